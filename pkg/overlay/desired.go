package overlay

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Self is what this node knows of itself.
type Self struct {
	Subnets  // the lease it holds
	Uplink   Uplink
	PublicIP netip.Addr // what it publishes; usually Uplink.V4
	PublicV6 netip.Addr
	// MAC and MACv6 are the addresses of its VTEPs.
	MAC, MACv6 MAC
	WGKey      WGKey // private, of backend wireguard
	// ExtensionData is the output of PreStartupCommand.
	ExtensionData string
	// Former are the backends that were configured before and that peers may still
	// send by, or be reached by: they stay beside the configured one.
	Former []BackendConfig
	RIB    *RIB // what the speaker has learned; nil: nothing yet
	Options
}

// Options are the operator's choices on this node, from flags.
type Options struct {
	IPMasq         bool // masquerade what leaves the cluster
	RandomFully    bool // with fully random source ports
	ForwardRules   bool // accept forwarded pod traffic
	BlackholeRoute bool // drop packets to pods of ours that do not exist
	Nexthops       bool // the kernel has nexthop objects (Linux 5.3)
	// NeighLimit and NeighLimitV6 are how many neighbours the kernel keeps
	// (gc_thresh3 in arp(7)); 0: unknown.
	NeighLimit, NeighLimitV6 int
	// WireGuardInUserSpace: the kernel has no WireGuard.
	WireGuardInUserSpace bool
	BGP                  BGPOptions
}

// CheckTransition says why a running node that holds n cannot take up the
// configuration next, or nil. The network may grow, and shrink to what holds all
// leases.
func (c Config) CheckTransition(next Config, n Subnets, leases []*Lease) error {
	if err := next.CheckBackend(); err != nil {
		return err
	}
	if err := next.Check(n); err != nil {
		return fmt.Errorf("this node's lease does not fit: %w; move the pods away and restart twilld", err)
	}
	for _, l := range leases {
		for _, f := range next.families() {
			s, had, has := l.Subnet(f), c.Pool(f).Network, next.Pool(f).Network
			if s.IsValid() && had.IsValid() && had.Contains(s.Addr()) && !has.Contains(s.Addr()) {
				return fmt.Errorf("network shrinks from %s to %s under the live lease %s; delete the lease or choose a network that holds it", had, has, l.holder())
			}
		}
	}
	return nil
}

func joined(p []netip.Prefix) string {
	var s []string
	for _, x := range p {
		s = append(s, x.String())
	}
	return strings.Join(s, ",")
}

// PublishedAttrs returns what the node's lease shall say.
func PublishedAttrs(c Config, self Self) (Attrs, error) {
	b, err := c.Backend.backend()
	if err != nil {
		return Attrs{}, err
	}
	return b.attrs(c, self), nil
}

// PodMTU returns the largest packet in bytes that a pod may send in every family
// in use without fragmentation.
func PodMTU(c Config, self Self) (int, error) {
	b, err := c.Backend.backend()
	if err != nil {
		return 0, err
	}
	mtu := 0
	for _, f := range c.families() {
		if m := max(b.mtu(self, f), leastMTU(f)); mtu == 0 || m < mtu {
			mtu = m
		}
	}
	return mtu, nil
}

// leastMTU is what a link must carry: RFC 791 and RFC 8200, section 5. An underlay
// that leaves less has to fragment the outer packets.
func leastMTU(f Family) int {
	if f == IPv4 {
		return 576
	}
	return 1280
}

// linkMTU is the MTU of our device for a family. It is never below what the
// kernel needs to run that family over the device.
func (d *draft) linkMTU(name string, b backend, f Family) int {
	mtu, least := b.mtu(d.self, f), leastMTU(f)
	if mtu < least {
		d.problem("link "+name, "raise the MTU of the uplink or Backend.MTU", "%d bytes are left for a packet of a pod, %s needs %d; outer packets will be fragmented", mtu, f, least)
		return least
	}
	return mtu
}

func (c Config) families() []Family {
	var out []Family
	for _, f := range []Family{IPv4, IPv6} {
		if c.Pool(f).Enabled() {
			out = append(out, f)
		}
	}
	return out
}

// Subnet returns the prefix of a family.
func (n Subnets) Subnet(f Family) netip.Prefix {
	if f == IPv4 {
		return n.V4
	}
	return n.V6
}

// Public returns the address of a family that peers send to.
func (a Attrs) Public(f Family) netip.Addr {
	if f == IPv4 {
		return a.PublicIP
	}
	return a.PublicIPv6
}

// draft is a State being put together.
type draft struct {
	cfg      Config
	self     Self
	families []Family // in use, and with a subnet of ours
	state    State
	problems []Problem

	bgp       *BGPConfig        // set if a speaker is wanted
	shared    map[string]uint32 // nexthop objects that several routes use
	sharedIDs map[uint32]bool
	wgPeers   map[string]int // place in state.WGPeers
	former    bool           // own is called of a former backend
	neighbors map[Family]int // peers that are reached without encapsulation
}

func (d *draft) pool(f Family) *Pool {
	if f == IPv4 {
		return &d.cfg.V4
	}
	return &d.cfg.V6
}

func (d *draft) problem(object, remedy, format string, args ...any) {
	d.problems = append(d.problems, Problem{Object: object, Reason: fmt.Sprintf(format, args...), Remedy: remedy})
}

// Desired returns what the node's kernel should hold. It is total: a peer that
// makes no sense is a Problem and costs nobody else anything.
func Desired(snap *Snapshot, self Self) (State, []Problem) {
	n := len(snap.Leases)
	d := &draft{
		cfg: snap.Config, self: self, problems: slices.Clone(snap.Problems),
		shared: map[string]uint32{}, sharedIDs: map[uint32]bool{}, wgPeers: map[string]int{}, neighbors: map[Family]int{},
	}
	carriers, err := d.carriers()
	if err != nil { // the caller asks CheckBackend before it takes a configuration up
		d.problem("config", "", "%v", err)
		return State{}, d.problems
	}
	for _, f := range snap.Config.families() {
		if self.Subnet(f).IsValid() {
			d.families = append(d.families, f)
		} else {
			d.problem("lease "+self.Key(), "", "has no %s subnet, so there is no %s for pods", f, f)
		}
	}
	n *= len(d.families)
	d.state.Nexthops, d.state.Routes = make([]Nexthop, 0, n), make([]Route, 0, n)
	d.state.Neighs, d.state.FDB = make([]Neigh, 0, n), make([]FDB, 0, n)
	for i, c := range carriers {
		if len(d.families) > 0 {
			d.former = i > 0
			c.own(d)
		}
	}
	d.node()
	peers := d.peers(snap.Leases)
	for _, f := range d.families {
		nodes := d.nodes(peers, f)
		for _, l := range ordered(peers, f) {
			if err := d.peer(carriers, l, f, nodes); err != nil {
				d.problem(l.object(), "", "%s peer %s: %v", f, l.address(), err)
			}
		}
	}
	if d.bgp != nil {
		d.learned(peers)
		d.state.Outside.BGP = d.speaker(*d.bgp, peers)
	}
	d.checkNeighbors()
	d.state.Normalize()
	d.dropTwins(snap.Leases)
	return d.state, d.problems
}

// peer adds what leads packets to the pods of one peer.
func (d *draft) peer(carriers []carrier, l *Lease, f Family, nodes []netip.Addr) error {
	if err := d.reasonable(l, f, nodes); err != nil {
		return err
	}
	b, err := d.carrierOf(carriers, l)
	if err != nil {
		return err
	}
	return b.peer(d, l, f)
}

// node adds what the node needs whatever the backend.
func (d *draft) node() {
	for _, f := range d.families {
		if f == IPv4 {
			d.state.Sysctls = append(d.state.Sysctls, Sysctl{Key: "net/ipv4/ip_forward", Value: "1"})
		} else {
			// A forwarding node ignores router advertisements unless accept_ra
			// is 2; without this an uplink that lives on them loses its default route.
			d.state.Sysctls = append(d.state.Sysctls,
				Sysctl{Key: "net/ipv6/conf/" + strings.ReplaceAll(d.self.Uplink.Name, "/", ".") + "/accept_ra", Value: "2", When: "1"},
				Sysctl{Key: "net/ipv6/conf/all/forwarding", Value: "1"})
		}
		pods := d.self.Subnet(f)
		d.state.Chains = append(d.state.Chains, chains(d.cfg.Tool(), f, d.cfg.Pool(f).Network, pods, d.self.Options)...)
		if d.self.BlackholeRoute {
			d.blackhole(pods)
		}
	}
}

// blackhole drops packets to pods of ours that do not exist. It has the lowest
// priority there is: cni0's own route comes first.
func (d *draft) blackhole(pods netip.Prefix) {
	r := Route{Dst: pods, Blackhole: true, Metric: 0xfffffffe, Protocol: Protocol}
	if !slices.Contains(d.state.Routes, r) {
		d.state.Routes = append(d.state.Routes, r)
	}
}

// peers returns the leases that somebody else holds by right. Of the others but
// our own it says what is wrong.
func (d *draft) peers(leases []*Lease) []*Lease {
	lost := losers(d.cfg, leases)
	out := make([]*Lease, 0, len(leases))
	for _, l := range leases {
		problem := func(remedy, format string, args ...any) { d.problem(l.object(), remedy, format, args...) }
		own, winner := l.Subnets == d.self.Subnets, lost[l]
		switch {
		case winner != nil && own:
			problem("twilld moves to another subnet", "this node's subnet overlaps a lease with the better claim: %s", winner.holder())
		case winner != nil:
			problem("the node takes another subnet by itself if it runs twilld; else delete its key", "overlaps a lease with the better claim: %s", winner.holder())
		case own:
		case l.Err != nil:
			problem("restart the node's daemon, which writes it anew, or correct the value", "%v", l.Err)
		case l.Backend == "" && l.Reserved() && l.Node == "": // nobody lives there yet
		case l.address() == d.self.address():
			problem(cmp.Or(l.deleteNode(), "delete the key")+", or give one of the nodes another address", "says that its node is at %s, which is this node's address", l.address())
		default:
			out = append(out, l)
		}
	}
	return out
}

// nodes returns the addresses that outer packets go to, in order, if there is a
// subnet outside the pod network that might contain some.
func (d *draft) nodes(leases []*Lease, f Family) []netip.Addr {
	network := d.cfg.Pool(f).Network
	if !slices.ContainsFunc(leases, func(l *Lease) bool { return l.Subnet(f).IsValid() && !network.Contains(l.Subnet(f).Addr()) }) {
		return nil
	}
	out := []netip.Addr{d.self.Uplink.addr(f)}
	for _, l := range leases {
		if l.Public(f).IsValid() {
			out = append(out, l.Public(f))
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

// reasonable refuses a peer whose route would do harm to others: it would take
// the traffic to nodes, or to far more than pods. A subnet beside the network is
// well: the network may just be on its way to a wider one, node by node.
func (d *draft) reasonable(l *Lease, f Family, nodes []netip.Addr) error {
	subnet, network := l.Subnet(f), d.pool(f).Network
	switch {
	case !subnet.IsValid():
		return fmt.Errorf("it has no %s subnet", f)
	case !l.Public(f).IsValid() && l.Backend != "wireguard": // which may go over the other family
		return fmt.Errorf("it publishes no %s address", f)
	case subnet.Bits() <= network.Bits():
		return fmt.Errorf("its subnet is as wide as the whole network %s", network)
	case subnet.Contains(l.Public(f)):
		return fmt.Errorf("its address %s lies in its own subnet", l.Public(f))
	case network.Contains(subnet.Addr()):
		return nil
	}
	i, _ := slices.BinarySearchFunc(nodes, subnet.Addr(), netip.Addr.Compare)
	if i < len(nodes) && subnet.Contains(nodes[i]) {
		return fmt.Errorf("its subnet contains the address of node %s", nodes[i])
	}
	for _, p := range d.self.Uplink.OnLink {
		if subnet.Overlaps(p) {
			return fmt.Errorf("its subnet overlaps %s, the network of this node's uplink", p)
		}
	}
	return nil
}

// address identifies the node that holds the lease.
func (a *Attrs) address() netip.Addr {
	if a.PublicIP.IsValid() {
		return a.PublicIP
	}
	return a.PublicIPv6
}

// public returns the address of a family that the node publishes.
func (s *Self) public(f Family) netip.Addr {
	if f == IPv4 {
		return s.PublicIP
	}
	return s.PublicV6
}

// is reports whether a is one of the node's own addresses.
func (s *Self) is(a netip.Addr) bool {
	return slices.Contains([]netip.Addr{s.PublicIP, s.PublicV6, s.Uplink.V4, s.Uplink.V6}, a)
}

func (s *Self) address() netip.Addr {
	a := Attrs{PublicIP: s.PublicIP, PublicIPv6: s.PublicV6}
	return a.address()
}

// route leads dst to gateway, or into link if there is none, by a nexthop object of
// its own. Without nexthop objects, or for a subnet that has no number in its pool, it is a plain route.
func (d *draft) route(dst netip.Prefix, gateway netip.Addr, link string, onlink bool) {
	r := Route{Dst: dst, Metric: defaultMetric(dst), Protocol: Protocol}
	if id, ok := d.nexthopID(dst); ok {
		n := Nexthop{ID: id, Gateway: gateway, Link: link, OnLink: onlink}
		if !gateway.IsValid() {
			n.Family = FamilyOf(dst.Addr())
		}
		d.state.Nexthops = append(d.state.Nexthops, n)
		r.NH = id
	} else {
		r.Gateway, r.Link, r.OnLink = gateway, link, onlink
	}
	d.state.Routes = append(d.state.Routes, r)
}

// nexthopID numbers the nexthop object of a peer by the number of its subnet,
// behind 0x54 (84, IPv4) or 0x55 (IPv6): two peers never share one.
func (d *draft) nexthopID(dst netip.Prefix) (uint32, bool) {
	f := FamilyOf(dst.Addr())
	pool := d.pool(f)
	n, ok := pool.number(dst)
	if !ok || !d.self.Nexthops {
		return 0, false
	}
	if f == IPv4 {
		return 0x54<<24 | n, true
	}
	return 0x55<<24 | n, true
}

// dropTwins keeps one of several FDB entries for the same MAC: two nodes that
// publish the same VTEP address cannot both be reached. The younger lease is more
// likely to have somebody behind it: a node that comes back with another IP
// address has a lease under its old one for a day.
func (d *draft) dropTwins(leases []*Lease) {
	var created map[netip.Addr]int64 // the youngest lease of each node
	kept := d.state.FDB[:0]
	for _, e := range d.state.FDB {
		last := len(kept) - 1
		if last < 0 || kept[last].compare(e) != 0 {
			kept = append(kept, e)
			continue
		}
		a, b := kept[last].Dst, e.Dst
		if a == b { // one node with two leases
			continue
		}
		if created == nil {
			created = newest(leases, d.families)
		}
		if c := cmp.Compare(created[b], created[a]); c > 0 || c == 0 && b.Less(a) {
			a, b = b, a
			kept[last] = e
		}
		d.problem("fdb "+e.MAC.String(), "delete the link on one of the two and restart its daemon", "%s and %s publish the same VtepMAC; only %s is reached, whose lease is younger", a, b, a)
	}
	d.state.FDB = kept
}

// newest maps each public address to the creation of its youngest lease.
func newest(leases []*Lease, families []Family) map[netip.Addr]int64 {
	out := map[netip.Addr]int64{}
	for _, l := range leases {
		for _, f := range families {
			out[l.Public(f)] = max(out[l.Public(f)], l.Created)
		}
	}
	return out
}
