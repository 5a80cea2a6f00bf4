package daemon

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// pathLab is a node with four peers behind a router. All cables carry 1500 bytes,
// but what the router sends to "narrow" and "hole" is 1400 at most, and of those to
// "hole" it does not say so. "mute" does not answer pings.
type pathLab struct {
	t            *testing.T
	node, router *nettest.NS
	peers        map[string]*nettest.NS
}

var pathPeers = []string{"wide", "narrow", "hole", "mute"}

func newPathLab(t *testing.T) *pathLab {
	t.Helper()
	lab := nettest.NewT(t)
	l := &pathLab{t: t, peers: map[string]*nettest.NS{}}
	newNS := func(name string) *nettest.NS {
		n, err := lab.NewNS(name)
		if err != nil {
			t.Fatal(err)
		}
		// A router whose link-local address is still tentative asks for no neighbour.
		l.run(n, "sysctl", "-qw", "net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0")
		return n
	}
	l.node, l.router = newNS("node"), newNS("router")
	l.run(l.router, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
	l.cable(l.node, 0)
	for i, name := range pathPeers {
		l.peers[name] = newNS(name)
		l.cable(l.peers[name], i+1)
	}
	for _, name := range []string{"narrow", "hole"} {
		l.run(l.router, "ip", "link", "set", name, "mtu", "1400")
	}
	// Of the packet that an error quotes, the destination stands in its IP header,
	// behind the 8 bytes of the error's own.
	l.run(l.router, "nft", fmt.Sprintf(`table inet filter { chain output {
		type filter hook output priority 0;
		icmp type destination-unreachable @th,192,32 0x%x drop
		icmpv6 type packet-too-big @th,256,128 0x%x drop
	}
	}`, pathAddr(overlay.IPv4, 3).AsSlice(), pathAddr(overlay.IPv6, 3).AsSlice()))
	l.run(l.peers["mute"], "sysctl", "-qw", "net.ipv4.icmp_echo_ignore_all=1", "net.ipv6.icmp.echo_ignore_all=1")
	return l
}

// pathAddr is the address of the node (0) or of a peer; the router has the one
// before it.
func pathAddr(f overlay.Family, n int) netip.Addr {
	if f == overlay.IPv4 {
		return netip.AddrFrom4([4]byte{203, 0, 113, byte(16*n + 2)})
	}
	return netip.MustParseAddr(fmt.Sprintf("2001:db8:%d::2", n))
}

func (l *pathLab) run(n *nettest.NS, name string, args ...string) {
	l.t.Helper()
	if _, err := n.Run(name, args...); err != nil {
		l.t.Fatal(err)
	}
}

// cable connects a namespace to the router's device of the same name.
func (l *pathLab) cable(n *nettest.NS, number int) {
	l.t.Helper()
	l.run(l.router, "ip", "link", "add", n.Name, "type", "veth", "peer", "eth0", "netns", filepath.Base(n.Path))
	l.run(l.router, "ip", "link", "set", n.Name, "up")
	l.run(n, "ip", "link", "set", "eth0", "up")
	for f, bits := range map[overlay.Family]int{overlay.IPv4: 28, overlay.IPv6: 64} {
		own := pathAddr(f, number)
		l.run(l.router, "ip", "address", "add", fmt.Sprintf("%s/%d", own.Prev(), bits), "dev", n.Name, "nodad")
		l.run(n, "ip", "address", "add", fmt.Sprintf("%s/%d", own, bits), "dev", "eth0", "nodad")
		l.run(n, "ip", "route", "add", "default", "via", own.Prev().String())
	}
}

// targets are all peers at both addresses.
func (l *pathLab) targets(needed int) (all []pathTarget) {
	for i, name := range pathPeers {
		for _, f := range []overlay.Family{overlay.IPv4, overlay.IPv6} {
			all = append(all, pathTarget{Lease: name, Addr: pathAddr(f, i+1), Local: pathAddr(f, 0), Needed: needed})
		}
	}
	return all
}

// start runs the prober in the node until the test ends.
func (l *pathLab) start(p *pathProber) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- l.node.Do(func() error { return p.run(ctx) }) }()
	l.t.Cleanup(func() {
		cancel()
		if err := <-ended; err != context.Canceled {
			l.t.Errorf("run ended with %v", err)
		}
	})
}

// expect waits until every target has a result and compares them.
func (l *pathLab) expect(p *pathProber, targets []pathTarget, want map[string]int) {
	l.t.Helper()
	deadline := time.Now().Add(time.Minute)
	for len(p.results()) < len(targets) {
		if time.Now().After(deadline) {
			l.t.Fatalf("after a minute: %+v", p.results())
		}
		time.Sleep(10 * time.Millisecond)
	}
	got := p.results()
	if !slices.IsSortedFunc(got, func(a, b overlay.PathMTU) int { return strings.Compare(a.Lease, b.Lease) }) {
		l.t.Errorf("not in order: %+v", got)
	}
	for _, t := range targets {
		i := slices.IndexFunc(got, func(r overlay.PathMTU) bool { return r.Lease == t.Lease && r.Peer == t.Addr })
		if i < 0 || got[i].Carries != want[t.Lease] || got[i].Needed != t.Needed {
			l.t.Errorf("%s %s: %+v, want %d", t.Lease, t.Addr, got, want[t.Lease])
		}
	}
}

// again makes all targets due, without what is known of them.
func again(p *pathProber) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.states {
		s.due, s.at = time.Time{}, time.Time{}
	}
	p.requeue()
	p.changed.ring("test")
}

func newTestProber(rung chan string) *pathProber {
	p := newPathProber(slog.New(slog.DiscardHandler), func(why string) { rung <- why })
	p.gap, p.timeout = time.Millisecond, 400*time.Millisecond
	return p
}

func TestPathMTU(t *testing.T) {
	nettest.CheckLeaks(t)
	l := newPathLab(t)
	rung := make(chan string, 100)
	p := newTestProber(rung)
	l.start(p)
	bells := func(want int) {
		t.Helper()
		for range want {
			select {
			case <-rung:
			case <-time.After(10 * time.Second):
				t.Fatal("the bell is not rung")
			}
		}
		if len(rung) != 0 {
			t.Errorf("the bell is rung %d times more than %d", len(rung), want)
		}
	}

	all := l.targets(1500)
	p.set(all)
	found := map[string]int{"wide": 1500, "narrow": 1400, "hole": 1400, "mute": 0}
	l.expect(p, all, found)
	bells(4) // narrow and hole, by two families
	// The kernel knows the path MTU of narrow by now, which changes nothing.
	again(p)
	l.expect(p, all, found)
	bells(0)

	// Another need is another question; what is not asked any more is forgotten.
	some := append(l.targets(1400)[:6:6], all[6:]...)
	p.set(some)
	if r := p.results(); len(r) != 2 || r[0].Lease != "mute" {
		t.Errorf("known before the probe: %+v", r)
	}
	l.expect(p, some, map[string]int{"wide": 1400, "narrow": 1400, "hole": 1400})
	p.set(all[:4])
	l.expect(p, all[:4], found)
	bells(2)

	// The path becomes as wide as it should be, and the other one narrower than that.
	l.run(l.router, "ip", "link", "set", "narrow", "mtu", "1500")
	l.run(l.router, "ip", "link", "set", "wide", "mtu", "1301")
	again(p)
	l.expect(p, all[:4], map[string]int{"wide": 1301, "narrow": 1500})
	bells(4)
	// More than our own device takes.
	large := l.targets(9000)[2:4]
	p.set(large)
	l.expect(p, large, map[string]int{"narrow": 1500})
	bells(2)
	// No way at all.
	l.run(l.node, "ip", "link", "set", "eth0", "down")
	again(p)
	l.expect(p, large, map[string]int{"narrow": 0})
	bells(2)
	p.set(nil)
	if r := p.results(); r != nil {
		t.Errorf("results without targets: %+v", r)
	}
}

// TestPathMTULossy sees that a network that loses packets of every size is not
// taken for a narrow one.
func TestPathMTULossy(t *testing.T) {
	t.Parallel()
	l := newPathLab(t)
	l.run(l.router, "nft", `table ip loss { chain forward {
		type filter hook forward priority 0;
		numgen inc mod 3 1 drop
	}
	}`)
	p := newTestProber(make(chan string, 100))
	l.start(p)
	wide := l.targets(1500)[:1]
	p.set(wide)
	l.expect(p, wide, map[string]int{"wide": 1500})
	// Everything is lost once the least packet has been answered.
	l.run(l.router, "nft", `flush chain ip loss forward
		add rule ip loss forward numgen inc mod 100 < 2 accept
		add rule ip loss forward drop`)
	again(p)
	l.expect(p, wide, map[string]int{"wide": 0})
}

// TestPathPace sees that all probes together keep the pace.
func TestPathPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPathProber(slog.New(slog.DiscardHandler), nil)
		began := time.Now()
		sent := make(chan time.Time, 100)
		for range pathProbes {
			go func() {
				for range 5 {
					p.pace(t.Context())
					sent <- time.Now()
				}
			}()
		}
		for i := range 5 * pathProbes {
			if at, want := (<-sent).Sub(began), time.Duration(i)*pathGap; at != want {
				t.Errorf("packet %d after %s, want %s", i, at, want)
			}
		}
	})
}

// TestPathSchedule walks through a day of a target, without packets.
func TestPathSchedule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		rung := 0
		p := newPathProber(slog.New(slog.NewTextHandler(&log, nil)), func(string) { rung++ })
		p.set([]pathTarget{{Lease: "10.5.2.0-24", Addr: pathAddr(overlay.IPv4, 1), Needed: 1500}})
		for i := range 144 {
			s, err := p.take(t.Context())
			if err != nil || i > 0 && time.Since(s.at) < 8*time.Minute || time.Since(s.at) > 12*time.Minute && i > 0 {
				t.Fatalf("probe %d after %s, %v", i, time.Since(s.at), err)
			}
			if other, wait := p.next(); other != nil || wait != pathPeriod {
				t.Fatalf("probed twice at a time: %+v", other)
			}
			carries := 1500
			if i >= 10 && i < 20 {
				carries = 1400
			}
			p.finish(t.Context(), s, carries)
		}
		if rung != 2 || strings.Count(log.String(), "path MTU to a peer has changed") != 2 {
			t.Errorf("the bell was rung %d times; log:\n%s", rung, log.String())
		}
		// Taken away while it is probed: of no interest.
		s, err := p.take(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		p.set(nil)
		p.finish(t.Context(), s, 1400)
		if rung != 2 || p.results() != nil {
			t.Errorf("the bell was rung %d times, results %+v", rung, p.results())
		}
	})
}

// FuzzParseICMP feeds it what anybody may send to the node.
func FuzzParseICMP(f *testing.F) {
	reply := icmp.Message{Type: ipv4.ICMPTypeEchoReply, Body: &icmp.Echo{ID: 1, Seq: 2, Data: []byte("data")}}
	b, err := reply.Marshal(nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte{3, 4, 0, 0, 0, 0, 5, 120, 0x4f})
	f.Add(slices.Concat([]byte{3, 4, 0, 0, 0, 0, 5, 120, 0x45}, make([]byte, 8), []byte{1}, make([]byte, 10), []byte{8, 0, 0, 0, 0, 1, 0, 2}))
	f.Add(slices.Concat([]byte{2, 0, 0, 0, 0, 0, 5, 120, 0x60}, make([]byte, 5), []byte{58}, make([]byte, 33), []byte{128, 0, 0, 0, 0, 1, 0, 2}))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, f := range []overlay.Family{overlay.IPv4, overlay.IPv6} {
			_, _, about, a, ok := icmpOf(f).parse(b)
			if ok && a.arrived == a.tooBig {
				t.Errorf("%+v", a)
			}
			if ok && a.tooBig && (!about.IsValid() || overlay.FamilyOf(about) != f) {
				t.Errorf("%s about %s", f, about)
			}
		}
	})
}
