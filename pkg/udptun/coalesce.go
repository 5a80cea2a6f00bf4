package udptun

import (
	"bytes"
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// Bounds of one batch of received packets. 64 segments are what the kernel's own
// GRO puts into one buffer.
const (
	maxRuns     = 64
	maxSegments = 64
	maxIPLen    = 65535
)

// flow is what a packet has to offer to those that follow it.
type flow struct {
	proto     byte // TCP or UDP: may be joined; 0: goes alone
	transport int
	header    int    // length of all headers
	seq       uint32 // of TCP
	last      bool   // nothing may follow: PSH
	tag       uint32 // equal for packets of one flow
}

// run is one write to the device: a packet, and the payloads of those that
// continue it. The headers are the first packet's.
type run struct {
	flow
	pkt    packet
	size   int // payload bytes of the first packet
	length int // of the whole
	n      int // packets
	closed bool
	next   uint32 // sequence number that follows
	id     uint16 // IPv4 identification of the last packet

	vnet   [vnetLen]byte
	pieces [2 + maxSegments]unix.Iovec
	used   int // pieces
}

// coalescer joins the packets of a batch that a sender's offload had cut, so that
// the stack sees one packet of up to 64 KiB. Runs are written in the order of
// their first packets, and a packet joins the youngest run of its flow or none:
// no flow is ever reordered.
//
// Inner TCP and UDP checksums of joined packets are not verified: the checksum of
// the outer UDP datagram covers them and the kernel has verified it. A packet
// that goes alone keeps its checksum, and the kernel looks at it.
type coalescer struct {
	runs [maxRuns]run
	n    int
	udp  bool // the device takes UDP segments
}

// add takes a packet that stays unchanged in memory until the runs are written.
// False: there is no room, write and try again.
func (c *coalescer) add(p packet) bool {
	f := c.classify(p)
	if f.proto != 0 {
		for i := c.n - 1; i >= 0; i-- {
			r := &c.runs[i]
			if r.tag == f.tag && r.proto == f.proto && r.sameFlow(p, f) {
				if r.join(p, f) {
					return true
				}
				break
			}
		}
	}
	if c.n == maxRuns {
		return false
	}
	r := &c.runs[c.n]
	c.n++
	r.start(p, f)
	return true
}

func (c *coalescer) classify(p packet) flow {
	var f flow
	if p.isV6() {
		f.proto, f.transport = p[6], ipv6Len
	} else {
		f.proto, f.transport = p[9], ipv4Len
		const fragment = 0x3fff // more fragments, and the offset
		if p[0] != 0x45 || binary.BigEndian.Uint16(p[6:])&fragment != 0 {
			return flow{}
		}
	}
	t := p[f.transport:]
	switch {
	case f.proto == protoTCP && len(t) >= tcpLen:
		f.header = f.transport + int(t[12]>>4)*4
		f.seq = binary.BigEndian.Uint32(t[4:])
		f.last = t[13]&tcpPSH != 0
	case f.proto == protoUDP && c.udp && len(t) >= udpLen:
		f.header = f.transport + udpLen
	default:
		return flow{}
	}
	const golden = 0x9e3779b1
	f.tag = binary.BigEndian.Uint32(t) ^ binary.BigEndian.Uint32(p[f.transport-4:])*golden
	return f
}

func (r *run) start(p packet, f flow) {
	r.flow, r.pkt, r.length, r.n, r.used = f, p, len(p), 1, 2
	r.size = len(p) - f.header
	r.next = f.seq + uint32(r.size)
	r.pieces[1].Base = &p[0]
	r.pieces[1].SetLen(len(p))
	r.closed = f.last || !f.startable(p)
	if !p.isV6() {
		r.id = binary.BigEndian.Uint16(p[4:])
	}
}

// startable reports whether others may be joined to the packet.
func (f flow) startable(p packet) bool {
	if f.proto == 0 || f.header >= len(p) {
		return false
	}
	t := p[f.transport:]
	if f.proto == protoUDP {
		// Without a checksum it was not sent by an offload.
		return t[6]|t[7] != 0 && int(binary.BigEndian.Uint16(t[4:])) == len(t) && headerIntact(p)
	}
	return f.header >= f.transport+tcpLen && t[13]&^tcpPSH == tcpACK && headerIntact(p)
}

// headerIntact verifies the checksum of an IPv4 header: a joined packet gets a new one.
func headerIntact(p packet) bool {
	return p.isV6() || fold(sum(0, p[:ipv4Len])) == 0xffff
}

func (r *run) sameFlow(p packet, f flow) bool {
	return p[0]>>4 == r.pkt[0]>>4 &&
		binary.NativeEndian.Uint32(p[f.transport:]) == binary.NativeEndian.Uint32(r.pkt[f.transport:]) &&
		bytes.Equal(p.addrs(), r.pkt.addrs())
}

// join appends the packet if segmentation of the result gives it back.
func (r *run) join(p packet, f flow) bool {
	payload := len(p) - f.header
	if r.closed || payload > r.size || r.n == maxSegments || r.length+payload > maxIPLen || !r.continues(p, f) || !f.startable(p) {
		r.closed = true
		return false
	}
	if !p.isV6() {
		r.id++
	}
	if f.last {
		r.pkt[f.transport+13] |= tcpPSH
	}
	r.closed = f.last || payload < r.size
	r.next += uint32(payload)
	r.length += payload
	r.n++
	r.pieces[r.used].Base = &p[f.header]
	r.pieces[r.used].SetLen(payload)
	r.used++
	return true
}

// continues compares all that the segments of one packet have in common.
func (r *run) continues(p packet, f flow) bool {
	if f.header != r.header {
		return false
	}
	a, b := r.pkt, p
	if p.isV6() {
		if !bytes.Equal(a[:4], b[:4]) || a[7] != b[7] {
			return false
		}
	} else if a[1] != b[1] || a[8] != b[8] || a[6] != b[6] || binary.BigEndian.Uint16(b[4:]) != r.id+1 {
		return false
	}
	if f.proto == protoUDP {
		return true
	}
	x, y := a[f.transport:r.header], b[f.transport:f.header]
	// Acknowledgement and data offset; window; urgent pointer and options.
	return f.seq == r.next &&
		bytes.Equal(x[8:13], y[8:13]) && bytes.Equal(x[14:16], y[14:16]) && bytes.Equal(x[18:], y[18:])
}

// finish makes the headers those of the whole and returns what to write.
func (r *run) finish() []unix.Iovec {
	v := vnet{}
	if r.n > 1 {
		v = vnet{
			needsSum: true, headerLen: uint16(r.header), size: uint16(r.size),
			sumStart: uint16(r.transport), sumOffset: 16, gso: unix.VIRTIO_NET_HDR_GSO_TCPV4,
		}
		t := r.pkt[r.transport:]
		length := r.length - r.transport
		switch {
		case r.proto == protoUDP:
			v.gso, v.sumOffset = unix.VIRTIO_NET_HDR_GSO_UDP_L4, 6
			binary.BigEndian.PutUint16(t[4:], uint16(length))
		case r.pkt.isV6():
			v.gso = unix.VIRTIO_NET_HDR_GSO_TCPV6
		}
		r.pkt.setLength(r.length)
		// The field holds the sum itself, not its complement.
		partial := fold(pseudo(r.pkt.addrs(), r.proto, length))
		binary.NativeEndian.PutUint16(t[v.sumOffset:], partial)
	}
	v.put(r.vnet[:])
	r.pieces[0].Base = &r.vnet[0]
	r.pieces[0].SetLen(vnetLen)
	return r.pieces[:r.used]
}
