package overlay

import "fmt"

// linkless is what the backends have in common that send a pod's packet as it is,
// by the uplink.
type linkless struct{}

func (linkless) mtu(self Self, _ Family) int { return self.Uplink.MTU }
func (linkless) own(*draft)                  {}

// hostGW leads each peer's subnet to the peer's address.
type hostGW struct{ linkless }

func (hostGW) attrs(c Config, self Self) Attrs { return public(c, self, "host-gw") }

func (hostGW) own(d *draft) {
	for _, f := range d.families {
		if own := d.self.Uplink.addr(f); d.self.public(f) != own {
			d.problem("address "+d.self.public(f).String(), "leave --public-ip out",
				"peers send to it without encapsulation, but this node's address on %s is %s", d.self.Uplink.Name, own)
		}
	}
}

func (hostGW) peer(d *draft, l *Lease, f Family) error {
	if !d.self.onLink(l.Public(f)) {
		return d.self.offLink(l.Public(f), "host-gw")
	}
	d.direct(l, f)
	return nil
}

// direct leads a peer's subnet to the peer's address on the uplink's link.
func (d *draft) direct(l *Lease, f Family) {
	d.neighbors[f]++
	d.route(l.Subnet(f), l.Public(f), d.self.Uplink.Name, false)
}

// checkNeighbors warns before the kernel's neighbour table is full: packets to
// peers that do not fit are lost in silence.
func (d *draft) checkNeighbors() {
	for _, f := range d.families {
		limit := d.self.NeighLimit
		if f == IPv6 {
			limit = d.self.NeighLimitV6
		}
		if n := d.neighbors[f]; limit > 0 && n > limit/2 {
			d.problem(fmt.Sprintf("%s neighbour table", f), fmt.Sprintf("raise net.ipv%d.neigh.default.gc_thresh3 (and gc_thresh2) to at least %d on every node", f, 4*n),
				"%d peers are reached without encapsulation, and the kernel keeps %d neighbours at most; packets to those that do not fit are lost", n, limit)
		}
	}
}

// offLink says why a peer cannot be reached without encapsulation.
func (s *Self) offLink(peer fmt.Stringer, backend string) error {
	return fmt.Errorf("it publishes %s, but %s is not on the link of %s (%s), so its pods cannot be reached; join the node to that link, or use vxlan with DirectRouting, or bgp with a router between the links",
		backend, peer, s.Uplink.Name, joined(s.Uplink.OnLink))
}

// alloc leases a subnet and leaves the carrying to others.
type alloc struct{ linkless }

func (alloc) attrs(c Config, self Self) Attrs   { return public(c, self, "") }
func (alloc) peer(*draft, *Lease, Family) error { return nil }

// public returns what every lease says: where the node is.
func public(c Config, self Self, backend string) Attrs {
	a := Attrs{Backend: backend}
	if c.V4.Enabled() || c.Underlay(IPv4) {
		a.PublicIP = self.PublicIP
	}
	if c.V6.Enabled() || c.Underlay(IPv6) {
		a.PublicIPv6 = self.PublicV6
	}
	return a
}
