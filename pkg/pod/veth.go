package pod

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// loopback is lo's index, the first in every namespace.
const loopback = 1

// checkFree returns an error if either end's name is taken, before anything is
// made.
func checkFree(at attachment, h *netlink.Handle, s *sandbox) error {
	l, err := h.LinkByName(at.hostLink())
	if err == nil {
		return hostLinkTaken(at, l)
	}
	if !isNotFound(err) {
		return ioFail("look up link "+at.hostLink(), err)
	}
	_, err = s.nl.LinkByName(at.IfName)
	if err == nil {
		return ifNameTaken(at)
	}
	if !isNotFound(err) {
		return ioFail("look up link "+at.IfName+" in the pod", err)
	}
	return nil
}

func hostLinkTaken(at attachment, l netlink.Link) error {
	if owner, ok := ownerOf(l.Attrs().Alias); ok && owner == at.Owner || l.Attrs().Alias == "" {
		return fail(types.ErrInvalidEnvironmentVariables, "CNI_CONTAINERID, CNI_IFNAME: %s is attached already, by link %s; the runtime must call DEL before it calls ADD again", at, at.hostLink())
	}
	return fail(types.ErrTryAgainLater, "link %s, which %s would get, belongs to %q; try again with a new sandbox", at.hostLink(), at, l.Attrs().Alias)
}

func ifNameTaken(at attachment) error {
	return fail(types.ErrInvalidEnvironmentVariables, "CNI_IFNAME: the network namespace %s has a link %s already; use another name, or call DEL of the network that made it", at.netns, at.IfName)
}

// makeVeth makes the pod's link: one end on the host, the other in the pod with
// its final name. Either both exist afterwards, or none.
func (w *wiring) makeVeth(at attachment, h *netlink.Handle, s *sandbox) (*netlink.Veth, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.Flags = at.hostLink(), w.mtu, net.FlagUp
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerMTU, veth.PeerNamespace = at.IfName, uint32(w.mtu), netlink.NsFd(s.ns)
	err := h.LinkAdd(veth)
	if errors.Is(err, unix.EEXIST) {
		// Somebody was faster since checkFree.
		if l, err := h.LinkByName(at.hostLink()); err == nil {
			return nil, hostLinkTaken(at, l)
		}
		return nil, ifNameTaken(at)
	}
	if err != nil {
		return nil, ioFail("add link "+attrs.Name, err)
	}
	return veth, nil
}

// plug makes the host's end a port of the bridge.
func (w *wiring) plug(at attachment, h *netlink.Handle, port, br netlink.Link) error {
	if err := h.LinkSetAlias(port, at.alias()); err != nil {
		return ioFail("set alias of "+at.hostLink(), err)
	}
	// A port needs no address of its own: without one there is no duplicate address
	// detection and no multicast report towards the pod.
	err := h.LinkSetIP6AddrGenMode(port, nl.IN6_ADDR_GEN_MODE_NONE)
	if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
		return ioFail("set address generation of "+at.hostLink(), err)
	}
	if err := h.LinkSetMaster(port, br); err != nil {
		return ioFail("make "+at.hostLink()+" a port of "+w.Bridge, err)
	}
	if w.Hairpin {
		if err := h.LinkSetHairpin(port, true); err != nil {
			return ioFail("set hairpin mode of "+at.hostLink(), err)
		}
	}
	return nil
}

// configure gives the pod its addresses and routes. The link comes up when it has
// its addresses, and the routes follow, as they need both.
func (w *wiring) configure(s *sandbox, l netlink.Link, addrs []netip.Prefix) error {
	for _, p := range addrs {
		if err := addAddress(s.nl, l, p, s.enableIPv6); err != nil {
			return ioFail("configure the pod", err)
		}
	}
	for _, up := range []netlink.Link{&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: loopback}}, l} {
		if err := s.nl.LinkSetUp(up); err != nil {
			return ioFail("set the pod's links up", err)
		}
	}
	for _, r := range w.routes {
		if err := s.nl.RouteAdd(kernelRoute(r, l.Attrs().Index)); err != nil {
			return fail(types.ErrIOFailure, "add route %s via %s to the pod: %v", &r.Dst, r.GW, err)
		}
	}
	return nil
}

func kernelRoute(r *types.Route, ifindex int) *netlink.Route {
	dst := r.Dst
	k := &netlink.Route{LinkIndex: ifindex, Dst: &dst, Gw: r.GW, MTU: r.MTU, AdvMSS: r.AdvMSS, Priority: r.Priority}
	if r.Table != nil {
		k.Table = *r.Table
	}
	if r.Scope != nil {
		k.Scope = netlink.Scope(*r.Scope)
	}
	return k
}

// awaitUp returns the link once the kernel passes packets through it. A veth's
// carrier comes from a kernel thread, mostly within a millisecond; asking for the
// link makes that happen at once on newer kernels.
func awaitUp(h *netlink.Handle, index int) (netlink.Link, error) {
	const limit = 5 * time.Second
	for begin, pause := time.Now(), time.Millisecond; ; pause *= 2 {
		l, err := h.LinkByIndex(index)
		if err != nil {
			return nil, err
		}
		if l.Attrs().OperState == netlink.OperUp {
			return l, nil
		}
		if time.Since(begin) > limit {
			return nil, fmt.Errorf("link %s has no carrier after %s", l.Attrs().Name, limit)
		}
		time.Sleep(pause)
	}
}
