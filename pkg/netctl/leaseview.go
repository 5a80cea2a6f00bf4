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
	if s.snap == nil {
		out.Leases = append(out.Leases, s.selfRow())
	}
	for _, r := range s.have.Routes {
		if !leased[r.Dst] && !r.Blackhole {
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
		Key: l.Key(), Subnets: l.All(), PublicIPs: valid(l.PublicIP, l.PublicIPv6), VTEPs: []vtep{},
		Backend: l.Backend, Reserved: l.Reserved(), Created: l.Created, Modified: l.Modified,
	}
	for _, v := range []overlay.VTEP{l.VTEP, l.VTEPv6} {
		if v.MAC != (overlay.MAC{}) {
			r.VTEPs = append(r.VTEPs, vtep{MAC: v.MAC, VNI: v.VNI})
		}
	}
	if left, ok := s.expiry[l]; ok {
		seconds := int64(left.Seconds())
		r.ExpiresIn = &seconds
	}
	r.NodeView, r.NodeDetail = j.lease(l)
	return r
}

// selfRow is the node's own lease as the daemon tells it.
func (s *sight) selfRow() leaseRow {
	self := s.self.Self
	r := leaseRow{
		Subnets: self.All(), PublicIPs: valid(self.PublicIP, self.PublicV6), VTEPs: []vtep{},
		Backend: s.self.Config.Backend.Type, NodeView: nodeSelf,
	}
	for _, mac := range []overlay.MAC{self.MAC, self.MACv6} {
		if mac != (overlay.MAC{}) {
			r.VTEPs = append(r.VTEPs, vtep{MAC: mac, VNI: s.self.Config.Backend.VXLAN.VNI})
		}
	}
	return r
}

// kernelRow tells of a subnet that only the kernel knows.
func (s *sight) kernelRow(route overlay.Route, j *judge) leaseRow {
	p := j.have.follow(route)
	r := leaseRow{Subnets: []netip.Prefix{route.Dst}, PublicIPs: []netip.Addr{}, VTEPs: []vtep{}, NodeView: nodeStale}
	if s.snap == nil {
		r.NodeView = nodeKernel
	}
	if p.neigh.Link != "" {
		r.Backend = "vxlan"
		r.VTEPs = append(r.VTEPs, vtep{MAC: p.neigh.MAC, VNI: p.link.VXLAN.VNI})
	}
	if p.fdb.Link != "" {
		r.PublicIPs = append(r.PublicIPs, p.fdb.Dst)
	}
	return r
}

// judge says what the node makes of a lease.
type judge struct {
	s          *sight
	have, want parts
	routes     map[netip.Prefix]overlay.Route
	problems   map[string][]string // reasons, by object
	used       map[string]bool     // problems that stand in a row
}

func newJudge(s *sight) *judge {
	j := &judge{
		s: s, have: index(s.have), want: index(s.want),
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
	for _, p := range l.All() {
		objects = append(objects, "route "+p.String())
	}
	for _, o := range objects {
		j.used[o] = true
		detail = append(detail, j.problems[o]...)
	}
	switch {
	case !j.s.complete():
		return nodeUnknown, nil
	case len(detail) > 0:
		return nodeProblem, detail
	case l.Subnets == j.s.self.Self.Subnets:
		return nodeSelf, nil
	case l.Backend == "" && l.Reserved():
		return nodeVacant, nil
	}
	for _, p := range l.All() {
		route, ok := j.routes[p]
		if !ok { // a family that is off
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
	case len(detail) == 0:
		return nodeOK, nil
	case l.Modified > j.s.status.Store.Revision:
		return nodePending, detail
	}
	return nodeDiffers, detail
}

// rest returns the problems that concern no lease that is shown.
func (j *judge) rest(s *sight) []overlay.Problem {
	problems := slices.Concat(s.problems, s.refused)
	if s.snap != nil && !s.complete() {
		problems = s.snap.Problems
	}
	return without(problems, func(p overlay.Problem) bool { return j.used[p.Object] })
}
