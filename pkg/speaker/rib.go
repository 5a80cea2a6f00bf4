package speaker

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/apiutil"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"
	"github.com/osrg/gobgp/v4/pkg/server"

	"github.com/twill-net/twill/pkg/overlay"
)

func familyOf(a netip.Addr) bgp.Family {
	if a.Is4() {
		return bgp.RF_IPv4_UC
	}
	return bgp.RF_IPv6_UC
}

// learned reads the server's table: the best paths, and how many paths are in it of
// each neighbour.
func learned(srv *server.BgpServer, b overlay.BGP) (*overlay.RIB, map[netip.Addr]uint64, error) {
	accepted := map[netip.Addr]uint64{}
	neighbors := map[netip.Addr]overlay.BGPNeighbor{}
	for _, n := range b.Neighbors {
		neighbors[n.Address] = n
	}
	rib := &overlay.RIB{}
	for _, f := range []bgp.Family{bgp.RF_IPv4_UC, bgp.RF_IPv6_UC} {
		if !slices.ContainsFunc(b.Neighbors, func(n overlay.BGPNeighbor) bool { return familyOf(n.Address) == f }) {
			continue // a table is not cheap to read, even an empty one
		}
		req := apiutil.ListPathRequest{TableType: api.TableType_TABLE_TYPE_GLOBAL, Family: f}
		err := srv.ListPath(req, func(_ bgp.NLRI, paths []*apiutil.Path) {
			for _, p := range paths {
				accepted[p.PeerAddress]++
			}
			if r, ok := route(paths, neighbors); ok {
				rib.Routes = append(rib.Routes, r)
			}
		})
		if err != nil {
			return nil, nil, fmt.Errorf("read %s routes: %w", f, err)
		}
	}
	slices.SortFunc(rib.Routes, func(x, y overlay.BGPRoute) int {
		return cmp.Or(x.Prefix.Addr().Compare(y.Prefix.Addr()), cmp.Compare(x.Prefix.Bits(), y.Prefix.Bits()))
	})
	return rib, accepted, nil
}

// route takes the best of all paths to one prefix. An announcement of our own is the
// best wherever there is one.
func route(paths []*apiutil.Path, neighbors map[netip.Addr]overlay.BGPNeighbor) (overlay.BGPRoute, bool) {
	var r overlay.BGPRoute
	for _, p := range paths {
		nlri, ok := p.Nlri.(*bgp.IPAddrPrefix)
		n, known := neighbors[p.PeerAddress]
		if !ok || !known || !p.Best {
			continue
		}
		// RFC 8950 would let an IPv4 prefix have an IPv6 next hop; a link-local one
		// says nothing without its link.
		h := nextHopOf(p)
		if h.Is4() != nlri.Prefix.Addr().Is4() || !h.IsGlobalUnicast() {
			continue
		}
		r.Prefix = nlri.Prefix
		r.Paths = append(r.Paths, overlay.BGPPath{NextHop: h, From: n.Address, Allowed: allowed(n, nlri.Prefix), Stale: p.Stale})
	}
	slices.SortFunc(r.Paths, func(x, y overlay.BGPPath) int {
		return cmp.Or(x.NextHop.Compare(y.NextHop), x.From.Compare(y.From))
	})
	return r, len(r.Paths) > 0
}

func nextHopOf(p *apiutil.Path) netip.Addr {
	for _, a := range p.Attrs {
		switch a := a.(type) {
		case *bgp.PathAttributeNextHop:
			return a.Value
		case *bgp.PathAttributeMpReachNLRI:
			return a.Nexthop
		}
	}
	return netip.Addr{}
}

// allowed reports whether an import rule of the neighbour accepts the prefix by name.
func allowed(n overlay.BGPNeighbor, p netip.Prefix) bool {
	i := slices.IndexFunc(n.Import, func(r overlay.BGPRule) bool { return r.Matches(p) })
	return i >= 0 && n.Import[i].Accept
}
