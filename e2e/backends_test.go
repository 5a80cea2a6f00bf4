package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// backend is one way to carry packets between nodes.
type backend struct {
	name   string
	config string // the Backend object
	// kernel says that no packet passes through twilld: it may die at any moment.
	kernel bool
	// overhead is what is wrapped around a pod's packet, IPv4 and IPv6, in bytes.
	overhead [2]int
	links    []string // its devices
	wire     wire
}

// backends are all that run here, with both families.
func backends() []backend {
	return []backend{
		{
			name: "vxlan", config: `{"Type": "vxlan", "Port": 4789}`, kernel: true, overhead: [2]int{50, 70},
			links: []string{"flannel.1", "flannel-v6.1"}, wire: wire{port: 4789, vni: 1},
		},
		{
			name: "vxlan with direct routing", config: `{"Type": "vxlan", "Port": 4789, "DirectRouting": true}`, kernel: true,
			overhead: [2]int{50, 70}, links: []string{"flannel.1", "flannel-v6.1"},
		},
		{name: "host-gw", config: `{"Type": "host-gw"}`, kernel: true},
		{name: "bgp", config: `{"Type": "bgp"}`, kernel: true},
		{
			name: "udp", config: `{"Type": "udp"}`, overhead: [2]int{28, 48},
			links: []string{"flannel0"}, wire: wire{tunnels: []uint16{8285}},
		},
		{
			name: "wireguard", config: `{"Type": "wireguard"}`, overhead: [2]int{80, 80},
			links: []string{"flannel-wg", "flannel-wg-v6"}, wire: wire{tunnels: []uint16{51820, 51821}},
		},
	}
}

// dual is a network configuration of both families with that Backend object.
func dual(backend string) string {
	return fmt.Sprintf(`{"Network": %q, "EnableIPv6": true, "IPv6Network": %q, "Backend": %s}`, PodNetwork, PodNetworkV6, backend)
}

// podMTU is what a pod gets on an uplink of that MTU.
func (b backend) podMTU(uplink int) int { return uplink - max(b.overhead[0], b.overhead[1]) }

// probeRate is how many probes a second and way the daemons can carry: when they are
// built with the race detector, their crypto takes a fraction of what it does else.
func (b backend) probeRate() int {
	if b.name == "wireguard" {
		return 100
	}
	return 1000
}

// trial is a cluster with a backend, on which one scenario after the other runs.
type trial struct {
	*Cluster
	backend
	ctx  context.Context
	pods []*Pod // one on each node
}

// TestBackends runs the same scenarios over every backend, with both families.
func TestBackends(t *testing.T) {
	for _, b := range backends() {
		t.Run(b.name, func(t *testing.T) {
			c, ctx := newCluster(t, Options{Hosts: 3, Config: dual(b.config)})
			c.Nodes[0].shell(t, foreignSetup)
			must(t, c.Start(ctx))
			must(t, c.WaitPeers(ctx))
			s := &trial{Cluster: c, backend: b, ctx: ctx, pods: onePod(t, c)}
			for _, n := range c.Nodes {
				n.shell(t, forwardDrop)
			}
			for _, scenario := range []struct {
				name string
				run  func(*testing.T)
			}{
				{"reach", s.reach},
				{"shown", s.shown},
				{"restart", s.restart},
				{"etcd away", s.etcdAway},
				{"drift", s.drift},
				{"MTU", s.mtu},
				{"peer changes address", s.peerMoves},
				{"peer leaves", s.peerLeaves},
			} {
				if !t.Run(scenario.name, scenario.run) {
					return // the next one would only say it again
				}
			}
		})
	}
}

// reach has every pod and node reach every pod, unfragmented, from their own
// addresses.
func (s *trial) reach(t *testing.T) {
	for _, p := range s.pods {
		if got, want := podMTU(p), s.podMTU(1500); got != want {
			t.Errorf("MTU of %s is %d, want %d", p.Name, got, want)
		}
	}
	checkWire(t, s.Cluster, s.pods, s.wire)
	checkBulk(t, s.probeRate(), s.pods[0], s.pods[1])
	from, to := s.pods[1], s.pods[2]
	for _, f := range families(from) {
		capture, err := to.Capture(nettest.CaptureOptions{})
		must(t, err)
		must(t, from.Ping(to.Addr(f), 1, 56))
		_, err = capture.Wait(s.ctx, func(x nettest.Frame) bool { return x.Src == from.Addr(f) && x.Dst == to.Addr(f) })
		must(t, err)
		_, err = capture.Stop()
		must(t, err)
	}
}

// shown has netctl find nothing wrong, and show all there is.
func (s *trial) shown(t *testing.T) {
	for _, n := range s.Nodes {
		for _, command := range []string{"status", "leases", "routes", "diff", "drift"} {
			out, code, err := n.Netctl(command)
			must(t, err)
			if code != 0 {
				t.Errorf("netctl %s on %s exits with %d:\n%s", command, n.Name, code, out)
			}
			if n == s.Nodes[0] {
				t.Logf("netctl %s\n%s", command, out)
			}
			if command != "leases" && command != "routes" {
				continue
			}
			for _, p := range s.pods {
				for _, f := range families(p) {
					if want := subnetOf(p, f).String(); !strings.Contains(out, want) && (command == "leases" || p.Node != n) {
						t.Errorf("netctl %s on %s does not show %s:\n%s", command, n.Name, want, out)
					}
				}
			}
		}
	}
}

// subnetOf returns the subnet that the pod's address is from.
func subnetOf(p *Pod, f overlay.Family) netip.Prefix {
	bits := map[overlay.Family]int{overlay.IPv4: 24, overlay.IPv6: 64}[f]
	return netip.PrefixFrom(p.Addr(f), bits).Masked()
}

// restart kills and ends a daemon, which costs no packet that does not pass
// through it, and nobody sees a change.
func (s *trial) restart(t *testing.T) {
	n := s.Nodes[1]
	for _, end := range []struct {
		name string
		end  func() error
	}{{"SIGKILL", n.Daemon.Kill9}, {"SIGTERM", n.Daemon.Term}} {
		p := startProbesAt(t, s.probeRate(), s.pods[0], s.pods[1])
		must(t, end.end())
		time.Sleep(300 * time.Millisecond)
		must(t, n.Daemon.Start())
		must(t, n.WaitReady(s.ctx))
		must(t, n.WaitInSync(s.ctx))
		s.sessions(t, n)
		t.Log(end.name)
		s.endProbes(t, p)
	}
	must(t, s.WaitPeers(s.ctx))
	s.undisturbed(t)
}

// endProbes ends the probes a second after a daemon was restarted. Those that pass
// through it get lost while it is away, and not when it is back.
func (s *trial) endProbes(t *testing.T, p *probes) {
	t.Helper()
	if s.kernel {
		p.stopAfter(t, 1000)
		return
	}
	time.Sleep(time.Second)
	for i, r := range p.results(t) {
		if n := len(r.LostAt); n > 0 && r.LostAt[n-1] > r.LastAt-500 {
			t.Errorf("%s: probes are lost to the end, at %.0f ms of %.0f", p.names[i], r.LostAt[n-1], r.LastAt)
		}
	}
}

// sessions waits until a node that has lost its WireGuard sessions has new ones, also
// with peers that it has nothing to say to: they go on with the old ones for 15 s.
func (s *trial) sessions(t *testing.T, n *Node) {
	t.Helper()
	if s.name != "wireguard" {
		return
	}
	var out string
	if Eventually(s.ctx, func() bool {
		out = n.shell(t, "wg show all latest-handshakes")
		return out != "" && !strings.Contains(out, "\t0\n")
	}) != nil {
		t.Errorf("%s has peers that it has not shaken hands with:\n%s", n.Name, out)
	}
}

// undisturbed fails if a node has seen its kernel changed by others.
func (s *trial) undisturbed(t *testing.T) {
	t.Helper()
	for _, n := range s.Nodes {
		must(t, n.WaitInSync(s.ctx))
		if d := drifts(t, n); len(d) > 0 {
			t.Errorf("%d drifts on %s that nobody caused, the first: %+v", len(d), n.Name, d[0])
		}
		must(t, n.waitProblem(s.ctx))
	}
}

// etcdAway takes the store away for some seconds. Where no packet passes through
// it, a daemon is restarted meanwhile, which then knows nothing.
func (s *trial) etcdAway(t *testing.T) {
	p := startProbesAt(t, s.probeRate(), s.pods[0], s.pods[1])
	must(t, s.Etcd.Stop())
	for _, n := range s.Nodes {
		must(t, n.WaitStatus(s.ctx, "without its store", func(s overlay.Status) bool { return !s.Store.Connected && s.Ready }))
	}
	if s.kernel {
		must(t, s.Nodes[1].Daemon.Kill9())
		must(t, s.Nodes[1].Daemon.Start())
	}
	time.Sleep(5 * time.Second)
	must(t, s.Etcd.Start(s.ctx))
	for _, n := range s.Nodes {
		must(t, n.WaitStatus(s.ctx, "back at its store", func(s overlay.Status) bool { return s.Store.Connected && s.Ready }))
	}
	p.stopAfter(t, 1000)
	s.undisturbed(t)
}

// peerMoves gives a node other addresses: the others follow, its pods stay.
func (s *trial) peerMoves(t *testing.T) {
	n := s.Nodes[2]
	old := []netip.Addr{n.IPv4, n.IPv6}
	n.IPv4, n.IPv6 = netip.MustParseAddr("198.51.100.133"), netip.MustParseAddr("2001:db8:51::133")
	n.shell(t, fmt.Sprintf(`set -e
		ip addr del %s/24 dev eth0; ip addr add %s/24 dev eth0; ip route replace default via 198.51.100.1
		ip addr del %s/64 dev eth0; ip addr add %s/64 dev eth0 nodad`, old[0], n.IPv4, old[1], n.IPv6))
	must(t, n.WaitStatus(s.ctx, "at its new addresses", func(s overlay.Status) bool {
		return s.PublicIP == n.IPv4 && s.PublicIPv6 == n.IPv6 && s.Ready
	}))
	must(t, Eventually(s.ctx, func() bool {
		return slices.ContainsFunc(s.leases(t, Prefix), func(l leaseKey) bool {
			return strings.Contains(l.value, n.IPv4.String()) && strings.Contains(l.value, n.IPv6.String())
		})
	}))
	must(t, s.WaitPeers(s.ctx))
	for _, p := range s.pods[:2] {
		for _, f := range families(p) {
			must(t, s.eventuallyPings(p, s.pods[2].Addr(f)))
			must(t, s.pods[2].Ping(p.Addr(f), 2, 1000))
		}
	}
	s.nothingOf(t, old[0].String()+" ", old[1].String()+" ")
}

// eventuallyPings waits for the first answer: peers hear of a change one by one.
func (s *trial) eventuallyPings(p *Pod, to netip.Addr) error {
	return Eventually(s.ctx, func() bool { return p.Ping(to, 1, 56) == nil })
}

// traces prints all that leads to a peer.
const traces = `ip route; ip -6 route; ip nexthop; bridge fdb; ip neigh show nud permanent; ip -6 neigh show nud permanent
	for d in flannel-wg flannel-wg-v6; do [ ! -e /run/wireguard/$d.sock ] || wg show $d; done`

// peerLeaves has a node's lease deleted, and another expire: nothing is left.
func (s *trial) peerLeaves(t *testing.T) {
	gone := s.Nodes[2]
	must(t, gone.Daemon.Term())
	lease := gone.leaseOf(t, gone.IPv4)
	_, err := s.Etcd.Client().Delete(s.ctx, Prefix+"/subnets/"+lease.name)
	must(t, err)
	s.Nodes = s.Nodes[:2]
	must(t, s.WaitPeers(s.ctx))
	s.nothingOf(t, subnetOf(s.pods[2], overlay.IPv4).String(), subnetOf(s.pods[2], overlay.IPv6).String(), gone.IPv4.String(), gone.IPv6.String())

	subnet := overlay.Subnets{V4: netip.MustParsePrefix("10.5.222.0/24"), V6: netip.MustParsePrefix("fd00:5:0:222::/64")}
	const v4, v6 = "198.51.100.122", "2001:db8:51::122"
	value := strings.NewReplacer(gone.IPv4.String(), v4, gone.IPv6.String(), v6).Replace(lease.value)
	grant, err := s.Etcd.Client().Grant(s.ctx, 2)
	must(t, err)
	alive, die := context.WithCancel(s.ctx)
	defer die()
	_, err = s.Etcd.Client().KeepAlive(alive, grant.ID)
	must(t, err)
	_, err = s.Etcd.Client().Put(s.ctx, Prefix+"/subnets/"+subnet.Key(), value, clientv3.WithLease(grant.ID))
	must(t, err)
	for _, n := range s.Nodes {
		must(t, Eventually(s.ctx, func() bool { return containsAll(n.shell(t, traces), []string{subnet.V4.String(), subnet.V6.String()}) }))
	}
	die()
	must(t, s.WaitPeers(s.ctx))
	s.nothingOf(t, subnet.V4.String(), subnet.V6.String(), v4, v6)
	for _, f := range families(s.pods[0]) {
		must(t, s.pods[0].Ping(s.pods[1].Addr(f), 2, 56))
	}
}

// nothingOf fails if a node's kernel still has something to do with a peer.
func (s *trial) nothingOf(t *testing.T, names ...string) {
	t.Helper()
	for _, n := range s.Nodes {
		out := n.shell(t, traces)
		for _, left := range names {
			if strings.Contains(out, left) {
				t.Errorf("%s is left on %s:\n%s", left, n.Name, out)
			}
		}
		must(t, n.waitProblem(s.ctx))
	}
}
