package netctl

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
)

// bgpWorld is a daemon that answers GET /v1/bgp.
type bgpWorld struct {
	now    time.Time
	status overlay.BGPStatus
	away   bool   // there is no speaker
	reason string // the daemon's, then
}

func (w *bgpWorld) netctl(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "twilld.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/bgp", func(rw http.ResponseWriter, _ *http.Request) {
		if w.away {
			http.Error(rw, w.reason, http.StatusNotFound)
			return
		}
		if err := json.NewEncoder(rw).Encode(w.status); err != nil {
			t.Error(err)
		}
	})
	s := &http.Server{Handler: mux}
	done := make(chan error)
	go func() { done <- s.Serve(l) }()
	defer func() {
		s.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	}()
	var out, errs bytes.Buffer
	a := &app{stdout: &out, stderr: &errs, built: "v0.1.0", now: func() time.Time { return w.now }, getenv: func(string) string { return "" }}
	code = a.run(t.Context(), append(args, "--socket", socket), strings.NewReader(""))
	return out.String(), strings.ReplaceAll(errs.String(), socket, DefaultSocket), code
}

func newBGPWorld() *bgpWorld {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	ip := netip.MustParseAddr
	up := func(name, a string, as uint32) overlay.BGPSession {
		return overlay.BGPSession{
			Neighbor: overlay.BGPNeighbor{Name: name, Address: ip(a), ASNumber: as, Port: 179, Node: as == 64512},
			State:    "established", Since: now.Add(-3*time.Hour - 12*time.Minute), Uptime: 3*time.Hour + 12*time.Minute,
			Received: 1, Accepted: 1, Announced: 1, MessagesIn: 391, MessagesOut: 388,
		}
	}
	router := up("Backend.Peers 203.0.113.1", "203.0.113.1", 65001)
	router.Received, router.Accepted, router.Flaps = 7, 2, 1
	return &bgpWorld{now: now, status: overlay.BGPStatus{
		ASNumber: 64512, RouterID: ip("198.51.100.1"), Speaker: "gobgp", Settled: true,
		Sessions: []overlay.BGPSession{up("lease 10.5.2.0-24", "198.51.100.2", 64512), up("lease 10.5.3.0-24", "198.51.100.3", 64512), router},
		Received: []overlay.BGPRoute{
			{Prefix: netip.MustParsePrefix("10.5.2.0/24"), Paths: []overlay.BGPPath{{NextHop: ip("198.51.100.2"), From: ip("198.51.100.2")}}},
			{Prefix: netip.MustParsePrefix("192.168.0.0/16"), Paths: []overlay.BGPPath{
				{NextHop: ip("198.51.100.3"), From: ip("198.51.100.3")}, {NextHop: ip("203.0.113.1"), From: ip("203.0.113.1"), Allowed: true},
			}},
		},
		Announced: []overlay.BGPOwn{
			{Prefix: netip.MustParsePrefix("10.5.1.0/24"), NextHop: ip("198.51.100.1")}, {Prefix: netip.MustParsePrefix("fd00:5:0:1::/64"), NextHop: ip("2001:db8::1")},
		},
	}}
}

// troubled is a reflector with a session that is not up and one that restarts.
func (w *bgpWorld) troubled() {
	w.status.ClusterID, w.status.Settled = netip.MustParseAddr("192.0.2.1"), false
	s := &w.status.Sessions[1]
	s.State, s.Since, s.Uptime, s.Flaps, s.Received, s.Accepted, s.Announced = "active", w.now.Add(-47*time.Second), 0, 3, 0, 0, 0
	s.Error = "198.51.100.3 refuses TCP port 179: is its BGP daemon running?"
	w.status.Received[1].Paths[0].Stale = true
	w.status.Received[1].Paths[1].Stale = true
}

func TestBGP(t *testing.T) {
	fine := func(*bgpWorld) {}
	tests := []struct {
		name, args string
		world      func(*bgpWorld)
		code       int
	}{
		{"bgp-fine", "bgp", fine, 0},
		{"bgp-json", "bgp -o json", fine, 0},
		{"bgp-troubled", "bgp", (*bgpWorld).troubled, 1},
		{"bgp-troubled-colour", "bgp --color always", (*bgpWorld).troubled, 1},
		{"bgp-alone", "bgp", func(w *bgpWorld) { w.status.Sessions, w.status.Received = nil, nil }, 0},
		{"bgp-none", "bgp", func(w *bgpWorld) { w.away, w.reason = true, "the backend is vxlan, not bgp: there is no speaker" }, 2},
		{"bgp-routes-fine", "bgp routes", fine, 0},
		{"bgp-routes-json", "bgp routes -o json", fine, 0},
		{"bgp-routes-troubled", "bgp routes", (*bgpWorld).troubled, 1},
		{"bgp-routes-nothing", "bgp routes", func(w *bgpWorld) { w.status = overlay.BGPStatus{Speaker: "gobgp"} }, 0},
		{"bgp-routes-nothing-json", "bgp routes -o json", func(w *bgpWorld) { w.status = overlay.BGPStatus{Speaker: "gobgp"} }, 0},
		{"bgp-argument", "bgp sessions", fine, 2},
		{"bgp-help", "bgp --help", fine, 0},
		{"bgp-routes-help", "bgp routes --help", fine, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newBGPWorld()
			tt.world(w)
			stdout, stderr, code := w.netctl(t, strings.Fields(tt.args)...)
			if code != tt.code {
				t.Errorf("exit code %d, want %d", code, tt.code)
			}
			if strings.Contains(tt.args, "-o json") && !json.Valid([]byte(stdout)) {
				t.Error("stdout is not JSON")
			}
			golden(t, tt.name, fmt.Sprintf("$ netctl %s\n%s[exit %d]\n%s", tt.args, stdout, code, stderr))
		})
	}
}
