package kernel

import (
	"context"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

// Observe returns what the kernel holds of ours, in the form in which Desired
// says what is wanted; also the links that flannel may have left behind with all
// that is on them, and what scope asks for. It is complete or an error.
func (k *Kernel) Observe(ctx context.Context, scope Scope) (overlay.State, error) {
	k.scope.Store(&scope)
	k.mu.Lock()
	defer k.mu.Unlock()
	o := observer{conn: k.conn, ctx: ctx, scope: scope, names: map[uint32]string{}, wireguard: k.wireguard}
	steps := []func() error{o.links, o.addrs, o.routes, o.neighbors, o.sysctls}
	if k.nexthops {
		steps = append(steps, o.nexthops)
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return overlay.State{}, fmt.Errorf("observe %w", err)
		}
	}
	chains, err := k.firewall.observe(ctx)
	if err != nil {
		return overlay.State{}, err
	}
	o.state.Chains = chains
	o.state.Normalize()
	return o.state, nil
}

// observer fills a State from one dump after the other.
type observer struct {
	conn  *conn
	ctx   context.Context
	scope Scope
	state overlay.State
	own   []link // the links that are ours or flannel's
	// names holds the names of the links met so far; named says that these are all.
	names map[uint32]string
	named bool

	wireguard *wireguard
}

func (o *observer) links() error {
	found, err := o.conn.links(o.ctx, overlay.KindVXLAN)
	if err != nil {
		return err
	}
	// The others are asked for by name: of a kind that it does not know, the kernel
	// would list the links of all pods.
	for _, name := range []string{overlay.UDPLink, overlay.WireGuardLink, overlay.WireGuardLinkV6, overlay.IPIPLink} {
		err := o.conn.request(func(e *encoder) { encodeLinkGet(e, name) }, func(_ header, body []byte) {
			if l := decodeLink(body); l.Kind != overlay.KindVXLAN { // listed already
				found = append(found, l)
			}
		})
		if err != nil && !absent(err) {
			return fmt.Errorf("link %s: %w", name, err)
		}
	}
	for _, l := range found {
		if !l.candidate() {
			continue
		}
		o.names[l.index] = l.Name
		parent, err := o.name(l.parent)
		if err != nil {
			return err
		}
		l.setParent(parent)
		if l.hasWireGuard() {
			var peers []overlay.WGPeer
			if l.WG, peers, err = o.wireguard.device(l.Name); err != nil {
				return fmt.Errorf("WireGuard device %s: %w", l.Name, err)
			}
			o.state.WGPeers = append(o.state.WGPeers, peers...)
		}
		o.own = append(o.own, l)
		o.state.Links = append(o.state.Links, l.Link)
	}
	return nil
}

// links lists the devices of a kind, or all if kind is empty.
func (c *conn) links(ctx context.Context, kind overlay.Kind) ([]link, error) {
	var out []link
	err := c.dump(ctx, func(e *encoder) { encodeLinkDump(e, kind) }, func() { out = out[:0] }, func(_ header, body []byte) {
		if l := decodeLink(body); kind == "" || l.Kind == kind {
			out = append(out, l)
		}
	})
	if err != nil {
		return nil, fmt.Errorf("links: %w", err)
	}
	return out, nil
}

// linkAt reads the device of that index; a zero link if it is gone.
func (c *conn) linkAt(index uint32) (l link, err error) {
	err = c.request(func(e *encoder) {
		beginLink(e, unix.RTM_GETLINK, index)
		e.u32(unix.IFLA_EXT_MASK, skipStats)
	}, func(_ header, body []byte) { l = decodeLink(body) })
	if err != nil && !absent(err) {
		return link{}, fmt.Errorf("link %d: %w", index, err)
	}
	return l, nil
}

// fewLinks is how many links are asked for one by one: the uplink and the bridge
// of the pods, on most nodes. Many more are read in one dump.
const fewLinks = 8

// name returns the name of a link, or none if the link is gone by now.
func (o *observer) name(index uint32) (string, error) {
	if name, ok := o.names[index]; ok || index == 0 || o.named {
		return name, nil
	}
	if len(o.names) < fewLinks {
		l, err := o.conn.linkAt(index)
		if err != nil {
			return "", err
		}
		o.names[index] = l.Name
		return l.Name, nil
	}
	all, err := o.conn.links(o.ctx, "")
	if err != nil {
		return "", err
	}
	o.named = true
	for _, l := range all {
		o.names[l.index] = l.Name
	}
	return o.names[index], nil
}

func (o *observer) isOwn(index uint32) bool {
	for i := range o.own { // one or two
		if o.own[i].index == index {
			return true
		}
	}
	return false
}

func (o *observer) addrs() error {
	for _, l := range o.own {
		var out []overlay.Addr
		err := o.conn.dump(o.ctx, func(e *encoder) { encodeAddrDump(e, l.index) }, func() { out = out[:0] }, func(_ header, body []byte) {
			if linkIndexOf(body) != l.index {
				return
			}
			if p := decodeAddr(body).prefix; p.IsValid() && !p.Addr().IsLinkLocalUnicast() {
				out = append(out, overlay.Addr{Link: l.Name, Prefix: p})
			}
		})
		if err != nil {
			return fmt.Errorf("addresses of %s: %w", l.Name, err)
		}
		o.state.Addrs = append(o.state.Addrs, out...)
	}
	return nil
}

func (o *observer) nexthops() error {
	var found []nexthop
	err := o.conn.dump(o.ctx, encodeNexthopDump, func() { found = found[:0] }, func(_ header, body []byte) {
		if n := decodeNexthop(body); n.protocol == overlay.Protocol {
			found = append(found, n)
		}
	})
	if err != nil {
		return fmt.Errorf("nexthops: %w", err)
	}
	o.state.Nexthops = make([]overlay.Nexthop, 0, len(found))
	for _, n := range found {
		if n.Link, err = o.name(n.oif); err != nil {
			return err
		}
		o.state.Nexthops = append(o.state.Nexthops, n.Nexthop)
	}
	return nil
}

func (o *observer) routes() error {
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		var found []route
		err := o.conn.dump(o.ctx, func(e *encoder) { encodeRouteDump(e, family) }, func() { found = found[:0] }, func(_ header, body []byte) {
			// A kernel without IPv6 lists all families instead.
			if r, ok := decodeRoute(body); ok && body[0] == family && o.concerns(&r) {
				found = append(found, r)
			}
		})
		if err != nil && !absent(err) { // a table that never held a route does not exist
			return fmt.Errorf("routes: %w", err)
		}
		if err := o.sortOut(found); err != nil {
			return err
		}
	}
	return nil
}

// concerns reports whether a route belongs in the State: as ours, or as another's
// in the way.
func (o *observer) concerns(r *route) bool {
	if r.leadsToPod(o.isOwn(r.oif)) {
		return false
	}
	if r.Protocol == overlay.Protocol {
		return true
	}
	if o.isOwn(r.oif) {
		return r.Protocol != unix.RTPROT_KERNEL // what comes with an address
	}
	if r.Dst.Bits() == 0 || o.scope.Places[r.Dst] {
		return o.scope.Places[r.Dst]
	}
	for _, n := range o.scope.Networks {
		if n.Overlaps(r.Dst) {
			return true
		}
	}
	return false
}

// sortOut puts routes where they belong, in the form of Desired.
func (o *observer) sortOut(found []route) error {
	for i := range found {
		r := &found[i]
		ours := r.Protocol == overlay.Protocol || o.isOwn(r.oif)
		switch {
		case r.typ != unix.RTN_UNICAST:
			// IPv6 says that such a route leads to lo.
		case r.NH != 0:
			// The kernel adds what the nexthop object says.
			r.Gateway, r.OnLink = netip.Addr{}, false
		default:
			var err error
			if r.Link, err = o.name(r.oif); err != nil {
				return err
			}
		}
		if ours {
			o.state.Routes = append(o.state.Routes, r.Route)
		} else {
			o.state.Foreign = append(o.state.Foreign, r.Route)
		}
	}
	return nil
}

func (o *observer) neighbors() error {
	for _, l := range o.own {
		err := o.neighborsOf(l, unix.AF_UNSPEC)
		if err == nil {
			err = o.neighborsOf(l, unix.AF_BRIDGE)
		}
		if err != nil {
			return fmt.Errorf("neighbours of %s: %w", l.Name, err)
		}
	}
	return nil
}

// neighborsOf lists the ARP and NDP entries, or the forwarding entries, of a link.
func (o *observer) neighborsOf(l link, family uint8) error {
	neighs, fdb := len(o.state.Neighs), len(o.state.FDB)
	reset := func() { o.state.Neighs, o.state.FDB = o.state.Neighs[:neighs], o.state.FDB[:fdb] }
	return o.conn.dump(o.ctx, func(e *encoder) { encodeNeighDump(e, family, l.index) }, reset, func(_ header, body []byte) {
		n := decodeNeighbor(body)
		switch {
		case n.index != l.index || !n.permanent():
		case family == unix.AF_UNSPEC:
			o.state.Neighs = append(o.state.Neighs, overlay.Neigh{Link: l.Name, IP: n.dst, MAC: n.mac})
		case n.flags&unix.NTF_SELF != 0:
			o.state.FDB = append(o.state.FDB, overlay.FDB{Link: l.Name, MAC: n.mac, Dst: n.dst})
		}
	})
}

func (o *observer) sysctls() (err error) {
	o.state.Sysctls, err = readSysctls(o.scope.Sysctls)
	return err
}
