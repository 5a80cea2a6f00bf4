package overlay

import (
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

// Object is one of Link, Addr, Nexthop, Route, Neigh, FDB, Sysctl and Chain.
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

// Diff returns the changes that turn have into want. Both must be normalized.
// What is foreign stays: a stranger at one of our keys is a Problem. A stranger's
// link under our name blocks the whole plan, since all else stands on it.
func Diff(have, want State) (Plan, []Problem) {
	if p := foreignLinks(have.Links, want.Links); len(p) > 0 {
		return nil, p
	}
	have = withoutLost(have, want)
	routes, problems := adoptable(have, want)

	var fresh, stale Plan
	compareAll(&fresh, &stale, have.Sysctls, want.Sysctls, Sysctl.compare, func(h, w Sysctl) bool { return w.satisfiedBy(h.Value) })
	compareAll(&fresh, &stale, have.Links, want.Links, Link.compare, same)
	compareAll(&fresh, &stale, have.Chains, want.Chains, Chain.compare, func(h, w Chain) bool { return h.Hash == w.Hash })
	compareAll(&fresh, &stale, have.Addrs, want.Addrs, Addr.compare, same)
	compareAll(&fresh, &stale, have.Nexthops, want.Nexthops, Nexthop.compare, same)
	compareAll(&fresh, &stale, have.Neighs, want.Neighs, Neigh.compare, same)
	compareAll(&fresh, &stale, have.FDB, want.FDB, FDB.compare, same)
	compareAll(&fresh, &stale, have.Routes, routes, Route.compare, same)
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
// kernel cannot change a VXLAN device's VNI, port or GBP flag.
func (a Link) Recreate(w Link) bool {
	return a.VXLAN.VNI != w.VXLAN.VNI || a.VXLAN.Port != w.VXLAN.Port || a.VXLAN.GBP != w.VXLAN.GBP
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
		out = append(out, Problem{
			Object: "link " + w.Name,
			Reason: fmt.Sprintf("exists, is not Twill's, and has VNI %d, port %d, GBP %t where the configuration says VNI %d, port %d, GBP %t",
				h.VNI, h.Port, h.GBP, w.VXLAN.VNI, w.VXLAN.Port, w.VXLAN.GBP),
			Remedy: fmt.Sprintf("remove it (ip link delete %s) or set Backend.VNI and Backend.Port to its values", w.Name),
		})
	}
	return out
}

// withoutLost leaves out of have what the link changes of this very plan will
// make the kernel drop: everything on a link that is made anew or comes up, and
// the neighbours of one whose MAC or up flag changes.
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
			gone := map[uint32]bool{}
			for _, n := range have.Nexthops {
				gone[n.ID] = gone[n.ID] || n.Link == w.Name
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

// adoptable returns the wanted routes whose key no stranger holds. A stranger's
// route to the same gateway is taken over: flannel left it.
func adoptable(have, want State) ([]Route, []Problem) {
	if len(have.Foreign) == 0 {
		return want.Routes, nil
	}
	var problems []Problem
	foreign := make(map[Route]Route, len(have.Foreign))
	for _, f := range have.Foreign {
		foreign[routeKey(f)] = f
	}
	gateways := make(map[uint32]netip.Addr, len(want.Nexthops))
	for _, n := range want.Nexthops {
		gateways[n.ID] = n.Gateway
	}
	routes := without(want.Routes, func(w Route) bool {
		f, taken := foreign[routeKey(w)]
		gateway := w.Gateway
		if w.NH != 0 {
			gateway = gateways[w.NH]
		}
		if !taken || f.Gateway.IsValid() && f.Gateway == gateway {
			return false
		}
		problems = append(problems, Problem{
			Object: "route " + w.Dst.String(),
			Reason: fmt.Sprintf("another program's route stands at the same place: %s", f),
			Remedy: fmt.Sprintf("remove it (ip route delete %s proto %d), then Twill adds its own", f.Dst, f.Protocol),
		})
		return true
	})
	return routes, problems
}

func routeKey(r Route) Route { return Route{Dst: r.Dst, Metric: r.Metric} }
