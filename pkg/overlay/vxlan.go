package overlay

import (
	"cmp"
	"fmt"
	"net/netip"
)

// vxlan carries Ethernet frames in UDP (RFC 7348). Each peer is known by three
// things: a route to its subnet by the gateway <first address of the subnet>, the
// gateway's permanent neighbour entry, which gives the peer's VTEP MAC, and the
// FDB entry of that MAC, which gives the address for the outer packet.
type vxlan struct {
	VXLANConfig
	link4, link6 string // names of the devices
}

func newVXLAN(c VXLANConfig) *vxlan {
	return &vxlan{c, VXLANLink(IPv4, c.VNI), VXLANLink(IPv6, c.VNI)}
}

func (v *vxlan) link(f Family) string {
	if f == IPv4 {
		return v.link4
	}
	return v.link6
}

// vxlanOverhead is what is wrapped around a pod's packet, in bytes: outer IP (20
// or 40), UDP 8, VXLAN 8, inner Ethernet 14.
func vxlanOverhead(f Family) int {
	return outerIP(f) + 8 + 8 + 14
}

func (v *vxlan) mtu(self Self, f Family) int {
	return cmp.Or(v.MTU, self.Uplink.MTU) - vxlanOverhead(f)
}

// VXLANLink returns the name of the VXLAN device of a family.
func VXLANLink(f Family, vni uint32) string {
	if f == IPv4 {
		return fmt.Sprintf("flannel.%d", vni)
	}
	return fmt.Sprintf("flannel-v6.%d", vni)
}

func (v *vxlan) attrs(c Config, self Self) Attrs {
	a := public(c, self, "vxlan")
	for _, f := range c.families() {
		vtep := VTEP{VNI: v.VNI, MAC: self.mac(f)}
		if f == IPv4 {
			a.VTEP, a.Data = vtep, vtep.data()
		} else {
			a.VTEPv6, a.DataV6 = vtep, vtep.data()
		}
	}
	return a
}

func (s *Self) mac(f Family) MAC {
	if f == IPv4 {
		return s.MAC
	}
	return s.MACv6
}

func (a *Attrs) vtep(f Family) VTEP {
	if f == IPv4 {
		return a.VTEP
	}
	return a.VTEPv6
}

func (v *vxlan) own(d *draft) {
	for _, f := range d.families {
		name := v.link(f)
		d.state.Links = append(d.state.Links, Link{
			Name: name, Alias: Alias, Up: true, Kind: KindVXLAN, MAC: d.self.mac(f),
			MTU: d.linkMTU(name, v, f),
			VXLAN: VXLAN{
				VNI: v.VNI, Port: v.Port, Local: d.self.Uplink.addr(f), Parent: d.self.Uplink.Name,
				GBP: v.GBP, Learning: v.Learning,
			},
		})
		first := d.self.Subnet(f).Addr()
		d.state.Addrs = append(d.state.Addrs, Addr{Link: name, Prefix: netip.PrefixFrom(first, first.BitLen())})
	}
}

func (v *vxlan) peer(d *draft, l *Lease, f Family) error {
	subnet, public, vtep := l.Subnet(f), l.Public(f), l.vtep(f)
	switch {
	case v.DirectRouting && d.self.onLink(public):
		d.direct(l, f)
		return nil
	case vtep.MAC == MAC{}:
		return fmt.Errorf("it publishes no VtepMAC for %s", f)
	case vtep.VNI != v.VNI:
		return fmt.Errorf("its VNI is %d, ours is %d", vtep.VNI, v.VNI)
	case vtep.MAC == d.self.mac(f):
		return fmt.Errorf("it publishes this node's own VtepMAC %s", vtep.MAC)
	}
	link := v.link(f)
	gateway := subnet.Addr()
	d.state.Neighs = append(d.state.Neighs, Neigh{Link: link, IP: gateway, MAC: vtep.MAC})
	d.state.FDB = append(d.state.FDB, FDB{Link: link, MAC: vtep.MAC, Dst: public})
	d.route(subnet, gateway, link, true)
	return nil
}

// onLink reports whether a needs no gateway from the uplink.
func (s *Self) onLink(a netip.Addr) bool {
	for _, p := range s.Uplink.OnLink {
		if p.Contains(a) {
			return true
		}
	}
	return false
}
