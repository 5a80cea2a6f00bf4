package overlay

import "net/netip"

// UDPLink is the TUN device of backend udp.
const UDPLink = "flannel0"

// UDP is the user-space tunnel: a pod's packet is the whole payload of a datagram
// to the peer, as in flannel.
type UDP struct {
	Port  uint16
	Own   []netip.Prefix // this node's subnets: it takes packets for them alone
	Peers []UDPPeer
}

// UDPPeer says where packets for a subnet go.
type UDPPeer struct {
	Subnet netip.Prefix
	Addr   netip.AddrPort
}

// udp hands packets to the program behind a TUN. The whole network leads there,
// so that it can answer for subnets that nobody has.
type udp struct{ port uint16 }

func (udp) attrs(c Config, self Self) Attrs { return public(c, self, "") }

// mtu leaves room for the outer IP (20 or 40) and UDP (8) headers.
func (udp) mtu(self Self, f Family) int { return self.Uplink.MTU - outerIP(f) - 8 }

func (u udp) own(d *draft) {
	// One device for both families: the kernel refuses IPv6 on a link below 1280.
	mtu := 0
	for _, f := range d.families {
		mtu = max(mtu, d.linkMTU(UDPLink, u, f))
	}
	d.state.Links = append(d.state.Links, Link{Name: UDPLink, Alias: Alias, Up: true, Kind: KindTUN, MTU: mtu})
	for _, f := range d.families {
		first := d.self.Subnet(f).Addr()
		d.state.Addrs = append(d.state.Addrs, Addr{Link: UDPLink, Prefix: netip.PrefixFrom(first, first.BitLen())})
		network := d.pool(f).Network
		d.state.Routes = append(d.state.Routes, Route{Dst: network, Link: UDPLink, Metric: defaultMetric(network), Protocol: Protocol})
	}
	d.state.Outside.UDP = &UDP{Port: u.port, Own: d.self.All()}
}

func (u udp) peer(d *draft, l *Lease, f Family) error {
	t := d.state.Outside.UDP
	t.Peers = append(t.Peers, UDPPeer{l.Subnet(f), netip.AddrPortFrom(l.Public(f), u.port)})
	d.route(l.Subnet(f), netip.Addr{}, UDPLink, false)
	return nil
}

func outerIP(f Family) int {
	if f == IPv4 {
		return 20
	}
	return 40
}
