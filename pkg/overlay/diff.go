package overlay

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Verb says what an Op does.
type Verb uint8

// The verbs.
const (
	Add Verb = iota + 1
	Change
	Delete
)

func (v Verb) String() string {
	return [...]string{"?", "add", "change", "delete"}[v]
}

// Object is one of Link, Addr, Nexthop, Route, Neigh, FDB, WGPeer, Sysctl and Chain.
type Object = fmt.Stringer

// Op is one change to the kernel. Before is what Change and Delete find there.
type Op struct {
	Verb   Verb
	Object Object
	Before Object
}

// String prints the change as the operator would type it, more or less:
// "route add 10.5.1.0/24 nhid 1409286145 proto 84".
func (o Op) String() string {
	noun, rest, _ := strings.Cut(o.Object.String(), " ")
	return fmt.Sprintf("%s %s %s", noun, o.Verb, rest)
}

// Plan is a list of changes in the order in which they must be made: what others
// depend on first, and everything new before anything old is removed.
type Plan []Op

func (p Plan) String() string {
	var b strings.Builder
	for _, op := range p {
		fmt.Fprintln(&b, op)
	}
	return b.String()
}

// KeepRoutes leaves out of p what would take a route away.
func (p Plan) KeepRoutes() Plan {
	return slices.DeleteFunc(p, func(op Op) bool {
		switch op.Object.(type) {
		case Route, Nexthop:
			return op.Verb == Delete
		}
		return false
	})
}

// Diff returns the changes that turn have into want. Both must be normalized.
// What is foreign stays: a stranger at one of our keys is a Problem. A stranger's
// link under our name blocks the whole plan, since all else stands on it.
func Diff(have, want State) (Plan, []Problem) {
	if p := foreignLinks(have.Links, want.Links); len(p) > 0 {
		return nil, p
	}
	have = withoutLost(withoutStrangers(have, want), want)
	have, want, problems := adopt(have, want)

	var fresh, stale Plan
	compareAll(&fresh, &stale, have.Sysctls, want.Sysctls, Sysctl.compare, func(h, w Sysctl) bool { return w.satisfiedBy(h.Value) })
	// accept_ra=2 comes before forwarding=1, which makes the kernel drop the
	// default routes it has learned from router advertisements.
	slices.SortStableFunc(fresh, func(a, b Op) int {
		return cmp.Compare(b.Object.(Sysctl).When, a.Object.(Sysctl).When)
	})
	compareAll(&fresh, &stale, have.Links, want.Links, Link.compare, same)
	compareAll(&fresh, &stale, have.Chains, want.Chains, Chain.compare, func(h, w Chain) bool { return h.Hash == w.Hash })
	compareAll(&fresh, &stale, have.Addrs, want.Addrs, Addr.compare, same)
	have.WGPeers = withoutKept(have.WGPeers, want)
	compareAll(&fresh, &stale, have.WGPeers, want.WGPeers, WGPeer.compare, same)
	// A nexthop that moves to a VXLAN device takes its routes along at once: the
	// gateway must be known there before.
	compareAll(&fresh, &stale, have.Neighs, want.Neighs, Neigh.compare, same)
	compareAll(&fresh, &stale, have.FDB, want.FDB, FDB.compare, same)
	compareAll(&fresh, &stale, have.Nexthops, want.Nexthops, Nexthop.compare, same)
	compareAll(&fresh, &stale, have.Routes, want.Routes, Route.compare, same)
	slices.Reverse(stale)
	return append(fresh, stale...), problems
}

func same[T comparable](a, b T) bool { return a == b }

// compareAll walks two slices sorted by key.
func compareAll[T Object](fresh, stale *Plan, have, want []T, key func(a, b T) int, equal func(have, want T) bool) {
	for len(have) > 0 || len(want) > 0 {
		order := 0
		switch {
		case len(have) == 0:
			order = 1
		case len(want) == 0:
			order = -1
		default:
			order = key(have[0], want[0])
		}
		switch {
		case order < 0:
			if _, isSysctl := Object(have[0]).(Sysctl); !isSysctl { // sysctls are set, never taken back
				*stale = append(*stale, Op{Verb: Delete, Object: have[0], Before: have[0]})
			}
			have = have[1:]
		case order > 0:
			*fresh = append(*fresh, Op{Verb: Add, Object: want[0]})
			want = want[1:]
		default:
			if !equal(have[0], want[0]) {
				*fresh = append(*fresh, Op{Verb: Change, Object: want[0], Before: have[0]})
			}
			have, want = have[1:], want[1:]
		}
	}
}

// Ours reports whether the link carries Twill's alias.
func (a Link) Ours() bool { return a.Alias == Alias }

// Recreate reports whether a link must be deleted and made anew to become w: the
// kernel cannot change a link's kind, nor a VXLAN device's VNI, port or GBP flag.
func (a Link) Recreate(w Link) bool {
	return a.Kind != w.Kind || a.VXLAN.VNI != w.VXLAN.VNI || a.VXLAN.Port != w.VXLAN.Port || a.VXLAN.GBP != w.VXLAN.GBP
}

// CheckLinks names the interfaces of others that stand where the backend's own
// devices have to be. have are those that may be ours or flannel's, ifaces all.
func CheckLinks(c Config, have []Link, ifaces []Iface) []Problem {
	want := c.ownLinks()
	out := foreignLinks(have, want)
	for _, w := range want {
		if slices.ContainsFunc(ifaces, func(i Iface) bool { return i.Name == w.Name }) &&
			!slices.ContainsFunc(have, func(h Link) bool { return h.Name == w.Name }) {
			out = append(out, Problem{Object: "link " + w.Name, Reason: fmt.Sprintf("exists and is not of kind %s", w.Kind), Remedy: "remove it (ip link delete " + w.Name + ")"})
		}
	}
	return out
}

// ownLinks returns the devices that the configured backend will make.
func (c Config) ownLinks() []Link {
	var out []Link
	for _, f := range c.families() {
		l := Link{Kind: KindTUN}
		switch c.Backend.Type {
		case "vxlan":
			v := c.Backend.VXLAN
			l = Link{Name: VXLANLink(f, v.VNI), Kind: KindVXLAN, VXLAN: VXLAN{VNI: v.VNI, Port: v.Port, GBP: v.GBP}}
		case "udp":
			l.Name = UDPLink
		case "ipip":
			l = Link{Name: IPIPLink, Kind: KindIPIP}
		default:
			return nil
		}
		if !slices.Contains(out, l) {
			out = append(out, l)
		}
	}
	return out
}

// foreignLinks names the links that bear a wanted name but are neither ours nor
// flannel's with the same VNI and port.
func foreignLinks(have, want []Link) []Problem {
	var out []Problem
	for _, w := range want {
		i := slices.IndexFunc(have, func(h Link) bool { return h.Name == w.Name })
		if i < 0 || have[i].Ours() || !have[i].Recreate(w) {
			continue
		}
		h := have[i].VXLAN
		if have[i].Kind != w.Kind {
			out = append(out, Problem{Object: "link " + w.Name, Reason: fmt.Sprintf("exists, is not Twill's, and is of kind %s, not %s", have[i].Kind, w.Kind), Remedy: "remove it (ip link delete " + w.Name + ")"})
			continue
		}
		out = append(out, Problem{
			Object: "link " + w.Name,
			Reason: fmt.Sprintf("exists, is not Twill's, and has VNI %d, port %d, GBP %t where the configuration says VNI %d, port %d, GBP %t",
				h.VNI, h.Port, h.GBP, w.VXLAN.VNI, w.VXLAN.Port, w.VXLAN.GBP),
			Remedy: fmt.Sprintf("remove it (ip link delete %s) or set Backend.VNI and Backend.Port to its values", w.Name),
		})
	}
	return out
}

// withoutStrangers leaves out of have the links that are neither wanted nor ours
// (flannel's of another VNI) and what is on them. Their routes join the foreign
// ones.
func withoutStrangers(have, want State) State {
	stranger := map[string]bool{}
	for _, h := range have.Links {
		if !h.Ours() && !slices.ContainsFunc(want.Links, func(w Link) bool { return w.Name == h.Name }) {
			stranger[h.Name] = true
		}
	}
	if len(stranger) == 0 {
		return have
	}
	isForeign := func(r Route) bool { return stranger[r.Link] && r.Protocol != Protocol }
	have.Foreign = slices.Clone(have.Foreign)
	for _, r := range have.Routes {
		if isForeign(r) {
			have.Foreign = append(have.Foreign, r)
		}
	}
	have.Routes = without(have.Routes, isForeign)
	have.Links = without(have.Links, func(l Link) bool { return stranger[l.Name] })
	have.Addrs = without(have.Addrs, func(a Addr) bool { return stranger[a.Link] })
	have.Neighs = without(have.Neighs, func(n Neigh) bool { return stranger[n.Link] })
	have.FDB = without(have.FDB, func(f FDB) bool { return stranger[f.Link] })
	have.WGPeers = without(have.WGPeers, func(p WGPeer) bool { return stranger[p.Link] })
	return have
}

// withoutKept leaves out of have the peers that nobody wants and that stay.
func withoutKept(have []WGPeer, want State) []WGPeer {
	if len(want.KeepPeers) == 0 {
		return have
	}
	return without(have, func(p WGPeer) bool {
		_, wanted := slices.BinarySearchFunc(want.WGPeers, p, WGPeer.compare)
		return !wanted && slices.Contains(want.KeepPeers, p.Link)
	})
}

// withoutLost leaves out of have what the link changes of this very plan will
// make the kernel drop: everything on a link that is made anew, and the
// neighbours of one whose MAC changes. (A link that is down has lost its routes
// and neighbours already.)
func withoutLost(have, want State) State {
	for _, w := range want.Links {
		i := slices.IndexFunc(have.Links, func(h Link) bool { return h.Name == w.Name })
		if i < 0 {
			continue
		}
		h := have.Links[i]
		if h.Recreate(w) {
			have.Addrs = without(have.Addrs, func(a Addr) bool { return a.Link == w.Name })
			have.FDB = without(have.FDB, func(f FDB) bool { return f.Link == w.Name })
			have.WGPeers = without(have.WGPeers, func(p WGPeer) bool { return p.Link == w.Name })
			gone := map[uint32]bool{}
			for _, n := range have.Nexthops {
				if n.Link == w.Name {
					gone[n.ID] = true
				}
			}
			have.Nexthops = without(have.Nexthops, func(n Nexthop) bool { return n.Link == w.Name })
			have.Routes = without(have.Routes, func(r Route) bool { return r.Link == w.Name || gone[r.NH] })
		}
		if h.Recreate(w) || h.MAC != w.MAC {
			have.Neighs = without(have.Neighs, func(n Neigh) bool { return n.Link == w.Name })
		}
	}
	return have
}

func without[T any](s []T, drop func(T) bool) []T {
	return slices.DeleteFunc(slices.Clone(s), drop)
}

// adopt settles the places where a stranger's route stands. One to the same
// gateway was left by flannel: it counts as ours, and changes into ours in one
// step. Any other is a Problem, and its place is left as it is.
func adopt(have, want State) (State, State, []Problem) {
	var adopted []Route
	var problems []Problem
	blocked := map[Route]bool{}
	for _, f := range have.Foreign {
		i, clash := slices.BinarySearchFunc(want.Routes, f, Route.compare)
		if !clash {
			continue
		}
		_, both := slices.BinarySearchFunc(have.Routes, f, Route.compare)
		if !both && f.Gateway.IsValid() && f.Gateway == want.gateway(want.Routes[i]) {
			adopted = append(adopted, f)
			continue
		}
		blocked[routeKey(f)] = true
		problems = append(problems, Problem{
			Object: "route " + f.Dst.String(),
			Reason: fmt.Sprintf("another program's route stands at the same place: %s", f),
			Remedy: fmt.Sprintf("remove it (ip route delete %s proto %d), then Twill adds its own", f.Dst, f.Protocol),
		})
	}
	if len(blocked) > 0 {
		isBlocked := func(r Route) bool { return blocked[routeKey(r)] }
		have.Routes, want.Routes = without(have.Routes, isBlocked), without(want.Routes, isBlocked)
		adopted = slices.DeleteFunc(adopted, isBlocked)
	}
	if len(adopted) > 0 {
		have.Routes = slices.Concat(have.Routes, adopted)
		slices.SortFunc(have.Routes, Route.compare)
	}
	return have, want, problems
}

func routeKey(r Route) Route { return Route{Dst: r.Dst, Metric: r.Metric} }

// gateway is where a route leads, by its nexthop object if it has one.
func (s *State) gateway(r Route) netip.Addr {
	if r.NH == 0 {
		return r.Gateway
	}
	i, ok := slices.BinarySearchFunc(s.Nexthops, Nexthop{ID: r.NH}, Nexthop.compare)
	if !ok {
		return netip.Addr{}
	}
	return s.Nexthops[i].Gateway
}
