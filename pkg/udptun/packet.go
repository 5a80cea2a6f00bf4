package udptun

import (
	"encoding/binary"
	"net/netip"
)

// Offsets and sizes of RFC 791, 8200, 9293, 768.
const (
	protoICMP   = 1
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58

	ipv4Len = 20
	ipv6Len = 40
	tcpLen  = 20
	udpLen  = 8

	tcpFIN = 0x01
	tcpPSH = 0x08
	tcpACK = 0x10
	tcpCWR = 0x80

	dontFragment = 0x40 // in byte 6 of an IPv4 header
)

// packet is an IP packet whose fixed header is there and whose length field
// agrees with what has come.
type packet []byte

// parse accepts what may be forwarded: the rest of the header is the business of
// the kernels at both ends.
func parse(b []byte) (packet, bool) {
	if len(b) < ipv4Len {
		return nil, false
	}
	switch b[0] >> 4 {
	case 4:
		header := int(b[0]&15) * 4
		total := int(binary.BigEndian.Uint16(b[2:]))
		return b, header >= ipv4Len && total >= header && total == len(b)
	case 6:
		return b, len(b) >= ipv6Len && ipv6Len+int(binary.BigEndian.Uint16(b[4:])) == len(b)
	}
	return nil, false
}

func (p packet) isV6() bool { return p[0]>>4 == 6 }

// addrs are source and destination, as they stand in the header.
func (p packet) addrs() []byte {
	if p.isV6() {
		return p[8:40]
	}
	return p[12:20]
}

func (p packet) src() netip.Addr {
	if p.isV6() {
		return netip.AddrFrom16([16]byte(p[8:24]))
	}
	return netip.AddrFrom4([4]byte(p[12:16]))
}

func (p packet) dst() netip.Addr {
	if p.isV6() {
		return netip.AddrFrom16([16]byte(p[24:40]))
	}
	return netip.AddrFrom4([4]byte(p[16:20]))
}

// hop takes one from the time to live. False: the packet has come to its end
// here, and is unchanged.
func (p packet) hop() bool {
	if p.isV6() {
		if p[7] <= 1 {
			return false
		}
		p[7]--
		return true
	}
	if p[8] <= 1 {
		return false
	}
	p[8]--
	c := uint32(binary.BigEndian.Uint16(p[10:])) + 0x100 // RFC 1624
	binary.BigEndian.PutUint16(p[10:], uint16(c+c>>16))
	return true
}

// mayNotFragment reports whether a router has to refuse the packet if it is too
// big, and to tell the sender.
func (p packet) mayNotFragment() bool { return p.isV6() || p[6]&dontFragment != 0 }

// setLength makes the header fit a packet of n bytes in all.
func (p packet) setLength(n int) {
	if p.isV6() {
		binary.BigEndian.PutUint16(p[4:], uint16(n-ipv6Len))
		return
	}
	binary.BigEndian.PutUint16(p[2:], uint16(n))
	p.sumHeader()
}

// sumHeader computes the checksum of an IPv4 header.
func (p packet) sumHeader() {
	p[10], p[11] = 0, 0
	putSum(p[10:], sum(0, p[:int(p[0]&15)*4]))
}
