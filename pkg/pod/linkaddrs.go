package pod

import (
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// linkAddr is an address of a link.
type linkAddr struct {
	netip.Prefix
	flags uint32 // IFA_F_*
}

// linkAddrs lists the addresses of one link. The library asks for those of all, which
// on a node with 500 pods takes as long as the rest of an ADD; the kernel looks at one
// link alone if it is asked strictly (Linux 4.20).
func linkAddrs(index int) ([]linkAddr, error) {
	s, err := openStrict()
	if err != nil {
		return nil, err
	}
	defer s.Close()
	msg := nl.NewIfAddrmsg(unix.AF_UNSPEC)
	msg.Index = uint32(index)
	return dumpAddrs(s, msg)
}

// openStrict returns a socket at which the kernel heeds what a dump asks for.
func openStrict() (*nl.NetlinkSocket, error) {
	s, err := nl.Subscribe(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	if err := unix.SetsockoptInt(s.GetFd(), unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// dumpAddrs asks with an ifaddrmsg and attributes.
func dumpAddrs(s *nl.NetlinkSocket, ask ...nl.NetlinkRequestData) ([]linkAddr, error) {
	return complete(func() ([]linkAddr, error) {
		req := nl.NewNetlinkRequest(unix.RTM_GETADDR, unix.NLM_F_DUMP)
		for _, a := range ask {
			req.AddData(a)
		}
		req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: s}}
		msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWADDR)
		if err != nil {
			return nil, err
		}
		var out []linkAddr
		for _, m := range msgs {
			a, err := decodeAddr(m)
			if err != nil {
				return nil, err
			}
			out = append(out, a)
		}
		return out, nil
	})
}

func decodeAddr(m []byte) (linkAddr, error) {
	head := nl.DeserializeIfAddrmsg(m)
	attrs, err := nl.ParseRouteAttr(m[unix.SizeofIfAddrmsg:])
	if err != nil {
		return linkAddr{}, err
	}
	out := linkAddr{flags: uint32(head.IfAddrmsg.Flags)}
	for _, a := range attrs {
		switch a.Attr.Type {
		case unix.IFA_ADDRESS, unix.IFA_LOCAL: // IPv4 says both
			if addr, ok := netip.AddrFromSlice(a.Value); ok {
				out.Prefix = netip.PrefixFrom(addr, int(head.Prefixlen))
			}
		case unix.IFA_FLAGS:
			out.flags = nl.NativeEndian().Uint32(a.Value)
		}
	}
	return out, nil
}
