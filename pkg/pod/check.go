package pod

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"

	"github.com/twill-net/twill/pkg/ipam"
)

// Check compares the attachment with the result of ADD. The error names
// everything that differs.
func Check(args *skel.CmdArgs) error {
	c, err := readConf(args)
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
	w, err := newWiring(c, types.ErrTryAgainLater)
	if err != nil {
		return err
	}
	s, err := openSandbox(at.netns)
	if err != nil {
		return err
	}
	defer s.close()
	h, err := openNetlink()
	if err != nil {
		return err
	}
	defer h.Close()

	k := &checker{wiring: w, at: at, host: host(h), pod: s.place()}
	k.ends()
	k.bridge()
	k.answers()
	k.ports()
	k.reservations()
	if len(k.found) > 0 {
		return fail(ErrDiffers, "%s is not as ADD left it: %s; delete the pod to have it wired anew", at, strings.Join(k.found, "; "))
	}
	return nil
}

// checker collects what differs.
type checker struct {
	*wiring
	at        attachment
	host, pod place
	found     []string
}

func (k *checker) differs(format string, a ...any) {
	k.found = append(k.found, fmt.Sprintf(format, a...))
}

// given returns the interface of the result that the predicate picks, or nothing.
func (k *checker) given(pick func(*types100.Interface) bool) types100.Interface {
	for _, i := range k.PrevResult.Interfaces {
		if i != nil && pick(i) {
			return *i
		}
	}
	return types100.Interface{}
}

// ends compares both ends of the veth with what ADD would make for the addresses
// and routes of its result, which says the names and MACs that the kernel chose.
func (k *checker) ends() {
	l := lease{routes: k.routesGiven()}
	for _, ip := range k.PrevResult.IPs {
		l.addrs = append(l.addrs, ipam.Address{Prefix: prefixOf(ip.Address)})
	}
	hostEnd, podEnd := k.Config.ends(k.at, l)
	k.asGiven(&podEnd, k.given(func(i *types100.Interface) bool { return i.Sandbox != "" && i.Name == k.at.IfName }))
	k.asGiven(&hostEnd, k.given(func(i *types100.Interface) bool { return i.Sandbox == "" && i.Name != k.Bridge }))
	if hostEnd.name != k.at.hostLink() {
		hostEnd.alias = "" // wired by flannel's plugin, under a name of its own
	}
	inner := k.link("the pod's link ", k.pod, podEnd)
	outer := k.link("the host's link ", k.host, hostEnd)
	if inner == nil || outer == nil {
		return
	}
	if outer.Attrs().ParentIndex != inner.Attrs().Index || outer.Attrs().Index != inner.Attrs().ParentIndex {
		k.differs("the host's link %s does not lead to the pod's link %s", hostEnd.name, podEnd.name)
	}
	if k.Bandwidth != nil {
		for _, d := range k.Bandwidth.differences(k.host.nl, outer, hostEnd.alias) {
			k.differs("%s", d)
		}
	}
}

// routesGiven are the routes of the result. Before version 1.1 it says no more than
// where they lead: what else a route has, the configuration says.
func (k *checker) routesGiven() []*types.Route {
	var out []*types.Route
	for _, r := range k.PrevResult.Routes {
		own := slices.IndexFunc(k.routes, func(c *types.Route) bool { return c.Dst.String() == r.Dst.String() && c.GW.Equal(r.GW) })
		if own >= 0 {
			r = k.routes[own]
		}
		out = append(out, r)
	}
	return out
}

// asGiven takes what the result says of an interface. Before version 1.1 it has no
// MTU: then it is the configuration's.
func (k *checker) asGiven(e *end, i types100.Interface) {
	if i.Name != "" {
		e.name = i.Name
	}
	if mac, err := net.ParseMAC(i.Mac); err == nil {
		e.mac = mac
	}
	if e.mtu = i.Mtu; e.mtu == 0 {
		e.mtu = k.MTU
	}
}

// link compares one end, and returns its link if it is there.
func (k *checker) link(where string, p place, e end) netlink.Link {
	l, err := p.nl.LinkByName(e.name)
	if isNotFound(err) {
		k.differs("%s%s is missing", where, e.name)
		return nil
	}
	if err != nil {
		k.differs("%s%s: %v", where, e.name, err)
		return nil
	}
	for _, d := range e.differences(p, l) {
		k.differs("%s%s", where, d)
	}
	return l
}

// bridge checks the gateways' end.
func (k *checker) bridge() {
	if k.Mode != Bridged {
		return
	}
	br, err := k.host.nl.LinkByName(k.Bridge)
	switch {
	case isNotFound(err):
		k.differs("the bridge %s is missing", k.Bridge)
		return
	case err != nil:
		k.differs("the bridge %s: %v", k.Bridge, err)
		return
	}
	a := br.Attrs()
	want := k.given(func(i *types100.Interface) bool { return i.Sandbox == "" && i.Name == k.Bridge })
	if br.Type() != "bridge" {
		k.differs("the bridge %s is a %s", k.Bridge, br.Type())
	}
	if a.Flags&net.FlagUp == 0 {
		k.differs("the bridge %s is down", k.Bridge)
	}
	if want.Mac != "" && !strings.EqualFold(want.Mac, a.HardwareAddr.String()) {
		k.differs("the bridge %s has MAC %s, not %s", k.Bridge, a.HardwareAddr, want.Mac)
	}
	if k.Promisc && a.Promisc == 0 {
		k.differs("the bridge %s is not promiscuous", k.Bridge)
	}
	list, err := complete(func() ([]netlink.Addr, error) { return k.host.nl.AddrList(br, netlink.FAMILY_ALL) })
	if err != nil {
		k.differs("list the addresses of %s: %v", k.Bridge, err)
		return
	}
	for _, ip := range k.PrevResult.IPs {
		gw, ok := netip.AddrFromSlice(ip.Gateway)
		// The gateway of a subnet that the node had before is kept with its full length.
		if ok && !slices.ContainsFunc(list, func(a netlink.Addr) bool { return prefixOf(*a.IPNet).Addr() == gw.Unmap() }) {
			k.differs("the bridge %s has no gateway address %s", k.Bridge, gw.Unmap())
		}
	}
}

func (k *checker) ports() {
	e, needed := k.portEntryOf(k.at, resultAddrs(k.PrevResult))
	if !needed {
		return
	}
	list, err := k.portmap().Check(context.Background(), e)
	if err != nil {
		k.differs("check the host ports: %v", err)
	}
	k.found = append(k.found, list...)
	k.found = append(k.found, sysctlDifferences(k.host, k.localnet(e.HostLink))...)
}

// answers checks that bridged pods of the node, if there are any, find a routed one.
func (k *checker) answers() {
	if k.Mode != Routed {
		return
	}
	br, err := k.host.nl.LinkByName(k.Bridge)
	if isNotFound(err) {
		return
	}
	var have []netlink.Neigh
	if err == nil {
		have, err = complete(func() ([]netlink.Neigh, error) { return k.host.nl.NeighProxyList(br.Attrs().Index, netlink.FAMILY_V6) })
	}
	if err != nil {
		k.differs("list the proxy neighbours of %s: %v", k.Bridge, err)
		return
	}
	for _, a := range resultAddrs(k.PrevResult) {
		if a.Is6() && !slices.ContainsFunc(have, func(n netlink.Neigh) bool { return n.IP.Equal(a.AsSlice()) }) {
			k.differs("the bridge %s does not answer for %s", k.Bridge, a)
		}
	}
}

func (k *checker) reservations() {
	dir := k.Config.reservations()
	for _, a := range resultAddrs(k.PrevResult) {
		switch o, err := dir.Owner(a); {
		case errors.Is(err, fs.ErrNotExist):
			k.differs("the reservation %s is missing", dir.Path(a))
		case err != nil:
			k.differs("%v", err)
		case !o.Holds(k.at.Owner):
			k.differs("the reservation %s is of %s", dir.Path(a), o)
		}
	}
	if len(k.PrevResult.IPs) == 0 {
		k.differs("prevResult has no address")
	}
}
