package pod

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// place is a network namespace as one end of a veth sees it: a netlink socket in
// it, and a way to its files below /proc/sys.
type place struct {
	nl *netlink.Handle
	in func(func() error) error // runs f inside the namespace
}

// host is the plugin's own namespace.
func host(h *netlink.Handle) place {
	return place{nl: h, in: func(f func() error) error { return f() }}
}

// attach names the host's end's owner and makes it a port of its bridge, before it is
// up. The link needs no address of its own: without one there is no duplicate address
// detection and no multicast report towards the pod.
func (e end) attach(p place, l netlink.Link) error {
	master := 0
	if e.bridge != "" {
		br, err := p.nl.LinkByName(e.bridge)
		if err != nil {
			return ioFail("look up bridge "+e.bridge, err)
		}
		master = br.Attrs().Index
	}
	err := e.setLink(l.Attrs().Index, master, true)
	if errors.Is(err, unix.EAFNOSUPPORT) { // a kernel without IPv6
		err = e.setLink(l.Attrs().Index, master, false)
	}
	if errors.Is(err, unix.EXFULL) {
		return fail(ErrBridge, "bridge %s has 1,023 ports, and the kernel allows no more: wire the pods without a bridge, by \"mode\": \"routed\" in the network configuration, or have fewer pods on this node", e.bridge)
	}
	if err != nil {
		return ioFail("set up link "+e.name, err)
	}
	for _, flag := range []struct {
		name string
		on   bool
		set  func(netlink.Link, bool) error
	}{{"hairpin mode", e.hairpin, p.nl.LinkSetHairpin}, {"isolation", e.isolated, p.nl.LinkSetIsolated}} {
		if !flag.on {
			continue
		}
		if err := flag.set(l, true); err != nil {
			return ioFail("set "+flag.name+" of "+e.name, err)
		}
	}
	return nil
}

// setLink sets alias, bridge and settings in one message: each that changes a link
// waits for whoever holds the kernel's lock on all of them.
func (e end) setLink(index, master int, ipv6 bool) error {
	req := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.IFLA_IFALIAS, []byte(e.alias)))
	if master != 0 {
		req.AddData(nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(uint32(master))))
	}
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	if len(e.inet) > 0 {
		conf := spec.AddRtAttr(unix.AF_INET, nil).AddRtAttr(unix.IFLA_INET_CONF, nil)
		for _, c := range e.inet {
			conf.AddRtAttr(c.number, nl.Uint32Attr(1))
		}
	}
	if ipv6 {
		spec.AddRtAttr(unix.AF_INET6, nil).AddRtAttr(unix.IFLA_INET6_ADDR_GEN_MODE, []byte{nl.IN6_ADDR_GEN_MODE_NONE})
	}
	req.AddData(spec)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// configure gives a link its addresses, sets it up, and gives it what needs a link
// that is up: neighbours and routes.
func (e end) configure(p place, l netlink.Link) error {
	if err := writeSysctls(p, e.sysctls); err != nil {
		return err
	}
	for _, a := range e.addrs {
		if err := addAddress(p, l, a); err != nil {
			return ioFail("configure "+e.name, err)
		}
	}
	if e.promisc {
		if err := p.nl.SetPromiscOn(l); err != nil {
			return ioFail("set promiscuous mode of "+e.name, err)
		}
	}
	if err := p.nl.LinkSetUp(l); err != nil {
		return ioFail("set "+e.name+" up", err)
	}
	for _, n := range e.neighs {
		if err := p.nl.NeighSet(n.kernel(l)); err != nil {
			return fail(errIO, "add neighbour %s lladdr %s dev %s: %v", n.addr, n.mac, e.name, err)
		}
	}
	return e.addRoutes(p, l)
}

// addRoutes adds those without a gateway first: they lead to the gateways.
func (e end) addRoutes(p place, l netlink.Link) error {
	routes := slices.Clone(e.routes)
	slices.SortStableFunc(routes, func(a, b *netlink.Route) int { return min(len(a.Gw), 1) - min(len(b.Gw), 1) })
	for _, r := range routes {
		on := *r
		on.LinkIndex = l.Attrs().Index
		add := p.nl.RouteAdd
		if r.Protocol != 0 {
			// The host's route to the pod: the one to a pod that had the address
			// before, and is being deleted, must not stay.
			add = p.nl.RouteReplace
		}
		if err := add(&on); err != nil {
			return fail(errIO, "add route %s dev %s: %v", printRoute(r), e.name, err)
		}
	}
	return nil
}

func printRoute(r *netlink.Route) string {
	s := r.Dst.String()
	if len(r.Gw) > 0 {
		s += " via " + r.Gw.String()
	}
	return s
}

func (n neighbour) kernel(l netlink.Link) *netlink.Neigh {
	return &netlink.Neigh{
		LinkIndex: l.Attrs().Index, IP: n.addr.AsSlice(), HardwareAddr: n.mac, State: netlink.NUD_PERMANENT,
	}
}

// addAddress adds an address that is usable at once: duplicate address detection
// would take a second, and the reservation says already that it is unique.
func addAddress(p place, l netlink.Link, a netip.Prefix) error {
	n := ipNet(a)
	addr := &netlink.Addr{IPNet: &n}
	if a.Addr().Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	err := p.nl.AddrAdd(l, addr)
	if errors.Is(err, unix.EACCES) && a.Addr().Is6() {
		// Its maker turned IPv6 off in the namespace, as Docker does.
		on := []sysctl{{"ipv6/conf/" + l.Attrs().Name + "/disable_ipv6", "0"}}
		if err := writeSysctls(p, on); err != nil {
			return fmt.Errorf("enable IPv6: %w", err)
		}
		err = p.nl.AddrAdd(l, addr)
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add address %s to %s: %w", a, l.Attrs().Name, err)
	}
	return nil
}

func writeSysctls(p place, list []sysctl) error {
	if len(list) == 0 {
		return nil
	}
	err := p.in(func() error {
		for _, s := range list {
			if err := s.write(); err != nil {
				return fail(errIO, "set sysctl net/%s to %s: %v", s.key, s.value, err)
			}
		}
		return nil
	})
	if err != nil {
		return ioFail("set sysctl net/"+list[0].key, err)
	}
	return nil
}

// write does without what package os does for files that one can wait for.
func (s sysctl) write() error {
	fd, err := unix.Open("/proc/sys/net/"+s.key, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	_, err = unix.Write(fd, []byte(s.value))
	return errors.Join(err, unix.Close(fd))
}

// differences lists what of the end is not as it shall be. l is its link.
func (e end) differences(p place, l netlink.Link) []string {
	var out []string
	differs := func(format string, a ...any) { out = append(out, fmt.Sprintf(format, a...)) }
	a := l.Attrs()
	if l.Type() != "veth" {
		differs("%s is a %s, not a veth", e.name, l.Type())
	}
	if a.Flags&net.FlagUp == 0 {
		differs("%s is down", e.name)
	}
	if len(e.mac) > 0 && !slices.Equal(e.mac, a.HardwareAddr) {
		differs("%s has MAC %s, not %s", e.name, a.HardwareAddr, e.mac)
	}
	if e.mtu != 0 && e.mtu != a.MTU {
		differs("%s has MTU %d, not %d", e.name, a.MTU, e.mtu)
	}
	if e.alias != "" && a.Alias != e.alias {
		differs("%s has the alias %q, not %q", e.name, a.Alias, e.alias)
	}
	if e.promisc && a.Promisc == 0 {
		differs("%s is not promiscuous", e.name)
	}
	out = append(out, e.portDifferences(p, l)...)
	out = append(out, e.addrDifferences(p, l)...)
	for _, n := range e.neighs {
		list, err := complete(func() ([]netlink.Neigh, error) { return p.nl.NeighList(a.Index, netlink.FAMILY_ALL) })
		if err != nil {
			differs("list the neighbours of %s: %v", e.name, err)
		} else if !slices.ContainsFunc(list, func(k netlink.Neigh) bool { return k.IP.Equal(n.addr.AsSlice()) && slices.Equal(k.HardwareAddr, n.mac) }) {
			differs("%s has no neighbour %s lladdr %s", e.name, n.addr, n.mac)
		}
	}
	for _, r := range e.routes {
		if found, err := hasRoute(p, l, r); err != nil {
			differs("list the routes of %s: %v", e.name, err)
		} else if !found {
			differs("%s has no route %s", e.name, printRoute(r))
		}
	}
	want := slices.Clone(e.sysctls)
	for _, c := range e.inet {
		want = append(want, sysctl{"ipv4/conf/" + e.name + "/" + c.name, "1"})
	}
	return append(out, sysctlDifferences(p, want)...)
}

func (e end) portDifferences(p place, l netlink.Link) []string {
	if e.bridge == "" {
		return nil
	}
	br, err := p.nl.LinkByName(e.bridge)
	if isNotFound(err) {
		return nil // told already
	}
	if err == nil && l.Attrs().MasterIndex != br.Attrs().Index {
		return []string{fmt.Sprintf("%s is no port of %s", e.name, e.bridge)}
	}
	var info netlink.Protinfo
	if err == nil {
		info, err = complete(func() (netlink.Protinfo, error) { return p.nl.LinkGetProtinfo(l) })
	}
	if err != nil {
		return []string{fmt.Sprintf("read the port %s: %v", e.name, err)}
	}
	var out []string
	if info.Hairpin != e.hairpin {
		out = append(out, fmt.Sprintf("%s has hairpin mode %t, not %t", e.name, info.Hairpin, e.hairpin))
	}
	if info.Isolated != e.isolated {
		out = append(out, fmt.Sprintf("%s has port isolation %t, not %t", e.name, info.Isolated, e.isolated))
	}
	return out
}

func (e end) addrDifferences(p place, l netlink.Link) []string {
	if len(e.addrs) == 0 {
		return nil
	}
	list, err := complete(func() ([]netlink.Addr, error) { return p.nl.AddrList(l, netlink.FAMILY_ALL) })
	if err != nil {
		return []string{fmt.Sprintf("list the addresses of %s: %v", e.name, err)}
	}
	var out []string
	for _, want := range e.addrs {
		if !slices.ContainsFunc(list, func(a netlink.Addr) bool { return prefixOf(*a.IPNet) == want }) {
			out = append(out, fmt.Sprintf("%s has no address %s", e.name, want))
		}
	}
	return out
}

func hasRoute(p place, l netlink.Link, want *netlink.Route) (bool, error) {
	filter := *want
	filter.LinkIndex = l.Attrs().Index
	mask := netlink.RT_FILTER_OIF | netlink.RT_FILTER_DST
	if filter.Table != 0 {
		mask |= netlink.RT_FILTER_TABLE
	}
	got, err := complete(func() ([]netlink.Route, error) {
		return p.nl.RouteListFiltered(family(want), &filter, mask)
	})
	return slices.ContainsFunc(got, func(r netlink.Route) bool { return r.Gw.Equal(want.Gw) }), err
}

func sysctlDifferences(p place, list []sysctl) []string {
	var out []string
	err := p.in(func() error {
		for _, s := range list {
			b, err := os.ReadFile("/proc/sys/net/" + s.key)
			switch got := strings.Join(strings.Fields(string(b)), " "); {
			case err != nil:
				out = append(out, fmt.Sprintf("read sysctl net/%s: %v", s.key, err))
			case got != strings.Join(strings.Fields(s.value), " "):
				out = append(out, fmt.Sprintf("sysctl net/%s is %s, not %s", s.key, got, s.value))
			}
		}
		return nil
	})
	if err != nil {
		out = append(out, err.Error())
	}
	return out
}
