package kernel

import (
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

// neighbor is what RTM_NEWNEIGH describes: an ARP or NDP entry, or in family
// AF_BRIDGE a forwarding entry, where dst is the other end of the tunnel.
type neighbor struct {
	family uint8
	index  uint32
	state  uint16
	flags  uint8
	dst    netip.Addr
	mac    overlay.MAC
}

// permanent reports whether the entry was made by a program to stay.
func (n *neighbor) permanent() bool { return n.state&unix.NUD_PERMANENT != 0 }

func decodeNeighbor(body []byte) (n neighbor) {
	if len(body) < unix.SizeofNdMsg {
		return n
	}
	n.family, n.index, n.state, n.flags = body[0], linkIndexOf(body), native.Uint16(body[8:]), body[10]
	odd := false
	for typ, v := range attrs(body, unix.SizeofNdMsg) {
		switch typ {
		case unix.NDA_DST:
			n.dst = addrOf(v)
		case unix.NDA_LLADDR:
			n.mac = macOf(v)
		case unix.NDA_PORT, unix.NDA_VNI:
			odd = true
		}
	}
	if odd && n.family == unix.AF_BRIDGE {
		// The entry sends to another port or VNI than its device: no entry of
		// ours, whatever its address.
		n.dst = netip.Addr{}
	}
	return n
}

// encodeNeighDump asks for the ARP and NDP entries of one device, or with
// AF_BRIDGE for its forwarding entries.
func encodeNeighDump(e *encoder, family uint8, index uint32) {
	e.begin(unix.RTM_GETNEIGH, 0, unix.SizeofNdMsg)[0] = family
	e.u32(unix.NDA_IFINDEX, index)
}

// encodeNeighbor writes a change of n. Everything on our own device is ours, so
// that Add takes the place of what may be there.
func encodeNeighbor(e *encoder, verb overlay.Verb, n neighbor) {
	typ, flags := uint16(unix.RTM_NEWNEIGH), uint16(unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
	if verb == overlay.Delete {
		typ, flags = unix.RTM_DELNEIGH, 0
	}
	b := e.begin(typ, flags, unix.SizeofNdMsg)
	b[0], b[10] = n.family, n.flags
	native.PutUint32(b[4:], n.index)
	native.PutUint16(b[8:], n.state)
	if n.dst.IsValid() {
		e.addr(unix.NDA_DST, n.dst)
	}
	if n.family == unix.AF_BRIDGE || verb != overlay.Delete {
		e.bytes(unix.NDA_LLADDR, n.mac[:])
	}
}

func neighborOf(n overlay.Neigh, index uint32) neighbor {
	return neighbor{family: familyNumber(n.IP), index: index, state: unix.NUD_PERMANENT, dst: n.IP, mac: n.MAC}
}

func forwardingOf(f overlay.FDB, index uint32) neighbor {
	return neighbor{family: unix.AF_BRIDGE, index: index, state: unix.NUD_PERMANENT | unix.NUD_NOARP, flags: unix.NTF_SELF, dst: f.Dst, mac: f.MAC}
}
