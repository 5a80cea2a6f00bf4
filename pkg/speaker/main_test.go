package speaker

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync/atomic"
	"testing"

	"github.com/twill-net/twill/pkg/overlay"
)

// TestMain lets this test program be a node's speaker: a process of its own, in the
// namespace of its host.
func TestMain(m *testing.M) {
	if socket := os.Getenv("SPEAKER_SOCKET"); socket != "" {
		if err := serve(socket); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// wish is an overlay.BGP on its way to the process: communities as numbers.
type wish struct {
	BGP         overlay.BGP
	Communities []uint32
	Neighbors   [][]uint32 // the communities of each
}

func packed(b overlay.BGP) wish {
	numbers := func(cs []overlay.Community) (out []uint32) {
		for _, c := range cs {
			out = append(out, uint32(c))
		}
		return out
	}
	w := wish{BGP: b, Communities: numbers(b.Communities)}
	w.BGP.Communities = nil
	w.BGP.Neighbors = append([]overlay.BGPNeighbor(nil), b.Neighbors...)
	for i, n := range b.Neighbors {
		w.Neighbors = append(w.Neighbors, numbers(n.Communities))
		w.BGP.Neighbors[i].Communities = nil
	}
	return w
}

func (w wish) unpacked() overlay.BGP {
	for _, c := range w.Communities {
		w.BGP.Communities = append(w.BGP.Communities, overlay.Community(c))
	}
	for i, cs := range w.Neighbors {
		for _, c := range cs {
			w.BGP.Neighbors[i].Communities = append(w.BGP.Neighbors[i].Communities, overlay.Community(c))
		}
	}
	return w.BGP
}

// report is what the process says of itself.
type report struct {
	Status  overlay.BGPStatus
	RIB     *overlay.RIB
	Settled bool
	Bells   int64
	// Pointers counts how often Routes has become another.
	Pointers int
}

func serve(socket string) error {
	var bells atomic.Int64
	s := New(Options{
		Log:  slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Bell: func(why string) { bells.Add(1); fmt.Fprintln(os.Stderr, "bell:", why) },
	})
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	var last *overlay.RIB
	pointers := 0
	mux := http.NewServeMux()
	mux.HandleFunc("POST /set", func(w http.ResponseWriter, r *http.Request) {
		var x wish
		err := json.NewDecoder(r.Body).Decode(&x)
		if err == nil {
			err = s.Set(r.Context(), x.unpacked())
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})
	mux.HandleFunc("POST /close", func(_ http.ResponseWriter, r *http.Request) { s.Close(r.Context()) })
	mux.HandleFunc("POST /withdraw", func(_ http.ResponseWriter, r *http.Request) { s.Withdraw(r.Context()) })
	mux.HandleFunc("GET /report", func(w http.ResponseWriter, _ *http.Request) {
		rib := s.Routes()
		if rib != last {
			last = rib
			pointers++
		}
		st := s.Status()
		for i := range st.Sessions {
			st.Sessions[i].Neighbor.Communities = nil // they have no form that can be read
		}
		err := json.NewEncoder(w).Encode(report{st, rib, s.Settled(), bells.Load(), pointers})
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	})
	fmt.Fprintln(os.Stderr, "serving")
	return http.Serve(l, mux)
}

// client speaks to the process.
func client(socket string) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}
}

func call(c *http.Client, method, path string, in, out any) error {
	r, w := io.Pipe()
	go func() { w.CloseWithError(json.NewEncoder(w).Encode(in)) }()
	req, err := http.NewRequest(method, "http://speaker"+path, r)
	if err != nil {
		return err
	}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s", body)
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(body, out)
}
