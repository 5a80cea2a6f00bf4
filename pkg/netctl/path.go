package netctl

import (
	"fmt"
	"net/netip"

	"github.com/twill-net/twill/pkg/overlay"
)

// parts finds the objects of a State by what refers to them.
type parts struct {
	links    map[string]overlay.Link
	routes   map[routeKey]overlay.Route
	nexthops map[uint32]overlay.Nexthop
	neighs   map[neighKey]overlay.Neigh
	fdb      map[fdbKey]overlay.FDB
}

type routeKey struct {
	dst    netip.Prefix
	metric uint32
}

type neighKey struct {
	link string
	ip   netip.Addr
}

type fdbKey struct {
	link string
	mac  overlay.MAC
}

func keyOf(r overlay.Route) routeKey { return routeKey{r.Dst, r.Metric} }

func index(s overlay.State) parts {
	return parts{
		links:    byKey(s.Links, func(l overlay.Link) string { return l.Name }),
		routes:   byKey(s.Routes, keyOf),
		nexthops: byKey(s.Nexthops, func(n overlay.Nexthop) uint32 { return n.ID }),
		neighs:   byKey(s.Neighs, func(n overlay.Neigh) neighKey { return neighKey{n.Link, n.IP} }),
		fdb:      byKey(s.FDB, func(f overlay.FDB) fdbKey { return fdbKey{f.Link, f.MAC} }),
	}
}

func byKey[K comparable, T any](items []T, key func(T) K) map[K]T {
	m := make(map[K]T, len(items))
	for _, x := range items {
		m[key(x)] = x
	}
	return m
}

// path is what a packet to one destination meets on its way out of the node. A
// zero field is a part that is not there, or not needed.
type path struct {
	route   overlay.Route
	link    overlay.Link
	nexthop overlay.Nexthop
	neigh   overlay.Neigh
	fdb     overlay.FDB
}

// follow goes the way of a packet from the route on.
func (s parts) follow(r overlay.Route) path {
	p := path{route: r, nexthop: s.nexthops[r.NH]}
	p.link = s.links[p.device()]
	p.neigh = s.neighs[neighKey{p.device(), p.gateway()}]
	p.fdb = s.fdb[fdbKey{p.device(), p.neigh.MAC}]
	return p
}

func (p path) gateway() netip.Addr {
	if p.route.NH != 0 {
		return p.nexthop.Gateway
	}
	return p.route.Gateway
}

func (p path) device() string {
	if p.route.NH != 0 {
		return p.nexthop.Link
	}
	return p.route.Link
}

// fault is one difference between what a path should be and what the kernel has.
type fault struct {
	part    string // link, route, nexthop, neigh, fdb
	missing bool
	found   string // what is there instead: "→ 203.0.113.9", "down"
	want    string // the object as it should be, in ip(8) words
}

// String is short enough for a table: "neigh missing", "fdb → 203.0.113.9".
func (f fault) String() string {
	if f.missing {
		return f.part + " missing"
	}
	return f.part + " " + f.found
}

// faults compares the wanted path with the kernel, in the order in which a packet
// meets the parts.
func (s parts) faults(want path) []fault {
	var out []fault
	check := func(part string, want fmt.Stringer, there, same bool, found string) {
		if !there || !same {
			out = append(out, fault{part: part, missing: !there, found: found, want: want.String()})
		}
	}
	r, ok := s.routes[keyOf(want.route)]
	check("route", want.route, ok, r == want.route, "→ "+s.target(r))
	if w := want.nexthop; w.ID != 0 {
		n, ok := s.nexthops[w.ID]
		check("nexthop", w, ok, n == w, fmt.Sprintf("→ via %s dev %s", n.Gateway, n.Link))
	}
	if w := want.link; w.Name != "" {
		l, ok := s.links[w.Name]
		check("link "+w.Name, w, ok, l.Up, "down")
	}
	if w := want.neigh; w.Link != "" {
		n, ok := s.neighs[neighKey{w.Link, w.IP}]
		check("neigh", w, ok, n == w, "→ "+n.MAC.String())
	}
	if w := want.fdb; w.Link != "" {
		f, ok := s.fdb[fdbKey{w.Link, w.MAC}]
		check("fdb", w, ok, f == w, "→ "+f.Dst.String())
	}
	return out
}

// target says in short where a route leads.
func (s parts) target(r overlay.Route) string {
	switch {
	case r.Blackhole:
		return "blackhole"
	case r.NH != 0:
		return fmt.Sprintf("nhid %d", r.NH)
	case r.Gateway.IsValid():
		return fmt.Sprintf("via %s dev %s", r.Gateway, r.Link)
	default:
		return "dev " + r.Link
	}
}
