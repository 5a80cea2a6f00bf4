package ipam

import (
	"fmt"
	"net/netip"
	"testing"
	"time"
)

// crowd reserves n addresses of 198.18.0.0/16, from the first on, and leaves the
// round robin behind them.
func crowd(b *testing.B, n int) (Dir, [][]Range) {
	b.Helper()
	d := NewDir(b.TempDir(), "net")
	a := netip.MustParseAddr("198.18.0.2")
	for i := range n {
		writeFile(b, d.Path(a), fmt.Sprintf("%064x\r\neth0", i))
		a = a.Next()
	}
	writeFile(b, d.lastFile(0), a.Prev().String())
	return d, newSets("198.18.0.0/16")
}

// BenchmarkPod is one ADD and one DEL beside n other pods. They must cost the same
// for every n.
func BenchmarkPod(b *testing.B) {
	for _, mode := range []struct {
		name string
		req  Request
	}{
		{"round-robin", Request{}},
		{"sticky-and-cool-down", Request{Pod: "default/a", Sticky: true, CoolDown: time.Minute}},
	} {
		for _, n := range []int{10, 1000, 10_000} {
			b.Run(fmt.Sprintf("%s/%d", mode.name, n), func(b *testing.B) {
				d, sets := crowd(b, n)
				req := mode.req
				req.Owner, req.Sets = Owner{"c", "eth0"}, sets
				for b.Loop() {
					pod(b, d, req)
				}
			})
		}
	}
}

// BenchmarkBlock is the one ADD that runs into n taken neighbours: it reads the
// directory. BenchmarkBehindBlock is those that come after it.
func BenchmarkBlock(b *testing.B) {
	for _, n := range []int{10, 1000, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			d, sets := crowd(b, n)
			for b.Loop() {
				writeFile(b, d.lastFile(0), "198.18.0.1")
				pod(b, d, Request{Owner: Owner{"c", "eth0"}, Sets: sets})
			}
		})
	}
}

func BenchmarkBehindBlock(b *testing.B) {
	for _, n := range []int{10, 1000, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			d, sets := crowd(b, n)
			writeFile(b, d.lastFile(0), "198.18.0.1")
			pod(b, d, Request{Owner: Owner{"c", "eth0"}, Sets: sets})
			for b.Loop() {
				pod(b, d, Request{Owner: Owner{"c", "eth0"}, Sets: sets})
			}
		})
	}
}

// pod comes and goes.
func pod(b *testing.B, d Dir, req Request) {
	got, err := d.Allocate(req)
	if err != nil {
		b.Fatal(err)
	}
	opts := ReleaseOptions{Pod: req.Pod, Sticky: req.Sticky, CoolDown: req.CoolDown}
	if err := d.Release(req.Owner, []netip.Addr{got[0].Prefix.Addr()}, opts); err != nil {
		b.Fatal(err)
	}
}
