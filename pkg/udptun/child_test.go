package udptun_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"runtime/pprof"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/twill-net/twill/pkg/udptun"
)

// childEnv makes the test program one of the programs of a node, so that each
// node has processes of its own, as in life.
const childEnv = "UDPTUN_CHILD"

// child says what to be.
type child struct {
	Role    string // tunnel, library, echo, pingpong
	Device  string
	Local   []netip.Addr
	Port    uint16
	Queues  int
	Peers   []udptun.Peer
	To      netip.AddrPort // of the library's peer; of echo and pingpong
	Profile string
}

func TestMain(m *testing.M) {
	if text := os.Getenv(childEnv); text != "" {
		var c child
		err := json.Unmarshal([]byte(text), &c)
		if err == nil {
			err = c.run()
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func (c child) run() error {
	if c.Profile != "" {
		f, err := os.Create(fmt.Sprintf("%s.%d", c.Profile, os.Getpid()))
		if err != nil {
			return err
		}
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	switch c.Role {
	case "tunnel":
		return c.tunnel()
	case "library":
		return c.library()
	case "echo":
		return c.echo()
	case "pingpong":
		return c.pingpong()
	}
	return errors.New("unknown role " + c.Role)
}

func (c child) tunnel() error {
	t, err := udptun.Open(udptun.Options{Device: c.Device, Port: c.Port, Local: c.Local, Queues: c.Queues, Peers: c.Peers})
	if err != nil {
		return err
	}
	fmt.Println("ready")
	go func() {
		<-t.Done()
		fmt.Println("ended:", t.Err())
	}()
	waitSignal()
	fmt.Printf("%+v\n", t.Stats())
	return t.Close()
}

func waitSignal() {
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, unix.SIGTERM)
	<-sig
}

// library is the tunnel on wireguard-go's tun and conn, which this package has to
// beat: one peer.
func (c child) library() error {
	dev, err := tun.CreateTUN(c.Device, 1472)
	if err != nil {
		return err
	}
	bind := conn.NewStdNetBind()
	fns, _, err := bind.Open(c.Port)
	if err != nil {
		return err
	}
	to, err := bind.ParseEndpoint(c.To.String())
	if err != nil {
		return err
	}
	const offset = 16
	buffers := func(n int) [][]byte {
		b := make([][]byte, n)
		for i := range b {
			b[i] = make([]byte, offset+65535)
		}
		return b
	}
	go func() {
		bufs, sizes := buffers(dev.BatchSize()), make([]int, dev.BatchSize())
		for {
			n, err := dev.Read(bufs, sizes, offset)
			if err != nil && !errors.Is(err, tun.ErrTooManySegments) {
				return
			}
			out := make([][]byte, 0, n)
			for i := range n {
				out = append(out, bufs[i][offset:offset+sizes[i]])
			}
			_ = bind.Send(out, to)
		}
	}()
	for _, fn := range fns {
		go func() {
			n := bind.BatchSize()
			bufs, sizes, eps := buffers(n), make([]int, n), make([]conn.Endpoint, n)
			in := make([][]byte, n)
			for i := range in {
				in[i] = bufs[i][offset:]
			}
			for {
				got, err := fn(in, sizes, eps)
				if err != nil {
					return
				}
				out := make([][]byte, 0, got)
				for i := range got {
					if sizes[i] > 0 {
						out = append(out, bufs[i][:offset+sizes[i]])
					}
				}
				_, _ = dev.Write(out, offset)
			}
		}()
	}
	fmt.Println("ready")
	waitSignal()
	return nil
}

func (c child) echo() error {
	pc, err := net.ListenPacket("udp", c.To.String())
	if err != nil {
		return err
	}
	fmt.Println("ready")
	buf := make([]byte, 65536)
	for {
		n, from, err := pc.ReadFrom(buf)
		if err != nil {
			return err
		}
		if _, err := pc.WriteTo(buf[:n], from); err != nil {
			return err
		}
	}
}

// pingpong prints the median round trip in microseconds of one second of requests.
func (c child) pingpong() error {
	nc, err := net.Dial("udp", c.To.String())
	if err != nil {
		return err
	}
	var times []time.Duration
	buf := make([]byte, 64)
	for begin := time.Now(); time.Since(begin) < time.Second; {
		at := time.Now()
		if _, err := nc.Write(buf); err != nil {
			return err
		}
		if err := nc.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
			return err
		}
		if _, err := nc.Read(buf); err != nil {
			return fmt.Errorf("after %d answers: %w", len(times), err)
		}
		times = append(times, time.Since(at))
	}
	slices.Sort(times)
	_, err = io.WriteString(os.Stdout, fmt.Sprintf("%.2f", float64(times[len(times)/2].Nanoseconds())/1e3))
	return err
}
