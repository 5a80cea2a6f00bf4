package kernel

import (
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

// encodeAddr writes the addition or deletion of an address.
func encodeAddr(e *encoder, verb overlay.Verb, p netip.Prefix, index uint32) {
	typ, flags := uint16(unix.RTM_NEWADDR), uint16(unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	if verb == overlay.Delete {
		typ, flags = unix.RTM_DELADDR, 0
	}
	b := e.begin(typ, flags, unix.SizeofIfAddrmsg)
	b[0], b[1] = familyNumber(p.Addr()), uint8(p.Bits())
	if p.Addr().Is6() {
		b[2] = unix.IFA_F_NODAD // nobody else on the overlay can have it
	}
	native.PutUint32(b[4:], index)
	e.addr(unix.IFA_LOCAL, p.Addr())
	e.addr(unix.IFA_ADDRESS, p.Addr())
}

func encodeAddrDump(e *encoder, index uint32) {
	b := e.begin(unix.RTM_GETADDR, 0, unix.SizeofIfAddrmsg)
	native.PutUint32(b[4:], index)
}

// address is one of an interface's, as RTM_NEWADDR describes it.
type address struct {
	prefix netip.Prefix
	flags  uint32
	// preferred is the lifetime in seconds during which new connections may use
	// the address.
	preferred uint32
}

func decodeAddr(body []byte) address {
	if len(body) < unix.SizeofIfAddrmsg {
		return address{}
	}
	a := address{flags: uint32(body[2]), preferred: ^uint32(0)}
	var local, peer netip.Addr
	for typ, v := range attrs(body, unix.SizeofIfAddrmsg) {
		switch typ {
		case unix.IFA_LOCAL: // of a point-to-point link, where IFA_ADDRESS is the peer's
			local = addrOf(v)
		case unix.IFA_ADDRESS:
			peer = addrOf(v)
		case unix.IFA_FLAGS:
			a.flags = u32Of(v)
		case unix.IFA_CACHEINFO:
			a.preferred = u32Of(v)
		}
	}
	if !local.IsValid() {
		local = peer
	}
	a.prefix = netip.PrefixFrom(local, int(body[1]))
	return a
}

func familyNumber(a netip.Addr) uint8 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func familyOf(number uint8) overlay.Family {
	if number == unix.AF_INET {
		return overlay.IPv4
	}
	return overlay.IPv6
}
