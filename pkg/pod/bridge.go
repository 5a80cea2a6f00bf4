package pod

import (
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

// ensureBridge returns the bridge with the node's gateway addresses, made if need
// be. Concurrent calls and a call that died half-way are no matter: each step
// is taken when it is found missing. A bridge that flannel left is used as it is.
func (w *wiring) ensureBridge(h *netlink.Handle) (netlink.Link, error) {
	br, err := h.LinkByName(w.Bridge)
	if isNotFound(err) {
		br, err = w.makeBridge(h)
	}
	if err != nil {
		return nil, ioFail("look up bridge "+w.Bridge, err)
	}
	if err := w.checkBridge(br); err != nil {
		return nil, err
	}
	missing, err := w.missingGateways(h, br)
	if err != nil {
		return nil, err
	}
	if br.Attrs().Flags&net.FlagUp == 0 {
		if err := w.configureBridge(h, br); err != nil {
			return nil, ioFail("set up bridge "+w.Bridge, err)
		}
	}
	enableIPv6 := func(link string) error { return writeSysctl("ipv6", link, "disable_ipv6", "0") }
	for _, gw := range missing {
		if err := addAddress(h, br, gw, enableIPv6); err != nil {
			return nil, ioFail("add gateway to bridge "+w.Bridge, err)
		}
	}
	if w.Promisc && br.Attrs().Promisc == 0 {
		if err := h.SetPromiscOn(br); err != nil {
			return nil, ioFail("set promiscuous mode of bridge "+w.Bridge, err)
		}
	}
	return br, nil
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
		return nil, err
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
		if err := writeSysctl("ipv6", w.Bridge, key, "0"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("set %s: %w", key, err)
		}
	}
	return h.LinkSetUp(br)
}

// missingGateways returns the gateway addresses that the bridge lacks. A bridge
// that has another address instead belongs to a subnet this node had before, or
// to somebody else.
func (w *wiring) missingGateways(h *netlink.Handle, br netlink.Link) ([]netip.Prefix, error) {
	have, err := complete(func() ([]netlink.Addr, error) { return h.AddrList(br, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, ioFail("list addresses of bridge "+w.Bridge, err)
	}
	var missing []netip.Prefix
	for _, subnet := range w.subnets {
		want, _ := w.gateway(subnet.Addr().Is4())
		var other netip.Prefix
		found := false
		for _, a := range have {
			p := prefixOf(*a.IPNet)
			found = found || p == want
			if p.Addr().Is4() == want.Addr().Is4() && !p.Addr().IsLinkLocalUnicast() {
				other = p
			}
		}
		if found {
			continue
		}
		if other.IsValid() {
			return nil, fail(ErrBridge, "%q already has an IP address different from %s: it has %s, of a subnet that is not this node's; drain the node and delete the bridge (ip link delete %s), the next pod makes it anew",
				w.Bridge, want, other, w.Bridge)
		}
		missing = append(missing, want)
	}
	return missing, nil
}

// addAddress adds an address that is usable at once: duplicate address detection
// would take a second, and the reservation says already that it is unique.
func addAddress(h *netlink.Handle, l netlink.Link, p netip.Prefix, enableIPv6 func(link string) error) error {
	n := ipNet(p)
	a := &netlink.Addr{IPNet: &n}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	err := h.AddrAdd(l, a)
	if errors.Is(err, unix.EACCES) && p.Addr().Is6() {
		if err := enableIPv6(l.Attrs().Name); err != nil {
			return fmt.Errorf("enable IPv6: %w", err)
		}
		err = h.AddrAdd(l, a)
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add address %s to %s: %w", p, l.Attrs().Name, err)
	}
	return nil
}
