package router

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// learned returns what a router has of a prefix, with its attributes.
func (s *speakerHost) learned(p netip.Prefix) string {
	s.t.Helper()
	if s.kind == "bird" {
		return s.run("birdc", "-s", s.socket(), "show", "route", p.String(), "all")
	}
	family := "ipv4"
	if p.Addr().Is6() {
		family = "ipv6"
	}
	return s.run("vtysh", "-c", fmt.Sprintf("show bgp %s unicast %s", family, p))
}

// community is how a router prints one.
func (s *speakerHost) community(c overlay.Community) string {
	if s.kind == "bird" {
		return "(" + strings.Replace(c.String(), ":", ",", 1) + ")"
	}
	return c.String()
}

// TestReflector: nodes that do not speak to each other learn of each other by a
// reflector of either kind, and packets do not go by way of it.
func TestReflector(t *testing.T) {
	for _, kind := range kinds() {
		t.Run(kind, func(t *testing.T) {
			l := nettest.NewT(t)
			rr, a, b := newSpeakerHost(t, l, kind), newSpeakerHost(t, l, "bird"), newSpeakerHost(t, l, "frr")
			facts := rr.node(1)
			facts.ClusterID = ip("192.0.2.9")
			for _, f := range families() {
				for _, c := range []*speakerHost{a, b} {
					n := rr.to(f, c)
					n.Client = true
					facts.Neighbors = append(facts.Neighbors, n)
				}
			}
			rr.set(facts)
			for i, c := range []*speakerHost{a, b} {
				facts := c.node(i + 2)
				for _, f := range families() {
					facts.Neighbors = append(facts.Neighbors, c.to(f, rr))
				}
				c.set(facts)
			}
			for _, s := range []*speakerHost{rr, a, b} {
				s.established()
			}
			for _, f := range families() {
				a.ping(f, 2, 3)
				a.ping(f, 2, 1)
				for from, to := range map[*speakerHost]int{a: 3, b: 2} {
					eventually(t, func() error {
						if got := from.learned(subnet(f, to)); !strings.Contains(got, "192.0.2.9") {
							return fmt.Errorf("%s (%s): no cluster id in %s", from.Name, from.kind, got)
						}
						return nil
					})
				}
			}
			a.wantRoute(subnet(overlay.IPv4, 3), "via "+b.IPv4.String())
			b.wantRoute(subnet(overlay.IPv4, 2), "via "+a.IPv4.String())
		})
	}
}

// outside is what a router outside announces.
func (s *speakerHost) outside(as uint32, announce ...netip.Prefix) overlay.BGP {
	b := overlay.BGP{ASNumber: as, RouterID: s.IPv4, Port: 179, HoldTime: 90e9, RestartTime: 60e9}
	for _, p := range announce {
		b.Own = append(b.Own, overlay.BGPOwn{Prefix: p, NextHop: s.public(overlay.FamilyOf(p.Addr()))})
	}
	return b
}

// TestExternal: a node with two routers outside and another node in the mesh.
func TestExternal(t *testing.T) {
	for _, kind := range kinds() {
		t.Run(kind, func(t *testing.T) { testExternal(t, kind) })
	}
}

// externalLab is a node in a mesh with another, and routers outside: two announce
// the same, the third what it should not.
type externalLab struct {
	*testing.T
	node, other, e1, e2, evil *speakerHost
	mine                      overlay.BGP // the facts of node
}

var (
	both4, both6         = pfx("203.0.113.0/24"), pfx("2001:db8:113::/48")
	wide, hijack, inside = pfx("10.0.0.0/8"), pfx("198.51.100.8/30"), pfx("10.5.1.128/25")
)

const node100, peer7 = overlay.Community(64512<<16 | 100), overlay.Community(65001<<16 | 7)

func testExternal(t *testing.T, kind string) {
	l := nettest.NewT(t)
	x := &externalLab{
		T: t, node: newSpeakerHost(t, l, kind), other: newSpeakerHost(t, l, "bird"),
		e1: newSpeakerHost(t, l, "bird"), e2: newSpeakerHost(t, l, "frr"), evil: newSpeakerHost(t, l, "bird"),
	}
	before := x.node.run("ip", "-o", "route", "show", "default")
	x.start()
	x.withoutRules()
	for _, p := range []netip.Prefix{wide, hijack, inside} {
		x.node.wantNoRoute(p)
	}
	if now := x.node.run("ip", "-o", "route", "show", "default"); now != before {
		t.Errorf("default route was %q, is %q", before, now)
	}
	connections := x.node.connections()
	x.withRules()
	if now := x.node.connections(); !slices.Equal(now, connections) {
		t.Errorf("new rules restarted sessions: %q, then %q", connections, now)
	}
}

func (x *externalLab) start() {
	x.Helper()
	x.mine = x.node.node(1)
	x.mine.Communities = []overlay.Community{node100}
	theirs := x.other.node(2)
	outside := map[*speakerHost]overlay.BGP{
		x.e1: x.e1.outside(65001, both4, both6), x.e2: x.e2.outside(65002, both4, both6),
		x.evil: x.evil.outside(65003, wide, hijack, inside, pfx("0.0.0.0/0")),
	}
	for _, f := range families() {
		x.mine.Neighbors = append(x.mine.Neighbors, x.node.to(f, x.other))
		theirs.Neighbors = append(theirs.Neighbors, x.other.to(f, x.node))
		for host, p := range map[*speakerHost]overlay.BGPNeighbor{
			x.e1: {TTLSecurity: 1, Password: "one", Communities: []overlay.Community{peer7}}, x.e2: {Multihop: 2, Password: "two"}, x.evil: {},
		} {
			b := outside[host]
			p.Address, p.Local, p.ASNumber, p.Port = host.public(f), x.node.public(f), b.ASNumber, 179
			p.Name = "Backend.Peers " + p.Address.String()
			x.mine.Neighbors = append(x.mine.Neighbors, p)
			p.Address, p.Local, p.ASNumber, p.Communities = p.Local, p.Address, 64512, nil
			b.Neighbors = append(b.Neighbors, p)
			outside[host] = b
		}
	}
	for host, b := range outside {
		host.set(b)
	}
	x.other.set(theirs)
	x.node.set(x.mine)
	for _, s := range []*speakerHost{x.node, x.other, x.e1, x.e2, x.evil} {
		s.established()
	}
}

// withoutRules: equal ways are both used, the mesh learns them by next hop self,
// and the routers outside learn the node's own subnets.
func (x *externalLab) withoutRules() {
	x.Helper()
	for _, p := range []netip.Prefix{both4, both6} {
		eventually(x.T, func() error {
			if got := x.node.routes(p); strings.Count(got, "nexthop via") != 2 {
				return fmt.Errorf("not two ways to %s: %q", p, got)
			}
			return nil
		})
		x.other.wantRoute(p, "dev eth0")
	}
	x.other.wantRoute(both4, "via "+x.node.IPv4.String())
	for _, f := range families() {
		x.e1.wantRoute(subnet(f, 1), "dev eth0")
		x.e1.wantNoRoute(subnet(f, 2)) // of another node: it announces it itself
		eventually(x.T, func() error {
			got := x.e1.learned(subnet(f, 1))
			if !strings.Contains(got, x.e1.community(node100)) || !strings.Contains(got, x.e1.community(peer7)) {
				return fmt.Errorf("communities: %s", got)
			}
			return nil
		})
		if got := x.e2.learned(subnet(f, 1)); !strings.Contains(got, x.e2.community(node100)) || strings.Contains(got, x.e2.community(peer7)) {
			x.Errorf("communities: %s", got)
		}
	}
}

// withRules sets rules while the sessions run.
func (x *externalLab) withRules() {
	x.Helper()
	for i := range x.mine.Neighbors {
		n := &x.mine.Neighbors[i]
		switch n.Address {
		case x.e1.IPv4:
			n.Import = []overlay.BGPRule{{Prefix: both4, MinLen: 24, MaxLen: 24}, {Prefix: pfx("0.0.0.0/0"), MinLen: 0, MaxLen: 32, Accept: true}}
		case x.evil.IPv4:
			n.Import = []overlay.BGPRule{{Prefix: wide, MinLen: 8, MaxLen: 32, Accept: true}}
		case x.e2.IPv4:
			n.Export = []overlay.BGPRule{{Prefix: wide, MinLen: 8, MaxLen: 32, Accept: true}}
		case x.e2.IPv6:
			n.Export = []overlay.BGPRule{{Prefix: both6, MinLen: 48, MaxLen: 48, Accept: true}}
		}
	}
	x.node.set(x.mine)
	x.node.wantRoute(wide, "via "+x.evil.IPv4.String()) // over the own subnet, but by name
	x.node.wantRoute(both4, "via "+x.e2.IPv4.String())
	eventually(x.T, func() error { // until now it was a route with both
		if got := x.node.routes(both4); strings.Contains(got, "nexthop") {
			return fmt.Errorf("the route of a rejected neighbour is used: %s", got)
		}
		return nil
	})
	x.node.wantNoRoute(inside)   // by no rule
	x.e2.wantRoute(wide, "via ") // of evil, who is on the same link, or the node
	x.e2.wantRoute(subnet(overlay.IPv4, 1), "via "+x.node.IPv4.String())
	x.e2.wantRoute(subnet(overlay.IPv4, 2), "via ")
	x.e2.wantNoRoute(subnet(overlay.IPv6, 1))
}

// TestWrongPassword: such a session is never established, the others are.
func TestWrongPassword(t *testing.T) {
	l := nettest.NewT(t)
	a, b := newSpeakerHost(t, l, "bird"), newSpeakerHost(t, l, "frr")
	fa, fb := a.node(1), b.node(2)
	for i, f := range families() {
		na, nb := a.to(f, b), b.to(f, a)
		na.Password, nb.Password = "right", []string{"right", "wrong"}[i]
		fa.Neighbors, fb.Neighbors = append(fa.Neighbors, na), append(fb.Neighbors, nb)
	}
	a.set(fa)
	b.set(fb)
	for _, s := range []*speakerHost{a, b} {
		eventually(t, func() error {
			st, err := s.r.Status(t.Context())
			if err != nil {
				return err
			}
			if st.Sessions[0].State != "established" || st.Sessions[1].State == "established" || st.Sessions[1].Error == "" && s.kind == "frr" || st.Settled {
				return fmt.Errorf("sessions %+v", st.Sessions)
			}
			if got := st.Sessions[0]; got.Accepted != 1 || got.Announced != 1 || got.Uptime == 0 || got.Neighbor.Password != "" {
				return fmt.Errorf("session %+v", got)
			}
			return nil
		})
	}
	a.ping(overlay.IPv4, 1, 2)
	fb.Neighbors[1].Password = "right"
	b.set(fb)
	a.established()
	a.ping(overlay.IPv6, 1, 2)
}
