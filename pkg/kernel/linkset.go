package kernel

import (
	"cmp"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

const addrGenModeNone = 1 // IN6_ADDR_GEN_MODE_NONE

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

// ipipData writes all of want: the kernel sets what is left out to its default.
// For TTL that is the inner packet's, and fragmentation is forbidden, so that
// senders learn the path's MTU.
func ipipData(e *encoder, want overlay.IPIP, parent uint32) {
	e.u32(iptunLink, parent)
	e.addr(iptunLocal, want.Local)
}

// linkInfo writes the kind of a device and what of want differs from have.
func linkInfo(e *encoder, have, want overlay.Link, parent uint32) {
	e.nest(unix.IFLA_LINKINFO, func() {
		e.bytes(unix.IFLA_INFO_KIND, []byte(want.Kind))
		e.nest(unix.IFLA_INFO_DATA, func() {
			switch want.Kind {
			case overlay.KindVXLAN:
				vxlanData(e, have.VXLAN, want.VXLAN, parent)
			case overlay.KindIPIP:
				ipipData(e, want.IPIP, parent)
			}
		})
	})
}

// encodeNewLink writes the creation of a device that is down.
func encodeNewLink(e *encoder, want overlay.Link, parent uint32) {
	e.begin(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, unix.SizeofIfInfomsg)
	e.str(unix.IFLA_IFNAME, want.Name)
	e.u32(unix.IFLA_MTU, uint32(want.MTU))
	if want.MAC != (overlay.MAC{}) {
		e.bytes(unix.IFLA_ADDRESS, want.MAC[:])
	}
	linkInfo(e, overlay.Link{}, want, parent)
}

// newLink makes a device that is down and bears no alias yet.
func (c *conn) newLink(want overlay.Link) error {
	parent, err := c.linkIndex(parentOf(want))
	if err != nil {
		return err
	}
	return c.request(func(e *encoder) { encodeNewLink(e, want, parent) }, nil)
}

func parentOf(l overlay.Link) string { return cmp.Or(l.VXLAN.Parent, l.IPIP.Parent) }

// setParameters changes what belongs to the kind of a device.
func (c *conn) setParameters(index uint32, have, want overlay.Link) error {
	parent, err := c.linkIndex(parentOf(want))
	if err != nil {
		return err
	}
	err = c.request(func(e *encoder) {
		beginLink(e, unix.RTM_NEWLINK, index)
		if want.Kind == overlay.KindIPIP { // which takes the MTU of its new parent otherwise
			e.u32(unix.IFLA_MTU, uint32(have.MTU))
		}
		linkInfo(e, have, want, parent)
	}, nil)
	if err != nil {
		return fmt.Errorf("set parameters of kind %s: %w", want.Kind, err)
	}
	return nil
}

// setLink changes what all devices have. A device comes up only when it will not
// give itself a link-local address, and together with its alias.
func (c *conn) setLink(index uint32, have, want overlay.Link) error {
	// A kernel without IPv6 refuses this, and needs it as little.
	_ = c.request(func(e *encoder) {
		beginLink(e, unix.RTM_NEWLINK, index)
		e.nest(unix.IFLA_AF_SPEC, func() {
			e.nest(unix.AF_INET6, func() { e.u8(unix.IFLA_INET6_ADDR_GEN_MODE, addrGenModeNone) })
		})
	}, nil)
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
