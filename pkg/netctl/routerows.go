package netctl

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/twill-net/twill/pkg/overlay"
)

// The states of a route.
const (
	stateOK      = "ok"
	stateMissing = "missing" // a part of the path is not in the kernel
	stateChanged = "changed" // a part leads elsewhere
	stateLocal   = "local"   // to this node's own pods
	stateForeign = "foreign" // another program's route
	stateExtra   = "extra"   // Twill's, and nobody asks for it
	stateUnknown = "unknown" // there is nothing to compare with
)

// The sources of a route: who asks for it.
const (
	sourceLease = "lease"
	sourceBGP   = "bgp"
	sourceOwn   = "own" // this node
)

// routeRow is one destination: what the kernel has, and what is wrong with it.
type routeRow struct {
	Destination string `json:"destination"`
	Source      string `json:"source,omitempty"`
	Gateway     string `json:"gateway,omitempty"` // of the one way; see Ways
	Nexthop     uint32 `json:"nexthop,omitempty"`
	Link        string `json:"link,omitempty"`
	Neigh       string `json:"neigh,omitempty"` // MAC of the gateway
	FDB         string `json:"fdb,omitempty"`   // outer address
	// Peer is where WireGuard's or the UDP tunnel's datagrams go: address and port.
	Peer      string   `json:"peer,omitempty"`
	PublicKey string   `json:"publicKey,omitempty"` // of the WireGuard peer
	Ways      []wayRow `json:"ways,omitempty"`      // all, if there is more than one
	// From are the neighbours that told a learned route.
	From   []netip.Addr `json:"from,omitempty"`
	State  string       `json:"state"`
	Detail []string     `json:"detail,omitempty"`

	key     string // PublicKey in short
	summary string // Detail in short, for the table
	route   overlay.Route
}

// wayRow is one of several equal ways.
type wayRow struct {
	Nexthop uint32 `json:"nexthop"` // member of the group
	Gateway string `json:"gateway,omitempty"`
	Link    string `json:"link,omitempty"`
}

// routeRows lists what is wanted, what is ours, and what is foreign, by
// destination.
func (s *sight) routeRows() []routeRow {
	have, want, from := index(s.have), index(s.want), s.origins()
	refused := map[string]overlay.Problem{}
	for _, p := range s.refused {
		refused[p.Object] = p
	}
	rows := []routeRow{}
	for _, r := range s.want.Routes {
		row := have.row(r)
		faults := have.faults(want.follow(r))
		p, isRefused := refused["route "+r.Dst.String()]
		switch {
		case isRefused:
			row.State, row.Detail, row.summary = stateMissing, []string{p.Reason}, p.Reason
		case len(faults) == 0:
			row.State = stateOK
		default:
			row.judge(faults)
		}
		rows = append(rows, row)
	}
	for _, r := range s.have.Routes {
		if _, wanted := want.routes[keyOf(r)]; wanted {
			continue
		}
		row := have.row(r)
		row.State = stateExtra
		if !s.complete() {
			row.State = stateUnknown
		}
		rows = append(rows, row)
	}
	for _, r := range s.have.Foreign {
		rows = append(rows, s.foreignRow(have.row(r)))
	}
	rows = append(rows, s.unrouted()...)
	for i := range rows {
		from.explain(&rows[i])
	}
	slices.SortStableFunc(rows, func(a, b routeRow) int {
		return cmp.Or(a.route.Dst.Addr().Compare(b.route.Dst.Addr()), cmp.Compare(a.route.Dst.Bits(), b.route.Dst.Bits()), cmp.Compare(a.route.Metric, b.route.Metric))
	})
	return rows
}

func (s *sight) foreignRow(row routeRow) routeRow {
	own := slices.Contains(s.self.Self.All(), row.route.Dst) || s.selfErr != nil && row.route.Protocol == protoKernel
	if row.route.Link == overlay.Bridge && own {
		row.State = stateLocal
		return row
	}
	row.State, row.summary = stateForeign, "proto "+protocol(row.route.Protocol)
	if s.snap != nil && slices.ContainsFunc(s.snap.Leases, func(l *overlay.Lease) bool { return s.byRouter(l) && slices.Contains(l.All(), row.route.Dst) }) {
		row.State = stateOK // the router's, as it should be
	}
	row.Detail = []string{row.summary}
	return row
}

// unrouted lists the subnets that an external router should have led to a peer.
func (s *sight) unrouted() []routeRow {
	var rows []routeRow
	if !s.complete() {
		return nil
	}
	for _, l := range s.snap.Leases {
		for _, p := range l.All() {
			if s.byRouter(l) && !s.foreignTo(p) {
				rows = append(rows, routeRow{
					Destination: p.String(), State: stateMissing, Detail: []string{noRouter}, summary: noRouter,
					route: overlay.Route{Dst: p, Protocol: overlay.Protocol},
				})
			}
		}
	}
	return rows
}

const noRouter = "the external router has set no route"

// byRouter reports whether a router that is not Twill's leads to the peer.
func (s *sight) byRouter(l *overlay.Lease) bool {
	return s.self.Self.BGP.External && l.Backend == "bgp" && l.Subnets != s.self.Self.Subnets
}

func (s *sight) foreignTo(p netip.Prefix) bool {
	return slices.ContainsFunc(s.have.Foreign, func(r overlay.Route) bool { return r.Dst == p })
}

// row shows what the kernel has at the key of r; nothing but the destination if
// there is no such route.
func (s parts) row(r overlay.Route) routeRow {
	row := routeRow{Destination: r.Dst.String(), route: r}
	have, ok := s.routes[keyOf(r)]
	if r.Protocol != overlay.Protocol {
		have, ok = r, true // a stranger stands in no State but as Foreign
	}
	if !ok {
		return row
	}
	p := s.follow(have)
	row.Nexthop = have.NH
	if have.Blackhole {
		row.Gateway = "blackhole"
	}
	if len(p.ways) > 1 {
		for _, w := range p.ways {
			row.Ways = append(row.Ways, wayRow{w.member.ID, text(w.gateway), w.device})
		}
	}
	if len(p.ways) == 1 {
		row.only(p.ways[0])
	}
	return row
}

// only shows the one way there is.
func (r *routeRow) only(w way) {
	r.Gateway, r.Link = text(w.gateway), w.device
	if w.neigh.Link != "" {
		r.Neigh = w.neigh.MAC.String()
	}
	if w.fdb.Link != "" {
		r.FDB = w.fdb.Dst.String()
	}
	if w.peer.Link != "" {
		r.Peer, r.PublicKey, r.key = endpointOf(w.peer), w.peer.PublicKey.String(), shortKey(w.peer.PublicKey)
	}
}

func text(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

// judge sums up faults: a path with a part that leads elsewhere is changed, one
// that only lacks parts is missing.
func (r *routeRow) judge(faults []fault) {
	r.State = stateMissing
	if slices.ContainsFunc(faults, func(f fault) bool { return !f.missing }) {
		r.State = stateChanged
	}
	var short []string
	for _, f := range faults {
		full := f.String() + ", should be " + f.want
		r.Detail = append(r.Detail, full)
		switch {
		case f.missing && r.State == stateMissing:
			short = append(short, f.part)
		case f.missing, strings.HasPrefix(f.part, "link "): // said at length by netctl diff
			short = append(short, f.String())
		default:
			short = append(short, full)
		}
	}
	r.summary = strings.Join(short, "; ")
}

// origins knows who asks for a route, and what no kernel shows of it.
type origins struct {
	leases  map[netip.Prefix]*overlay.Lease
	learned map[netip.Prefix]overlay.BGPRoute
	own     map[netip.Prefix]bool
	tunnel  map[netip.Prefix]netip.AddrPort // the UDP tunnel's peers
	router  map[netip.Prefix]bool           // subnets that an external router leads to
}

func (s *sight) origins() origins {
	o := origins{map[netip.Prefix]*overlay.Lease{}, map[netip.Prefix]overlay.BGPRoute{}, map[netip.Prefix]bool{}, map[netip.Prefix]netip.AddrPort{}, map[netip.Prefix]bool{}}
	if s.snap != nil {
		for _, l := range s.snap.Leases {
			for _, p := range l.All() {
				o.leases[p] = l
				o.router[p] = s.byRouter(l)
			}
		}
	}
	if rib := s.self.Self.RIB; rib != nil {
		o.learned = byKey(rib.Routes, func(r overlay.BGPRoute) netip.Prefix { return r.Prefix })
	}
	cfg := s.self.Config
	if s.selfErr != nil && s.snap != nil {
		cfg = s.snap.Config
	}
	for _, p := range slices.Concat(s.self.Self.All(), cfg.Networks()) {
		o.own[p] = true
	}
	if u := s.want.Outside.UDP; u != nil {
		for _, p := range u.Peers {
			o.tunnel[p.Subnet] = p.Addr
		}
	}
	return o
}

// source returns who asks for a route of Twill to dst; empty: nobody known. The
// lease of a peer that does not speak BGP counts more than what is learned.
func (o origins) source(dst netip.Prefix) string {
	_, learned := o.learned[dst]
	switch l := o.leases[dst]; {
	case o.router[dst], learned && (l == nil || l.Backend == "bgp"):
		return sourceBGP
	case o.own[dst]:
		return sourceOwn
	case l != nil:
		return sourceLease
	}
	return ""
}

// explain adds to a row what the kernel does not show.
func (o origins) explain(r *routeRow) {
	switch r.State {
	case stateExtra:
		return
	case stateForeign:
		if o.router[r.route.Dst] {
			r.Source = sourceBGP
		}
		return
	case stateLocal:
		r.Source = sourceOwn
		return
	}
	r.Source = o.source(r.route.Dst)
	if r.route.Blackhole {
		r.Source = sourceOwn
	}
	if to, ok := o.tunnel[r.route.Dst]; ok && r.Link == overlay.UDPLink {
		r.Peer = to.String()
	}
	if r.Source != sourceBGP {
		return
	}
	stale := true
	for _, p := range o.learned[r.route.Dst].Paths {
		stale = stale && p.Stale
		if !slices.Contains(r.From, p.From) {
			r.From = append(r.From, p.From)
		}
	}
	if stale && len(r.From) > 0 && r.State == stateOK {
		r.summary = "kept while " + list(r.From) + " restarts"
		r.Detail = []string{r.summary}
	}
}

const protoKernel = 2

// protocol names the origin of a route (rtnetlink(7), rtm_protocol).
func protocol(n uint8) string {
	switch n {
	case protoKernel:
		return "kernel"
	case 3:
		return "boot"
	case 4:
		return "static"
	case 11:
		return "zebra"
	case 12:
		return "bird"
	case 16:
		return "dhcp"
	case 186:
		return "bgp"
	}
	return fmt.Sprint(n)
}
