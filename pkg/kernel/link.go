package kernel

import (
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

const (
	// linkPrefix begins the names of the devices that Twill and flannel make.
	linkPrefix = "flannel"
	// skipStats keeps the counters out of the answers (RTEXT_FILTER_SKIP_STATS).
	skipStats = 1 << 3

	// The attributes of a device of kind ipip (linux/if_tunnel.h), which package
	// unix lacks.
	iptunLink, iptunLocal, iptunRemote = 1, 2, 3
)

// link is a device as RTM_NEWLINK describes it.
type link struct {
	overlay.Link
	index  uint32
	parent uint32 // VXLAN.Parent or IPIP.Parent by index
	flags  uint32
}

// candidate reports whether the device may be ours or flannel's.
func (l *link) candidate() bool {
	switch l.Kind {
	case overlay.KindVXLAN, overlay.KindTUN, overlay.KindWireGuard, overlay.KindIPIP:
		return strings.HasPrefix(l.Name, linkPrefix)
	}
	return false
}

// hasWireGuard reports whether the device may be a WireGuard one: the kernel's, or
// the TUN of one in user space.
func (l *link) hasWireGuard() bool {
	return l.Kind == overlay.KindWireGuard || l.Kind == overlay.KindTUN && strings.HasPrefix(l.Name, overlay.WireGuardLink)
}

// setParent names the underlay device.
func (l *link) setParent(name string) {
	switch l.Kind {
	case overlay.KindVXLAN:
		l.VXLAN.Parent = name
	case overlay.KindIPIP:
		l.IPIP.Parent = name
	}
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
			l.Kind = overlay.Kind(stringOf(v))
		case unix.IFLA_INFO_DATA:
			data = v
		}
	}
	switch l.Kind {
	case overlay.KindVXLAN:
		l.decodeVXLAN(data)
	case overlay.KindIPIP:
		l.decodeIPIP(data)
	case overlay.KindTUN:
		for typ, v := range attrs(data, 0) {
			if typ == unix.IFLA_TUN_TYPE && len(v) == 1 && v[0] != unix.IFF_TUN {
				l.Kind = "tap" // carries Ethernet frames: nothing of ours
			}
		}
	}
}

func (l *link) decodeVXLAN(data []byte) {
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

func (l *link) decodeIPIP(data []byte) {
	peer := netip.IPv4Unspecified()
	for typ, v := range attrs(data, 0) {
		switch typ {
		case iptunLocal:
			l.IPIP.Local = addrOf(v)
		case iptunRemote:
			peer = addrOf(v)
		case iptunLink:
			l.parent = u32Of(v)
		}
	}
	if peer != netip.IPv4Unspecified() {
		// All packets go to one peer: no device of ours, whatever its address.
		l.IPIP.Local = netip.Addr{}
	}
}

func macOf(b []byte) (m overlay.MAC) {
	if len(b) == len(m) {
		copy(m[:], b)
	}
	return m
}

// encodeLinkDump asks for the devices of a kind, or for all if kind is empty.
func encodeLinkDump(e *encoder, kind overlay.Kind) {
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
