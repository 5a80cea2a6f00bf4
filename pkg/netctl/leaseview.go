package netctl

import (
	"net/netip"
	"slices"

	"github.com/twill-net/twill/pkg/overlay"
)

// leaseReport joins the cluster's view with the node's, by subnet.
func (s *sight) leaseReport() leaseReport {
	out := leaseReport{DaemonRevision: s.status.Store.Revision, Leases: []leaseRow{}, Problems: []overlay.Problem{}}
	j := newJudge(s)
	leased := map[netip.Prefix]bool{}
	if s.snap != nil {
		out.Revision = s.snap.Revision
		for _, l := range s.snap.Leases {
			out.Leases = append(out.Leases, s.leaseRow(l, j))
			for _, p := range l.All() {
				leased[p] = true
			}
		}
	}
	if s.snap == nil && s.selfErr == nil {
		out.Leases = append(out.Leases, s.selfRow())
	}
	for _, r := range s.have.Routes {
		if !leased[r.Dst] && s.nobodysRoute(r, j) {
			out.Leases = append(out.Leases, s.kernelRow(r, j))
		}
	}
	slices.SortStableFunc(out.Leases, func(a, b leaseRow) int {
		x, y := a.Subnets[0], b.Subnets[0]
		if c := x.Addr().Compare(y.Addr()); c != 0 {
			return c
		}
		return x.Bits() - y.Bits()
	})
	out.Problems = append(out.Problems, j.rest(s)...)
	return out
}

func (s *sight) leaseRow(l *overlay.Lease, j *judge) leaseRow {
	r := leaseRow{
		Key: l.Key(), Node: l.Node, Subnets: l.All(), PublicIPs: []netip.Addr{}, VTEPs: []vtep{},
		Backend: s.backendOf(l), Reserved: l.Reserved() && l.Node == "", Created: l.Created, Modified: l.Modified, unreadable: l.Err != nil,
	}
	r.publishes(l.Attrs)
	if left, ok := s.expiry[l]; ok {
		seconds := int64(left.Seconds())
		r.ExpiresIn = &seconds
	}
	r.NodeView, r.NodeDetail = j.lease(l)
	return r
}

// publishes shows what a node says of itself.
func (r *leaseRow) publishes(a overlay.Attrs) {
	r.PublicIPs = append(r.PublicIPs, valid(a.PublicIP, a.PublicIPv6)...)
	for _, v := range []overlay.VTEP{a.VTEP, a.VTEPv6} {
		if v.MAC != (overlay.MAC{}) {
			r.VTEPs = append(r.VTEPs, vtep{MAC: v.MAC, VNI: v.VNI})
		}
	}
	for _, w := range []overlay.WireGuardNode{a.WireGuard, a.WireGuardV6} {
		if w.PublicKey != (overlay.WGKey{}) {
			r.WireGuard = append(r.WireGuard, wgNode{w.PublicKey, w.Port})
		}
	}
	if b := a.BGP; b.ASNumber != 0 {
		r.BGP = &bgpNode{b.ASNumber, b.Port, b.ClusterID}
	}
}

// selfRow is the node's own lease as the daemon tells it.
func (s *sight) selfRow() leaseRow {
	r := leaseRow{
		Subnets: s.self.Self.All(), PublicIPs: []netip.Addr{}, VTEPs: []vtep{},
		Backend: s.self.Config.Backend.Type, NodeView: nodeSelf,
	}
	// The daemon runs no configuration that it cannot publish.
	attrs, _ := overlay.PublishedAttrs(s.self.Config, s.self.Self)
	r.publishes(attrs)
	return r
}

// nobodysRoute reports whether a route of Twill, which is of no lease, is a subnet
// that should not be there. Without the store it cannot be known what should: the
// routes that lead to no subnet of a peer in any case are not such.
func (s *sight) nobodysRoute(r overlay.Route, j *judge) bool {
	if r.Blackhole {
		return false
	}
	if s.snap != nil {
		_, wanted := j.want.routes[keyOf(r)]
		return s.complete() && !wanted
	}
	networks := s.self.Config.Networks()
	inside := slices.ContainsFunc(networks, func(n netip.Prefix) bool { return n.Contains(r.Dst.Addr()) && n.Bits() < r.Dst.Bits() })
	return !slices.Contains(networks, r.Dst) && (inside || j.from.source(r.Dst) != sourceBGP)
}

// kernelRow tells of a subnet that only the kernel knows.
func (s *sight) kernelRow(route overlay.Route, j *judge) leaseRow {
	r := leaseRow{Subnets: []netip.Prefix{route.Dst}, PublicIPs: []netip.Addr{}, VTEPs: []vtep{}, NodeView: nodeStale}
	if s.snap == nil {
		r.NodeView = nodeKernel
	}
	for _, w := range j.have.follow(route).ways {
		r.leads(w)
	}
	if j.from.source(route.Dst) == sourceBGP {
		r.Backend = "bgp"
	}
	return r
}

// leads shows what a way in the kernel tells of the node at its end.
func (r *leaseRow) leads(w way) {
	switch {
	case w.neigh.Link != "":
		r.Backend = "vxlan"
		r.VTEPs = append(r.VTEPs, vtep{MAC: w.neigh.MAC, VNI: w.link.VXLAN.VNI})
		r.PublicIPs = append(r.PublicIPs, valid(w.fdb.Dst)...)
	case w.peer.Link != "":
		r.Backend = "wireguard"
		r.WireGuard = append(r.WireGuard, wgNode{w.peer.PublicKey, w.peer.Endpoint.Port()})
		r.PublicIPs = append(r.PublicIPs, valid(w.peer.Endpoint.Addr())...)
	case w.device == overlay.UDPLink:
		r.Backend = "udp"
	case w.link.Kind == overlay.KindIPIP:
		r.Backend = "ipip"
		r.PublicIPs = append(r.PublicIPs, w.gateway)
	}
}

// judge says what the node makes of a lease.
type judge struct {
	s          *sight
	have, want parts
	from       origins
	routes     map[netip.Prefix]overlay.Route
	problems   map[string][]string // reasons, by object
	used       map[string]bool     // problems that stand in a row
}

func newJudge(s *sight) *judge {
	j := &judge{
		s: s, have: index(s.have), want: index(s.want), from: s.origins(),
		routes:   byKey(without(s.want.Routes, func(r overlay.Route) bool { return r.Blackhole }), func(r overlay.Route) netip.Prefix { return r.Dst }),
		problems: map[string][]string{}, used: map[string]bool{},
	}
	for _, p := range slices.Concat(s.problems, s.refused) {
		j.problems[p.Object] = append(j.problems[p.Object], p.Reason)
	}
	return j
}

func without[T any](s []T, drop func(T) bool) []T {
	return slices.DeleteFunc(slices.Clone(s), drop)
}

func (j *judge) lease(l *overlay.Lease) (view string, detail []string) {
	objects := []string{"lease " + l.Key()}
	if l.Node != "" {
		objects = append(objects, "node "+l.Node)
	}
	for _, p := range l.All() {
		objects = append(objects, "route "+p.String())
	}
	for _, o := range objects {
		j.used[o] = true
		detail = append(detail, j.problems[o]...)
	}
	switch {
	case !j.s.complete():
		return j.inKernel(l), nil
	case len(detail) > 0:
		return nodeProblem, detail
	case l.Subnets == j.s.self.Self.Subnets:
		return nodeSelf, nil
	case vacant(l):
		return nodeVacant, nil
	}
	var outside []string
	for _, p := range l.All() {
		route, ok := j.routes[p]
		if !ok {
			fine, why := j.unrouted(l, p)
			if !fine {
				detail = append(detail, why)
			} else if why != "" && !slices.Contains(outside, why) {
				outside = append(outside, why)
			}
			continue
		}
		for _, f := range j.have.faults(j.want.follow(route)) {
			text := f.String()
			if l.V6.IsValid() {
				text = overlay.FamilyOf(p.Addr()).String() + " " + text
			}
			detail = append(detail, text)
		}
	}
	switch {
	case len(detail) == 0 && len(outside) > 0:
		return nodeOutside, outside
	case len(detail) == 0:
		return nodeOK, nil
	case l.Modified > j.s.status.Store.Revision:
		return nodePending, detail
	}
	return nodeDiffers, detail
}

// inKernel is all that can be said of a lease without the daemon or the kernel.
func (j *judge) inKernel(l *overlay.Lease) string {
	for _, p := range l.All() {
		if !slices.ContainsFunc(j.s.have.Routes, func(r overlay.Route) bool { return r.Dst == p && !r.Blackhole }) {
			return nodeUnknown
		}
	}
	return nodeKernel
}

// unrouted says who leads packets to a subnet of a peer that Twill wants no route
// to; not fine: somebody should and does not.
func (j *judge) unrouted(l *overlay.Lease, p netip.Prefix) (fine bool, why string) {
	cfg := j.s.self.Config
	switch {
	case !cfg.Pool(overlay.FamilyOf(p.Addr())).Enabled(): // the family is off
		return true, ""
	case cfg.Backend.Type == "alloc":
		return true, "left to others by alloc"
	case l.Backend == "extension":
		return true, "left to the commands of extension"
	case j.s.byRouter(l) && !j.s.foreignTo(p):
		return false, noRouter + " to " + p.String()
	}
	return true, ""
}

// rest returns the problems that concern no lease that is shown.
func (j *judge) rest(s *sight) []overlay.Problem {
	problems := slices.Concat(s.problems, s.refused)
	if s.snap != nil && !s.complete() {
		problems = s.snap.Problems
	}
	return without(problems, func(p overlay.Problem) bool { return j.used[p.Object] })
}
