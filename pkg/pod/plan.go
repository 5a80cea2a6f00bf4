package pod

import (
	"net"
	"net/netip"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/ipam"
	"github.com/twill-net/twill/pkg/overlay"
)

// A routed pod sends everything to these gateways, which no other host has. The
// host's end answers for both.
var (
	gateway4 = netip.MustParseAddr("169.254.1.1")
	gateway6 = netip.MustParseAddr("fe80::1")
	// hostMAC is the host's end of every routed pod: with one MAC for all of them a
	// pod's neighbour entry for its gateway is right from the first packet on.
	hostMAC = net.HardwareAddr{0xee, 0xee, 0xee, 0xee, 0xee, 0xee}
)

// end is one end of a pod's veth as it shall be. ADD makes it so, CHECK compares.
type end struct {
	name  string
	mac   net.HardwareAddr // nil: as the kernel chose
	mtu   int              // 0: not looked at
	alias string

	bridge            string // that this end is a port of; empty: none
	hairpin, isolated bool   // of the port
	promisc           bool

	inet    []inetConf // on for the host's end
	addrs   []netip.Prefix
	neighs  []neighbour // permanent
	routes  []*netlink.Route
	sysctls []sysctl
}

// neighbour is a permanent entry of the neighbour table.
type neighbour struct {
	addr netip.Addr
	mac  net.HardwareAddr
}

// inetConf is a switch of IPv4 on a link: IPV4_DEVCONF_* of linux/ip.h, and the name
// of its file.
type inetConf struct {
	number int
	name   string
}

// sysctl is a file below /proc/sys/net.
type sysctl struct{ key, value string }

// lease is what a pod is given: its addresses with their gateways, its routes, its
// MTU.
type lease struct {
	addrs  []ipam.Address
	routes []*types.Route
	mtu    int
}

// ends returns the two ends of a pod's veth: the host's and the pod's.
func (c *Config) ends(at attachment, l lease) (host, pod end) {
	host = end{name: at.hostLink(), mtu: l.mtu, alias: at.alias()}
	pod = end{name: at.IfName, mac: c.MAC, mtu: l.mtu, promisc: c.PodPromisc}
	if pod.mac == nil {
		pod.mac = macOf(l.addrs)
	}
	if c.Mode == Routed {
		c.routedEnds(&host, &pod, l)
	} else {
		host.bridge, host.hairpin, host.isolated = c.Bridge, c.Hairpin, c.Isolated
		for _, a := range l.addrs {
			pod.addrs = append(pod.addrs, a.Prefix)
		}
	}
	for _, r := range l.routes {
		pod.routes = append(pod.routes, kernelRoute(r))
	}
	for _, s := range c.Sysctls {
		pod.sysctls = append(pod.sysctls, sysctl{strings.ReplaceAll(s.key, "IFNAME", at.IfName), s.value})
	}
	return host, pod
}

// macOf makes a pod's MAC from its first address: 0a:58 and the last four bytes. Who
// remembers the MAC of the pod that had the address before remembers the right one,
// and no announcement has to go to every pod of the node. It is locally administered.
func macOf(addrs []ipam.Address) net.HardwareAddr {
	if len(addrs) == 0 {
		return nil
	}
	b := addrs[0].Prefix.Addr().AsSlice()
	return append(net.HardwareAddr{0x0a, 0x58}, b[len(b)-4:]...)
}

// routedEnds wires a pod as Calico does: one address of full length, everything by
// a gateway on the link, one route on the host.
func (c *Config) routedEnds(host, pod *end, l lease) {
	host.mac = hostMAC
	for _, a := range l.addrs {
		full := fullLength(a.Prefix.Addr())
		pod.addrs = append(pod.addrs, full)
		host.routes = append(host.routes, hostRoute(full))
		if full.Addr().Is4() {
			host.inet = []inetConf{
				{3, "proxy_arp"}, // a pod that lost its neighbour entry asks, and any address is answered
				{8, "rp_filter"}, // a pod sends with its own address alone
			}
			pod.neighs = append(pod.neighs, neighbour{gateway4, hostMAC})
			gw := ipNet(netip.PrefixFrom(gateway4, 32))
			pod.routes = append(pod.routes, &netlink.Route{Dst: &gw, Scope: netlink.SCOPE_LINK})
			continue
		}
		host.addrs = append(host.addrs, netip.PrefixFrom(gateway6, 64))
		host.sysctls = append(host.sysctls, sysctl{"ipv6/conf/" + host.name + "/accept_ra", "0"})
		pod.neighs = append(pod.neighs, neighbour{gateway6, hostMAC})
		pod.sysctls = append(pod.sysctls, sysctl{"ipv6/conf/" + pod.name + "/accept_dad", "0"})
	}
}

// hostRoute leads to one pod. Its protocol says that it is Twill's, and its device
// that it is a pod's, which the overlay leaves alone.
func hostRoute(full netip.Prefix) *netlink.Route {
	dst := ipNet(full)
	r := &netlink.Route{Dst: &dst, Protocol: overlay.Protocol}
	if full.Addr().Is4() {
		r.Scope = netlink.SCOPE_LINK
	}
	return r
}

// kernelRoute is a route of a result in the kernel's form.
func kernelRoute(r *types.Route) *netlink.Route {
	dst := r.Dst
	k := &netlink.Route{Dst: &dst, Gw: r.GW, MTU: r.MTU, AdvMSS: r.AdvMSS, Priority: r.Priority}
	if r.Table != nil {
		k.Table = *r.Table
	}
	if r.Scope != nil {
		k.Scope = netlink.Scope(*r.Scope)
	}
	return k
}

// fullLength is the prefix that holds one address alone.
func fullLength(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// family is the address family of a kernel route.
func family(r *netlink.Route) int {
	if isV4(r.Dst.IP) {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
