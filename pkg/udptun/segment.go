package udptun

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// maxHeader is the room for the headers of a segment: 60 bytes of TCP and an
// IPv4 header, or an IPv6 header with 92 bytes of extensions.
const maxHeader = 192

// segmenter cuts a packet of up to 64 KiB, as TCP or a UDP sender with
// UDP_SEGMENT gives it to a device with offloads, into the packets that go out.
// Payload stays where it is: a segment is a new header and a slice.
type segmenter struct {
	pkt       packet
	transport int // offset of the transport header
	header    int // length of all headers
	size      int // payload of each segment but the last
	n         int // segments
	tcp       bool
	base      uint64 // sum of the addresses and the protocol
}

// newSegmenter checks a packet against what the kernel says of it.
func newSegmenter(p packet, v vnet) (segmenter, bool) {
	s := segmenter{pkt: p, transport: int(v.sumStart), size: int(v.size)}
	ip := ipv6Len
	if !p.isV6() {
		ip = int(p[0]&15) * 4
	}
	proto := byte(protoTCP)
	if s.transport < ip || s.size == 0 || !v.needsSum {
		return s, false
	}
	switch v.gso {
	case unix.VIRTIO_NET_HDR_GSO_TCPV4, unix.VIRTIO_NET_HDR_GSO_TCPV6:
		if len(p) < s.transport+tcpLen {
			return s, false
		}
		s.tcp = true
		s.header = s.transport + int(p[s.transport+12]>>4)*4
		if s.header < s.transport+tcpLen {
			return s, false
		}
	case unix.VIRTIO_NET_HDR_GSO_UDP_L4:
		proto = protoUDP
		s.header = s.transport + udpLen
	default:
		return s, false
	}
	if s.header >= len(p) || s.header > maxHeader {
		return s, false
	}
	s.n = (len(p) - s.header + s.size - 1) / s.size
	s.base = pseudo(p.addrs(), proto, 0)
	return s, true
}

// length of segment i in bytes, headers included.
func (s *segmenter) length(i int) int {
	return s.header + min(s.size, len(s.pkt)-s.header-i*s.size)
}

// segment writes the headers of segment i to dst and returns them and the payload.
func (s *segmenter) segment(i int, dst []byte) (header, payload []byte) {
	from := s.header + i*s.size
	payload = s.pkt[from:min(from+s.size, len(s.pkt))]
	header = dst[:s.header]
	copy(header, s.pkt)
	ip, be := packet(header), binary.BigEndian
	if !ip.isV6() {
		be.PutUint16(header[4:], be.Uint16(header[4:])+uint16(i)) // identification
	}
	ip.setLength(len(header) + len(payload))

	t := header[s.transport:]
	length := len(t) + len(payload)
	var check []byte
	if s.tcp {
		be.PutUint32(t[4:], be.Uint32(t[4:])+uint32(i*s.size))
		if i > 0 {
			t[13] &^= tcpCWR // once is enough (RFC 3168)
		}
		if i < s.n-1 {
			t[13] &^= tcpFIN | tcpPSH
		}
		check = t[16:18]
	} else {
		be.PutUint16(t[4:], uint16(length))
		check = t[6:8]
	}
	check[0], check[1] = 0, 0
	var l [8]byte
	be.PutUint32(l[4:], uint32(length))
	putSum(check, sum(sum(sum(s.base, l[:]), t), payload))
	if !s.tcp && check[0]|check[1] == 0 {
		check[0], check[1] = 0xff, 0xff // zero means none (RFC 768)
	}
	return header, payload
}

// finishSum completes the checksum of a single packet, which the kernel had left
// to the device.
func finishSum(p packet, v vnet) bool {
	at := int(v.sumStart) + int(v.sumOffset)
	if int(v.sumStart) < ipv4Len || at+2 > len(p) {
		return false
	}
	check := p[at : at+2]
	putSum(check, sum(0, p[v.sumStart:])) // with the pseudo-header's sum in the field
	const udpCheck = 6
	if v.sumOffset == udpCheck && check[0]|check[1] == 0 {
		check[0], check[1] = 0xff, 0xff
	}
	return true
}
