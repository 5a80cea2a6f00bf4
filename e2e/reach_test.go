package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// TestReach has pods on three hosts reach each other and the world outside, with
// both families and both firewall tools.
func TestReach(t *testing.T) {
	for _, network := range []struct{ name, config string }{{"IPv4", ConfigIPv4}, {"dual", ConfigDual}} {
		for _, tool := range []overlay.Tool{overlay.Iptables, overlay.Nftables} {
			t.Run(network.name+" "+string(tool), func(t *testing.T) {
				config := network.config
				if tool == overlay.Nftables {
					config = with(config, `"EnableNFTables": true`)
				}
				c, ctx := startCluster(t, Options{Hosts: 3, Config: config})
				pods := onePod(t, c)
				checkTool(t, c.Nodes[0], tool)
				checkWire(t, c, pods, wire{port: 4789, vni: 1})
				for i, p := range pods {
					checkBulk(t, 1000, p, pods[(i+1)%len(pods)])
				}
				for _, f := range families(pods[0]) {
					checkEgress(ctx, t, c, pods[0], f)
				}
			})
		}
	}
}

// checkTool fails unless the rules are where the configuration says.
func checkTool(t *testing.T, n *Node, tool overlay.Tool) {
	t.Helper()
	rules := n.shell(t, "iptables-save; ip6tables-save; nft list tables | grep -x 'table ip6\\? twill' || true")
	if ipt, nft := strings.Contains(rules, "TWILL-"), strings.Contains(rules, "table ip twill"); ipt == nft || nft != (tool == overlay.Nftables) {
		t.Errorf("rules of %s are not where %s looks:\n%s", n.Name, tool, rules)
	}
}

// wire says what an overlay's packets look like on the hosts' cables. Without any
// port they are the pods' packets themselves.
type wire struct {
	port    uint16 // of VXLAN
	vni     uint32
	tunnels []uint16 // UDP ports of what is not decoded here
}

// checkWire pings from each pod and node to each pod, at full MTU and one byte
// beyond, while all cables are watched.
func checkWire(t *testing.T, c *Cluster, pods []*Pod, w wire) {
	t.Helper()
	ours := map[netip.Addr]bool{}
	for _, p := range pods {
		ours[p.IPv4], ours[p.IPv6] = true, true
	}
	var captures []*nettest.Capture
	for _, n := range c.Nodes {
		capture, err := n.Capture(nettest.CaptureOptions{VXLANPort: w.port})
		must(t, err)
		captures = append(captures, capture)
	}
	for _, from := range pods {
		for _, to := range pods {
			for _, f := range families(from) {
				if from != to {
					checkPings(t, from, to.Addr(f))
				}
			}
		}
	}
	for _, capture := range captures {
		frames, err := capture.Stop()
		must(t, err)
		seen := 0
		for _, f := range frames {
			if f.Fragment {
				t.Fatalf("a packet in pieces: %v", &f)
			}
			carried := f.Inner
			if w.port == 0 && w.tunnels == nil {
				carried = &f
			} else if ours[f.Src] || ours[f.Dst] {
				t.Fatalf("a packet of a pod that is not encapsulated: %v", &f)
			}
			if f.Proto == nettest.ProtoUDP && slices.Contains(w.tunnels, f.DstPort) {
				seen++
			}
			if carried == nil || carried.Proto == 0 || !ours[carried.Src] && !ours[carried.Dst] {
				continue // ARP and NDP of the hosts, etcd
			}
			seen++
			if !ours[carried.Src] || !ours[carried.Dst] {
				t.Fatalf("pods' packets do not keep their addresses: %v", &f)
			}
			if f.DstPort != w.port && w.port != 0 || f.VNI != w.vni {
				t.Fatalf("not on UDP port %d with VNI %d: %v", w.port, w.vni, &f)
			}
		}
		if want := (len(pods) - 1) * 2 * 3 * 2 * len(families(pods[0])); seen < want {
			t.Errorf("%d packets of pods on a cable, want at least %d", seen, want)
		}
	}
	for i, n := range c.Nodes {
		for _, f := range families(pods[0]) {
			for _, to := range []*Pod{pods[i], pods[(i+1)%len(pods)]} {
				_, err := n.Run("ping", "-n", "-q", "-c", "2", "-i", "0.1", "-W", "2", to.Addr(f).String())
				must(t, err)
			}
		}
	}
}

// checkPings sends 3 small and 3 packets of full size, which must arrive in one
// piece; more than the MTU must be refused.
func checkPings(t *testing.T, from *Pod, to netip.Addr) {
	t.Helper()
	headers := 20 + 8
	if to.Is6() {
		headers = 40 + 8
	}
	mtu := podMTU(from)
	must(t, from.Ping(to, 3, 56))
	must(t, from.Ping(to, 3, mtu-headers))
	_, err := from.Run("ping", "-n", "-c", "1", "-W", "0.1", "-M", "do", "-s", fmt.Sprint(mtu-headers+1), to.String())
	if err == nil || !strings.Contains(strings.ToLower(err.Error()), "message too long") {
		t.Errorf("ping from %s to %s with a byte more than the MTU of %d: %v", from.Name, to, mtu, err)
	}
}

func podMTU(p *Pod) int { return p.Result.Interfaces[len(p.Result.Interfaces)-1].Mtu }

// checkBulk moves 32 MiB by TCP, and probes at that rate.
func checkBulk(t *testing.T, rate int, from, to *Pod) {
	t.Helper()
	const size = 32 << 20
	for _, f := range families(from) {
		r, err := nettest.Transfer(from.NS, to.NS, to.Addr(f), size)
		must(t, err)
		if r.Bytes != size {
			t.Errorf("%d bytes arrived at %s, want %d", r.Bytes, to.Name, size)
		}
		t.Logf("TCP %s to %s over %s: %.0f Mbit/s", from.Name, to.Name, f, r.MbitPS)
	}
	startProbesAt(t, rate, from, to).stopAfter(t, 600)
}

// checkEgress pings the etcd host, which knows no way to pods: it is answered
// because it sees the node's address.
func checkEgress(ctx context.Context, t *testing.T, c *Cluster, from *Pod, f overlay.Family) {
	t.Helper()
	outside, node := c.Etcd.Members[0], from.Node.IPv4
	to := outside.IPv4
	if f == overlay.IPv6 {
		to, node = outside.IPv6, from.Node.IPv6
	}
	proto := map[overlay.Family]uint8{overlay.IPv4: nettest.ProtoICMP, overlay.IPv6: nettest.ProtoICMPv6}[f]
	capture, err := outside.Capture(nettest.CaptureOptions{Keep: func(f nettest.Frame) bool { return f.Proto == proto && f.Dst == to }})
	must(t, err)
	must(t, from.Ping(to, 2, 1000))
	frame, err := capture.Wait(ctx, func(f nettest.Frame) bool { return f.Length > 1000 })
	must(t, err)
	if frame.Src != node {
		t.Errorf("packets of %s reach %s from %s, want %s", from.Name, to, frame.Src, node)
	}
}

// TestDirectRouting sends packets to peers on the same link as they are.
func TestDirectRouting(t *testing.T) {
	c, _ := startCluster(t, Options{Hosts: 3, Config: strings.Replace(ConfigDual, `"Port": 4789`, `"Port": 4789, "DirectRouting": true`, 1)})
	pods := onePod(t, c)
	checkWire(t, c, pods, wire{})
	checkBulk(t, 1000, pods[0], pods[1])
}

// TestVXLANParameters uses none of the defaults but the port, which is the
// kernel's own.
func TestVXLANParameters(t *testing.T) {
	config := `{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:5::/48",
		"Backend": {"Type": "vxlan", "VNI": 42, "MTU": 1400, "GBP": true, "Learning": true}}`
	c, _ := startCluster(t, Options{Hosts: 2, Config: config})
	pods := onePod(t, c)
	checkWire(t, c, pods, wire{port: 8472, vni: 42})
	if mtu := podMTU(pods[0]); mtu != 1400-70 {
		t.Errorf("MTU of pods is %d, want 1330: 1400 without 70 for VXLAN over IPv6", mtu)
	}
	for name, mtu := range map[string]int{"flannel.42": 1350, "flannel-v6.42": 1330} {
		out := c.Nodes[0].shell(t, "ip -d link show "+name)
		for _, want := range []string{"vxlan id 42 ", "dstport 8472 ", fmt.Sprintf("mtu %d ", mtu), " gbp", "alias twill"} {
			if !strings.Contains(out, want) {
				t.Errorf("%s has no %q: %s", name, want, out)
			}
		}
		if strings.Contains(out, "nolearning") {
			t.Errorf("%s does not learn: %s", name, out)
		}
	}
}

// TestFirstPacket has a packet from afar be the first that the first pod of a node
// has to do with. Nobody may have to wait for it: the node can ask for the pod's
// MAC as soon as the pod is there.
func TestFirstPacket(t *testing.T) {
	c, _ := startCluster(t, Options{Hosts: 2, Config: ConfigDual})
	from, err := c.Nodes[0].AddPod("p1")
	must(t, err)
	for _, name := range []string{"p1", "p2"} {
		to, err := c.Nodes[1].AddPod(name)
		must(t, err)
		if out := c.Nodes[1].shell(t, "ip -6 addr show dev cni0 tentative"); out != "" {
			t.Errorf("cni0 cannot use an address yet:\n%s", out)
		}
		for _, f := range families(to) {
			out, err := from.Run("ping", "-n", "-c", "1", "-W", "5", to.Addr(f).String())
			must(t, err)
			_, took, _ := strings.Cut(out, " time=")
			took, _, _ = strings.Cut(took, "\n")
			t.Logf("%s answers its first ping over %s after %s", to.Name, f, took)
		}
	}
}
