package pod

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
)

// announce has the pod's kernel tell the bridge which MAC each address has now, by
// gratuitous ARP and unsolicited neighbour advertisement. An address that another
// pod held before is reached at once, not when the neighbours' old entries time
// out.
//
// The kernel does so when a link's MAC is set, be it to what it is, if the two
// sysctls allow. Sending it ourselves would take an AF_PACKET socket, whose close
// waits for an RCU grace period: 10 to 16 ms, twice the rest of ADD.
func (s *sandbox) announce(l netlink.Link, addrs []netip.Prefix) error {
	err := s.enter(func() error {
		for _, p := range addrs {
			family, key := "ipv4", "arp_notify"
			if p.Addr().Is6() {
				family, key = "ipv6", "ndisc_notify"
			}
			if err := writeSysctl(family, l.Attrs().Name, key, "1"); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := s.nl.LinkSetHardwareAddr(l, l.Attrs().HardwareAddr); err != nil {
		return fmt.Errorf("set MAC of %s: %w", l.Attrs().Name, err)
	}
	return nil
}
