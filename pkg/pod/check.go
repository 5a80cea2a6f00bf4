package pod

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Check compares the attachment with the result of ADD. The error names
// everything that differs.
func Check(args *skel.CmdArgs) error {
	c, err := ParseConfig(args.StdinData)
	if err != nil {
		return err
	}
	at, err := parseArgs(args)
	if err != nil {
		return err
	}
	if c.PrevResult == nil {
		return badValue("prevResult", nil, "must be the result of ADD")
	}
	s, err := openSandbox(at.netns)
	if err != nil {
		return err
	}
	defer s.close()
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return ioFail("open netlink socket", err)
	}
	defer h.Close()

	k := &checker{c: c, at: at}
	inner := k.podLink(s)
	if inner != nil {
		k.podAddrs(s, inner)
		k.podRoutes(s, inner)
	}
	br := k.bridge(h)
	k.port(h, br, inner)
	k.reservations()
	if len(k.found) > 0 {
		return fail(ErrDiffers, "%s is not as ADD left it: %s; delete the pod to have it wired anew", at, strings.Join(k.found, "; "))
	}
	return nil
}

// checker collects what differs.
type checker struct {
	c     *Config
	at    attachment
	found []string
}

func (k *checker) differs(format string, a ...any) {
	k.found = append(k.found, fmt.Sprintf(format, a...))
}

// iface returns the interface of the result that the predicate picks, or nil.
func (k *checker) iface(pick func(*types100.Interface) bool) *types100.Interface {
	for _, i := range k.c.PrevResult.Interfaces {
		if pick(i) {
			return i
		}
	}
	return nil
}

// link looks a link up and compares what holds for each: that it is there, of the
// right type, up, with the MAC and MTU of the result.
func (k *checker) link(h *netlink.Handle, where string, typ string, want types100.Interface) netlink.Link {
	l, err := h.LinkByName(want.Name)
	if isNotFound(err) {
		k.differs("%s %s is missing", where, want.Name)
		return nil
	}
	if err != nil {
		k.differs("%s %s: %v", where, want.Name, err)
		return nil
	}
	a := l.Attrs()
	if l.Type() != typ {
		k.differs("%s %s is a %s, not a %s", where, want.Name, l.Type(), typ)
	}
	if a.Flags&net.FlagUp == 0 {
		k.differs("%s %s is down", where, want.Name)
	}
	if want.Mac != "" && !strings.EqualFold(want.Mac, a.HardwareAddr.String()) {
		k.differs("%s %s has MAC %s, not %s", where, want.Name, a.HardwareAddr, want.Mac)
	}
	if want.Mtu != 0 && want.Mtu != a.MTU {
		k.differs("%s %s has MTU %d, not %d", where, want.Name, a.MTU, want.Mtu)
	}
	return l
}

func (k *checker) podLink(s *sandbox) netlink.Link {
	want := types100.Interface{Name: k.at.IfName}
	if i := k.iface(func(i *types100.Interface) bool { return i.Sandbox != "" && i.Name == k.at.IfName }); i != nil {
		want = *i
	}
	if want.Mtu == 0 {
		want.Mtu = k.c.MTU // before version 1.1 a result has no MTU
	}
	return k.link(s.nl, "the pod's link", "veth", want)
}

func (k *checker) podAddrs(s *sandbox, l netlink.Link) {
	list, err := complete(func() ([]netlink.Addr, error) { return s.nl.AddrList(l, netlink.FAMILY_ALL) })
	if err != nil {
		k.differs("list the pod's addresses: %v", err)
		return
	}
	for _, ip := range k.c.PrevResult.IPs {
		want := prefixOf(ip.Address)
		if !slices.ContainsFunc(list, func(a netlink.Addr) bool { return prefixOf(*a.IPNet) == want }) {
			k.differs("the pod has no address %s", want)
		}
	}
}

func (k *checker) podRoutes(s *sandbox, l netlink.Link) {
	for _, want := range k.c.PrevResult.Routes {
		family := netlink.FAMILY_V6
		if isV4(want.Dst.IP) {
			family = netlink.FAMILY_V4
		}
		filter := kernelRoute(want, l.Attrs().Index)
		mask := netlink.RT_FILTER_OIF | netlink.RT_FILTER_DST
		if filter.Table != 0 {
			mask |= netlink.RT_FILTER_TABLE
		}
		got, err := complete(func() ([]netlink.Route, error) { return s.nl.RouteListFiltered(family, filter, mask) })
		if err != nil {
			k.differs("list the pod's routes: %v", err)
			continue
		}
		if !slices.ContainsFunc(got, func(r netlink.Route) bool { return r.Gw.Equal(want.GW) }) {
			k.differs("the pod has no route %s via %s", &want.Dst, want.GW)
		}
	}
}

// bridge checks the gateways' end. It returns nil if there is no bridge.
func (k *checker) bridge(h *netlink.Handle) netlink.Link {
	want := types100.Interface{Name: k.c.Bridge}
	if i := k.iface(func(i *types100.Interface) bool { return i.Sandbox == "" && i.Name == k.c.Bridge }); i != nil {
		want.Mac = i.Mac
	}
	br := k.link(h, "the bridge", "bridge", want)
	if br == nil {
		return nil
	}
	if k.c.Promisc && br.Attrs().Promisc == 0 {
		k.differs("the bridge %s is not promiscuous", k.c.Bridge)
	}
	list, err := complete(func() ([]netlink.Addr, error) { return h.AddrList(br, netlink.FAMILY_ALL) })
	if err != nil {
		k.differs("list the addresses of %s: %v", k.c.Bridge, err)
		return br
	}
	for _, ip := range k.c.PrevResult.IPs {
		gw, ok := netip.AddrFromSlice(ip.Gateway)
		if !ok {
			continue
		}
		want := netip.PrefixFrom(gw.Unmap(), prefixOf(ip.Address).Bits())
		if !slices.ContainsFunc(list, func(a netlink.Addr) bool { return prefixOf(*a.IPNet) == want }) {
			k.differs("the bridge %s has no gateway address %s", k.c.Bridge, want)
		}
	}
	return br
}

// port checks the host's end. The result names it: a pod that flannel wired has
// another name there than Twill would choose.
func (k *checker) port(h *netlink.Handle, br, inner netlink.Link) {
	want := types100.Interface{Name: k.at.hostLink()}
	if i := k.iface(func(i *types100.Interface) bool { return i.Sandbox == "" && i.Name != k.c.Bridge }); i != nil {
		want = *i
	}
	l := k.link(h, "the host's link", "veth", want)
	if l == nil {
		return
	}
	if br != nil && l.Attrs().MasterIndex != br.Attrs().Index {
		k.differs("the host's link %s is no port of %s", want.Name, k.c.Bridge)
		return
	}
	if inner != nil && (l.Attrs().ParentIndex != inner.Attrs().Index || l.Attrs().Index != inner.Attrs().ParentIndex) {
		k.differs("the host's link %s does not lead to the pod's link %s", want.Name, k.at.IfName)
	}
	info, err := complete(func() (netlink.Protinfo, error) { return h.LinkGetProtinfo(l) })
	if err != nil {
		k.differs("read the port %s: %v", want.Name, err)
		return
	}
	if info.Hairpin != k.c.Hairpin {
		k.differs("the host's link %s has hairpin mode %t, not %t", want.Name, info.Hairpin, k.c.Hairpin)
	}
}

func (k *checker) reservations() {
	dir := k.c.reservations()
	for _, a := range resultAddrs(k.c.PrevResult) {
		switch o, err := dir.Owner(a); {
		case errors.Is(err, fs.ErrNotExist):
			k.differs("the reservation %s is missing", dir.Path(a))
		case err != nil:
			k.differs("%v", err)
		case !o.Holds(k.at.Owner):
			k.differs("the reservation %s is of %s", dir.Path(a), o)
		}
	}
	if len(k.c.PrevResult.IPs) == 0 {
		k.differs("prevResult has no address")
	}
}
