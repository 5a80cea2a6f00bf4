package speaker

import (
	"fmt"
	"testing"

	"github.com/twill-net/twill/pkg/overlay"
)

var both = []overlay.Family{overlay.IPv4, overlay.IPv6}

// TestMesh: two speakers, a BIRD and an FRR in one mesh, in both families.
func TestMesh(t *testing.T) {
	r := newRig(t, 4)
	var speakers []*speakerProcess
	for i := range 2 {
		b := r.base(i, both...)
		b.Communities = []overlay.Community{64512<<16 | 7}
		for j := range 4 {
			for _, f := range both {
				if i != j {
					b.Neighbors = append(b.Neighbors, r.node(i, j, f))
				}
			}
		}
		speakers = append(speakers, r.speaker(i, b))
	}
	var peers, frr string
	for _, f := range both {
		for j := range 4 {
			if j != 2 {
				peers += birdPeer(fmt.Sprintf("h%dv%d", j, f), r.addr(2, f), r.addr(j, f), asn, asn, "direct;", "")
			}
		}
	}
	bird := r.bird(2, birdRoutes("10.5.2.0/24", "fd00:5:0:2::/64")+peers)
	frr = "router bgp 64512\n bgp router-id 198.51.100.14\n no bgp network import-check\n"
	for j := range 3 {
		for _, f := range both {
			frr += fmt.Sprintf(" neighbor %s remote-as 64512\n", r.addr(j, f))
		}
	}
	frr += " address-family ipv4 unicast\n  network 10.5.3.0/24\n"
	for j := range 3 {
		frr += fmt.Sprintf("  no neighbor %s activate\n", r.addr(j, overlay.IPv6))
	}
	frr += " exit-address-family\n address-family ipv6 unicast\n  network fd00:5:0:3::/64\n"
	for j := range 3 {
		frr += fmt.Sprintf("  neighbor %s activate\n", r.addr(j, overlay.IPv6))
	}
	bgpd := r.frr(3, frr+" exit-address-family\n")

	for i, s := range speakers {
		var want []string
		for j := range 4 {
			for _, f := range both {
				if i != j {
					want = append(want, fmt.Sprintf("%s via %s", pods(j, f), r.addr(j, f)))
				}
			}
		}
		s.learns(want...)
	}
	for _, f := range both {
		bird.says(fmt.Sprintf("show route all %s", pods(0, f)), r.addr(0, f).String(), "(64512,7)")
		bgpd.says(fmt.Sprintf("show bgp %s", pods(1, f)), r.addr(1, f).String(), "64512:7", "valid, internal")
	}
	// Withdrawals both ways.
	b := speakers[0].want
	b.Own = b.Own[1:]
	speakers[0].set(b)
	speakers[1].learns("10.5.2.0/24 via 198.51.100.13", "10.5.3.0/24 via 198.51.100.14", "fd00:5:0:2::/64 via 2001:db8:51::13", "fd00:5:0:3::/64 via 2001:db8:51::14", "fd00:5::/64 via 2001:db8:51::11")
}
