package netctl

import (
	"cmp"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/twill-net/twill/pkg/overlay"
)

// parts finds the objects of a State by what refers to them.
type parts struct {
	links    map[string]overlay.Link
	routes   map[routeKey]overlay.Route
	nexthops map[uint32]overlay.Nexthop
	neighs   map[neighKey]overlay.Neigh
	fdb      map[fdbKey]overlay.FDB
	peers    map[peerKey]overlay.WGPeer
	allowed  map[allowedKey]overlay.WGPeer
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

type peerKey struct {
	link string
	key  overlay.WGKey
}

type allowedKey struct {
	link   string
	subnet netip.Prefix
}

func keyOf(r overlay.Route) routeKey { return routeKey{r.Dst, r.Metric} }

func index(s overlay.State) parts {
	p := parts{
		links:    byKey(s.Links, func(l overlay.Link) string { return l.Name }),
		routes:   byKey(s.Routes, keyOf),
		nexthops: byKey(s.Nexthops, func(n overlay.Nexthop) uint32 { return n.ID }),
		neighs:   byKey(s.Neighs, func(n overlay.Neigh) neighKey { return neighKey{n.Link, n.IP} }),
		fdb:      byKey(s.FDB, func(f overlay.FDB) fdbKey { return fdbKey{f.Link, f.MAC} }),
		peers:    byKey(s.WGPeers, func(w overlay.WGPeer) peerKey { return peerKey{w.Link, w.PublicKey} }),
		allowed:  map[allowedKey]overlay.WGPeer{},
	}
	for _, w := range s.WGPeers {
		for _, text := range strings.Split(w.AllowedIPs, ",") {
			if subnet, err := netip.ParsePrefix(text); err == nil { // a peer may have none
				p.allowed[allowedKey{w.Link, subnet}] = w
			}
		}
	}
	return p
}

func byKey[K comparable, T any](items []T, key func(T) K) map[K]T {
	m := make(map[K]T, len(items))
	for _, x := range items {
		m[key(x)] = x
	}
	return m
}

// path is what a packet to one destination meets on its way out of the node. A
// blackhole has no way.
type path struct {
	route   overlay.Route
	nexthop overlay.Nexthop // of the route; zero if it has none
	ways    []way           // several if the nexthop is a group
}

// way is one of the equally good ways to a destination. A zero field is a part
// that is not there, or not needed.
type way struct {
	member  overlay.Nexthop // of the group
	gateway netip.Addr
	device  string
	link    overlay.Link // the device, if it is Twill's
	neigh   overlay.Neigh
	fdb     overlay.FDB
	peer    overlay.WGPeer // whose AllowedIPs hold the destination
}

// follow goes the way of a packet from the route on.
func (s parts) follow(r overlay.Route) path {
	p := path{route: r, nexthop: s.nexthops[r.NH]}
	switch {
	case r.Blackhole:
	case r.NH == 0:
		p.ways = []way{s.way(r.Dst, r.Gateway, r.Link)}
	case p.nexthop.Group == "":
		p.ways = []way{s.way(r.Dst, p.nexthop.Gateway, p.nexthop.Link)}
	default:
		for _, text := range strings.Split(p.nexthop.Group, "/") {
			id, _ := strconv.ParseUint(text, 10, 32) // the kernel and overlay write numbers
			n := s.nexthops[uint32(id)]
			w := s.way(r.Dst, n.Gateway, n.Link)
			w.member = n
			p.ways = append(p.ways, w)
		}
	}
	return p
}

func (s parts) way(dst netip.Prefix, gateway netip.Addr, device string) way {
	w := way{gateway: gateway, device: device, link: s.links[device]}
	w.neigh = s.neighs[neighKey{device, gateway}]
	w.fdb = s.fdb[fdbKey{device, w.neigh.MAC}]
	w.peer = s.holder(device, dst)
	return w
}

// holder returns the peer that a WireGuard device chooses for a destination: the
// one whose AllowedIPs match longest.
func (s parts) holder(device string, dst netip.Prefix) overlay.WGPeer {
	if len(s.allowed) == 0 {
		return overlay.WGPeer{}
	}
	for bits := dst.Bits(); bits >= 0; bits-- {
		if w, ok := s.allowed[allowedKey{device, netip.PrefixFrom(dst.Addr(), bits).Masked()}]; ok {
			return w
		}
	}
	return overlay.WGPeer{}
}

// fault is one difference between what a path should be and what the kernel has.
type fault struct {
	part    string // link, route, nexthop, neigh, fdb, wgpeer
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
	check("route", want.route, ok, r == want.route, "→ "+target(r))
	if w := want.nexthop; w.ID != 0 {
		n, ok := s.nexthops[w.ID]
		check("nexthop", w, ok, n == w, "→ "+leadsTo(n))
	}
	for _, way := range want.ways {
		if w := way.member; w.ID != 0 {
			n, ok := s.nexthops[w.ID]
			check("nexthop via "+w.Gateway.String(), w, ok, n == w, "→ "+leadsTo(n))
		}
		if w := way.link; w.Name != "" {
			l, ok := s.links[w.Name]
			found := wrongLink(l, w)
			check("link "+w.Name, w, ok, found == "", found)
		}
		if w := way.neigh; w.Link != "" {
			n, ok := s.neighs[neighKey{w.Link, w.IP}]
			check("neigh", w, ok, n == w, "→ "+n.MAC.String())
		}
		if w := way.fdb; w.Link != "" {
			f, ok := s.fdb[fdbKey{w.Link, w.MAC}]
			check("fdb", w, ok, f == w, "→ "+f.Dst.String())
		}
		if w := way.peer; w.Link != "" {
			p, ok := s.peers[peerKey{w.Link, w.PublicKey}]
			check("wgpeer", w, ok, p == w, wrongPeer(p, w))
		}
	}
	return out
}

// target says in short where a route leads.
func target(r overlay.Route) string {
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

// leadsTo says in short where a nexthop object leads.
func leadsTo(n overlay.Nexthop) string {
	switch {
	case n.Group != "":
		return "group " + n.Group
	case n.Gateway.IsValid():
		return fmt.Sprintf("via %s dev %s", n.Gateway, n.Link)
	default:
		return "dev " + n.Link
	}
}

// wrongLink says why a device lets no packet through; empty: nothing is wrong.
func wrongLink(have, want overlay.Link) string {
	switch {
	case !have.Up:
		return "down"
	case have.Kind != want.Kind:
		return "is of kind " + string(have.Kind)
	case want.WG.Port == 0:
		return ""
	case have.WG.Port == 0:
		return "answered by no WireGuard"
	case have.WG.Port != want.WG.Port:
		return fmt.Sprintf("listens on port %d, not %d", have.WG.Port, want.WG.Port)
	case have.WG.Key != want.WG.Key:
		return "has another key, its public one is " + have.WG.Key.Public().String()
	}
	return ""
}

// wrongPeer says in what a WireGuard peer differs, and keeps its secret.
func wrongPeer(have, want overlay.WGPeer) string {
	var out []string
	if have.Endpoint != want.Endpoint {
		out = append(out, "→ "+endpointOf(have))
	}
	if have.AllowedIPs != want.AllowedIPs {
		out = append(out, "→ allowed-ips "+cmp.Or(have.AllowedIPs, "none"))
	}
	if have.PSK != want.PSK {
		out = append(out, "→ another preshared-key")
	}
	if have.Keepalive != want.Keepalive {
		out = append(out, fmt.Sprintf("→ persistent-keepalive %.0f", have.Keepalive.Seconds()))
	}
	return strings.Join(out, ", ")
}

func endpointOf(p overlay.WGPeer) string {
	if !p.Endpoint.IsValid() {
		return "no endpoint"
	}
	return p.Endpoint.String()
}

// shortKey is enough of a public key to tell it from the others in a cluster.
func shortKey(k overlay.WGKey) string { return k.String()[:8] + "…" }
