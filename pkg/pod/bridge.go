package pod

import (
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

// ensureBridge sees to it that there is the bridge with the node's gateway addresses. Concurrent calls and a call that died half-way are no matter: each step
// is taken when it is found missing. A bridge that flannel left is used as it is.
func (w *wiring) ensureBridge(h *netlink.Handle) error {
	br, err := h.LinkByName(w.Bridge)
	if isNotFound(err) {
		br, err = w.makeBridge(h)
	}
	if err != nil {
		return ioFail("look up bridge "+w.Bridge, err)
	}
	if err := w.checkBridge(br); err != nil {
		return err
	}
	addrs, err := w.readBridge(br)
	if err != nil {
		return err
	}
	if br.Attrs().Flags&net.FlagUp == 0 {
		if err := w.configureBridge(h, br); err != nil {
			return ioFail("set up bridge "+w.Bridge, err)
		}
		if err := w.answerForAllRouted(h, br); err != nil {
			return ioFail("set up bridge "+w.Bridge, err)
		}
	}
	for _, gw := range addrs.missing {
		if err := addAddress(host(h), br, gw); err != nil {
			return ioFail("add gateway to bridge "+w.Bridge, err)
		}
	}
	if err := w.renumber(h, br, addrs.old); err != nil {
		return ioFail("renumber bridge "+w.Bridge, err)
	}
	if w.Promisc && br.Attrs().Promisc == 0 {
		if err := h.SetPromiscOn(br); err != nil {
			return ioFail("set promiscuous mode of bridge "+w.Bridge, err)
		}
	}
	return nil
}

// bridgeMAC follows from the node's subnets, so that neither ports that come and
// go nor making the bridge anew leaves the pods with a gateway's MAC that nobody
// answers to. It is locally administered.
func (w *wiring) bridgeMAC() net.HardwareAddr {
	h := fnv.New64a()
	fmt.Fprint(h, w.Bridge, w.subnets)
	mac := h.Sum(nil)[:6]
	mac[0] = mac[0]&^1 | 2
	return mac
}

func (w *wiring) makeBridge(h *netlink.Handle) (netlink.Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = w.Bridge, w.mtu, w.bridgeMAC()
	if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, fmt.Errorf("make it: %w", err)
	}
	return h.LinkByName(w.Bridge)
}

func (w *wiring) checkBridge(l netlink.Link) error {
	if l.Type() != "bridge" {
		return fail(ErrBridge, "link %s is a %s, not a bridge: rename or delete it, or set another \"bridge\" in the network configuration", w.Bridge, l.Type())
	}
	return nil
}

// configureBridge sets a bridge up that is down: new, or left so by a call that
// died. The alias is put on none but a bridge that was made here, as its MAC says.
func (w *wiring) configureBridge(h *netlink.Handle, br netlink.Link) error {
	if a := br.Attrs(); a.Alias == "" && a.HardwareAddr.String() == w.bridgeMAC().String() {
		if err := h.LinkSetAlias(br, overlay.Alias); err != nil {
			return fmt.Errorf("set alias: %w", err)
		}
	}
	for _, key := range []string{
		"accept_ra", // a pod's router advertisements must not give the node a default route
		// The node asks for a pod's MAC from the bridge's link-local address.
		// While that one is checked for duplicates, up to 2 s, no packet from
		// elsewhere would get to the first pod of a node.
		"accept_dad",
	} {
		err := writeSysctls(host(h), []sysctl{{"ipv6/conf/" + w.Bridge + "/" + key, "0"}})
		if err != nil && w.hasIPv6() {
			return err
		}
	}
	return h.LinkSetUp(br)
}

func (w *wiring) hasIPv6() bool {
	return slices.ContainsFunc(w.subnets, func(p netip.Prefix) bool { return p.Addr().Is6() })
}

// bridgeAddrs sorts the addresses of the bridge.
type bridgeAddrs struct {
	missing []netip.Prefix // gateways of the node's subnets that are not there
	old     []oldGateway
}

// oldGateway is the gateway of a subnet that the node had before.
type oldGateway struct {
	netip.Prefix
	alone bool // no route to the subnet comes with it any more
}

// readBridge looks at the bridge's addresses. One that is of none of the cluster's
// networks, on a bridge that we did not make, is somebody else's: pods of this node
// must not share a bridge with it.
func (w *wiring) readBridge(br netlink.Link) (bridgeAddrs, error) {
	var out bridgeAddrs
	have, err := linkAddrs(br.Attrs().Index)
	if err != nil {
		return out, ioFail("list addresses of bridge "+w.Bridge, err)
	}
	want := w.bridgeAddrs()
	for _, a := range have {
		p := a.Prefix
		inNetwork := slices.ContainsFunc(w.networks, func(n netip.Prefix) bool { return n.Contains(p.Addr()) })
		switch {
		case p.Addr().IsLinkLocalUnicast():
		case slices.Contains(want, p):
			want = slices.DeleteFunc(want, func(x netip.Prefix) bool { return x == p })
		case br.Attrs().Alias == overlay.Alias || inNetwork:
			out.old = append(out.old, oldGateway{p, p.IsSingleIP() || a.flags&unix.IFA_F_NOPREFIXROUTE != 0})
		case slices.ContainsFunc(w.subnets, func(s netip.Prefix) bool { return s.Addr().Is4() == p.Addr().Is4() }):
			return out, fail(ErrBridge, "%q already has an IP address different from this node's: it has %s, which is in none of the cluster's networks %v, so the bridge is not Twill's; rename it, or set another \"bridge\" in the network configuration",
				w.Bridge, p, w.networks)
		}
	}
	out.missing = want
	return out, nil
}

// renumber makes what is left of a subnet that the node had before smaller: its
// gateway stays as an address of full length, because the pods that run send to it,
// and a route leads to each of them. The rest of the subnet may be another node's
// by now: the bridge's route to it goes, and the bridge answers for it (proxy ARP),
// since the pods take it to be on their link.
func (w *wiring) renumber(h *netlink.Handle, br netlink.Link, old []oldGateway) error {
	for _, gw := range old {
		if gw.alone {
			continue
		}
		if err := w.routeOldPods(h, br, gw.Masked()); err != nil {
			return err
		}
		if err := answerFor(h, w.Bridge, gw.Addr().Is4()); err != nil {
			return err
		}
		if err := leaveAlone(h, br, gw.Prefix); err != nil {
			return err
		}
	}
	return nil
}

// leaveAlone keeps an address, and drops the route to its subnet. IPv4 has an
// address twice, of two lengths; IPv6 can change the one it has.
func leaveAlone(h *netlink.Handle, br netlink.Link, gw netip.Prefix) error {
	n := ipNet(gw)
	if gw.Addr().Is6() {
		err := h.AddrReplace(br, &netlink.Addr{IPNet: &n, Flags: unix.IFA_F_NODAD | unix.IFA_F_NOPREFIXROUTE})
		if err != nil {
			return fmt.Errorf("change address %s of %s: %w", gw, br.Attrs().Name, err)
		}
		return nil
	}
	if err := addAddress(host(h), br, fullLength(gw.Addr())); err != nil {
		return err
	}
	if err := h.AddrDel(br, &netlink.Addr{IPNet: &n}); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("delete address %s of %s: %w", gw, br.Attrs().Name, err)
	}
	return nil
}

// routeOldPods gives each pod with an address of an old subnet a route of its own.
// DEL deletes it.
func (w *wiring) routeOldPods(h *netlink.Handle, br netlink.Link, subnet netip.Prefix) error {
	list, err := w.reservations().List()
	if err != nil {
		return err
	}
	for _, r := range list {
		if !subnet.Contains(r.Addr) {
			continue
		}
		route := hostRoute(fullLength(r.Addr))
		route.LinkIndex = br.Attrs().Index
		if err := h.RouteReplace(route); err != nil {
			return fmt.Errorf("add route %s dev %s: %w", route.Dst, w.Bridge, err)
		}
	}
	return nil
}

func answerFor(h *netlink.Handle, link string, v4 bool) error {
	list := []sysctl{{"ipv4/conf/" + link + "/proxy_arp", "1"}, {"ipv4/neigh/" + link + "/proxy_delay", "0"}}
	if !v4 {
		list = []sysctl{{"ipv6/conf/" + link + "/proxy_ndp", "1"}}
	}
	if err := writeSysctls(host(h), list); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
