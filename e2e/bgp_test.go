package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

func prefixes(s ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, x := range s {
		out = append(out, netip.MustParsePrefix(x))
	}
	return out
}

// The networks behind the routers: both announce the first, each one of the
// others.
var (
	sharedNets = []string{"203.0.113.0/24", "2001:db8:203::/48"}
	birdNets   = []string{"198.18.1.0/24", "2001:db8:1::/48"}
	frrNets    = []string{"198.18.2.0/24", "2001:db8:2::/48"}
)

const (
	nodesAS, routersAS = 64512, 65001
	birdSecret         = "s3cret of the router" // RFC 2385
)

// dataCentre is a cluster of two nodes with a BIRD and an FRR beside them.
type dataCentre struct {
	*Cluster
	ctx       context.Context
	pods      []*Pod
	bird, frr *Router
}

// startDataCentre starts all. more is added to the configuration of the peer that
// BIRD is, with $ANY for all addresses of a family; announced are networks that
// BIRD announces beside its own.
func startDataCentre(t *testing.T, password, more string, announced ...string) *dataCentre {
	t.Helper()
	// The third and fourth host.
	var peers []string
	for i, secret := range []string{password, ""} {
		for j, a := range []string{"198.51.100.", "2001:db8:51::"} {
			p := fmt.Sprintf(`{"Address": "%s%d", "ASNumber": %d`, a, 13+i, routersAS)
			if secret != "" {
				p += fmt.Sprintf(`, "Password": %q`, secret)
			}
			if i == 0 {
				p += strings.ReplaceAll(more, "$ANY", []string{"0.0.0.0/0", "::/0"}[j])
			}
			peers = append(peers, p+"}")
		}
	}
	config := fmt.Sprintf(`{"Type": "bgp", "ASNumber": %d, "RestartTime": 30, "Peers": [%s]}`, nodesAS, strings.Join(peers, ", "))
	c, ctx := newCluster(t, Options{Hosts: 2, Config: dual(config)})
	d := &dataCentre{Cluster: c, ctx: ctx}
	nodes := func(secret string) []birdPeer {
		var out []birdPeer
		for _, n := range c.Nodes {
			out = append(out, birdPeer{n.IPv4, nodesAS, secret}, birdPeer{n.IPv6, nodesAS, secret})
		}
		return out
	}
	hosts, err := c.Lab.NewHosts(2)
	must(t, err)
	for _, h := range hosts {
		_, err := h.Run("sysctl", "-q", "-w", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
		must(t, err)
	}
	own := append(append(prefixes(sharedNets...), prefixes(birdNets...)...), prefixes(announced...)...)
	d.bird, err = StartBIRD(hosts[0], birdConf(hosts[0], routersAS, own, nodes(birdSecret)))
	must(t, err)
	d.frr, err = StartFRR(hosts[1], frrConf(hosts[1], routersAS, append(prefixes(sharedNets...), prefixes(frrNets...)...), nodes("")))
	must(t, err)
	must(t, d.bird.serve(prefixes(append(birdNets, sharedNets...)...)...))
	must(t, d.frr.serve(prefixes(append(frrNets, sharedNets...)...)...))
	must(t, c.Start(ctx))
	if more == "" {
		must(t, c.WaitPeers(ctx))
	}
	for _, n := range c.Nodes { // with import rules not in sync: what is announced may be refused
		must(t, n.WaitStatus(ctx, "done with its peers", func(s overlay.Status) bool { return s.Ready && s.Peers == 1 }))
	}
	d.pods = onePod(t, c)
	return d
}

// route returns what the node's kernel has for a prefix by Twill.
func (n *Node) route(t *testing.T, prefix string) string {
	t.Helper()
	family := "-4"
	if strings.Contains(prefix, ":") {
		family = "-6"
	}
	return n.shell(t, fmt.Sprintf("ip %s route show exact %s proto 84", family, prefix))
}

// waitRoute waits until a prefix leads to exactly these gateways.
func (d *dataCentre) waitRoute(t *testing.T, prefix string, gateways ...netip.Addr) {
	t.Helper()
	for _, n := range d.Nodes {
		var out string
		if Eventually(d.ctx, func() bool {
			out = n.route(t, prefix)
			for _, r := range []*Router{d.bird, d.frr} {
				for _, a := range []netip.Addr{r.IPv4, r.IPv6} {
					want := false
					for _, g := range gateways {
						want = want || g == a
					}
					if strings.Contains(out, "via "+a.String()+" ") != want {
						return false
					}
				}
			}
			return true
		}) != nil {
			bgp, _, _ := n.Netctl("bgp")
			t.Fatalf("%s on %s leads not to %v:\n%s\n%s", prefix, n.Name, gateways, out, bgp)
		}
	}
}

// TestRouters has BIRD and FRR outside the cluster: routes arrive on both sides
// and packets follow them, whatever happens to whom.
func TestRouters(t *testing.T) {
	d := startDataCentre(t, birdSecret, "")
	for _, x := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"routes and packets both ways", d.reach},
		{"two equal paths", d.equalPaths},
		{"withdrawn", d.withdrawn},
		{"twilld killed and ended", d.twilldRestarts},
		{"router restarts gracefully", d.routerRestarts},
		{"router does not come back", d.routerGone},
	} {
		if !t.Run(x.name, x.run) {
			return
		}
	}
}

func (d *dataCentre) reach(t *testing.T) {
	d.waitRoute(t, birdNets[0], d.bird.IPv4)
	d.waitRoute(t, birdNets[1], d.bird.IPv6)
	d.waitRoute(t, frrNets[0], d.frr.IPv4)
	d.waitRoute(t, frrNets[1], d.frr.IPv6)
	for i, n := range d.Nodes {
		must(t, n.WaitInSync(d.ctx))
		n.waitSessions(t, 6)
		if i == 0 {
			for _, command := range []string{"bgp", "routes"} {
				out, _, _ := n.Netctl(command)
				t.Logf("netctl %s\n%s", command, out)
			}
		}
	}
	for _, r := range []*Router{d.bird, d.frr} {
		for _, p := range d.pods {
			for _, f := range families(p) {
				from := map[*Router][]string{d.bird: birdNets, d.frr: frrNets}[r][f/4-1]
				a := netip.MustParsePrefix(from).Addr().Next()
				must(t, Eventually(d.ctx, func() bool { return p.Ping(a, 1, 1400) == nil }))
				_, err := r.Run("ping", "-n", "-q", "-c", "2", "-i", "0.1", "-W", "2", "-I", a.String(), p.Addr(f).String())
				must(t, err)
			}
		}
	}
}

// equalPaths sends to many addresses: some go by one router, some by the other.
func (d *dataCentre) equalPaths(t *testing.T) {
	d.waitRoute(t, sharedNets[0], d.bird.IPv4, d.frr.IPv4)
	d.waitRoute(t, sharedNets[1], d.bird.IPv6, d.frr.IPv6)
	for _, net := range sharedNets {
		var captures []*nettest.Capture
		for _, r := range []*Router{d.bird, d.frr} {
			capture, err := r.Capture(nettest.CaptureOptions{Keep: func(f nettest.Frame) bool {
				return !f.Out && netip.MustParsePrefix(net).Contains(f.Dst)
			}})
			must(t, err)
			captures = append(captures, capture)
		}
		a := netip.MustParsePrefix(net).Addr()
		for range 24 {
			a = a.Next()
			must(t, d.pods[0].Ping(a, 1, 56))
		}
		for i, capture := range captures {
			frames, err := capture.Stop()
			must(t, err)
			if len(frames) < 2 {
				t.Errorf("%d of 24 packets to %s by router %d", len(frames), net, i)
			}
		}
	}
}

// withdrawn has BIRD take its routes back, and announce them again.
func (d *dataCentre) withdrawn(t *testing.T) {
	p := startProbes(t, d.pods[0], d.pods[1])
	for i, f := range []int{4, 6} {
		_, err := d.bird.Ask(fmt.Sprintf("disable own%d", f))
		must(t, err)
		d.waitRoute(t, birdNets[i])
		d.waitRoute(t, sharedNets[i], []netip.Addr{d.frr.IPv4, d.frr.IPv6}[i])
		_, err = d.bird.Ask(fmt.Sprintf("enable own%d", f))
		must(t, err)
		d.waitRoute(t, birdNets[i], []netip.Addr{d.bird.IPv4, d.bird.IPv6}[i])
	}
	p.stopAfter(t, 500)
	d.quiet(t)
}

// quiet fails if anything is wrong on a node, or was changed by somebody else.
func (d *dataCentre) quiet(t *testing.T) {
	t.Helper()
	for _, n := range d.Nodes {
		must(t, n.WaitInSync(d.ctx))
		must(t, n.waitProblem(d.ctx))
		if x := drifts(t, n); len(x) > 0 {
			t.Errorf("%d drifts on %s that nobody caused, the first: %+v", len(x), n.Name, x[0])
		}
	}
}

// outsideProbes are 1,000 a second from a pod to the networks of BIRD and back.
func (d *dataCentre) outsideProbes(t *testing.T) *probes {
	t.Helper()
	out, p := &probes{rate: 1000}, d.pods[0]
	for i, f := range families(p) {
		to, err := nettest.StartProbe(p.NS, d.bird.NS, netip.MustParsePrefix(birdNets[i]).Addr().Next())
		must(t, err)
		from, err := nettest.StartProbe(d.bird.NS, p.NS, p.Addr(f))
		must(t, err)
		out.all = append(out.all, to, from)
		out.names = append(out.names, fmt.Sprintf("%s to router over %s", p.Name, f), fmt.Sprintf("router to %s over %s", p.Name, f))
	}
	return out
}

// twilldRestarts kills and ends the speaker of a node: the routers keep its
// routes, and the kernel keeps theirs.
func (d *dataCentre) twilldRestarts(t *testing.T) {
	n := d.Nodes[0]
	p := d.outsideProbes(t)
	subnet := subnetOf(d.pods[0], overlay.IPv4).String()
	for _, end := range []func() error{n.Daemon.Kill9, n.Daemon.Term} {
		must(t, end())
		for range 10 {
			for _, r := range []*Router{d.bird, d.frr} {
				out, err := r.Run("ip", "route", "show", "exact", subnet)
				must(t, err)
				if !strings.Contains(out, n.IPv4.String()) {
					t.Fatalf("%s has lost the route to %s: %s", r.Name, subnet, out)
				}
			}
			time.Sleep(100 * time.Millisecond)
		}
		must(t, n.Daemon.Start())
		must(t, n.WaitReady(d.ctx))
		n.waitSessions(t, 6)
	}
	p.stopAfter(t, 2000)
	d.quiet(t)
}

// routerRestarts kills BIRD, whose routes are kept until it is back.
func (d *dataCentre) routerRestarts(t *testing.T) {
	p := d.outsideProbes(t)
	must(t, d.bird.procs[0].Kill9())
	for range 10 {
		for i, a := range []netip.Addr{d.bird.IPv4, d.bird.IPv6} {
			if out := d.Nodes[0].route(t, birdNets[i]); !strings.Contains(out, a.String()) {
				t.Fatalf("the route to %s is lost: %s", birdNets[i], out)
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	must(t, d.bird.startBIRD("-R"))
	must(t, Eventually(d.ctx, func() bool {
		out, err := d.bird.Ask("show protocols")
		return err == nil && strings.Count(out, "Established") == 4
	}))
	p.stopAfter(t, 1000)
	d.waitRoute(t, birdNets[0], d.bird.IPv4)
	d.waitRoute(t, birdNets[1], d.bird.IPv6)
	d.quiet(t)
}

// routerGone kills BIRD for good: its routes go when its restart time is over, and
// what FRR announces, too, goes by FRR alone.
func (d *dataCentre) routerGone(t *testing.T) {
	must(t, d.bird.procs[0].Kill9())
	died := time.Now()
	d.waitRoute(t, birdNets[0])
	d.waitRoute(t, birdNets[1])
	t.Logf("gone %.1f s after its death, restart time %d s", time.Since(died).Seconds(), birdRestartTime)
	d.waitRoute(t, sharedNets[0], d.frr.IPv4)
	d.waitRoute(t, sharedNets[1], d.frr.IPv6)
	for i := range sharedNets {
		must(t, d.pods[0].Ping(netip.MustParsePrefix(sharedNets[i]).Addr().Next(), 2, 56))
	}
}
