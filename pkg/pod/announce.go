package pod

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// introduce sees to it that packets to the addresses find the pod and not one that
// had them before. A pod's MAC follows from its first address, and IPv6 addresses of a
// wide subnet do not come again, so that mostly nothing is to be done but to have the
// host forget. All others of the bridge are told if the MAC or an address was asked
// for: an announcement is work for every pod of the node. A routed pod shares its link
// with nobody.
func (w *wiring) introduce(h *netlink.Handle, s *sandbox, links []netlink.Link, addrs []netip.Prefix) error {
	if w.Mode == Routed {
		return nil
	}
	br, inner := links[0], links[len(links)-1]
	const many = 112 // an IPv6 subnet of this length or less has 65,536 addresses or more
	var loud []netip.Prefix
	for i, p := range addrs {
		err := h.NeighDel(&netlink.Neigh{LinkIndex: br.Attrs().Index, IP: p.Addr().AsSlice()})
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("forget neighbour %s of %s: %w", p.Addr(), w.Bridge, err)
		}
		if w.MAC != nil || i > 0 && (w.Wanted != nil || w.IPAM.Sticky || p.Bits() > many) {
			loud = append(loud, p)
		}
	}
	if len(loud) == 0 {
		return nil
	}
	return s.announce(inner, loud)
}

// announce has the pod's kernel tell the bridge which MAC each address has now, by
// gratuitous ARP and unsolicited neighbour advertisement. An address that another
// pod held before is reached at once, not when the neighbours' old entries time
// out.
//
// The kernel does so when a link's MAC is set, be it to what it is, if the two
// sysctls allow. Sending it ourselves would take an AF_PACKET socket, whose close
// waits for an RCU grace period: 10 to 16 ms, twice the rest of ADD.
func (s *sandbox) announce(l netlink.Link, addrs []netip.Prefix) error {
	var notify []sysctl
	for _, p := range addrs {
		key := "ipv4/conf/" + l.Attrs().Name + "/arp_notify"
		if p.Addr().Is6() {
			key = "ipv6/conf/" + l.Attrs().Name + "/ndisc_notify"
		}
		notify = append(notify, sysctl{key, "1"})
	}
	if err := writeSysctls(s.place(), notify); err != nil {
		return err
	}
	if err := s.nl.LinkSetHardwareAddr(l, l.Attrs().HardwareAddr); err != nil {
		return fmt.Errorf("set MAC of %s: %w", l.Attrs().Name, err)
	}
	return nil
}
