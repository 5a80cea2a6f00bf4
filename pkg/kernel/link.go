package kernel

import (
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

const (
	vxlanKind = "vxlan"
	// linkPrefix begins the names of the VXLAN devices that Twill and flannel make.
	linkPrefix = "flannel"
	// skipStats keeps the counters out of the answers (RTEXT_FILTER_SKIP_STATS).
	skipStats       = 1 << 3
	addrGenModeNone = 1 // IN6_ADDR_GEN_MODE_NONE
)

// link is a device as RTM_NEWLINK describes it.
type link struct {
	overlay.Link
	index  uint32
	parent uint32 // VXLAN.Parent by index
	kind   string
	flags  uint32
}

// candidate reports whether the device may be ours or flannel's.
func (l *link) candidate() bool {
	return l.kind == vxlanKind && strings.HasPrefix(l.Name, linkPrefix)
}

// linkIndexOf returns the ifindex in an ifinfomsg, ifaddrmsg or ndmsg: all three
// have it in the same place.
func linkIndexOf(body []byte) uint32 {
	if len(body) < 8 {
		return 0
	}
	return native.Uint32(body[4:])
}

// decodeLink reads an RTM_NEWLINK. Attributes of AF_BRIDGE messages mean other
// things; the caller drops those.
func decodeLink(body []byte) link {
	if len(body) < unix.SizeofIfInfomsg {
		return link{}
	}
	l := link{index: linkIndexOf(body), flags: native.Uint32(body[8:])}
	l.Up = l.flags&unix.IFF_UP != 0
	for typ, v := range attrs(body, unix.SizeofIfInfomsg) {
		switch typ {
		case unix.IFLA_IFNAME:
			l.Name = stringOf(v)
		case unix.IFLA_IFALIAS:
			l.Alias = stringOf(v)
		case unix.IFLA_MTU:
			l.MTU = int(u32Of(v))
		case unix.IFLA_ADDRESS:
			l.MAC = macOf(v)
		case unix.IFLA_LINKINFO:
			l.decodeInfo(v)
		}
	}
	return l
}

func (l *link) decodeInfo(info []byte) {
	var data []byte
	for typ, v := range attrs(info, 0) {
		switch typ {
		case unix.IFLA_INFO_KIND:
			l.kind = stringOf(v)
		case unix.IFLA_INFO_DATA:
			data = v
		}
	}
	if l.kind != vxlanKind {
		return
	}
	x := &l.VXLAN
	for typ, v := range attrs(data, 0) {
		switch typ {
		case unix.IFLA_VXLAN_ID:
			x.VNI = u32Of(v)
		case unix.IFLA_VXLAN_PORT:
			if len(v) == 2 {
				x.Port = uint16(v[0])<<8 | uint16(v[1])
			}
		case unix.IFLA_VXLAN_LOCAL, unix.IFLA_VXLAN_LOCAL6:
			x.Local = addrOf(v)
		case unix.IFLA_VXLAN_LINK:
			l.parent = u32Of(v)
		case unix.IFLA_VXLAN_GBP:
			x.GBP = true
		case unix.IFLA_VXLAN_LEARNING:
			x.Learning = len(v) > 0 && v[0] != 0
		}
	}
}

func macOf(b []byte) (m overlay.MAC) {
	if len(b) == len(m) {
		copy(m[:], b)
	}
	return m
}

// encodeLinkDump asks for the devices of a kind, or for all if kind is empty.
func encodeLinkDump(e *encoder, kind string) {
	e.begin(unix.RTM_GETLINK, 0, unix.SizeofIfInfomsg)
	if kind != "" {
		e.nest(unix.IFLA_LINKINFO, func() { e.bytes(unix.IFLA_INFO_KIND, []byte(kind)) })
	}
	e.u32(unix.IFLA_EXT_MASK, skipStats)
}

func encodeLinkGet(e *encoder, name string) {
	e.begin(unix.RTM_GETLINK, 0, unix.SizeofIfInfomsg)
	e.str(unix.IFLA_IFNAME, name)
	e.u32(unix.IFLA_EXT_MASK, skipStats)
}

// beginLink starts a message about the device of that index.
func beginLink(e *encoder, typ uint16, index uint32) []byte {
	b := e.begin(typ, 0, unix.SizeofIfInfomsg)
	native.PutUint32(b[4:], index)
	return b
}

func setUp(ifinfomsg []byte, up bool) {
	flags := uint32(0)
	if up {
		flags = unix.IFF_UP
	}
	native.PutUint32(ifinfomsg[8:], flags)
	native.PutUint32(ifinfomsg[12:], unix.IFF_UP)
}

// vxlanData writes what of want differs from have; a zero have writes all.
func vxlanData(e *encoder, have, want overlay.VXLAN, parent uint32) {
	if have.Local != want.Local && want.Local.IsValid() {
		typ := uint16(unix.IFLA_VXLAN_LOCAL)
		if !want.Local.Is4() {
			typ = unix.IFLA_VXLAN_LOCAL6
		}
		e.addr(typ, want.Local)
	}
	if have.Parent != want.Parent {
		e.u32(unix.IFLA_VXLAN_LINK, parent)
	}
	if have.VNI != want.VNI || have.Learning != want.Learning {
		learning := uint8(0)
		if want.Learning {
			learning = 1
		}
		e.u8(unix.IFLA_VXLAN_LEARNING, learning)
	}
	if have.VNI != want.VNI { // a new device
		e.u32(unix.IFLA_VXLAN_ID, want.VNI)
		e.bytes(unix.IFLA_VXLAN_PORT, []byte{byte(want.Port >> 8), byte(want.Port)})
		if want.GBP {
			e.bytes(unix.IFLA_VXLAN_GBP, nil)
		}
	}
}

func linkInfo(e *encoder, data func()) {
	e.nest(unix.IFLA_LINKINFO, func() {
		e.bytes(unix.IFLA_INFO_KIND, []byte(vxlanKind))
		e.nest(unix.IFLA_INFO_DATA, data)
	})
}

// createLink makes a device. It comes up last, when it already bears our alias
// and will not give itself a link-local address. A crash in between leaves a
// device without alias that the next pass adopts.
func (c *conn) createLink(want overlay.Link) error {
	parent, err := c.linkIndex(want.VXLAN.Parent)
	if err != nil {
		return err
	}
	err = c.request(func(e *encoder) {
		e.begin(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, unix.SizeofIfInfomsg)
		e.str(unix.IFLA_IFNAME, want.Name)
		e.u32(unix.IFLA_MTU, uint32(want.MTU))
		e.bytes(unix.IFLA_ADDRESS, want.MAC[:])
		linkInfo(e, func() { vxlanData(e, overlay.VXLAN{}, want.VXLAN, parent) })
	}, nil)
	if err != nil {
		return err
	}
	index, err := c.linkIndex(want.Name)
	if err != nil {
		return err
	}
	err = c.request(func(e *encoder) {
		beginLink(e, unix.RTM_NEWLINK, index)
		e.bytes(unix.IFLA_IFALIAS, []byte(want.Alias))
	}, nil)
	if err != nil {
		return fmt.Errorf("set alias: %w", err)
	}
	// A kernel without IPv6 refuses this, and needs it as little.
	_ = c.request(func(e *encoder) {
		beginLink(e, unix.RTM_NEWLINK, index)
		e.nest(unix.IFLA_AF_SPEC, func() {
			e.nest(unix.AF_INET6, func() { e.u8(unix.IFLA_INET6_ADDR_GEN_MODE, addrGenModeNone) })
		})
	}, nil)
	if !want.Up {
		return nil
	}
	err = c.request(func(e *encoder) { setUp(beginLink(e, unix.RTM_NEWLINK, index), true) }, nil)
	if err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	return nil
}

// changeLink turns a device that exists into want, without a gap for packets.
func (c *conn) changeLink(have, want overlay.Link) error {
	index, err := c.linkIndex(want.Name)
	if err != nil {
		return err
	}
	parent := uint32(0)
	if have.VXLAN.Parent != want.VXLAN.Parent {
		if parent, err = c.linkIndex(want.VXLAN.Parent); err != nil {
			return err
		}
	}
	if have.VXLAN != want.VXLAN {
		err := c.request(func(e *encoder) {
			beginLink(e, unix.RTM_NEWLINK, index)
			linkInfo(e, func() { vxlanData(e, have.VXLAN, want.VXLAN, parent) })
		}, nil)
		if err != nil {
			return fmt.Errorf("set VXLAN parameters: %w", err)
		}
	}
	return c.request(func(e *encoder) {
		b := beginLink(e, unix.RTM_NEWLINK, index)
		if have.Up != want.Up {
			setUp(b, want.Up)
		}
		if have.MTU != want.MTU {
			e.u32(unix.IFLA_MTU, uint32(want.MTU))
		}
		if have.MAC != want.MAC {
			e.bytes(unix.IFLA_ADDRESS, want.MAC[:])
		}
		if have.Alias != want.Alias {
			e.bytes(unix.IFLA_IFALIAS, []byte(want.Alias))
		}
	}, nil)
}

func (c *conn) deleteLink(name string) error {
	index, err := c.linkIndex(name)
	if err != nil {
		return err
	}
	return c.request(func(e *encoder) { beginLink(e, unix.RTM_DELLINK, index) }, nil)
}

// linkIndex asks for the index of a device; no name has index 0.
func (c *conn) linkIndex(name string) (uint32, error) {
	if name == "" {
		return 0, nil
	}
	var index uint32
	err := c.request(func(e *encoder) { encodeLinkGet(e, name) }, func(_ header, body []byte) { index = linkIndexOf(body) })
	if err != nil {
		return 0, fmt.Errorf("find link %s: %w", name, err)
	}
	return index, nil
}

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
