package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
)

// switching is a cluster whose backend changes under traffic.
type switching struct {
	*Cluster
	ctx  context.Context
	pods []*Pod
	rate int // of the probes
}

// startSwitching starts a cluster of three that begins with vxlan.
func startSwitching(t *testing.T) *switching {
	t.Helper()
	c, ctx := startCluster(t, Options{Hosts: 3, Config: dual(backendNamed(t, "vxlan").config)})
	for _, n := range c.Nodes {
		n.shell(t, forwardDrop)
	}
	return &switching{Cluster: c, ctx: ctx, pods: onePod(t, c), rate: 1000}
}

func backendNamed(t *testing.T, name string) backend {
	t.Helper()
	for _, b := range backends() {
		if b.name == name {
			return b
		}
	}
	t.Fatalf("there is no backend %s", name)
	return backend{}
}

// round is a closed walk over the backends that takes each step from one to
// another exactly once.
func round(n int) []int {
	type step struct{ from, to int }
	walked := map[step]bool{}
	walk := []int{0}
	for {
		at, next := walk[len(walk)-1], -1
		for i := range n { // the highest first, home last: it never ends too early
			if to := n - 1 - i; to != at && !walked[step{at, to}] {
				next = to
				break
			}
		}
		if next < 0 {
			return walk
		}
		walked[step{at, next}] = true
		walk = append(walk, next)
	}
}

// TestSwitch moves a cluster from each backend to each other by storing another
// configuration, under probes each way and family.
func TestSwitch(t *testing.T) {
	all := []backend{backendNamed(t, "vxlan"), backendNamed(t, "host-gw"), backendNamed(t, "bgp"), backendNamed(t, "udp"), backendNamed(t, "wireguard")}
	s := startSwitching(t)
	walk := round(len(all))
	if want := len(all)*(len(all)-1) + 1; len(walk) != want {
		t.Fatalf("a walk of %d steps, want %d: %v", len(walk), want, walk)
	}
	for i, to := range walk[1:] {
		from, to := all[walk[i]], all[to]
		t.Run(from.name+" to "+to.name, func(t *testing.T) {
			s.rate = min(from.probeRate(), to.probeRate())
			lost := s.during(t, from.kernel && to.kernel, func() {
				s.to(t, to)
				if to.name == "wireguard" {
					// A node that hears of a peer's key before the peer hears of its own
					// shakes hands in vain, and again after REKEY_TIMEOUT, 5 s.
					time.Sleep(6 * time.Second)
				}
			})
			t.Logf("%s to %s: %s", from.name, to.name, lost)
		})
	}
	s.oldGone(t, all[walk[len(walk)-1]])
}

// during sends probes between the pods of the first two nodes while something
// happens, and says how many were lost. If strict, none may be.
func (s *switching) during(t *testing.T, strict bool, what func()) string {
	t.Helper()
	p := startProbesAt(t, s.rate, s.pods[0], s.pods[1])
	what()
	time.Sleep(500 * time.Millisecond)
	sent, lost, gap := 0, 0, 0.0
	for i, r := range p.results(t) {
		sent, lost, gap = sent+r.Sent, lost+r.Lost, max(gap, r.LongestGap)
		if strict && r.Lost > 0 {
			t.Errorf("%s: %d of %d probes lost, %d send errors, at %.0f ms", p.names[i], r.Lost, r.Sent, r.Errors, r.LostAt)
		}
		if n := len(r.LostAt); n > 0 && r.LostAt[n-1] > r.LastAt-200 {
			t.Errorf("%s: probes are lost to the end, at %.0f ms of %.0f", p.names[i], r.LostAt[n-1], r.LastAt)
		}
	}
	return fmt.Sprintf("%d of %d probes lost, longest gap %.0f ms", lost, sent, gap)
}

// to stores a configuration with another backend and waits until all nodes use it.
func (s *switching) to(t *testing.T, b backend) {
	t.Helper()
	must(t, s.Configure(s.ctx, dual(b.config)))
	s.waitFor(t, b)
}

// waitFor waits until every node's lease publishes the backend and every kernel
// agrees.
func (s *switching) waitFor(t *testing.T, b backend) {
	t.Helper()
	typ := b.typ()
	for _, n := range s.Nodes {
		must(t, n.WaitStatus(s.ctx, "using "+typ, func(s overlay.Status) bool { return s.Ready && s.Backend == typ }))
	}
	published := `"BackendType":"` + typ + `"`
	must(t, Eventually(s.ctx, func() bool {
		for _, l := range s.leases(t, Prefix) {
			if typ == "udp" && strings.Contains(l.value, "BackendType") || typ != "udp" && !strings.Contains(l.value, published) {
				return false
			}
		}
		return true
	}))
	must(t, s.WaitPeers(s.ctx))
	for _, n := range s.Nodes {
		must(t, n.waitProblem(s.ctx))
	}
}

// typ is the Type in the backend's configuration.
func (b backend) typ() string {
	_, rest, _ := strings.Cut(b.config, `"Type": "`)
	typ, _, _ := strings.Cut(rest, `"`)
	return typ
}

// oldGone waits until the devices of all backends but one are gone, and nothing is
// lost by that.
func (s *switching) oldGone(t *testing.T, last backend) {
	keep := map[string]bool{}
	for _, l := range last.links {
		keep[l] = true
	}
	s.rate = last.probeRate()
	lost := s.during(t, last.kernel, func() {
		// Nodes keep them for a minute after the last peer's use.
		ctx, cancel := context.WithTimeout(s.ctx, 100*time.Second)
		defer cancel()
		for _, n := range s.Nodes {
			var out string
			for ok := false; !ok; {
				out = n.shell(t, "ip -o link show | cut -d: -f2")
				ok = true
				for _, link := range strings.Fields(out) {
					link, _, _ = strings.Cut(link, "@")
					if strings.HasPrefix(link, "flannel") && !keep[link] {
						ok = false
					}
				}
				select {
				case <-ctx.Done():
					t.Errorf("%s still has devices of former backends:\n%s", n.Name, out)
					return
				case <-time.After(500 * time.Millisecond):
				}
			}
		}
	})
	t.Logf("while the old devices went: %s", lost)
	must(t, s.WaitPeers(s.ctx))
}
