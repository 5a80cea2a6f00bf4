package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/overlay"
)

// fullReach pings from each pod to each other.
func fullReach(t *testing.T, c *Cluster, pods []*Pod) {
	t.Helper()
	for _, from := range pods {
		for _, to := range pods {
			for _, f := range families(from) {
				if from != to {
					must(t, Eventually(t.Context(), func() bool { return from.Ping(to.Addr(f), 1, 1000) == nil }))
				}
			}
		}
	}
	for _, n := range c.Nodes {
		must(t, n.WaitInSync(t.Context()))
		must(t, n.waitProblem(t.Context()))
	}
}

// waitSessions waits until netctl bgp shows this many sessions, all established.
func (n *Node) waitSessions(t *testing.T, want int) {
	t.Helper()
	var out string
	if Eventually(t.Context(), func() bool {
		var code int
		var err error
		out, code, err = n.Netctl("bgp")
		return err == nil && code == 0 && strings.Contains(out, fmt.Sprintf(" %d of %[1]d established", want))
	}) != nil {
		t.Fatalf("%s has not %d sessions:\n%s", n.Name, want, out)
	}
}

// TestReflectors has two route reflectors instead of the full mesh. One of them
// may die.
func TestReflectors(t *testing.T) {
	c, ctx := newCluster(t, Options{Hosts: 5, Config: dual(`{"Type": "bgp", "NodeMesh": false, "RestartTime": 5}`)})
	for i, n := range c.Nodes {
		var role []string
		if i < 2 {
			role = []string{"--bgp-route-reflector", "--bgp-cluster-id=192.0.2.1"}
		}
		must(t, n.Start(role...))
	}
	must(t, c.WaitPeers(ctx))
	for i, n := range c.Nodes {
		want := 2 * 2
		if i < 2 {
			want = 4 * 2
		}
		n.waitSessions(t, want)
	}
	pods := onePod(t, c)
	fullReach(t, c, pods)
	out, _, err := c.Nodes[2].Netctl("routes")
	must(t, err)
	for _, p := range pods[3:] {
		if !strings.Contains(out, subnetOf(p, overlay.IPv4).String()) {
			t.Errorf("no route to %s:\n%s", p.Name, out)
		}
	}
	t.Logf("netctl routes\n%s", out)
	p := startProbes(t, pods[3], pods[4])
	must(t, c.Nodes[0].Daemon.Kill9())
	// Longer than the restart time: what it alone told would be gone.
	p.stopAfter(t, 8000)
	must(t, c.Nodes[0].Daemon.Start())
	must(t, c.WaitPeers(ctx))
	c.Nodes[3].waitSessions(t, 4)
	fullReach(t, c, pods)
}

// TestForeignMember has a host that runs BIRD, and no twilld, be a node of the
// mesh: its lease is in etcd, its routes are in BIRD.
func TestForeignMember(t *testing.T) {
	c, ctx := startCluster(t, Options{Hosts: 2, Config: dual(`{"Type": "bgp", "Password": "mesh secret"}`)})
	pods := onePod(t, c)
	h, err := c.Lab.NewHost()
	must(t, err)
	subnets := overlay.Subnets{V4: netip.MustParsePrefix("10.5.222.0/24"), V6: netip.MustParsePrefix("fd00:5:0:222::/64")}
	must(t, putLease(ctx, c, Prefix+"/subnets/"+subnets.Key(), fmt.Sprintf(
		`{"PublicIP": %q, "PublicIPv6": %q, "BackendType": "bgp", "BackendData": {"ASNumber": 64512, "Port": 179}}`, h.IPv4, h.IPv6)))
	var peers []birdPeer
	for _, n := range c.Nodes {
		peers = append(peers, birdPeer{n.IPv4, nodesAS, "mesh secret"}, birdPeer{n.IPv6, nodesAS, "mesh secret"})
	}
	bird, err := StartBIRD(h, birdConf(h, nodesAS, subnets.All(), peers))
	must(t, err)
	must(t, bird.serve(subnets.All()...))
	for _, n := range c.Nodes {
		n.waitSessions(t, 4)
		for _, s := range subnets.All() {
			must(t, Eventually(ctx, func() bool {
				out, _, err := n.Netctl("routes")
				for _, line := range strings.Split(out, "\n") {
					if err == nil && containsAll(line, []string{s.String(), "bgp", "ok"}) {
						return true
					}
				}
				return false
			}))
		}
	}
	for _, p := range pods {
		for _, f := range families(p) {
			a := subnets.Subnet(f).Addr().Next()
			must(t, p.Ping(a, 2, 1000))
			_, err := bird.Run("ping", "-n", "-q", "-c", "2", "-i", "0.1", "-W", "2", "-I", a.String(), p.Addr(f).String())
			must(t, err)
		}
	}
}

// TestOwnRouter has BIRD and FRR speak in the nodes' place, configured by twilld,
// among each other and with a node where twilld speaks itself.
func TestOwnRouter(t *testing.T) {
	c, ctx := newCluster(t, Options{Hosts: 4, Config: dual(`{"Type": "bgp", "Password": "mesh"}`)})
	kinds := []string{"bird", "bird", "frr", ""}
	for i, n := range c.Nodes {
		switch kinds[i] {
		case "bird":
			_, err := StartBIRD(n.Host, "log stderr all;\nprotocol device {}\n")
			must(t, err)
			must(t, n.Start("--bgp-router=bird"))
		case "frr":
			_, err := StartFRR(n.Host, "log stdout informational\n")
			must(t, err)
			must(t, n.Start("--bgp-router=frr"))
		default:
			must(t, n.Start())
		}
	}
	must(t, c.WaitPeers(ctx))
	for _, n := range c.Nodes {
		n.waitSessions(t, 6)
	}
	pods := onePod(t, c)
	fullReach(t, c, pods)
	for i, n := range c.Nodes[:3] {
		out, err := n.Run("ss", "-Htlnp", "sport = :179")
		must(t, err)
		if strings.Contains(out, "twilld") || out == "" {
			t.Errorf("%s listens not by %s alone: %s", n.Name, kinds[i], out)
		}
		for _, command := range []string{"bgp", "routes", "status"} {
			out, code, err := n.Netctl(command)
			must(t, err)
			t.Logf("%s: netctl %s exits with %d\n%s", kinds[i], command, code, out)
		}
	}
	// The daemon's death is nothing to the router.
	p := startProbes(t, pods[0], pods[2])
	for _, n := range []*Node{c.Nodes[0], c.Nodes[2]} {
		must(t, n.Daemon.Kill9())
		must(t, n.Daemon.Start())
		must(t, n.WaitReady(ctx))
	}
	p.stopAfter(t, 1000)
	fullReach(t, c, pods)
}

// TestBadBGP has a router announce what would do harm, and sessions that cannot
// be: each is named, and nothing else suffers.
func TestBadBGP(t *testing.T) {
	for _, x := range []struct {
		name, password string
		more           string // of BIRD's entry among the peers
		problems       [][]string
	}{
		{"wrong MD5 password", "another", "", [][]string{
			{"no answer from 198.51.100.13", "A password is set: check that both ends have the same"}, {"no answer from 2001:db8:51::13"},
		}},
		{"no MD5 password", "", "", [][]string{{"no answer from 198.51.100.13", "signed TCP segments"}, {"no answer from 2001:db8:51::13"}}},
	} {
		t.Run(x.name, func(t *testing.T) {
			d := startDataCentre(t, x.password, x.more)
			d.waitRoute(t, frrNets[0], d.frr.IPv4)
			d.waitRoute(t, sharedNets[1], d.frr.IPv6)
			for _, words := range x.problems {
				d.bgpSays(t, words...)
			}
			for _, f := range families(d.pods[0]) {
				must(t, d.pods[0].Ping(d.pods[1].Addr(f), 2, 56))
			}
		})
	}
	t.Run("harmful routes", func(t *testing.T) {
		harmful := []string{"0.0.0.0/0", "198.51.100.0/24", "198.51.100.128/25", "10.5.0.0/16", "::/0", "2001:db8:51::/64", "fd00:5::/48"}
		d := startDataCentre(t, birdSecret, "", harmful...)
		d.waitRoute(t, birdNets[0], d.bird.IPv4)
		d.waitRoute(t, birdNets[1], d.bird.IPv6)
		for _, n := range d.Nodes {
			for _, h := range harmful {
				must(t, n.waitProblem(d.ctx, "bgp route "+h, "refused", "overlaps"))
				if out := n.route(t, h); out != "" {
					t.Errorf("%s has taken %s up: %s", n.Name, h, out)
				}
			}
			must(t, n.WaitInSync(d.ctx))
		}
		out, code, err := d.Nodes[0].Netctl("status")
		must(t, err)
		t.Logf("netctl status exits with %d\n%s", code, out)
		for _, f := range families(d.pods[0]) {
			must(t, d.pods[0].Ping(d.pods[1].Addr(f), 2, 56))
		}
	})
	t.Run("a default route that is allowed", func(t *testing.T) {
		d := startDataCentre(t, birdSecret, `, "Import": [{"Prefix": "$ANY", "Action": "accept"}]`, "0.0.0.0/0", "::/0")
		d.waitRoute(t, birdNets[0], d.bird.IPv4)
		for _, n := range d.Nodes {
			must(t, n.waitProblem(d.ctx, "route 0.0.0.0/0", "another program's route"))
			n.shell(t, "ip route del default; ip -6 route del default")
			must(t, n.WaitInSync(d.ctx))
			must(t, n.waitProblem(d.ctx))
		}
		d.waitRoute(t, "0.0.0.0/0", d.bird.IPv4)
		d.waitRoute(t, "::/0", d.bird.IPv6)
	})
	t.Run("a peer that refuses", func(t *testing.T) {
		d := startDataCentre(t, birdSecret, "")
		d.waitRoute(t, birdNets[0], d.bird.IPv4)
		must(t, write(d.bird.Host, "/etc/bird/bird.conf", strings.ReplaceAll(
			birdConf(d.bird.Host, routersAS, prefixes(birdNets...), []birdPeer{
				{d.Nodes[0].IPv4, 64999, birdSecret}, {d.Nodes[1].IPv4, 64999, birdSecret},
			}), "graceful restart on;", "")))
		_, err := d.bird.Ask("configure")
		must(t, err)
		d.bgpSays(t, "198.51.100.13 rejects this node's OPEN")
		d.waitRoute(t, birdNets[0])
		d.waitRoute(t, frrNets[0], d.frr.IPv4)
	})
}

// bgpSays waits until netctl bgp on every node has a line or more with words, and
// exits with 1.
func (d *dataCentre) bgpSays(t *testing.T, words ...string) {
	t.Helper()
	for _, n := range d.Nodes {
		var out string
		var code int
		if Eventually(d.ctx, func() bool {
			var err error
			out, code, err = n.Netctl("bgp")
			return err == nil && code == 1 && containsAll(out, words)
		}) != nil {
			t.Fatalf("netctl bgp on %s exits with %d, without %q:\n%s", n.Name, code, words, out)
		}
		if n == d.Nodes[0] {
			t.Logf("netctl bgp\n%s", out)
		}
	}
}
