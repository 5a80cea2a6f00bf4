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
	d.route(l.Subnet(f), l.Public(f), d.self.Uplink.Name, false)
	return nil
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
