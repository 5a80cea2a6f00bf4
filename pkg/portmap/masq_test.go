package portmap

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/twill-net/twill/pkg/overlay"
)

// A pod that is masqueraded keeps its address towards the exceptions alone; the
// others keep theirs.
func TestMasquerade(t *testing.T) {
	eachFlavour(t, func(t *testing.T, f flavour) {
		n := newNode(t, f)
		pods := []*pod{n.pod(1), n.pod(2), n.pod(3)}
		for i, c := range n.clients {
			n.listen(c, "outside", 80)
			n.sh(c, fmt.Sprintf("ip route replace 198.18.1.0/24 via %s", []string{hostAddr, otherHostAddr}[i]))
		}
		some := pods[0].entry()
		some.Masquerade = []netip.Prefix{netip.MustParsePrefix("198.18.0.0/16"), netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("fd00:52::/64")}
		all := pods[1].entry()
		all.Masquerade = []netip.Prefix{}
		for _, e := range []Entry{some, all} {
			if err := n.add(e); err != nil {
				t.Fatal(err)
			}
			n.checks(e, nil)
		}
		n.answers(pods[0].NS, "tcp", clientAddr+":80", "outside "+hostAddr)
		n.answers(pods[0].NS, "tcp", otherClientAddr+":80", "outside "+pods[0].addr)
		n.answers(pods[0].NS, "udp", "["+clientAddr6+"]:80", "outside "+hostAddr6)
		n.answers(pods[0].NS, "udp", "[fd00:52::2]:80", "outside "+pods[0].ipv6)
		n.answers(pods[1].NS, "tcp", otherClientAddr+":80", "outside "+otherHostAddr)
		n.answers(pods[2].NS, "tcp", clientAddr+":80", "outside "+pods[2].addr)
		// kube-proxy replaces the sources of packets with its mark itself.
		n.sh(n.host, "iptables -t mangle -A PREROUTING -p tcp --dport 80 -j MARK --set-mark 0x4000")
		n.answers(pods[0].NS, "tcp", clientAddr+":80", "outside "+pods[0].addr)
		for _, e := range []Entry{some, all} {
			if err := n.remove(e); err != nil {
				t.Fatal(err)
			}
		}
		n.clean()
	})
}

// A service with the same port as a host port is kube-proxy's: it comes first, and
// the source of a pod on the same node is left to it.
func TestService(t *testing.T) {
	eachFlavour(t, func(t *testing.T, f flavour) {
		n := newNode(t, f)
		n.sh(n.host, "echo 1 > /proc/sys/net/bridge/bridge-nf-call-iptables")
		web, other := n.pod(1), n.pod(2)
		n.serve(web, 80)
		n.serve(other, 80)
		const service = "198.19.0.1"
		kubeProxy := fmt.Sprintf(`
			iptables -t nat -N KUBE-SERVICES
			iptables -t nat -A KUBE-SERVICES -d %s -p tcp --dport 8080 -j DNAT --to-destination %s:80
			iptables -t nat -A KUBE-SERVICES -p tcp --dport 30080 -m addrtype --dst-type LOCAL -j DNAT --to-destination %s:80
			iptables -t nat -I PREROUTING -j KUBE-SERVICES
			iptables -t nat -I OUTPUT -j KUBE-SERVICES`, service, web.addr, other.addr)
		if f.tool == overlay.Nftables {
			kubeProxy = fmt.Sprintf(`nft -f - <<EOF
				table ip kube-proxy {
					chain services {
						ip daddr %s tcp dport 8080 dnat to %s:80
						fib daddr type local tcp dport 30080 dnat to %s:80
					}
					chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
					chain nat-output { type nat hook output priority -100; jump services; }
				}`+"\nEOF", service, web.addr, other.addr)
		}
		for _, first := range []string{"kube-proxy", "twill"} {
			entry := web.entry(tcp(8080, 80), tcp(30080, 80))
			if first == "twill" {
				if err := n.add(entry); err != nil {
					t.Fatal(err)
				}
			}
			n.sh(n.host, kubeProxy)
			if err := n.add(entry); err != nil {
				t.Fatal(err)
			}
			n.answers(other.NS, "tcp", service+":8080", "pod1 "+other.addr)
			n.answers(n.clients[0], "tcp", service+":8080", "pod1 "+clientAddr)
			n.answers(other.NS, "tcp", hostAddr+":8080", "pod1 "+gateway)
			n.answers(n.clients[0], "tcp", hostAddr+":30080", "pod2 "+clientAddr)
			n.sh(n.host, `nft delete table ip kube-proxy 2>/dev/null || {
				iptables -t nat -D PREROUTING -j KUBE-SERVICES; iptables -t nat -D OUTPUT -j KUBE-SERVICES
				iptables -t nat -F KUBE-SERVICES; iptables -t nat -X KUBE-SERVICES; }`)
			if err := n.remove(entry); err != nil {
				t.Fatal(err)
			}
		}
		n.clean()
	})
}

// What listens on 127.0.0.1 is the node's own, though pods' packets to it are no
// longer refused by the kernel (route_localnet).
func TestLoopbackGuard(t *testing.T) {
	eachFlavour(t, func(t *testing.T, f flavour) {
		n := newNode(t, f)
		web, other := n.pod(1), n.pod(2)
		n.listen(n.host, "host", 9000)
		n.sh(other.NS, `
			echo 1 > /proc/sys/net/ipv4/conf/eth0/route_localnet
			ip route del local 127.0.0.0/8 dev lo table local
			ip addr del 127.0.0.1/8 dev lo
			ip route add 127.0.0.0/8 via 198.18.1.1 src 198.18.1.3`)
		n.answers(other.NS, "tcp", "127.0.0.1:9000", "host "+other.addr) // the hole
		if err := n.add(web.entry(tcp(8080, 80))); err != nil {
			t.Fatal(err)
		}
		n.silent(other.NS, "tcp", "127.0.0.1:9000")
		n.silent(other.NS, "udp", "127.0.0.1:9000")
		n.answers(n.host, "tcp", "127.0.0.1:9000", "host 127.0.0.1")
		n.answers(other.NS, "tcp", hostAddr+":9000", "host "+other.addr)
	})
}
