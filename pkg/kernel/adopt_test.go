package kernel

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

// flannelNode makes by ip(8) what flanneld makes for the peers of w.
func flannelNode(t *testing.T, w world) {
	t.Helper()
	var b strings.Builder
	for _, f := range w.families {
		l := w.link(f)
		fmt.Fprintf(&b, "ip link add %s mtu %d address %s type vxlan id %d dev %s local %s dstport %d nolearning\n",
			l.Name, l.MTU, l.MAC, l.VXLAN.VNI, l.VXLAN.Parent, l.VXLAN.Local, l.VXLAN.Port)
		own := subnet(f, 0).Addr()
		fmt.Fprintf(&b, "ip link set %s up\nip addr add %s/%d dev %s\n", l.Name, own, own.BitLen(), l.Name)
	}
	s := w.state()
	for _, n := range s.Neighs {
		fmt.Fprintf(&b, "ip neigh add %s lladdr %s dev %s nud permanent\n", n.IP, n.MAC, n.Link)
		p := subnet(overlay.FamilyOf(n.IP), 0)
		fmt.Fprintf(&b, "ip route add %s/%d via %s dev %s onlink proto boot\n", n.IP, p.Bits(), n.IP, n.Link)
	}
	for _, f := range s.FDB {
		fmt.Fprintf(&b, "bridge fdb add %s dst %s dev %s self permanent\n", f.MAC, f.Dst, f.Link)
	}
	sh(t, b.String())
}

// traffic sends packets to a pod of each of two peers in each family, as fast as
// it can, until stop. Every one must leave.
func traffic(t *testing.T) (stop func() (rounds int)) {
	t.Helper()
	var conns []net.PacketConn
	var to []netip.AddrPort
	for _, f := range []overlay.Family{overlay.IPv4, overlay.IPv6} {
		c, err := net.ListenPacket(fmt.Sprintf("udp%d", f), ":0")
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c, c)
		for peer := 1; peer <= 2; peer++ {
			to = append(to, netip.AddrPortFrom(subnet(f, peer).Addr().Next(), 9))
		}
	}
	send := func() {
		for i, c := range conns {
			if _, err := c.(*net.UDPConn).WriteToUDPAddrPort([]byte("x"), to[i]); err != nil {
				t.Errorf("packet to %s lost: %v", to[i], err)
			}
		}
	}
	send()
	end, ended, begun := make(chan struct{}), make(chan int), make(chan struct{})
	go func() {
		n := 0
		for ; ; n++ {
			select {
			case <-end:
				ended <- n
				return
			default:
				send()
			}
			if n == 0 {
				close(begun)
			}
		}
	}()
	<-begun
	return func() int {
		close(end)
		n := <-ended
		for _, c := range conns {
			c.Close()
		}
		return n
	}
}

// TestAdoption takes a node over from flannel under traffic, gives it back to
// flannel's form of routes, and takes it again: no packet may find no route, and
// nothing is deleted that is wanted.
func TestAdoption(t *testing.T) {
	inNode(t, func(k *Kernel) {
		w := dualWorld(200)
		flannelNode(t, w)
		plain := w
		plain.nexthops = false
		w.moved, w.mtu = 20, 1410
		stop := traffic(t)
		if got := kinds(reconcile(t, k, w.state())); got["overlay.Link change"] != 2 || got["overlay.Route change"] != 400 || got["overlay.Route delete"] > 0 || got["overlay.Neigh delete"] > 0 || got["overlay.Addr add"] > 0 {
			t.Errorf("adopted by %v", got)
		}
		// flanneld comes back for one peer and replaces our route.
		sh(t, `ip route replace 10.0.1.0/24 via 10.0.1.0 dev flannel.1 onlink proto boot
			ip -6 route replace fd00:5:1::/64 via fd00:5:1:: dev flannel-v6.1 onlink proto boot`)
		if got := kinds(reconcile(t, k, w.state())); got["overlay.Route change"] != 2 || len(got) != 1 {
			t.Errorf("taken back by %v", got)
		}
		// To plain routes and to direct routing, and back.
		direct := w
		direct.direct = 100
		for _, next := range []world{plain, w, direct, w, direct, plain, w} {
			reconcile(t, k, next.state())
		}
		if n := stop(); n < 100 {
			t.Errorf("only %d rounds of packets were sent meanwhile: this shows nothing", n)
		}
	})
}

// TestUnderlayRouteOverPods: a route of the underlay that covers the pod network
// makes IPv6 refuse on-link gateways within it (one of fd00::/8 to a router is
// quite usual).
func TestUnderlayRouteOverPods(t *testing.T) {
	for _, nexthops := range []bool{true, false} {
		inNode(t, func(k *Kernel) {
			sh(t, "ip -6 route add fd00::/8 via 2001:db8:0::9; ip route add 10.0.0.0/8 via 198.51.100.9")
			w := dualWorld(3)
			w.nexthops = nexthops
			reconcile(t, k, w.state())
			w.direct = 2
			reconcile(t, k, w.state())
			w.direct = 0
			reconcile(t, k, w.state())
		})
	}
}

// TestPacketsLeave looks at the packets for a world's peers on the wire: outer UDP
// to the peer's address, the VNI, and the inner frame to the peer's MAC.
func TestPacketsLeave(t *testing.T) {
	inNode(t, func(k *Kernel) {
		reconcile(t, k, dualWorld(2).state())
		sh(t, `ip neigh add 198.51.100.9 lladdr 0a:0b:00:00:00:01 dev eth0
			ip route add 198.18.0.0/16 via 198.51.100.9
			ip -6 neigh add 2001:db8:0::9 lladdr 0a:0b:00:00:00:01 dev eth0
			ip -6 route add 2001:db8:18::/48 via 2001:db8:0::9`)
		const all = 0x0300 // ETH_P_ALL in network byte order
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, all)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}); err != nil {
			t.Fatal(err)
		}
		stop := traffic(t)
		defer func() { stop() }()
		seen := map[string]bool{
			"198.18.0.1 port 8472 VNI 1 to 0a:04:00:00:00:01":     false,
			"2001:db8:18::1 port 8472 VNI 1 to 0a:06:00:00:00:01": false,
		}
		buf := make([]byte, 2048)
		for left := len(seen); left > 0; {
			n, _, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				t.Fatalf("not all seen: %v: %v", seen, err)
			}
			b := buf[:n]
			dst, udp := netip.Addr{}, 0
			switch {
			case n > 90 && native.Uint16(b[12:]) == 0x0008 && b[23] == unix.IPPROTO_UDP:
				dst, udp = addrOf(b[30:34]), 34
			case n > 90 && native.Uint16(b[12:]) == 0xdd86 && b[20] == unix.IPPROTO_UDP:
				dst, udp = addrOf(b[38:54]), 54
			default:
				continue
			}
			port, vni := int(b[udp+2])<<8|int(b[udp+3]), b[udp+14]
			what := fmt.Sprintf("%s port %d VNI %d to %s", dst, port, vni, macOf(b[udp+16:udp+22]))
			if done, expected := seen[what]; expected && !done {
				seen[what] = true
				left--
			}
		}
	})
}
