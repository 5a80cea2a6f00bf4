package kernel

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/twill-net/twill/pkg/overlay"
)

// TestInterruptedDump changes the nexthops in the middle of listing them. The
// kernel then says so, and the list is read again, or after a few times refused.
func TestInterruptedDump(t *testing.T) {
	inNode(t, func(k *Kernel) {
		const peers = 2000
		w := dualWorld(peers)
		reconcile(t, k, w.state())
		for _, test := range []struct {
			changes int
			err     error
		}{{0, nil}, {1, nil}, {dumpTries - 1, nil}, {dumpTries, errInterrupted}} {
			tries, found := 0, 0
			err := k.conn.dump(context.Background(), encodeNexthopDump, func() { tries, found = tries+1, 0 }, func(header, []byte) {
				if found++; found == 1 && tries <= test.changes {
					sh(t, fmt.Sprintf("ip nexthop add id %d blackhole; ip nexthop del id %[1]d", tries))
				}
			})
			if !errors.Is(err, test.err) || tries != min(test.changes+1, dumpTries) {
				t.Errorf("changed %d times: tried %d times, then %v", test.changes, tries, err)
			}
			if err == nil && found != 2*peers {
				t.Errorf("changed %d times: found %d of %d", test.changes, found, 2*peers)
			}
		}
		// The socket is in order afterwards.
		if left := plan(t, k, w.state()); len(left) > 0 {
			t.Errorf("then %d differences, the first %s", len(left), left[0])
		}
	})
}

// TestLargeAnswer reads a dump with a buffer that is too small for it.
func TestLargeAnswer(t *testing.T) {
	inNode(t, func(k *Kernel) {
		w := dualWorld(200)
		reconcile(t, k, w.state())
		k.conn.buf = make([]byte, 100)
		if left := plan(t, k, w.state()); len(left) > 0 {
			t.Errorf("%d differences, the first %s", len(left), left[0])
		}
	})
}

func TestCanceled(t *testing.T) {
	inNode(t, func(k *Kernel) {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if _, err := k.Observe(ctx, testScope()); !errors.Is(err, context.Canceled) {
			t.Errorf("Observe: %v", err)
		}
		p := plan(t, k, dualWorld(3).state())
		f := k.Apply(ctx, p)
		if len(f) != len(p) || !errors.Is(f[0], context.Canceled) {
			t.Errorf("Apply: %d of %d failed: %v", len(f), len(p), f)
		}
		if again := plan(t, k, dualWorld(3).state()); again.String() != p.String() {
			t.Errorf("something was done:\n%s", again)
		}
	})
}

// FuzzDecode feeds the decoders with anything: they may not panic.
func FuzzDecode(f *testing.F) {
	var e encoder
	state := tunnelWorld().state()
	for _, n := range state.Nexthops {
		if err := encodeNexthop(&e, overlay.Add, n, 3); err != nil {
			f.Fatal(err)
		}
		e.end(1)
	}
	for _, r := range state.Routes {
		encodeRoute(&e, overlay.Add, r, 3)
		e.end(1)
	}
	for _, n := range state.FDB {
		encodeNeighbor(&e, overlay.Add, forwardingOf(n, 3))
		e.end(1)
	}
	for _, l := range state.Links {
		if l.Kind == overlay.KindTUN {
			l.Kind, l.IPIP.Local = overlay.KindIPIP, underlayHost(overlay.IPv4, 1)
		}
		encodeNewLink(&e, l, 3)
		e.end(1)
	}
	f.Add(e.buf)
	f.Fuzz(func(_ *testing.T, b []byte) {
		messages(b, func(h header, body []byte) {
			decodeLink(body)
			decodeAddr(body)
			decodeRoute(body)
			decodeHops(body)
			decodeNexthop(body)
			decodeGroup(body)
			decodeWay(body)
			decodeNeighbor(body)
			_ = answer(h, body)
		})
	})
}
