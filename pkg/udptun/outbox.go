package udptun

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	maxMessages = 64
	maxPieces   = 2048
	maxDatagram = 65487 // UDP payload that IPv4 and IPv6 carry, with room to spare
	fullMessage = 60000 // bytes from which on waiting for more packets is of no use
)

// message is a datagram, or several of one size (the last may be shorter) to one
// peer, which the kernel or the network card takes apart.
type message struct {
	to     *dest
	size   int // of each packet but the last
	total  int
	n      int // packets
	first  int // of pieces
	closed bool
}

// outbox collects the messages of one socket.
type outbox struct {
	endpoint
	msgs  [maxMessages]message
	n     int
	bytes int

	pieces [maxPieces]unix.Iovec
	used   int
	header [maxPieces / 2][maxHeader]byte // of segments in pieces
	slots  int

	raw     [maxMessages]mmsghdr
	control [maxMessages]segmentControl
}

// open makes room for one packet of size bytes; its pieces are pushed next. False:
// the outbox has to be flushed first.
func (o *outbox) open(to *dest, size int) bool {
	if o.used+2 > maxPieces || o.slots == len(o.header) {
		return false
	}
	if o.n > 0 {
		m := &o.msgs[o.n-1]
		if m.to == to && !m.closed && size <= m.size && m.n < maxSegments && m.total+size <= maxDatagram && o.gso {
			m.closed = size < m.size
			m.n++
			m.total += size
			o.bytes += size
			return true
		}
	}
	if o.n == maxMessages || o.bytes >= fullMessage {
		return false
	}
	o.msgs[o.n] = message{to: to, size: size, total: size, n: 1, first: o.used}
	o.n++
	o.bytes += size
	return true
}

// slot is room for the headers of the packet that was opened last.
func (o *outbox) slot() []byte {
	o.slots++
	return o.header[o.slots-1][:]
}

func (o *outbox) push(b []byte) {
	p := &o.pieces[o.used]
	p.Base = &b[0]
	p.SetLen(len(b))
	o.used++
}

// reset forgets all messages.
func (o *outbox) reset() { o.n, o.bytes, o.used, o.slots = 0, 0, 0, 0 }

// prepare writes the kernel's form of the messages.
func (o *outbox) prepare() []mmsghdr {
	for i := range o.msgs[:o.n] {
		m, h := &o.msgs[i], &o.raw[i].hdr
		end := o.used
		if i+1 < o.n {
			end = o.msgs[i+1].first
		}
		*h = unix.Msghdr{Name: &m.to.raw[0], Namelen: m.to.len, Iov: &o.pieces[m.first]}
		h.SetIovlen(end - m.first)
		if m.n > 1 {
			o.control[i].set(h, m.size)
		}
	}
	return o.raw[:o.n]
}

// packets calls f with each packet of message i, put together in scratch.
func (o *outbox) packets(i int, scratch []byte, f func(packet)) {
	m, end := o.msgs[i], o.used
	if i+1 < o.n {
		end = o.msgs[i+1].first
	}
	n, size := 0, min(m.size, m.total)
	for _, p := range o.pieces[m.first:end] {
		n += copy(scratch[n:], unsafe.Slice(p.Base, int(p.Len)))
		if n == size {
			f(packet(scratch[:n]))
			m.total -= n
			n, size = 0, min(m.size, m.total)
		}
	}
}
