package pod

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

// On a node that changes from bridged pods to routed ones, or has both, a bridged pod
// takes the whole subnet to be on its link, and asks there for a routed pod's MAC. The
// bridge answers: by proxy ARP, which follows the routes, and by an entry for each
// IPv6 address, without which the kernel answers nothing (proxy NDP, RFC 4861 section
// 7.2.8).

// answerForRouted has the bridge answer for a routed pod, if there is a bridge.
func (w *wiring) answerForRouted(h *netlink.Handle, addrs []netip.Addr) error {
	br, err := h.LinkByName(w.Bridge)
	if isNotFound(err) {
		return nil // the first bridged pod sees to it
	}
	if err == nil {
		err = answer(h, br, addrs)
	}
	if err != nil {
		return ioFail("answer for the pod on bridge "+w.Bridge, err)
	}
	return nil
}

// answerForAllRouted is answerForRouted for the pods that are older than the bridge.
func (w *wiring) answerForAllRouted(h *netlink.Handle, br netlink.Link) error {
	routes, err := complete(func() ([]netlink.Route, error) {
		return h.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Protocol: overlay.Protocol}, netlink.RT_FILTER_PROTOCOL)
	})
	if err != nil {
		return fmt.Errorf("list the routes to pods: %w", err)
	}
	var addrs []netip.Addr
	for _, r := range routes {
		if r.Dst == nil || len(r.Gw) > 0 || r.LinkIndex == 0 || r.LinkIndex == br.Attrs().Index {
			continue
		}
		if p := prefixOf(*r.Dst); p.IsSingleIP() {
			addrs = append(addrs, p.Addr())
		}
	}
	if len(addrs) == 0 {
		return nil
	}
	return answer(h, br, addrs)
}

func answer(h *netlink.Handle, br netlink.Link, addrs []netip.Addr) error {
	for _, a := range addrs {
		if err := answerFor(h, br.Attrs().Name, a.Is4()); err != nil {
			return err
		}
		if a.Is4() {
			continue
		}
		if err := h.NeighSet(proxied(br, a)); err != nil {
			return fmt.Errorf("add proxy neighbour %s dev %s: %w", a, br.Attrs().Name, err)
		}
	}
	return nil
}

// stopAnswering takes the entries back. Like the routes they are the pod's only as
// long as the address is.
func (c *Config) stopAnswering(h *netlink.Handle, a netip.Addr) error {
	if a.Is4() {
		return nil
	}
	br, err := h.LinkByName(c.Bridge)
	if isNotFound(err) {
		return nil
	}
	if err == nil {
		err = h.NeighDel(proxied(br, a))
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return ioFail("delete proxy neighbour "+a.String(), err)
	}
	return nil
}

func proxied(br netlink.Link, a netip.Addr) *netlink.Neigh {
	return &netlink.Neigh{LinkIndex: br.Attrs().Index, Family: unix.AF_INET6, IP: a.AsSlice(), Flags: netlink.NTF_PROXY}
}
