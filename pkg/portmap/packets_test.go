package portmap

import (
	"fmt"
	"net/netip"
	"testing"
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
