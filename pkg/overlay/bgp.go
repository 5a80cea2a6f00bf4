package overlay

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// BGPNode is what a node's lease says of its speaker.
type BGPNode struct {
	ASNumber uint32
	Port     uint16
	// ClusterID makes the node a route reflector (RFC 4456); invalid: it is none.
	ClusterID netip.Addr
}

type bgpNodeValue struct {
	ASNumber  uint32
	Port      uint16
	ClusterID string `json:",omitempty"`
}

// BGPOptions are the operator's choices on this node, from flags.
type BGPOptions struct {
	ASNumber  uint32     // instead of the configuration's; 0: that
	ClusterID netip.Addr // makes this node a route reflector
	// External says that a router that is not Twill's (BIRD, FRR) speaks for this
	// node and programs the routes.
	External bool
}

// BGP is what a node's speaker has to do, whoever speaks: the one inside twilld,
// or a BIRD or FRR whose configuration is rendered from this.
type BGP struct {
	ASNumber    uint32
	RouterID    netip.Addr // an IPv4 address, whatever the families
	Port        uint16
	ClusterID   netip.Addr // valid: this node is a route reflector
	Own         []BGPOwn
	Networks    []netip.Prefix // the cluster's pod networks
	Communities []Community    // put on Own
	HoldTime    time.Duration
	RestartTime time.Duration
	Neighbors   []BGPNeighbor // sorted by address
}

// BGPOwn is a subnet that the node announces, and the next hop it gives.
type BGPOwn struct {
	Prefix  netip.Prefix
	NextHop netip.Addr
}

// BGPNeighbor is one session. It carries the routes of its address's family.
type BGPNeighbor struct {
	Name        string // "lease 10.5.1.0-24" or "Backend.Peers 203.0.113.1"
	Address     netip.Addr
	Local       netip.Addr // our end
	ASNumber    uint32
	Port        uint16
	Password    string
	Multihop    uint8
	TTLSecurity uint8
	Node        bool // a node of the cluster: its routes are taken as they are
	Client      bool // we reflect to it (RFC 4456)
	Import      []BGPRule
	Export      []BGPRule
	Communities []Community
}

// RIB is what the speaker has learned: for each prefix the best paths, all
// equally good. Immutable.
type RIB struct {
	Routes []BGPRoute // sorted by prefix
	// Hops resolves the next hops that are not on the uplink's link.
	Hops map[netip.Addr]Hop
}

// BGPRoute is a learned prefix.
type BGPRoute struct {
	Prefix netip.Prefix
	Paths  []BGPPath // sorted by next hop
}

// BGPPath is one way to a learned prefix.
type BGPPath struct {
	NextHop netip.Addr
	From    netip.Addr // the neighbour that told it
	Allowed bool       // an import rule accepts it by name: it may overlap the underlay
	Stale   bool       // its neighbour is restarting (RFC 4724)
}

// Hop is where the kernel sends packets for an address.
type Hop struct {
	Gateway netip.Addr // invalid: Link reaches it without
	Link    string
}

// bgp carries packets unencapsulated. Routes come from the speaker; until it has
// learned one, a peer on the link is reached by its lease.
type bgp struct {
	linkless
	BGPConfig
}

func (b bgp) attrs(c Config, self Self) Attrs {
	v := bgpNodeValue{ASNumber: self.BGP.asNumber(b.BGPConfig), Port: b.Port}
	if self.BGP.ClusterID.IsValid() {
		v.ClusterID = self.BGP.ClusterID.String()
	}
	data, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("marshal BGP data: %v", err))
	}
	a := public(c, self, "bgp")
	a.Data = string(data)
	a.BGP = BGPNode{ASNumber: v.ASNumber, Port: v.Port, ClusterID: self.BGP.ClusterID}
	return a
}

func parseBGPNode(data string) (BGPNode, error) {
	var v bgpNodeValue
	if err := json.Unmarshal([]byte(data), &v); err != nil {
		return BGPNode{}, fmt.Errorf("BackendData: %w", err)
	}
	n := BGPNode{ASNumber: v.ASNumber, Port: v.Port}
	if v.ASNumber == 0 || v.Port == 0 {
		return BGPNode{}, fmt.Errorf("BackendData: ASNumber %d, Port %d: must not be 0", v.ASNumber, v.Port)
	}
	if v.ClusterID != "" {
		id, err := netip.ParseAddr(v.ClusterID)
		if err != nil || !id.Is4() {
			return BGPNode{}, fmt.Errorf("BackendData: ClusterID %q is not like 192.0.2.1", v.ClusterID)
		}
		n.ClusterID = id
	}
	return n, nil
}

func (o BGPOptions) asNumber(c BGPConfig) uint32 {
	if o.ASNumber != 0 {
		return o.ASNumber
	}
	return c.ASNumber
}

// own adds the blackhole that keeps a packet to a pod that does not exist from
// being sent back to where it came from, and the facts for the speaker.
func (b bgp) own(d *draft) {
	for _, f := range d.families {
		d.blackhole(d.self.Subnet(f))
	}
	d.bgp = &b.BGPConfig
}

func (bgp) peer(d *draft, l *Lease, f Family) error {
	if d.self.BGP.External {
		return nil
	}
	if _, learned := d.self.RIB.route(l.Subnet(f)); learned {
		return nil // draft.learned adds it
	}
	if !d.self.onLink(l.Public(f)) {
		if d.bgp != nil {
			return fmt.Errorf("no route to %s is learned by BGP and the peer is not on the link of %s; see netctl bgp", l.Subnet(f), d.self.Uplink.Name)
		}
		return d.self.offLink(l.Public(f), "bgp")
	}
	d.direct(l, f)
	return nil
}

// route finds what was learned of exactly this prefix.
func (r *RIB) route(p netip.Prefix) (BGPRoute, bool) {
	if r == nil {
		return BGPRoute{}, false
	}
	i, ok := slices.BinarySearchFunc(r.Routes, p, func(x BGPRoute, p netip.Prefix) int { return comparePrefix(x.Prefix, p) })
	if !ok {
		return BGPRoute{}, false
	}
	return r.Routes[i], true
}

// Remote returns the next hops that are on none of the links.
func (r *RIB) Remote(onLink []netip.Prefix) []netip.Addr {
	var out []netip.Addr
	for _, route := range r.Routes {
		for _, p := range route.Paths {
			if !slices.ContainsFunc(onLink, func(l netip.Prefix) bool { return l.Contains(p.NextHop) }) && !slices.Contains(out, p.NextHop) {
				out = append(out, p.NextHop)
			}
		}
	}
	return out
}

// speaker returns what the node's speaker has to do.
func (d *draft) speaker(c BGPConfig, leases []*Lease) *BGP {
	b := &BGP{
		ASNumber: d.self.BGP.asNumber(c), RouterID: routerID(d.self), Port: c.Port, ClusterID: d.self.BGP.ClusterID,
		Networks: d.cfg.Networks(), Communities: c.Communities, HoldTime: c.HoldTime, RestartTime: c.RestartTime,
	}
	for _, f := range d.families {
		b.Own = append(b.Own, BGPOwn{d.self.Subnet(f), d.self.public(f)})
		for _, l := range leases {
			if n, ok := d.meshNeighbor(l, f, c); ok {
				b.Neighbors = append(b.Neighbors, n)
			}
		}
		for _, p := range c.Peers {
			if FamilyOf(p.Address) != f || len(p.Nodes) > 0 && !slices.ContainsFunc(p.Nodes, d.self.is) {
				continue
			}
			if p.Address == d.self.public(f) {
				d.problem("Backend.Peers "+p.Address.String(), "remove it, or list the nodes that speak to it in Nodes", "is this node's own address")
				continue
			}
			b.Neighbors = append(b.Neighbors, BGPNeighbor{
				Name: "Backend.Peers " + p.Address.String(), Address: p.Address, Local: d.self.Uplink.addr(f), ASNumber: p.ASNumber, Port: p.Port,
				Password: p.Password, Multihop: p.Multihop, TTLSecurity: p.TTLSecurity,
				Import: p.Import, Export: p.Export, Communities: p.Communities,
			})
		}
	}
	slices.SortStableFunc(b.Neighbors, func(x, y BGPNeighbor) int { return x.Address.Compare(y.Address) })
	b.Neighbors = slices.CompactFunc(b.Neighbors, func(x, y BGPNeighbor) bool {
		twin := x.Address == y.Address
		if twin {
			d.problem(y.Name, "remove one of the two", "%s has the same address", x.Name)
		}
		return twin
	})
	return b
}

// meshNeighbor returns the session to the node of a lease. Reflectors speak to
// all nodes and to each other; without the mesh other nodes speak to reflectors
// alone. A node that has not switched to bgp yet is spoken to all the same: it
// will have a speaker as soon as it reads the configuration.
func (d *draft) meshNeighbor(l *Lease, f Family, c BGPConfig) (BGPNeighbor, bool) {
	we, they := d.self.BGP.ClusterID, l.BGP.ClusterID
	if !l.Public(f).IsValid() || !l.Subnet(f).IsValid() || !c.NodeMesh && !we.IsValid() && !they.IsValid() {
		return BGPNeighbor{}, false
	}
	n := BGPNeighbor{
		Name: "lease " + l.Key(), Address: l.Public(f), Local: d.self.Uplink.addr(f), ASNumber: l.BGP.ASNumber, Port: l.BGP.Port,
		Password: c.Password, Node: true, Client: we.IsValid() && they != we,
	}
	if l.Backend != "bgp" {
		n.ASNumber, n.Port = c.ASNumber, c.Port
	}
	if !d.self.onLink(n.Address) {
		n.Multihop = 255
	}
	return n, true
}

// routerID is a node's BGP identifier (RFC 6286: unique in the AS, not zero).
func routerID(s Self) netip.Addr {
	if s.PublicIP.Is4() {
		return s.PublicIP
	}
	sum := sha256.Sum256(s.PublicV6.AsSlice())
	sum[0] |= 1
	return netip.AddrFrom4([4]byte(sum[:4]))
}

// learned adds the routes that the speaker has learned.
func (d *draft) learned(leases []*Lease) {
	if d.bgp == nil || d.self.RIB == nil || d.self.BGP.External {
		return
	}
	other := d.notByBGP(leases)
	for _, r := range d.self.RIB.Routes {
		f := FamilyOf(r.Prefix.Addr())
		if !slices.Contains(d.families, f) || other[r.Prefix] {
			continue
		}
		if why := d.harm(r); why != "" {
			d.problem("bgp route "+r.Prefix.String(), "withdraw it at the router, or let an import rule of Backend.Peers accept it",
				"learned from %s and refused: %s", r.Paths[0].From, why)
			continue
		}
		d.ecmp(r)
	}
}

// notByBGP returns the subnets of peers that publish another backend: mid-switch
// the lease says how they are reached.
func (d *draft) notByBGP(leases []*Lease) map[netip.Prefix]bool {
	out := map[netip.Prefix]bool{}
	for _, l := range leases {
		if l.Backend != "bgp" {
			for _, p := range l.All() {
				out[p] = true
			}
		}
	}
	return out
}

// harm says whose packets a learned route would take away.
func (d *draft) harm(r BGPRoute) string {
	f := FamilyOf(r.Prefix.Addr())
	if own := d.self.Subnet(f); own.Overlaps(r.Prefix) && (own.Bits() <= r.Prefix.Bits() || !allowed(r)) {
		return fmt.Sprintf("it overlaps this node's own subnet %s", own)
	}
	if allowed(r) {
		return ""
	}
	for _, p := range d.self.Uplink.OnLink {
		if p.Overlaps(r.Prefix) {
			return fmt.Sprintf("it overlaps %s, the network of this node's uplink", p)
		}
	}
	return ""
}

func allowed(r BGPRoute) bool {
	return slices.ContainsFunc(r.Paths, func(p BGPPath) bool { return p.Allowed })
}

// ecmp leads a learned prefix over all its equal paths: by a group of nexthop
// objects, one per gateway.
func (d *draft) ecmp(r BGPRoute) {
	var hops []Hop
	for _, p := range r.Paths {
		h := Hop{Gateway: p.NextHop, Link: d.self.Uplink.Name}
		if !d.self.onLink(p.NextHop) {
			var ok bool
			if h, ok = d.self.RIB.Hops[p.NextHop]; !ok {
				d.problem("bgp route "+r.Prefix.String(), "give this node a route to it", "next hop %s is not reachable", p.NextHop)
				continue
			}
		}
		if !slices.Contains(hops, h) {
			hops = append(hops, h)
		}
	}
	switch {
	case len(hops) == 0:
	case len(hops) == 1:
		d.route(r.Prefix, hops[0].Gateway, hops[0].Link, false)
	case !d.self.Nexthops:
		d.problem("bgp route "+r.Prefix.String(), "use Linux 5.3 or later", "one of %d equal paths is used: the kernel has no nexthop objects", len(hops))
		d.route(r.Prefix, hops[0].Gateway, hops[0].Link, false)
	default:
		var ids []string
		for _, h := range hops {
			ids = append(ids, fmt.Sprint(d.gatewayID(h)))
		}
		slices.Sort(ids)
		group := strings.Join(ids, "/")
		id := d.sharedID(0x57, "group "+group, Nexthop{Group: group})
		d.state.Routes = append(d.state.Routes, Route{Dst: r.Prefix, Metric: defaultMetric(r.Prefix), NH: id, Protocol: Protocol})
	}
}

func (d *draft) gatewayID(h Hop) uint32 {
	return d.sharedID(0x56, h.Gateway.String()+"%"+h.Link, Nexthop{Gateway: h.Gateway, Link: h.Link})
}

// sharedID numbers a nexthop object that several routes use by a hash of what it
// is, so that it keeps its number whatever comes and goes beside it.
func (d *draft) sharedID(space uint32, name string, n Nexthop) uint32 {
	if id, ok := d.shared[name]; ok {
		return id
	}
	sum := sha256.Sum256([]byte(name))
	id := space<<24 | uint32(sum[0])<<16 | uint32(sum[1])<<8 | uint32(sum[2])
	for d.sharedIDs[id] {
		id = space<<24 | (id+1)&0xffffff
	}
	d.shared[name], d.sharedIDs[id] = id, true
	n.ID = id
	d.state.Nexthops = append(d.state.Nexthops, n)
	return id
}
