package speaker

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/overlay"
)

func accept(p string, maxLen int) overlay.BGPRule {
	return overlay.BGPRule{Prefix: prefix(p), MinLen: prefix(p).Bits(), MaxLen: maxLen, Accept: true}
}

func reject(p string, maxLen int) overlay.BGPRule {
	r := accept(p, maxLen)
	r.Accept = false
	return r
}

// TestRouters: a BIRD and an FRR outside, each in its own AS, tell the same prefix;
// filters and communities; a node without a session to them.
func TestRouters(t *testing.T) {
	r := newRig(t, 4)
	b := r.base(0, both...)
	for _, f := range both {
		bird, frr := r.router(0, 1, f, 65001), r.router(0, 2, f, 4200000002)
		frr.Communities = []overlay.Community{65002<<16 | 42}
		if f == overlay.IPv4 {
			bird.Import = []overlay.BGPRule{reject("203.0.113.128/25", 32), accept("203.0.113.0/24", 26), accept("0.0.0.0/0", 0)}
			frr.Export = []overlay.BGPRule{accept("10.5.0.0/16", 24)}
		} else {
			bird.Export = []overlay.BGPRule{reject("fd00:5::/64", 64), accept("::/0", 128)}
		}
		b.Neighbors = append(b.Neighbors, bird, frr, r.node(0, 3, f))
	}
	b.Communities = []overlay.Community{64512<<16 | 7}
	speaker := r.speaker(0, b)
	inner := r.base(3, both...)
	for _, f := range both {
		inner.Neighbors = append(inner.Neighbors, r.node(3, 0, f))
	}
	node := r.speaker(3, inner)
	var birdPeers string
	var frrPeers []frrPeer
	for _, f := range both {
		birdPeers += birdPeer(fmt.Sprintf("t%d", f), r.addr(1, f), r.addr(0, f), 65001, asn, "", "")
		frrPeers = append(frrPeers, frrPeer{addr: r.addr(0, f), says: []string{"remote-as 64512"}})
	}
	// 10.5.0.0/24 is the speaker's own; it must not believe it.
	bird := r.bird(1, birdRoutes("203.0.113.0/24", "203.0.113.0/26", "203.0.113.64/27", "203.0.113.192/26", "192.168.9.0/24", "0.0.0.0/0", "10.5.0.0/24", "2001:db8:77::/48")+birdPeers)
	frr := r.frr(2, frrConf(4200000002, r.hosts[2].IPv4, nil, []string{"203.0.113.0/24", "192.168.10.0/24", "2001:db8:77::/48"}, frrPeers...))

	speaker.learns("0.0.0.0/0 via 198.51.100.12 allowed", "10.5.3.0/24 via 198.51.100.14", "192.168.10.0/24 via 198.51.100.13",
		"203.0.113.0/24 via 198.51.100.12 allowed via 198.51.100.13", "203.0.113.0/26 via 198.51.100.12 allowed",
		"2001:db8:77::/48 via 2001:db8:51::12 via 2001:db8:51::13", "fd00:5:0:3::/64 via 2001:db8:51::14")
	eventually(t, "counts of a session", func() error {
		if x := speaker.session(r.addr(1, overlay.IPv4)); x.Received != 7 || x.Accepted != 3 || x.Announced != 1 {
			return fmt.Errorf("session %+v", x)
		}
		return nil
	})
	// The node reaches all of it through the speaker, and no router hears of the node.
	node.learns("0.0.0.0/0 via 198.51.100.11", "10.5.0.0/24 via 198.51.100.11", "192.168.10.0/24 via 198.51.100.11", "203.0.113.0/24 via 198.51.100.11",
		"203.0.113.0/26 via 198.51.100.11", "2001:db8:77::/48 via 2001:db8:51::11", "fd00:5::/64 via 2001:db8:51::11")
	bird.says("show route all 10.5.0.0/24", "BGP.as_path: 64512", "(64512,7)", "!(65002,42)")
	bird.says("show route", "!10.5.3.0", "!192.168.10.0", "!fd00:5:")
	frr.says("show bgp ipv4 unicast 10.5.0.0/24", "64512:7", "65002:42", "valid, external")
	frr.says("show bgp ipv4 unicast", "!10.5.3.0", "!203.0.113.64")
	frr.says("show bgp ipv6 unicast fd00:5::/64", "65002:42")

	// Filters change under the sessions.
	for i := range b.Neighbors {
		switch b.Neighbors[i].Address {
		case r.addr(1, overlay.IPv4):
			b.Neighbors[i].Import = []overlay.BGPRule{accept("192.168.9.0/24", 24)}
		case r.addr(1, overlay.IPv6):
			b.Neighbors[i].Export = nil
		case r.addr(2, overlay.IPv4):
			b.Neighbors[i].Export = []overlay.BGPRule{reject("0.0.0.0/0", 32)}
		}
	}
	before := speaker.report().Status.Sessions
	speaker.set(b)
	speaker.learns("10.5.3.0/24 via 198.51.100.14", "192.168.9.0/24 via 198.51.100.12 allowed", "192.168.10.0/24 via 198.51.100.13", "203.0.113.0/24 via 198.51.100.13",
		"2001:db8:77::/48 via 2001:db8:51::12 via 2001:db8:51::13", "fd00:5:0:3::/64 via 2001:db8:51::14")
	bird.says("show route", "fd00:5::/64")
	frr.says("show bgp ipv4 unicast", "!10.5.0.0")
	for i, x := range speaker.report().Status.Sessions {
		if x.Since != before[i].Since || x.State != "established" {
			t.Errorf("session %s was disturbed by filters", x.Neighbor.Address)
		}
	}
}

// TestHops: a router that is not on the link. Packets to it pass another host.
func TestHops(t *testing.T) {
	for _, f := range both {
		t.Run(f.String(), func(t *testing.T) {
			r := newRig(t, 3)
			far, bits, proto := ip("203.0.113.9"), 32, "-4"
			if f == overlay.IPv6 {
				far, bits, proto = ip("2001:db8:9::9"), 128, "-6"
			}
			there := netip.PrefixFrom(far, bits)
			r.run(2, fmt.Sprintf("ip addr add %s dev lo", there))
			r.run(1, "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.eth0.send_redirects=0")
			r.run(1, fmt.Sprintf("ip %s route add %s via %s", proto, there, r.addr(2, f)))
			r.run(0, fmt.Sprintf("ip %s route add %s via %s", proto, there, r.addr(1, f)))
			r.run(0, "sysctl -qw net.ipv6.conf.eth0.accept_redirects=0 net.ipv4.conf.eth0.accept_redirects=0")
			back := netip.PrefixFrom(r.addr(0, f), bits)
			r.run(2, fmt.Sprintf("ip %s route add %s via %s", proto, back, r.addr(1, f)))
			n := r.router(0, 2, f, 65001)
			n.Address, n.Name = far, "Backend.Peers "+far.String()
			b := r.base(0, f)
			set := func(multihop, security uint8) overlay.BGP {
				c := b
				n.Multihop, n.TTLSecurity = multihop, security
				c.Neighbors = []overlay.BGPNeighbor{n}
				return c
			}
			peer := func(more string) string { return birdPeer("t", far, r.addr(0, f), 65001, asn, more, "") }
			bird := r.bird(2, peer("multihop 2;"))
			// One hop too few: the packets die on the way.
			s := r.speaker(0, set(0, 0))
			s.fails(far, "more hops away than Multihop (1)")
			bird.says("show protocols t", "!Established")
			// It holds on to half a session until its hold timer ends; a new one does not.
			renew := func(b overlay.BGP) {
				t.Helper()
				if err := bird.Kill9(); err != nil {
					t.Fatal(err)
				}
				s.set(b)
				if err := bird.Start(); err != nil {
					t.Fatal(err)
				}
				s.established(far)
			}
			renew(set(2, 0))
			if err := bird.Term(); err != nil {
				t.Fatal(err)
			}

			// RFC 5082: both ends send with 255 and refuse less than they were told.
			bird = r.bird(2, peer("multihop 2; ttl security on;"))
			s.set(set(0, 1))
			s.fails(far, "more hops away than TTLSecurity (1)")
			renew(set(0, 2))
		})
	}
}

// TestPassword: RFC 2385 with a BIRD, an FRR and a speaker, in both families.
func TestPassword(t *testing.T) {
	r := newRig(t, 4)
	const right, wrong = "s3cret", "secret"
	b := r.base(0, both...)
	var birdPeers string
	var frrPeers []frrPeer
	other := r.base(3, both...)
	for _, f := range both {
		for j := 1; j < 4; j++ {
			n := r.node(0, j, f)
			n.Password = right
			b.Neighbors = append(b.Neighbors, n)
		}
		n := r.node(3, 0, f)
		n.Password = right
		other.Neighbors = append(other.Neighbors, n)
		birdPeers += birdPeer(fmt.Sprintf("t%d", f), r.addr(1, f), r.addr(0, f), asn, asn, fmt.Sprintf("direct; password %q;", right), "")
		frrPeers = append(frrPeers, frrPeer{addr: r.addr(0, f), says: []string{"remote-as 64512", "password " + right}})
	}
	s := r.speaker(0, b)
	r.bird(1, birdPeers)
	r.frr(2, frrConf(asn, r.hosts[2].IPv4, nil, nil, frrPeers...))
	o := r.speaker(3, other)
	for _, f := range both {
		for j := 1; j < 4; j++ {
			s.established(r.addr(j, f))
		}
	}
	if log, err := s.Output(); err != nil || strings.Contains(log, right) {
		t.Errorf("the password is in the log (%v)", err)
	}
	for _, x := range s.report().Status.Sessions {
		if x.Neighbor.Password != "" {
			t.Error("the password is in the status")
		}
	}
	// Another password at one end, then none, then the right one again. The other
	// sessions do not notice.
	for i, p := range []string{wrong, "", right} {
		for k := range other.Neighbors {
			other.Neighbors[k].Password = p
		}
		o.set(other)
		for _, f := range both {
			a, far := r.addr(3, f), r.addr(0, f)
			switch i {
			case 0:
				s.fails(a, "check that both ends have the same; this node's kernel has dropped")
				o.fails(far, "A password is set")
			case 1:
				s.fails(a, "A password is set: check that both ends have the same")
				o.fails(far, "no answer")
			default:
				s.established(a)
			}
		}
	}
	for _, x := range s.report().Status.Sessions {
		if a := x.Neighbor.Address; a != r.addr(3, overlay.IPv4) && a != r.addr(3, overlay.IPv6) && x.Flaps > 0 {
			t.Errorf("session to %s was disturbed", a)
		}
	}
}
