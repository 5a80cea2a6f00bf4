package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
)

// TestSwitchNodeByNode has nodes follow a change of the backend at different
// times. No packet may be lost whoever is late.
func TestSwitchNodeByNode(t *testing.T) {
	s := startSwitching(t)
	for _, x := range []struct {
		name string
		to   string
		run  func(*testing.T, backend)
	}{
		{"a daemon stands still", "host-gw", s.pausedNode},
		{"a daemon is down", "vxlan", s.downNode},
		{"a daemon restarts half way", "bgp", s.restartHalfWay},
		{"there and back at once", "vxlan", s.thereAndBack},
		{"a node joins half way", "host-gw", s.joinHalfWay},
		{"every daemon is killed", "vxlan", s.allKilled},
	} {
		b := backendNamed(t, x.to)
		ok := t.Run(x.name, func(t *testing.T) {
			t.Logf("to %s: %s", b.name, s.during(t, true, func() {
				x.run(t, b)
				s.waitFor(t, b)
			}))
			for _, n := range s.Nodes {
				if d := drifts(t, n); len(d) > 0 {
					t.Errorf("%d drifts on %s that nobody caused, the first: %+v", len(d), n.Name, d[0])
				}
			}
		})
		if !ok {
			return // nodes are no longer where the next one needs them
		}
	}
}

// others waits until all nodes but the second publish the backend.
func (s *switching) others(t *testing.T, b backend) {
	t.Helper()
	typ := b.typ()
	for i, n := range s.Nodes {
		if i != 1 {
			must(t, n.WaitStatus(s.ctx, "using "+typ, func(s overlay.Status) bool { return s.Ready && s.Backend == typ }))
			must(t, Eventually(s.ctx, func() bool { return strings.Contains(n.lease(t).value, `"`+typ+`"`) }))
		}
	}
}

func (s *switching) pausedNode(t *testing.T, b backend) {
	late := s.Nodes[1]
	must(t, late.Daemon.Pause())
	must(t, s.Configure(s.ctx, dual(b.config)))
	s.others(t, b)
	time.Sleep(3 * time.Second)
	must(t, late.Daemon.Resume())
}

func (s *switching) downNode(t *testing.T, b backend) {
	late := s.Nodes[1]
	must(t, late.Daemon.Kill9())
	must(t, s.Configure(s.ctx, dual(b.config)))
	s.others(t, b)
	time.Sleep(2 * time.Second)
	must(t, late.Daemon.Start())
}

// restartHalfWay kills a daemon that still has to accept what the late one sends
// by the former backend.
func (s *switching) restartHalfWay(t *testing.T, b backend) {
	late, early := s.Nodes[1], s.Nodes[0]
	must(t, late.Daemon.Pause())
	must(t, s.Configure(s.ctx, dual(b.config)))
	s.others(t, b)
	for range 2 {
		must(t, early.Daemon.Kill9())
		must(t, early.Daemon.Start())
		must(t, early.WaitReady(s.ctx))
		must(t, early.WaitInSync(s.ctx))
	}
	time.Sleep(time.Second)
	must(t, late.Daemon.Resume())
}

func (s *switching) thereAndBack(t *testing.T, b backend) {
	for range 2 {
		for _, name := range []string{b.name, "host-gw", b.name, "bgp"} {
			must(t, s.Configure(s.ctx, dual(backendNamed(t, name).config)))
			time.Sleep(100 * time.Millisecond)
		}
	}
	must(t, s.Configure(s.ctx, dual(b.config)))
}

// joinHalfWay has a fourth node come when one has not followed yet.
func (s *switching) joinHalfWay(t *testing.T, b backend) {
	late := s.Nodes[1]
	must(t, late.Daemon.Pause())
	must(t, s.Configure(s.ctx, dual(b.config)))
	s.others(t, b)
	h, err := s.Lab.NewHost()
	must(t, err)
	n := &Node{Host: h, cluster: s.Cluster}
	must(t, n.Start())
	must(t, n.WaitReady(s.ctx))
	guest, err := n.AddPod("p1")
	must(t, err)
	for _, f := range families(guest) {
		for _, p := range []*Pod{s.pods[0], s.pods[2]} {
			must(t, Eventually(s.ctx, func() bool { return guest.Ping(p.Addr(f), 1, 56) == nil }))
			must(t, p.Ping(guest.Addr(f), 1, 1000))
		}
	}
	must(t, late.Daemon.Resume())
	s.Nodes = append(s.Nodes, n)
	for _, f := range families(guest) {
		must(t, Eventually(s.ctx, func() bool { return guest.Ping(s.pods[1].Addr(f), 1, 56) == nil }))
	}
}

// allKilled kills every daemon the moment the configuration changes, as a bad
// deployment tool might.
func (s *switching) allKilled(t *testing.T, b backend) {
	must(t, s.Configure(s.ctx, dual(b.config)))
	for _, n := range s.Nodes {
		must(t, n.Daemon.Kill9())
	}
	for _, n := range s.Nodes {
		must(t, n.Daemon.Start())
	}
}

// refused stores a configuration that no node may take up: nothing changes.
func (s *switching) refused(t *testing.T, config string, words ...string) {
	t.Helper()
	before, err := s.Nodes[0].dumpKernel()
	must(t, err)
	must(t, s.Configure(s.ctx, config))
	for _, n := range s.Nodes {
		must(t, n.waitProblem(s.ctx, append(words, "config", "not taken up", "the running one stays")...))
		must(t, n.WaitInSync(s.ctx))
	}
	after, err := s.Nodes[0].dumpKernel()
	must(t, err)
	sameLines(t, "with a network that is refused", before, after)
}

// TestNetworkChanges widens the network of a running cluster, which costs nothing,
// and tries to shrink it under live leases.
func TestNetworkChanges(t *testing.T) {
	for _, name := range []string{"vxlan", "host-gw", "bgp", "udp"} {
		t.Run(name, func(t *testing.T) {
			b := backendNamed(t, name)
			c, ctx := startCluster(t, Options{Hosts: 3, Config: dual(b.config)})
			s := &switching{Cluster: c, ctx: ctx, pods: onePod(t, c), rate: b.probeRate()}
			network := func(v4, v6 string) string {
				return strings.NewReplacer(PodNetwork.String(), v4, PodNetworkV6.String(), v6).Replace(dual(b.config))
			}
			t.Log(s.during(t, b.kernel, func() {
				must(t, c.Configure(ctx, network("10.4.0.0/15", "fd00:4::/31")))
				for _, n := range c.Nodes {
					must(t, n.WaitStatus(ctx, "using the wider network", func(s overlay.Status) bool {
						return s.Ready && fmt.Sprint(s.Networks) == "[10.4.0.0/15 fd00:4::/31]"
					}))
				}
				must(t, c.WaitPeers(ctx))
			}))
			s.refused(t, network("10.5.128.0/17", "fd00:4::/31"), "this node's lease does not fit", "SubnetMin 10.5.129.0")
			// Nodes draw theirs from the first hundred. This one is in the way.
			other := overlay.Subnets{V4: netip.MustParsePrefix("10.5.222.0/24"), V6: netip.MustParsePrefix("fd00:5:0:222::/64")}
			must(t, putLease(ctx, c, Prefix+"/subnets/"+other.Key(), `{"PublicIP": "198.51.100.122", "PublicIPv6": "2001:db8:51::122", "BackendType": "host-gw"}`))
			for _, n := range c.Nodes { // the comparison begins behind it
				must(t, Eventually(ctx, func() bool {
					dump, err := n.dumpKernel()
					return err == nil && strings.Contains(dump, other.V4.String()) && strings.Contains(dump, other.V6.String())
				}))
			}
			s.refused(t, network("10.5.0.0/17", "fd00:4::/31"), "network shrinks from 10.4.0.0/15 to 10.5.0.0/17", other.Key())
			_, err := c.Etcd.Client().Delete(ctx, Prefix+"/subnets/"+other.Key())
			must(t, err)
			must(t, c.Configure(ctx, network(PodNetwork.String(), PodNetworkV6.String())))
			for _, n := range c.Nodes {
				must(t, n.waitProblem(ctx))
			}
			must(t, c.WaitPeers(ctx))
			for _, f := range families(s.pods[0]) {
				must(t, s.pods[0].Ping(s.pods[1].Addr(f), 2, 56))
			}
		})
	}
}
