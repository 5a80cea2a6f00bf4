package pod

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// podAddrs returns the addresses of all network namespaces that a veth of this one
// leads to. The kernel tells them by the namespace's id: no path to it is needed.
func podAddrs(h *netlink.Handle) (map[netip.Addr]bool, error) {
	const targetNetNSID = 10 // IFA_TARGET_NETNSID, Linux 5.0
	links, err := complete(h.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	s, err := openStrict() // else the kernel passes the id over, and tells our own
	if err != nil {
		return nil, fmt.Errorf("ask for the pods' addresses: %w", err)
	}
	defer s.Close()
	out := map[netip.Addr]bool{}
	seen := map[int]bool{}
	for _, l := range links {
		id := l.Attrs().NetNsID
		if l.Type() != "veth" || id < 0 || seen[id] {
			continue
		}
		seen[id] = true
		list, err := dumpAddrs(s, nl.NewIfAddrmsg(unix.AF_UNSPEC), nl.NewRtAttr(targetNetNSID, nl.Uint32Attr(uint32(id))))
		if err != nil {
			return nil, fmt.Errorf("list addresses of the namespace behind %s: %w", l.Attrs().Name, err)
		}
		for _, a := range list {
			out[a.Addr()] = true
		}
	}
	return out, nil
}
