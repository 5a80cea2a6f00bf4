package overlay

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// applied is what a kernel is in after a plan: it drops what a link takes along
// when it goes, is made anew or changes its MAC, and refuses what cannot be.
func applied(have State, plan Plan) (State, error) {
	s := State{
		Links: slices.Clone(have.Links), Addrs: slices.Clone(have.Addrs), Nexthops: slices.Clone(have.Nexthops), Routes: slices.Clone(have.Routes),
		Neighs: slices.Clone(have.Neighs), FDB: slices.Clone(have.FDB), WGPeers: slices.Clone(have.WGPeers), Sysctls: slices.Clone(have.Sysctls),
		Chains: slices.Clone(have.Chains), Foreign: slices.Clone(have.Foreign),
	}
	for _, op := range plan {
		var err error
		switch o := op.Object.(type) {
		case Link:
			err = s.applyLink(op, o)
		case Addr:
			s.Addrs, err = set(s.Addrs, op, o, Addr.compare)
			err = firstError(err, s.needsLink(op, o.Link))
		case Nexthop:
			s.Nexthops, err = set(s.Nexthops, op, o, Nexthop.compare)
			err = firstError(err, s.needsLink(op, o.Link))
			if op.Verb == Delete {
				for _, r := range s.Routes {
					if r.NH == o.ID {
						err = firstError(err, fmt.Errorf("%s still uses it", r))
					}
				}
			}
		case Neigh:
			s.Neighs, err = set(s.Neighs, op, o, Neigh.compare)
			err = firstError(err, s.needsLink(op, o.Link))
		case FDB:
			s.FDB, err = set(s.FDB, op, o, FDB.compare)
			err = firstError(err, s.needsLink(op, o.Link))
		case WGPeer:
			s.WGPeers, err = set(s.WGPeers, op, o, WGPeer.compare)
			err = firstError(err, s.needsLink(op, o.Link))
		case Route:
			err = s.applyRoute(op, o)
		case Sysctl:
			if op.Verb == Delete {
				err = fmt.Errorf("a sysctl cannot be deleted")
			}
			o.When = ""
			s.Sysctls, _ = set(s.Sysctls, Op{Verb: Add, Object: o}, o, func(a, b Sysctl) int { return -1 })
			s.Sysctls = slices.DeleteFunc(s.Sysctls, func(x Sysctl) bool { return x.Key == o.Key && x != o })
		case Chain:
			s.Chains, err = set(s.Chains, op, o, Chain.compare)
		default:
			err = fmt.Errorf("unknown object %T", o)
		}
		if err != nil {
			return s, fmt.Errorf("%s: %w", op, err)
		}
	}
	s.Normalize()
	return s, nil
}

func firstError(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// set does to one list what op says; what Change and Delete find must be Before.
func set[T Object](all []T, op Op, o T, key func(a, b T) int) ([]T, error) {
	i := slices.IndexFunc(all, func(x T) bool { return key(x, o) == 0 })
	switch {
	case op.Verb == Add && i >= 0:
		return all, fmt.Errorf("exists: %s", all[i])
	case op.Verb == Add:
		return append(all, o), nil
	case i < 0:
		return all, fmt.Errorf("does not exist")
	case !reflect.DeepEqual(op.Before, Object(all[i])):
		return all, fmt.Errorf("before is %s, not %s", all[i], op.Before)
	case op.Verb == Delete:
		return slices.Delete(all, i, i+1), nil
	}
	all[i] = o
	return all, nil
}

func (s *State) needsLink(op Op, name string) error {
	if op.Verb != Delete && strings.HasPrefix(name, "flannel") && !slices.ContainsFunc(s.Links, func(l Link) bool { return l.Name == name }) {
		return fmt.Errorf("there is no link %s", name)
	}
	return nil
}

func (s *State) applyLink(op Op, w Link) (err error) {
	h, _ := op.Before.(Link)
	switch {
	case op.Verb == Delete && !h.Ours():
		return fmt.Errorf("not ours")
	case op.Verb == Delete || op.Verb == Change && h.Recreate(w):
		s.drop(w.Name)
		s.Neighs = slices.DeleteFunc(s.Neighs, func(n Neigh) bool { return n.Link == w.Name })
	case op.Verb == Change && h.MAC != w.MAC:
		s.Neighs = slices.DeleteFunc(s.Neighs, func(n Neigh) bool { return n.Link == w.Name })
	}
	s.Links, err = set(s.Links, op, w, Link.compare)
	return err
}

// drop loses what is on a link, neighbours apart.
func (s *State) drop(link string) {
	s.Addrs = slices.DeleteFunc(s.Addrs, func(a Addr) bool { return a.Link == link })
	s.FDB = slices.DeleteFunc(s.FDB, func(f FDB) bool { return f.Link == link })
	s.WGPeers = slices.DeleteFunc(s.WGPeers, func(p WGPeer) bool { return p.Link == link })
	s.Routes = slices.DeleteFunc(s.Routes, func(r Route) bool {
		return r.Link == link || slices.ContainsFunc(s.Nexthops, func(n Nexthop) bool { return n.ID == r.NH && n.Link == link })
	})
	s.Nexthops = slices.DeleteFunc(s.Nexthops, func(n Nexthop) bool { return n.Link == link })
}

func (s *State) applyRoute(op Op, r Route) (err error) {
	same := func(x Route) bool { return x.compare(r) == 0 }
	if i := slices.IndexFunc(s.Foreign, same); i >= 0 && op.Verb != Delete {
		if op.Verb == Add || s.Foreign[i] != op.Before {
			return fmt.Errorf("exists: foreign %s", s.Foreign[i])
		}
		s.Foreign = slices.Delete(s.Foreign, i, i+1)
		s.Routes = append(s.Routes, r)
	} else if s.Routes, err = set(s.Routes, op, r, Route.compare); err != nil {
		return err
	}
	if op.Verb != Delete && r.NH != 0 && !slices.ContainsFunc(s.Nexthops, func(n Nexthop) bool { return n.ID == r.NH }) {
		return fmt.Errorf("there is no such nexthop")
	}
	return s.needsLink(op, r.Link)
}

// observed is a wanted State as Observe would give it back.
func observed(s State) State {
	s.Chains, s.Sysctls = slices.Clone(s.Chains), slices.Clone(s.Sysctls)
	for i := range s.Chains {
		s.Chains[i].Rules = nil
	}
	for i := range s.Sysctls {
		s.Sysctls[i].When = ""
	}
	return s
}

// withoutSysctls leaves out what Diff does not bring to b: sysctls are never taken back.
func withoutSysctls(s State) string {
	s = observed(s)
	s.Sysctls = nil
	return printState(s)
}

func TestDiffOfEqualStatesIsEmpty(t *testing.T) {
	for _, s := range scenes() {
		want, _ := s.desired(t)
		for _, have := range []State{want, observed(want)} {
			if plan, problems := Diff(have, want); len(plan)+len(problems) > 0 {
				t.Errorf("%s:\n%s%s", s.name, plan, printProblems(problems))
			}
		}
	}
}

// Between any two scenes, and to and from nothing, the plan gets there, in an
// order that a kernel allows, and then nothing is left to do.
func TestDiffGetsThere(t *testing.T) {
	states := map[string]State{"nothing": {}}
	for _, s := range scenes() {
		states[s.name], _ = s.desired(t)
	}
	for from, a := range states {
		for to, b := range states {
			checkWalk(t, from+" -> "+to, observed(a), b)
		}
	}
}

func checkWalk(t *testing.T, name string, a, b State) {
	t.Helper()
	before := printState(a)
	plan, problems := Diff(a, b)
	if len(problems) > 0 {
		t.Fatalf("%s: %s", name, printProblems(problems))
	}
	if printState(a) != before {
		t.Fatalf("%s: Diff has changed its argument", name)
	}
	got, err := applied(a, plan)
	if err != nil {
		t.Fatalf("%s: %v\nplan:\n%s", name, err, plan)
	}
	got.WGPeers = withoutKept(got.WGPeers, b) // those of a former backend may stay
	if g, w := withoutSysctls(got), withoutSysctls(b); g != w {
		t.Fatalf("%s: %s\ngot:\n%s\nwant:\n%s\nplan:\n%s", name, firstDifference(g, w), g, w, plan)
	}
	if again, _ := Diff(got, b); len(again) > 0 {
		t.Fatalf("%s: the second plan is not empty:\n%s", name, again)
	}
	checkOrder(t, name, plan)
}

// checkOrder checks that all that is new comes first, what others stand on before
// them, and that removal goes the other way.
func checkOrder(t *testing.T, name string, plan Plan) {
	t.Helper()
	rank := func(op Op) int {
		r := map[reflect.Type]int{
			reflect.TypeFor[Sysctl](): 0, reflect.TypeFor[Link](): 1, reflect.TypeFor[Chain](): 2, reflect.TypeFor[Addr](): 3,
			reflect.TypeFor[WGPeer](): 4, reflect.TypeFor[Neigh](): 5, reflect.TypeFor[FDB](): 6, reflect.TypeFor[Nexthop](): 7, reflect.TypeFor[Route](): 8,
		}[reflect.TypeOf(op.Object)]
		if op.Verb == Delete {
			return 100 - r
		}
		return r
	}
	if !slices.IsSortedFunc(plan, func(a, b Op) int { return rank(a) - rank(b) }) {
		t.Fatalf("%s: out of order:\n%s", name, plan)
	}
}

func TestDiffRandomWalk(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	have := State{}
	for i := range 2000 {
		want := randomState(r, t)
		checkWalk(t, fmt.Sprint("step ", i), observed(have), want)
		have = want
	}
}

// randomState is what some node wants in some cluster, with some of it missing or
// changed as if somebody had been there.
func randomState(r *rand.Rand, t *testing.T) State {
	s := scene{config: v4JSON, self: func(s *Self) {
		s.Nexthops, s.BlackholeRoute, s.IPMasq, s.ForwardRules = r.IntN(4) > 0, r.IntN(3) == 0, r.IntN(2) == 0, r.IntN(2) == 0
		s.MAC[5] = byte(100 + r.IntN(2))
		s.Uplink.MTU = 1400 + 100*r.IntN(2)
	}}
	dual := r.IntN(2) == 0
	if dual {
		s.config = dualJSON
	}
	s.config = strings.Replace(s.config, `"Type"`, fmt.Sprintf(`"VNI":%d,"GBP":%t,"DirectRouting":%t,"Type"`, 1+r.IntN(2), r.IntN(2) == 0, r.IntN(2) == 0), 1)
	vni := config(t, s.config).Backend.VXLAN.VNI
	for i := 2; i < 12; i++ {
		key := fmt.Sprintf("10.5.%d.0-24", i+r.IntN(2)*20)
		if r.IntN(5) == 0 {
			key = fmt.Sprintf("10.5.%d.0-25", i)
		}
		if dual {
			key += fmt.Sprintf("&fd00:5:0:%x::-64", i)
		}
		l := peerLease(key, i)
		l.VTEP.VNI, l.VTEPv6.VNI = vni, vni
		if r.IntN(3) == 0 {
			elsewhere(&l)
		}
		l.VTEP.MAC[4] = byte(r.IntN(2))
		if r.IntN(3) > 0 {
			s.leases = append(s.leases, l)
		}
	}
	state, _ := s.desired(t)
	state.Routes = slices.DeleteFunc(state.Routes, func(Route) bool { return r.IntN(20) == 0 })
	state.Neighs = slices.DeleteFunc(state.Neighs, func(Neigh) bool { return r.IntN(20) == 0 })
	state.FDB = slices.DeleteFunc(state.FDB, func(FDB) bool { return r.IntN(20) == 0 })
	return state
}

func sceneState(t *testing.T, name string) State {
	t.Helper()
	for _, s := range scenes() {
		if s.name == name {
			state, _ := s.desired(t)
			return state
		}
	}
	t.Fatalf("no scene %s", name)
	return State{}
}

// The text of plans: what an operator reads in the log and from netctl diff.
func TestPlans(t *testing.T) {
	var b strings.Builder
	show := func(title string, have, want State) {
		plan, problems := Diff(have, want)
		fmt.Fprintf(&b, "== %s\n%s%s", title, printProblems(problems), plan)
	}
	v4, dual, direct := sceneState(t, "v4"), sceneState(t, "dual"), sceneState(t, "direct routing")
	show("from nothing", State{}, v4)
	show("to nothing", v4, State{})
	show("direct routing is turned on", v4, direct)
	show("IPv6 is turned on", v4, dual)
	show("nftables instead of iptables", dual, sceneState(t, "nftables"))
	show("from plain routes to nexthop objects", sceneState(t, "old kernel direct routing"), direct)

	moved := v4
	moved.Links = slices.Clone(v4.Links)
	moved.Links[0].MAC[5] = 0x77
	show("our MAC was changed", moved, v4)
	down := v4
	down.Links = slices.Clone(v4.Links)
	down.Links[0].Up, down.Nexthops, down.Routes, down.Neighs = false, nil, nil, nil
	show("the link was set down", down, v4)
	port := v4
	port.Links = slices.Clone(v4.Links)
	port.Links[0].VXLAN.Port = 4789
	show("the port changes", port, v4)
	show("the link was deleted", State{Sysctls: v4.Sysctls, Chains: v4.Chains}, v4)
	peer := v4
	peer.FDB = slices.Clone(v4.FDB)
	peer.FDB[0].Dst = ip("203.0.113.99")
	show("a peer's address changes", peer, v4)
	golden(t, "plans", b.String())
}

// What flannel leaves behind on a link of the same VNI and port is taken over,
// and what nobody wants of it goes.
func TestFlannelIsAdopted(t *testing.T) {
	want := sceneState(t, "v4")
	have := observed(want)
	have.Links = slices.Clone(want.Links)
	have.Links[0].Alias, have.Links[0].MAC = "", mac("0e:99:99:99:99:99")
	have.Chains, have.Nexthops = nil, nil
	have.Routes = []Route{
		{Dst: pfx("10.5.2.0/24"), Gateway: ip("10.5.2.0"), Link: "flannel.1", OnLink: true, Protocol: 3},
		{Dst: pfx("10.5.77.0/24"), Gateway: ip("10.5.77.0"), Link: "flannel.1", OnLink: true, Protocol: 3},
	}
	have.Foreign = []Route{
		{Dst: pfx("10.5.1.0/24"), Link: "cni0", Protocol: 2},
		{Dst: pfx("10.5.255.0/24"), Gateway: ip("10.5.255.0"), Link: "eth9", Protocol: 3},
	}
	plan, problems := Diff(have, want)
	golden(t, "flannel-adopted", printProblems(problems)+plan.String())
	got, err := applied(have, plan)
	if err != nil {
		t.Fatal(err)
	}
	if g, w := withoutSysctls(got), withoutSysctls(want)+"foreign route 10.5.1.0/24 dev cni0 proto 2\n"; g != w {
		t.Errorf("got:\n%s\nwant:\n%s", g, w)
	}
}

// A stranger's link under our name blocks everything: all else stands on it.
func TestForeignLink(t *testing.T) {
	want := sceneState(t, "dual")
	for _, change := range []func(*Link){
		func(l *Link) { l.VXLAN.VNI = 7 }, func(l *Link) { l.VXLAN.Port = 9999 }, func(l *Link) { l.VXLAN.GBP = true },
	} {
		have := State{Links: []Link{want.Links[1]}}
		have.Links[0].Alias = ""
		change(&have.Links[0])
		plan, problems := Diff(have, want)
		if len(plan) > 0 || len(problems) != 1 || problems[0].Object != "link flannel.1" || !strings.Contains(problems[0].Remedy, "ip link delete flannel.1") {
			t.Errorf("%s: problems %q, plan:\n%s", have.Links[0], problems, plan)
		}
		have.Links[0].Alias = Alias
		if plan, problems := Diff(have, want); len(plan) == 0 || len(problems) > 0 {
			t.Errorf("our own link %s is not made anew: %q", have.Links[0], problems)
		}
	}
}

func TestCheckLinks(t *testing.T) {
	cfg := config(t, dualJSON) // port 4789
	flannel := Link{Name: "flannel.1", Kind: KindVXLAN, VXLAN: VXLAN{VNI: 1, Port: 4789}}
	for _, c := range []struct {
		name   string
		have   []Link
		ifaces []string
		want   []string // objects
	}{
		{"nothing is there", nil, []string{"eth0", "flannel.7"}, nil},
		{"flannel's, to be adopted", []Link{flannel}, []string{"eth0", "flannel.1"}, nil},
		{"another port", []Link{{Name: "flannel.1", Kind: KindVXLAN, VXLAN: VXLAN{VNI: 1, Port: 8472}}}, []string{"flannel.1"}, []string{"link flannel.1"}},
		{"ours of another port", []Link{{Name: "flannel.1", Alias: Alias, Kind: KindVXLAN, VXLAN: VXLAN{VNI: 1, Port: 8472}}}, []string{"flannel.1"}, nil},
		{"no VXLAN devices", nil, []string{"flannel.1", "flannel-v6.1"}, []string{"link flannel.1", "link flannel-v6.1"}},
	} {
		var ifaces []Iface
		for _, name := range c.ifaces {
			ifaces = append(ifaces, Iface{Name: name})
		}
		var got []string
		for _, p := range CheckLinks(cfg, c.have, ifaces) {
			got = append(got, p.Object)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

// flannel's link of another VNI is a stranger's, with all that is on it.
func TestLinkOfAnotherVNIIsLeftAlone(t *testing.T) {
	want := sceneState(t, "all settings")
	have := State{
		Links:  []Link{{Name: "flannel.1", Up: true, MTU: 1450, MAC: mac("0e:99:99:99:99:99"), Kind: KindVXLAN, VXLAN: VXLAN{VNI: 1, Port: 8472}}},
		Addrs:  []Addr{{"flannel.1", pfx("10.9.1.0/32")}},
		Neighs: []Neigh{{"flannel.1", ip("10.9.2.0"), mac("0e:99:99:99:99:02")}},
		FDB:    []FDB{{"flannel.1", mac("0e:99:99:99:99:02"), ip("198.51.100.2")}},
		Routes: []Route{{Dst: pfx("10.9.2.0/24"), Gateway: ip("10.9.2.0"), Link: "flannel.1", OnLink: true, Protocol: 3}},
	}
	foreign := []string{"flannel.1 ", "10.9."}
	plan, problems := Diff(have, want)
	for _, op := range plan {
		for _, s := range foreign {
			if strings.Contains(op.String()+" ", s) {
				t.Errorf("%s", op)
			}
		}
	}
	if len(problems) > 0 || len(plan) == 0 {
		t.Errorf("problems %q", problems)
	}
	if plan, problems := Diff(have, State{}); len(plan)+len(problems) > 0 {
		t.Errorf("to nothing:\n%s%s", plan, printProblems(problems))
	}
	// A route of ours over such a link is ours all the same.
	ours := State{Links: have.Links, Routes: []Route{{Dst: pfx("10.5.2.0/24"), Gateway: ip("10.5.2.0"), Link: "flannel.1", OnLink: true, Protocol: Protocol}}}
	if plan, problems := Diff(ours, State{}); len(plan) != 1 || plan[0].Verb != Delete || len(problems) > 0 {
		t.Errorf("our route: %q, plan:\n%s", problems, plan)
	}
	// Its route at one of our places is taken over only if it leads where ours does.
	for gateway, ours := range map[string]bool{"10.5.2.0": true, "10.5.9.9": false} {
		have.Routes = []Route{{Dst: pfx("10.5.2.0/24"), Gateway: ip(gateway), Link: "flannel.1", OnLink: true, Protocol: 3}}
		plan, problems := Diff(have, want)
		changed := slices.ContainsFunc(plan, func(op Op) bool { return op.Verb == Change && op.Before == Object(have.Routes[0]) })
		if changed != ours || len(problems) != map[bool]int{true: 0, false: 1}[ours] {
			t.Errorf("gateway %s: problems %q, plan:\n%s", gateway, problems, plan)
		}
	}
}

func TestForeignRoutes(t *testing.T) {
	want := sceneState(t, "direct routing dual")
	place := want.Routes[0].Dst // by nexthop object to 198.51.100.2
	for _, c := range []struct {
		name    string
		foreign Route
		both    bool // ours is there too
		verb    Verb // of what is planned there; 0: nothing
		problem bool
	}{
		{"same gateway", Route{Dst: place, Gateway: ip("198.51.100.2"), Link: "eth0", Protocol: 3}, false, Change, false},
		{"other gateway", Route{Dst: place, Gateway: ip("198.51.100.254"), Link: "eth0", Protocol: 186}, false, 0, true},
		{"on a link", Route{Dst: place, Link: "docker0", Protocol: 2}, false, 0, true},
		{"blackhole", Route{Dst: place, Blackhole: true, Protocol: 12}, false, 0, true},
		{"by a nexthop object", Route{Dst: place, NH: 12, Protocol: 186}, false, 0, true},
		{"other metric", Route{Dst: place, Metric: 20, Gateway: ip("198.51.100.254"), Link: "eth0", Protocol: 186}, false, Add, false},
		{"narrower", Route{Dst: pfx("10.5.2.0/25"), Gateway: ip("198.51.100.254"), Link: "eth0", Protocol: 186}, false, Add, false},
		{"beside ours", Route{Dst: place, Gateway: ip("198.51.100.254"), Link: "eth0", Protocol: 186}, true, 0, true},
		{"beside ours with the same gateway", Route{Dst: place, Gateway: ip("198.51.100.2"), Link: "eth0", Protocol: 3}, true, 0, true},
	} {
		have := State{Foreign: []Route{c.foreign}}
		if c.both {
			have.Routes, have.Nexthops = want.Routes[:1], want.Nexthops[:1]
		}
		plan, problems := Diff(have, want)
		verb := Verb(0)
		for _, op := range plan {
			if r, ok := op.Object.(Route); ok && r.Dst == place {
				verb = op.Verb
				if verb == Change && op.Before != Object(c.foreign) {
					t.Errorf("%s: before is %v", c.name, op.Before)
				}
			}
		}
		if verb != c.verb || (len(problems) == 1) != c.problem || c.problem && problems[0].Object != "route "+place.String() {
			t.Errorf("%s: problems %q, plan:\n%s", c.name, problems, plan)
		}
	}
}

func TestSysctlWhen(t *testing.T) {
	want := State{Sysctls: []Sysctl{{Key: "net/ipv6/conf/eth0/accept_ra", Value: "2", When: "1"}, {Key: "net/ipv6/conf/all/forwarding", Value: "1"}}}
	want.Normalize()
	for _, c := range []struct{ ra, forwarding, plan string }{
		{"2", "1", ""},
		{"0", "1", ""},
		{"1", "1", "sysctl change net/ipv6/conf/eth0/accept_ra=2\n"},
		{"2", "0", "sysctl change net/ipv6/conf/all/forwarding=1\n"},
	} {
		have := State{Sysctls: []Sysctl{{Key: "net/ipv6/conf/eth0/accept_ra", Value: c.ra}, {Key: "net/ipv6/conf/all/forwarding", Value: c.forwarding}}}
		have.Normalize()
		if plan, _ := Diff(have, want); plan.String() != c.plan {
			t.Errorf("accept_ra %s, forwarding %s:\n%s", c.ra, c.forwarding, plan)
		}
		if plan, _ := Diff(have, State{}); len(plan) > 0 {
			t.Errorf("sysctls are taken back:\n%s", plan)
		}
	}
}

// Forwarding, once on, drops the default routes learned from router
// advertisements unless accept_ra is 2 by then.
func TestAcceptRABeforeForwarding(t *testing.T) {
	plan, _ := Diff(State{Sysctls: []Sysctl{
		{Key: "net/ipv4/ip_forward", Value: "0"}, {Key: "net/ipv6/conf/all/forwarding", Value: "0"}, {Key: "net/ipv6/conf/eth0/accept_ra", Value: "1"},
	}}, sceneState(t, "dual"))
	if !strings.HasPrefix(plan.String(), "sysctl change net/ipv6/conf/eth0/accept_ra=2\n") {
		t.Errorf("plan:\n%s", plan)
	}
}

// A chain is known by its hash alone; one whose jump is missing is set again.
func TestChainHashes(t *testing.T) {
	want := sceneState(t, "v4")
	have := observed(want)
	have.Chains[0].Hash = ""
	if plan, _ := Diff(have, want); len(plan) != 1 || plan[0].Verb != Change || len(plan[0].Object.(Chain).Rules) == 0 {
		t.Errorf("plan:\n%s", plan)
	}
	seen := map[string]bool{}
	for _, s := range scenes() {
		state, _ := s.desired(t)
		for _, c := range state.Chains {
			seen[c.Hash] = true
			if c.Hash != ChainHash(hashes(c.Rules)) || strings.Contains(strings.Join(c.Rules, " "), "invalid") {
				t.Errorf("%s: %s", c, c.Rules)
			}
		}
	}
	if len(seen) < 8 {
		t.Errorf("only %d different chains in all scenes", len(seen))
	}
	if ChainHash([]string{"a", "b"}) == ChainHash([]string{"b", "a"}) {
		t.Error("the order of rules does not count")
	}
}

func hashes(rules []string) (out []string) {
	for _, r := range rules {
		out = append(out, RuleHash(r))
	}
	return out
}

// What Observe finds in any order compares equal once it is sorted.
func TestNormalizeSortsAll(t *testing.T) {
	want := sceneState(t, "dual with a v4 peer")
	mixed := observed(want)
	mixed.Chains = slices.Clone(want.Chains)
	shuffle := func(n int, swap func(i, j int)) { rand.New(rand.NewPCG(1, 2)).Shuffle(n, swap) }
	mixed.Links, mixed.Addrs, mixed.Routes = slices.Clone(want.Links), slices.Clone(want.Addrs), slices.Clone(want.Routes)
	mixed.Nexthops, mixed.Neighs, mixed.FDB = slices.Clone(want.Nexthops), slices.Clone(want.Neighs), slices.Clone(want.FDB)
	shuffle(len(mixed.Routes), func(i, j int) { mixed.Routes[i], mixed.Routes[j] = mixed.Routes[j], mixed.Routes[i] })
	shuffle(len(mixed.Nexthops), func(i, j int) { mixed.Nexthops[i], mixed.Nexthops[j] = mixed.Nexthops[j], mixed.Nexthops[i] })
	shuffle(len(mixed.Neighs), func(i, j int) { mixed.Neighs[i], mixed.Neighs[j] = mixed.Neighs[j], mixed.Neighs[i] })
	shuffle(len(mixed.FDB), func(i, j int) { mixed.FDB[i], mixed.FDB[j] = mixed.FDB[j], mixed.FDB[i] })
	slices.Reverse(mixed.Links)
	slices.Reverse(mixed.Addrs)
	slices.Reverse(mixed.Sysctls)
	slices.Reverse(mixed.Chains)
	mixed.Normalize()
	if plan, _ := Diff(mixed, want); len(plan) > 0 {
		t.Errorf("plan:\n%s", plan)
	}
}

func TestRouteStrings(t *testing.T) {
	for want, r := range map[string]Route{
		"route 10.5.1.0/24 nhid 7 proto 84":                            {Dst: pfx("10.5.1.0/24"), NH: 7, Protocol: 84},
		"route 10.5.1.0/24 via 10.5.1.0 dev flannel.1 onlink proto 84": {Dst: pfx("10.5.1.0/24"), Gateway: ip("10.5.1.0"), Link: "flannel.1", OnLink: true, Protocol: 84},
		"route 10.5.1.0/24 dev cni0 proto 2":                           {Dst: pfx("10.5.1.0/24"), Link: "cni0", Protocol: 2},
		"route blackhole 10.5.1.0/24 proto 84 metric 9":                {Dst: pfx("10.5.1.0/24"), Blackhole: true, Metric: 9, Protocol: 84},
		"route fd00::/64 via fe80::1 dev eth0 proto 84":                {Dst: netip.MustParsePrefix("fd00::/64"), Gateway: ip("fe80::1"), Link: "eth0", Metric: 1024, Protocol: 84},
		"route fd00::/64 via fe80::1 dev eth0 proto 84 metric 0":       {Dst: netip.MustParsePrefix("fd00::/64"), Gateway: ip("fe80::1"), Link: "eth0", Protocol: 84},
	} {
		if r.String() != want {
			t.Errorf("got %q, want %q", r, want)
		}
	}
}
