package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/twill-net/twill/pkg/kernel"
	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// families returns those that the pods of a node have.
func families(p *Pod) []overlay.Family {
	if p.IPv6.IsValid() {
		return []overlay.Family{overlay.IPv4, overlay.IPv6}
	}
	return []overlay.Family{overlay.IPv4}
}

// with returns a stored configuration with another key in it.
func with(config, key string) string { return strings.Replace(config, "{", "{"+key+", ", 1) }

// probes are packets of each family each way between two pods.
type probes struct {
	rate  int // a second, each
	names []string
	all   []*nettest.Probe
}

// startProbes sends 1,000 probes a second on each way.
func startProbes(t *testing.T, a, b *Pod) *probes {
	t.Helper()
	return startProbesAt(t, 1000, a, b)
}

func startProbesAt(t *testing.T, rate int, a, b *Pod) *probes {
	t.Helper()
	p := &probes{rate: rate}
	for _, f := range families(a) {
		for _, way := range [][2]*Pod{{a, b}, {b, a}} {
			probe, err := nettest.StartProbeAt(rate, way[0].NS, way[1].NS, way[1].Addr(f))
			must(t, err)
			p.names = append(p.names, fmt.Sprintf("%s %s to %s", f, way[0].Name, way[1].Name))
			p.all = append(p.all, probe)
		}
	}
	return p
}

// results ends the probes and returns what became of each.
func (p *probes) results(t *testing.T) []nettest.ProbeResult {
	t.Helper()
	var out []nettest.ProbeResult
	for i, probe := range p.all {
		r, err := probe.Stop()
		must(t, err)
		t.Logf("%s: %v", p.names[i], r)
		out = append(out, r)
	}
	return out
}

// stop ends the probes; the test fails unless all were answered.
func (p *probes) stop(t *testing.T) {
	t.Helper()
	for i, r := range p.results(t) {
		if r.Lost > 0 || r.Sent < p.rate/2 {
			t.Errorf("%s: %d of %d probes lost, %d send errors, at %.0f ms", p.names[i], r.Lost, r.Sent, r.Errors, r.LostAt)
		}
	}
}

// stopAfter is stop after that many milliseconds.
func (p *probes) stopAfter(t *testing.T, ms int) {
	t.Helper()
	time.Sleep(time.Duration(ms) * time.Millisecond)
	p.stop(t)
}

// drifts returns what netctl drift tells.
func drifts(t *testing.T, n *Node) []overlay.Drift {
	t.Helper()
	out, code, err := n.Netctl("drift", "-o", "json")
	must(t, err)
	var d []overlay.Drift
	if err := json.Unmarshal([]byte(out), &d); err != nil || code > 1 {
		t.Fatalf("netctl drift on %s exits with %d: %v: %s", n.Name, code, err, out)
	}
	return d
}

// observer reads the node's kernel from this process, so that a change is seen
// within a millisecond of its being made.
type observer struct {
	node   *Node
	kernel *kernel.Kernel
	scope  kernel.Scope
}

func newObserver(t *testing.T, n *Node) *observer {
	t.Helper()
	o := &observer{node: n, scope: kernel.Scope{
		Networks: []netip.Prefix{PodNetwork, PodNetworkV6}, Uplink: "eth0",
		Sysctls: []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"},
	}}
	must(t, n.Do(func() (err error) {
		o.kernel, err = kernel.Open(kernel.Options{Log: slog.New(slog.DiscardHandler)})
		return err
	}))
	t.Cleanup(func() { must(t, o.kernel.Close()) })
	return o
}

// look returns what is Twill's in the kernel now.
func (o *observer) look(t *testing.T) overlay.State {
	t.Helper()
	var s overlay.State
	must(t, o.node.Do(func() (err error) {
		s, err = o.kernel.Observe(t.Context(), o.scope)
		return err
	}))
	return s
}

// waitFor waits until the kernel holds want and returns when it was seen to.
func (o *observer) waitFor(t *testing.T, want overlay.State) time.Time {
	t.Helper()
	var plan overlay.Plan
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); {
		plan, _ = overlay.Diff(o.look(t), want)
		if len(plan) == 0 {
			return time.Now()
		}
	}
	t.Fatalf("after 30 s %s still lacks:\n%s", o.node.Name, plan)
	return time.Time{}
}

// peerLease is what a peer that is not there would have stored.
func peerLease(subnet netip.Prefix, public string, mac overlay.MAC) (key, value string) {
	l := overlay.Lease{Subnets: overlay.Subnets{V4: subnet}}
	return Prefix + "/subnets/" + l.Key(),
		fmt.Sprintf(`{"PublicIP":%q,"PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":%q}}`, public, mac)
}

// putLease stores a lease for 24 hours, as flannel does.
func putLease(ctx context.Context, c *Cluster, key, value string) error {
	grant, err := c.Etcd.Client().Grant(ctx, 24*3600)
	if err != nil {
		return err
	}
	_, err = c.Etcd.Client().Put(ctx, key, value, clientv3.WithLease(grant.ID))
	return err
}

// foreignSetup gives a host all kinds of objects that are not Twill's, some of
// them where Twill works.
const foreignSetup = `set -e
ip link add foreign0 type veth peer name foreign1
ip link add foreign7 type vxlan id 7 dev eth0 dstport 4790 nolearning
for d in foreign0 foreign1 foreign7; do ip link set $d addrgenmode none; done
ip link set foreign1 up
ip link set foreign0 address 02:00:00:00:f0:01 up
ip link set foreign7 address 02:00:00:00:f0:07 up
ip addr add 203.0.113.1/25 dev foreign0
ip addr add 2001:db8:f::1/64 dev foreign0 nodad
bridge fdb append 02:00:00:00:f0:08 dev foreign7 dst 198.51.100.77 self permanent
ip neigh add 203.0.113.9 lladdr 02:00:00:00:f0:09 dev foreign0 nud permanent
ip neigh add 2001:db8:f::9 lladdr 02:00:00:00:f0:09 dev foreign0 nud permanent
ip nexthop add id 7777 via 203.0.113.9 dev foreign0 protocol static
ip nexthop add id 7778 via 2001:db8:f::9 dev foreign0 protocol bird
ip route add 203.0.113.128/26 nhid 7777 proto static
ip route add 203.0.113.192/26 via 203.0.113.9 proto bird metric 7
ip route add 198.18.7.0/24 dev foreign0 table 100
ip route add 2001:db8:f7::/48 nhid 7778 proto bird
ip route add unreachable 2001:db8:f8::/48 proto static
ip rule add from 198.18.0.0/15 table 100 pref 100
ip -6 rule add from 2001:db8:f9::/48 table 100 pref 100
for t in iptables ip6tables; do
	$t -t nat -N FOREIGN; $t -t nat -A FOREIGN -p tcp --dport 9 -j RETURN; $t -t nat -A POSTROUTING -m comment --comment foreign -j FOREIGN
	$t -N FOREIGN; $t -A FOREIGN -p tcp --dport 9 -j ACCEPT; $t -A FORWARD -j FOREIGN; $t -A INPUT -p udp --dport 9 -j ACCEPT
done
nft add table ip foreign
nft add chain ip foreign c '{ type filter hook forward priority 5; policy accept; }'
nft add rule ip foreign c tcp dport 9 counter comment '"foreign"'
`

// foreignDump prints all that foreignSetup made and whatever else is not
// Twill's. What is Twill's, and what comes and goes with it by the kernel's own
// doing (local routes and multicast of its devices), is left out.
const foreignDump = `set -e
for i in $(seq 50); do [ -n "$(ip -6 -o addr show tentative)" ] || break; sleep 0.1; done
for d in lo eth0 foreign0 foreign7; do ip -d link show dev $d; ip -d addr show dev $d; bridge fdb show dev $d; done
for f in -4 -6; do
	ip $f -d route show table all | grep -v -e 'dev flannel' -e 'proto 84' -e 'dev cni0' -e 'dev veth' || true
	ip $f rule
	ip $f neigh show dev foreign0 nud permanent
	ip $f nexthop | grep -v 'proto 84' || true
done
for s in iptables-save ip6tables-save; do
	for t in nat filter; do $s -t $t | sed -e '/^#/d' -e 's/ \[[0-9:]*\]$//' | grep -v -e TWILL- -e FLANNEL- ; done
done
nft list table ip foreign
`

// shell runs commands on the node.
func (n *Node) shell(t *testing.T, script string) string {
	t.Helper()
	out, err := n.Run("sh", "-c", script)
	must(t, err)
	return out
}

// firstDifference shows where two dumps part.
func firstDifference(a, b string) string {
	x, y := strings.Split(a, "\n"), strings.Split(b, "\n")
	for i := range max(len(x), len(y)) {
		var l, r string
		if i < len(x) {
			l = x[i]
		}
		if i < len(y) {
			r = y[i]
		}
		if l != r {
			return fmt.Sprintf("line %d\nbefore: %s\nafter:  %s", i+1, l, r)
		}
	}
	return "none"
}
