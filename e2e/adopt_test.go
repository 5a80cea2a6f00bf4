package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// flannelNode is what flanneld, stopped a moment ago, has left on a host: its
// lease in etcd and all it had in the kernel, with a pod on cni0.
type flannelNode struct {
	*Node
	subnets overlay.Subnets
	macs    map[overlay.Family]string // of its VTEPs, drawn at random
	key     string                    // of its lease
	value   string
	pod     *Pod
}

// newFlannelNode does to the node what flanneld would. peers are those that it
// knows of. Which chains there are depends on nftables.
func newFlannelNode(ctx context.Context, t *testing.T, n *Node, dual, nftables bool) *flannelNode {
	t.Helper()
	f := &flannelNode{
		Node:    n,
		subnets: overlay.Subnets{V4: netip.MustParsePrefix("10.5.177.0/24")},
		macs:    map[overlay.Family]string{overlay.IPv4: "4e:1f:22:33:44:55", overlay.IPv6: "4e:1f:22:33:44:66"},
	}
	f.value = fmt.Sprintf(`{"PublicIP":"%s","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"%s"}}`, n.IPv4, f.macs[overlay.IPv4])
	if dual {
		f.subnets.V6 = netip.MustParsePrefix("fd00:5:0:b1::/64")
		f.value = fmt.Sprintf(`{"PublicIP":"%s","PublicIPv6":"%s","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"%s"},"BackendV6Data":{"VNI":1,"VtepMAC":"%s"}}`,
			n.IPv4, n.IPv6, f.macs[overlay.IPv4], f.macs[overlay.IPv6])
	}
	f.key = Prefix + "/subnets/" + f.subnets.Key()
	must(t, putLease(ctx, n.cluster, f.key, f.value))
	f.addDevices(t)
	if nftables {
		f.addTables(t)
	} else {
		f.addChains(t)
	}
	f.addPod(t)
	return f
}

func (f *flannelNode) addDevices(t *testing.T) {
	t.Helper()
	env := fmt.Sprintf("FLANNEL_NETWORK=%s\nFLANNEL_SUBNET=%s/24\n", PodNetwork, f.subnets.V4.Addr().Next())
	for _, p := range f.subnets.All() {
		family := overlay.FamilyOf(p.Addr())
		local, forward := f.IPv4, "net/ipv4/ip_forward"
		if family == overlay.IPv6 {
			local, forward = f.IPv6, "net/ipv6/conf/all/forwarding"
			env += fmt.Sprintf("FLANNEL_IPV6_NETWORK=%s\nFLANNEL_IPV6_SUBNET=%s/64\n", PodNetworkV6, p.Addr().Next())
		}
		f.shell(t, fmt.Sprintf(`set -e
			ip link add %[1]s address %[2]s mtu 1450 type vxlan id 1 dev eth0 local %[3]s dstport 4789 nolearning
			echo 0 > /proc/sys/net/ipv6/conf/%[1]s/accept_ra
			ip link set %[1]s up
			ip addr add %[4]s/%[5]d dev %[1]s
			echo 1 > /proc/sys/%[6]s`, overlay.VXLANLink(family, 1), f.macs[family], local, p.Addr(), p.Addr().BitLen(), forward))
	}
	env += "FLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n"
	f.shell(t, "mkdir -p /run/flannel; cat > /run/flannel/subnet.env <<.\n"+env+".\n")
}

// addPeer is what flanneld does when it sees the peer's lease.
func (f *flannelNode) addPeer(t *testing.T, peer overlay.State, l overlay.Subnets, at *nettest.Host) {
	t.Helper()
	for _, p := range l.All() {
		family := overlay.FamilyOf(p.Addr())
		link, public := overlay.VXLANLink(family, 1), at.IPv4
		if family == overlay.IPv6 {
			public = at.IPv6
		}
		for _, o := range peer.Links {
			if o.Name == link {
				f.shell(t, fmt.Sprintf(`set -e
					ip neigh replace %[2]s lladdr %[3]s dev %[1]s nud permanent
					bridge fdb replace %[3]s dev %[1]s dst %[4]s self permanent
					ip route replace %[5]s via %[2]s dev %[1]s onlink`, link, p.Addr(), o.MAC, public, p))
			}
		}
	}
}

func (f *flannelNode) addChains(t *testing.T) {
	t.Helper()
	for _, p := range f.subnets.All() {
		command, cluster, multicast := "iptables", PodNetwork, "224.0.0.0/4"
		if p.Addr().Is6() {
			command, cluster, multicast = "ip6tables", PodNetworkV6, "ff00::/8"
		}
		masq := func(rule string) string {
			return fmt.Sprintf("-A FLANNEL-POSTRTG -m comment --comment \"flanneld masq\" %s\n", rule)
		}
		doc := "*nat\n:FLANNEL-POSTRTG - [0:0]\n-A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG\n" +
			masq("-m mark --mark 0x4000/0x4000 -j RETURN") +
			masq(fmt.Sprintf("-s %s -d %s -j RETURN", p, cluster)) +
			masq(fmt.Sprintf("-s %s -d %s -j RETURN", cluster, p)) +
			masq(fmt.Sprintf("! -s %s -d %s -j RETURN", cluster, p)) +
			masq(fmt.Sprintf("-s %s ! -d %s -j MASQUERADE --random-fully", cluster, multicast)) +
			masq(fmt.Sprintf("! -s %s -d %s -j MASQUERADE --random-fully", cluster, cluster)) +
			"COMMIT\n*filter\n:FLANNEL-FWD - [0:0]\n-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\n" +
			fmt.Sprintf("-A FLANNEL-FWD -s %s -m comment --comment \"flanneld forward\" -j ACCEPT\n", cluster) +
			fmt.Sprintf("-A FLANNEL-FWD -d %s -m comment --comment \"flanneld forward\" -j ACCEPT\nCOMMIT\n", cluster)
		f.shell(t, command+"-restore --noflush <<.\n"+doc+".\n")
	}
}

// addTables is addChains with EnableNFTables.
func (f *flannelNode) addTables(t *testing.T) {
	t.Helper()
	for _, p := range f.subnets.All() {
		ip, table, cluster := "ip", "flannel-ipv4", PodNetwork
		if p.Addr().Is6() {
			ip, table, cluster = "ip6", "flannel-ipv6", PodNetworkV6
		}
		f.shell(t, fmt.Sprintf(`nft -f - <<.
			table %[1]s %[2]s {
				chain forward { type filter hook forward priority 0; policy accept; %[1]s saddr %[3]s accept; %[1]s daddr %[3]s accept; }
				chain postrtg { type nat hook postrouting priority 100; policy accept;
					meta mark 0x4000 return; %[1]s saddr %[4]s %[1]s daddr %[3]s return; %[1]s saddr %[3]s %[1]s daddr %[4]s return
					%[1]s saddr %[3]s masquerade fully-random; }
			}
.`, ip, table, cluster, p))
	}
}

// addPod wires a pod as flannel's plugin, bridge and host-local would.
func (f *flannelNode) addPod(t *testing.T) {
	t.Helper()
	ns, err := f.NewPodNS("p0")
	must(t, err)
	f.pod = &Pod{NS: ns, Node: f.Node}
	name := ns.Path[strings.LastIndex(ns.Path, "/")+1:]
	f.shell(t, fmt.Sprintf(`set -e
		ip link add cni0 mtu 1430 type bridge
		ip link set cni0 addrgenmode none up
		ip link add veth0 mtu 1430 type veth peer name eth0 mtu 1430 netns %s
		ip link set veth0 master cni0 up
		ip -n %[1]s link set eth0 addrgenmode none up`, name))
	for _, p := range f.subnets.All() {
		gateway := p.Addr().Next()
		addr, nodad := gateway.Next(), ""
		if addr.Is4() {
			f.pod.IPv4 = addr
		} else {
			f.pod.IPv6, nodad = addr, "nodad"
		}
		f.shell(t, fmt.Sprintf(`set -e
			ip addr add %[2]s/%[4]d dev cni0 %[5]s
			ip -n %[1]s addr add %[3]s/%[4]d dev eth0 %[5]s
			ip -n %[1]s route add default via %[2]s
			mkdir -p /var/lib/cni/networks/twill
			printf 'flannel-pod\r\neth0' > /var/lib/cni/networks/twill/%[3]s`, name, gateway, addr, p.Bits(), nodad))
	}
}

// TestAdopt starts twilld on a node where flanneld ran until now. Traffic with a
// node that runs Twill does not notice, and all that others know of the node
// stays: lease, subnet, MAC, addresses of pods.
func TestAdopt(t *testing.T) {
	for _, dual := range []bool{false, true} {
		for _, nftables := range []bool{false, true} {
			t.Run(fmt.Sprintf("dual %t nftables %t", dual, nftables), func(t *testing.T) {
				config := map[bool]string{false: ConfigIPv4, true: ConfigDual}[dual]
				if nftables {
					config = with(config, `"EnableNFTables": true`)
				}
				c, ctx := newCluster(t, Options{Hosts: 2, Config: config})
				f, peer := startBesideFlannel(ctx, t, c, dual, nftables)
				if !nftables { // a base chain that drops drops whatever another accepts
					f.shell(t, forwardDrop)
				}
				before := f.shell(t, linkIdentity)
				probes := startProbes(t, f.pod, peer)
				must(t, f.Start())
				must(t, f.WaitReady(ctx))
				must(t, f.WaitInSync(ctx))
				probes.stopAfter(t, 1000)
				f.checkTakenOver(ctx, t, before)
				for _, family := range families(f.pod) {
					checkEgress(ctx, t, c, f.pod, family)
				}
			})
		}
	}
}

// linkIdentity prints what of the VTEPs must not change: index, MAC, address.
const linkIdentity = `for l in $(ls /sys/class/net | grep ^flannel); do echo $l $(cat /sys/class/net/$l/ifindex /sys/class/net/$l/address) $(ip -o addr show dev $l scope global | grep -o 'inet.*/[0-9]*'); done`

// startBesideFlannel makes node 0 one of flannel's and starts Twill on node 1,
// with a pod.
func startBesideFlannel(ctx context.Context, t *testing.T, c *Cluster, dual, nftables bool) (*flannelNode, *Pod) {
	t.Helper()
	f := newFlannelNode(ctx, t, c.Nodes[0], dual, nftables)
	twill := c.Nodes[1]
	must(t, twill.Start())
	must(t, twill.WaitReady(ctx))
	must(t, twill.WaitInSync(ctx))
	peer, err := twill.AddPod("p1")
	must(t, err)
	status, err := twill.Status()
	must(t, err)
	subnets, err := overlay.ParseKey(status.Lease)
	must(t, err)
	f.addPeer(t, newObserver(t, twill).look(t), subnets, twill.Host)
	for _, family := range families(f.pod) {
		must(t, f.pod.Ping(peer.Addr(family), 3, 1000))
	}
	return f, peer
}

func (f *flannelNode) checkTakenOver(ctx context.Context, t *testing.T, links string) {
	t.Helper()
	if now := f.shell(t, linkIdentity); now != links {
		t.Errorf("the VTEPs are others now: %s", firstDifference(links, now))
	}
	if out := f.shell(t, "ip -d link"); strings.Count(out, "alias twill") != len(f.subnets.All()) {
		t.Errorf("the VTEPs are not Twill's:\n%s", out)
	}
	rest := f.shell(t, "iptables-save; ip6tables-save; nft list ruleset; ip route; ip -6 route")
	for _, bad := range []string{"FLANNEL", "flannel-ipv", "flanneld", " onlink proto boot"} {
		if strings.Contains(rest, bad) {
			t.Errorf("%q is left:\n%s", bad, rest)
		}
	}
	if !strings.Contains(rest, "TWILL-") {
		t.Errorf("no chain of Twill's:\n%s", rest)
	}
	r, err := f.cluster.Etcd.Client().Get(ctx, f.key)
	must(t, err)
	if len(r.Kvs) != 1 || r.Kvs[0].Version != 1 || string(r.Kvs[0].Value) != f.value || r.Kvs[0].Lease == 0 {
		t.Errorf("the lease was rewritten: %v", r.Kvs)
	}
	want := fmt.Sprintf("FLANNEL_SUBNET=%s/24\n", f.subnets.V4.Addr().Next())
	if env := f.shell(t, "cat /run/flannel/subnet.env"); !strings.Contains(env, want) {
		t.Errorf("subnet.env has no %s: %s", want, env)
	}
	p, err := f.AddPod("p1")
	must(t, err)
	if !f.subnets.V4.Contains(p.IPv4) {
		t.Errorf("a new pod has %s, not in %s", p.IPv4, f.subnets.V4)
	}
	if d := drifts(t, f.Node); len(d) > 0 {
		t.Errorf("what was taken over counts as drift: %+v", d)
	}
}
