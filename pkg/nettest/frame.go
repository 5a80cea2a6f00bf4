package nettest

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"
)

// EtherTypes of Frame.EtherType.
const (
	EtherTypeIPv4 = 0x0800
	EtherTypeARP  = 0x0806
	EtherTypeIPv6 = 0x86dd
)

// Protocols of Frame.Proto.
const (
	ProtoICMP   = 1
	ProtoTCP    = 6
	ProtoUDP    = 17
	ProtoICMPv6 = 58
)

// Frame is a packet on an interface, decoded. What it does not have is zero.
type Frame struct {
	Time           time.Time
	Out            bool // leaves the namespace by the interface
	SrcMAC, DstMAC [6]byte
	EtherType      uint16

	Src, Dst netip.Addr // also of ARP: sender and target
	Proto    uint8      // IPv4 protocol or the first IPv6 next header
	// Length is that of the IP packet with its header, in bytes. A TCP packet
	// that the device would cut in segments is one long packet here.
	Length   int
	DF       bool // IPv4: do not fragment
	Fragment bool // a part of a packet that was cut

	SrcPort, DstPort uint16 // UDP and TCP

	// Inner is the frame within VXLAN (RFC 7348), and VNI its network.
	VNI   uint32
	Inner *Frame
}

func (f *Frame) String() string {
	s := fmt.Sprintf("%v > %v proto %d length %d", f.Src, f.Dst, f.Proto, f.Length)
	if f.Proto == ProtoUDP || f.Proto == ProtoTCP {
		s += fmt.Sprintf(" ports %d > %d", f.SrcPort, f.DstPort)
	}
	if f.DF {
		s += " DF"
	}
	if f.Inner != nil {
		s += fmt.Sprintf(" vni %d { %v }", f.VNI, f.Inner)
	}
	return s
}

// decoder decodes frames; UDP to vxlanPort has an inner one.
type decoder struct{ vxlanPort uint16 }

// ethernet decodes what begins with an Ethernet header. A frame that was cut short
// is decoded as far as it goes.
func (d decoder) ethernet(b []byte) *Frame {
	const header = 14
	f := &Frame{}
	if len(b) < header {
		return f
	}
	copy(f.DstMAC[:], b)
	copy(f.SrcMAC[:], b[6:])
	f.EtherType = binary.BigEndian.Uint16(b[12:])
	d.network(f, b[header:])
	return f
}

// bare decodes an IP packet, as a TUN device has it.
func (d decoder) bare(b []byte) *Frame {
	f := &Frame{}
	if len(b) == 0 {
		return f
	}
	f.EtherType = EtherTypeIPv4
	if b[0]>>4 == 6 {
		f.EtherType = EtherTypeIPv6
	}
	d.network(f, b)
	return f
}

func (d decoder) network(f *Frame, b []byte) {
	switch f.EtherType {
	case EtherTypeIPv4:
		d.ipv4(f, b)
	case EtherTypeIPv6:
		d.ipv6(f, b)
	case EtherTypeARP:
		if len(b) >= 28 {
			f.Src, f.Dst = addr4(b[14:]), addr4(b[24:])
		}
	}
}

func (d decoder) ipv4(f *Frame, b []byte) {
	if len(b) < 20 {
		return
	}
	f.Length = int(binary.BigEndian.Uint16(b[2:]))
	frag := binary.BigEndian.Uint16(b[6:])
	const dontFragment, moreOrOffset = 0x4000, 0x3fff
	f.DF, f.Fragment = frag&dontFragment != 0, frag&moreOrOffset != 0
	f.Proto = b[9]
	f.Src, f.Dst = addr4(b[12:]), addr4(b[16:])
	if header := int(b[0]&15) * 4; header >= 20 && header <= len(b) && frag&0x1fff == 0 {
		d.transport(f, b[header:])
	}
}

func (d decoder) ipv6(f *Frame, b []byte) {
	const header, fragmentHeader = 40, 44
	if len(b) < header {
		return
	}
	f.Length = header + int(binary.BigEndian.Uint16(b[4:]))
	f.Proto = b[6]
	f.Fragment = f.Proto == fragmentHeader
	f.Src, f.Dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	d.transport(f, b[header:])
}

func (d decoder) transport(f *Frame, b []byte) {
	if f.Proto != ProtoUDP && f.Proto != ProtoTCP || len(b) < 4 {
		return
	}
	f.SrcPort, f.DstPort = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
	const udp, vxlan = 8, 8
	if f.Proto != ProtoUDP || f.DstPort != d.vxlanPort || len(b) < udp+vxlan {
		return
	}
	b = b[udp:]
	f.VNI = binary.BigEndian.Uint32(b[4:]) >> 8
	// VXLAN does not nest here; without a port nothing is decoded further.
	f.Inner = decoder{}.ethernet(b[vxlan:])
}

func addr4(b []byte) netip.Addr { return netip.AddrFrom4([4]byte(b[:4])) }
