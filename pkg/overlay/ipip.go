package overlay

import (
	"fmt"
	"net/netip"
)

// IPIPLink is the device of backend ipip.
const IPIPLink = "flannel.ipip"

// ipip wraps a pod's packet in one more IPv4 header (RFC 2003). It carries IPv4.
type ipip struct{ IPIPConfig }

func (ipip) attrs(c Config, self Self) Attrs { return public(c, self, "ipip") }
func (ipip) mtu(self Self, _ Family) int     { return self.Uplink.MTU - 20 }

func (i ipip) own(d *draft) {
	d.state.Links = append(d.state.Links, Link{
		Name: IPIPLink, Alias: Alias, Up: true, Kind: KindIPIP, MTU: d.linkMTU(IPIPLink, i, IPv4),
		IPIP: IPIP{Local: d.self.Uplink.V4, Parent: d.self.Uplink.Name},
	})
	first := d.self.V4.Addr()
	d.state.Addrs = append(d.state.Addrs, Addr{Link: IPIPLink, Prefix: netip.PrefixFrom(first, first.BitLen())})
}

func (i ipip) peer(d *draft, l *Lease, f Family) error {
	switch {
	case f != IPv4:
		return fmt.Errorf("backend ipip carries IPv4 alone; use vxlan, host-gw, bgp or wireguard for IPv6")
	case i.DirectRouting && d.self.onLink(l.PublicIP):
		d.direct(l, f)
	default:
		d.route(l.V4, l.PublicIP, IPIPLink, true)
	}
	return nil
}
