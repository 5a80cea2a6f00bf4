package portmap

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/nettest"
)

// Every protocol and family reaches the pod from everywhere, and the pod sees the
// client's own address wherever the answer finds back by itself.
func TestPackets(t *testing.T) {
	for _, f := range flavours() {
		for _, bridgeNF := range []int{0, 1} {
			t.Run(fmt.Sprintf("%s/bridge-nf-%d", f.name, bridgeNF), func(t *testing.T) {
				n := newNode(t, f)
				n.sh(n.host, fmt.Sprintf(`for f in iptables ip6tables; do
					echo %d > /proc/sys/net/bridge/bridge-nf-call-$f; done`, bridgeNF))
				web, other := n.pod(1), n.pod(2)
				n.serve(web, 80)
				n.serve(web, 443)
				var ms []Mapping
				for _, p := range protocols() {
					ms = append(
						ms, Mapping{HostPort: 8080, ContainerPort: 80, Protocol: p},
						Mapping{HostPort: 8443, ContainerPort: 443, Protocol: p, HostIP: netip.MustParseAddr(hostAddr)},
						Mapping{HostPort: 8443, ContainerPort: 443, Protocol: p, HostIP: netip.MustParseAddr(hostAddr6)},
					)
				}
				e := web.entry(ms...)
				if err := n.add(e); err != nil {
					t.Fatal(err)
				}
				for _, p := range protocols() {
					t.Run(p, func(t *testing.T) {
						n := *n
						n.t = t
						n.everywhere(p, web, other)
					})
				}
				if err := n.remove(e); err != nil {
					t.Fatal(err)
				}
				for _, p := range protocols() {
					n.silent(n.clients[0], p, hostAddr+":8080")
					n.silent(n.clients[0], p, "["+hostAddr6+"]:8080")
				}
				n.clean()
			})
		}
	}
}

func (n *node) everywhere(p string, web, other *pod) {
	n.t.Helper()
	for _, port := range []string{"8080", "8443"} {
		v4, v6 := hostAddr+":"+port, "["+hostAddr6+"]:"+port
		n.answers(n.clients[0], p, v4, "pod1 "+clientAddr)
		n.answers(n.clients[0], p, v6, "pod1 "+clientAddr6)
		n.answers(n.clients[1], p, v4, "pod1 "+otherClientAddr)
		for _, from := range []*pod{other, web} { // another pod, and the pod itself
			n.answers(from.NS, p, v4, "pod1 "+gateway)
			n.answers(from.NS, p, v6, "pod1 "+gateway6)
		}
		n.answers(n.host, p, v4, "pod1 "+hostAddr)
		n.answers(n.host, p, v6, "pod1 "+hostAddr6)
	}
	n.answers(n.host, p, "127.0.0.1:8080", "pod1 "+gateway)
	n.answers(n.clients[1], p, otherHostAddr+":8080", "pod1 "+otherClientAddr)
	n.answers(other.NS, p, gateway+":8080", "pod1 "+gateway)
	// Another address of the node than the mapping's, and other ports.
	n.silent(n.clients[1], p, otherHostAddr+":8443")
	n.silent(n.host, p, "127.0.0.1:8443")
	n.silent(n.clients[0], p, hostAddr+":80")
	// A packet that only passes through the node is nobody's.
	n.silent(other.NS, p, clientAddr+":8080")
}

// Where every pod has its own link, only the pod itself needs another source.
func TestRoutedPods(t *testing.T) {
	eachFlavour(t, func(t *testing.T, f flavour) {
		n := newNode(t, f)
		n.sh(n.host, "ip route add default via "+clientAddr) // proxy ARP answers for what has a route elsewhere
		web, other := n.routedPod(1), n.routedPod(2)
		n.serve(web, 80)
		e := web.entry(tcp(8080, 80), Mapping{HostPort: 8080, ContainerPort: 80, Protocol: "udp"})
		e.Local = nil
		for _, a := range e.Addrs {
			e.Local = append(e.Local, netip.PrefixFrom(a, a.BitLen()))
		}
		if err := n.add(e); err != nil {
			t.Fatal(err)
		}
		for _, p := range []string{"tcp", "udp"} {
			v4, v6 := hostAddr+":8080", "["+hostAddr6+"]:8080"
			n.answers(n.clients[0], p, v4, "pod1 "+clientAddr)
			n.answers(n.clients[0], p, v6, "pod1 "+clientAddr6)
			n.answers(other.NS, p, v4, "pod1 "+other.addr)
			n.answers(other.NS, p, v6, "pod1 "+other.ipv6)
			n.answers(n.host, p, v4, "pod1 "+hostAddr)
			n.answers(n.host, p, v6, "pod1 "+hostAddr6)
			// The link has no address, so the source is one of the node's others.
			for _, from := range []struct {
				*nettest.NS
				to string
			}{{web.NS, v4}, {web.NS, v6}, {n.host, "127.0.0.1:8080"}} {
				got, err := ask(from.NS, p, from.to)
				if err != nil || !strings.HasPrefix(got, "pod1 ") || strings.Contains(got, web.addr) || strings.Contains(got, web.ipv6) || strings.Contains(got, "127.") {
					t.Errorf("%s from %s to %s: %q, %v", p, from.Name, from.to, got, err)
				}
			}
		}
		if err := n.remove(e); err != nil {
			t.Fatal(err)
		}
		n.clean()
	})
}

// routedPod is a pod whose gateway is the node itself, on a link of its own.
func (n *node) routedPod(number int) *pod {
	n.t.Helper()
	p := &pod{NS: n.namespace(fmt.Sprintf("pod%d", number)), number: number}
	p.addr, p.ipv6 = fmt.Sprintf("198.18.2.%d", number+1), fmt.Sprintf("fd00:18:0:2::%d", number+1)
	n.sh(n.host, fmt.Sprintf(`
		link=veth%d
		ip link add $link type veth peer name eth0 netns %s
		ip addr add fe80::1/64 dev $link nodad
		ip link set $link up
		ip route add %s dev $link
		ip -6 route add %s dev $link
		echo 1 > /proc/sys/net/ipv4/conf/$link/proxy_arp
		echo 0 > /proc/sys/net/ipv4/neigh/$link/proxy_delay
		echo 1 > /proc/sys/net/ipv4/conf/$link/route_localnet`, number, filepath.Base(p.Path), p.addr, p.ipv6))
	n.sh(p.NS, fmt.Sprintf(`
		ip link set eth0 up
		ip addr add %s/32 dev eth0
		ip addr add %s/128 dev eth0 nodad
		ip route add 169.254.1.1 dev eth0
		ip route add default via 169.254.1.1
		ip -6 route add default via fe80::1 dev eth0`, p.addr, p.ipv6))
	return p
}
