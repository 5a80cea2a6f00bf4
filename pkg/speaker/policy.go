package speaker

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/osrg/gobgp/v4/api"

	"github.com/twill-net/twill/pkg/overlay"
)

// The filters are two lists of rules of which the first that matches decides.
//
// Import: our own subnets never come back, nor what leads to ourselves; a neighbour
// with Import rules is believed what they accept.
//
// Export to nodes of the cluster: our own subnets; what routers outside told us, by
// our own address, since the other nodes may not reach theirs; a route reflector
// passes pod subnets on as they are. Export to routers outside: our own subnets, and
// a route reflector the cluster's pod subnets with their own next hops. Export rules
// choose among these and never add to them: a node is no transit between routers.

// source is where a route that a rule looks at comes from.
type source int

const (
	anywhere source = iota
	local           // announced by this speaker
	external        // learned from another AS
	internal        // learned from our AS
)

type nextHop int

const (
	asUsual nextHop = iota // RFC 4271, section 5.1.3
	ourself
	unchanged
)

// rule is one step of a filter. What is empty matches all.
type rule struct {
	neighbor    netip.Addr // this one alone
	from        source
	within      []span
	nextHops    []netip.Addr
	accept      bool
	nextHop     nextHop
	communities []overlay.Community // added
}

// span is the prefixes inside a prefix with a length in min..max.
type span struct {
	prefix   netip.Prefix
	min, max int
}

func exactly(p netip.Prefix) span { return span{p, p.Bits(), p.Bits()} }

func inside(p netip.Prefix) span { return span{p, p.Bits(), p.Addr().BitLen()} }

// filters are both, as the server has them.
type filters struct{ in, out []rule }

// importRules says what is believed.
func importRules(b overlay.BGP) []rule {
	rules := []rule{{from: local, accept: true}}
	for _, f := range []overlay.Family{overlay.IPv4, overlay.IPv6} {
		if own := ownSpans(b, f); own != nil {
			rules = append(rules, rule{within: own})
		}
	}
	if ours := ownAddresses(b); ours != nil {
		rules = append(rules, rule{nextHops: ours})
	}
	for _, n := range b.Neighbors {
		if n.Node || len(n.Import) == 0 {
			continue
		}
		for _, r := range n.Import {
			rules = append(rules, rule{neighbor: n.Address, within: []span{{r.Prefix, r.MinLen, r.MaxLen}}, accept: r.Accept})
		}
		rules = append(rules, rule{neighbor: n.Address})
	}
	return append(rules, rule{accept: true})
}

// exportRules says what is told to whom.
func exportRules(b overlay.BGP) []rule {
	var rules []rule
	reflector := b.ClusterID.IsValid()
	for _, n := range b.Neighbors {
		switch {
		case !n.Node:
			rules = append(rules, exportTo(b, n)...)
		case reflector && !n.Client:
			// The other reflector of our cluster hears the clients itself. If both
			// told it each other, gobgp would not withdraw what the client has
			// withdrawn (it sends no CLUSTER_LIST, RFC 4456, to who is no client).
			rules = append(rules, rule{neighbor: n.Address, from: internal})
		}
	}
	for _, f := range []overlay.Family{overlay.IPv4, overlay.IPv6} {
		if pods := podSpans(b, f); pods != nil {
			rules = append(rules, rule{from: external, within: pods, accept: reflector, nextHop: unchanged})
		}
	}
	return append(rules,
		rule{from: local, accept: true, nextHop: unchanged},
		rule{from: external, accept: true, nextHop: ourself},
		rule{accept: true})
}

// exportTo returns the rules for a router outside; the last one matches all.
func exportTo(b overlay.BGP, n overlay.BGPNeighbor) []rule {
	f := overlay.FamilyOf(n.Address)
	tell := func(from source, s span) rule {
		return rule{neighbor: n.Address, from: from, within: []span{s}, accept: true, nextHop: unchanged, communities: n.Communities}
	}
	candidates := n.Export
	if len(candidates) == 0 {
		all := netip.PrefixFrom(n.Address, 0).Masked()
		candidates = []overlay.BGPRule{{Prefix: all, MaxLen: all.Addr().BitLen(), Accept: true}}
	}
	var rules []rule
	for _, r := range candidates {
		s := span{r.Prefix, r.MinLen, r.MaxLen}
		if !r.Accept {
			rules = append(rules, rule{neighbor: n.Address, within: []span{s}})
			continue
		}
		rules = append(rules, tell(local, s))
		if !b.ClusterID.IsValid() {
			continue
		}
		for _, pods := range podSpans(b, f) {
			if both, ok := s.and(pods); ok {
				rules = append(rules, tell(anywhere, both))
			}
		}
	}
	return append(rules, rule{neighbor: n.Address})
}

// and returns the prefixes that are in both.
func (s span) and(o span) (span, bool) {
	narrow := s.prefix
	if o.prefix.Bits() > narrow.Bits() {
		narrow = o.prefix
	}
	both := span{narrow, max(s.min, o.min), min(s.max, o.max)}
	return both, s.prefix.Overlaps(o.prefix) && both.min <= both.max
}

func ownSpans(b overlay.BGP, f overlay.Family) []span {
	var out []span
	for _, o := range b.Own {
		if overlay.FamilyOf(o.Prefix.Addr()) == f {
			out = append(out, exactly(o.Prefix))
		}
	}
	return out
}

func podSpans(b overlay.BGP, f overlay.Family) []span {
	var out []span
	for _, p := range b.Networks {
		if overlay.FamilyOf(p.Addr()) == f {
			out = append(out, inside(p))
		}
	}
	return out
}

// ownAddresses are the next hops that would lead back to this node.
func ownAddresses(b overlay.BGP) []netip.Addr {
	var out []netip.Addr
	for _, o := range b.Own {
		out = append(out, o.NextHop)
	}
	for _, n := range b.Neighbors {
		if n.Local.IsValid() {
			out = append(out, n.Local)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// policies translates both filters for gobgp.
func policies(b overlay.BGP) *api.SetPoliciesRequest {
	t := translation{req: &api.SetPoliciesRequest{}}
	t.policy("import", importRules(b))
	t.policy("export", exportRules(b))
	return t.req
}

// translation puts a filter in gobgp's words: named sets, and statements that name
// them.
type translation struct {
	req *api.SetPoliciesRequest
}

func (t *translation) policy(name string, rules []rule) {
	p := &api.Policy{Name: name}
	for i, r := range rules {
		p.Statements = append(p.Statements, t.statement(fmt.Sprintf("%s-%d", name, i), r))
	}
	t.req.Policies = append(t.req.Policies, p)
}

func (t *translation) statement(name string, r rule) *api.Statement {
	c, a := &api.Conditions{}, &api.Actions{RouteAction: api.RouteAction_ROUTE_ACTION_REJECT}
	if r.neighbor.IsValid() {
		host := netip.PrefixFrom(r.neighbor, r.neighbor.BitLen()).String()
		t.set(&api.DefinedSet{DefinedType: api.DefinedType_DEFINED_TYPE_NEIGHBOR, Name: name, List: []string{host}})
		c.NeighborSet = &api.MatchSet{Name: name, Type: api.MatchSet_TYPE_ANY}
	}
	if len(r.within) > 0 {
		s := &api.DefinedSet{DefinedType: api.DefinedType_DEFINED_TYPE_PREFIX, Name: name}
		for _, w := range r.within {
			s.Prefixes = append(s.Prefixes, &api.Prefix{IpPrefix: w.prefix.String(), MaskLengthMin: uint32(w.min), MaskLengthMax: uint32(w.max)})
		}
		t.set(s)
		c.PrefixSet = &api.MatchSet{Name: name, Type: api.MatchSet_TYPE_ANY}
	}
	switch r.from {
	case local:
		c.RouteType = api.Conditions_ROUTE_TYPE_LOCAL
	case external:
		c.RouteType = api.Conditions_ROUTE_TYPE_EXTERNAL
	case internal:
		c.RouteType = api.Conditions_ROUTE_TYPE_INTERNAL
	}
	for _, h := range r.nextHops {
		c.NextHopInList = append(c.NextHopInList, h.String())
	}
	if r.accept {
		a.RouteAction = api.RouteAction_ROUTE_ACTION_ACCEPT
		switch r.nextHop {
		case ourself:
			a.Nexthop = &api.NexthopAction{Self: true}
		case unchanged:
			a.Nexthop = &api.NexthopAction{Unchanged: true}
		}
		if len(r.communities) > 0 {
			a.Community = &api.CommunityAction{Type: api.CommunityAction_TYPE_ADD}
			for _, x := range r.communities {
				a.Community.Communities = append(a.Community.Communities, x.String())
			}
		}
	}
	return &api.Statement{Name: name, Conditions: c, Actions: a}
}

func (t *translation) set(s *api.DefinedSet) { t.req.DefinedSets = append(t.req.DefinedSets, s) }
