package kernel

import (
	"encoding/binary"
	"iter"
	"net/netip"

	"golang.org/x/sys/unix"
)

// The netlink format (linux/netlink.h): messages with a 16-byte header, a fixed
// part that depends on the type, and attributes, all in host byte order and
// aligned to 4 bytes.

var native = binary.NativeEndian

const (
	headerLen = unix.NLMSG_HDRLEN
	attrLen   = unix.SizeofRtAttr
	// typeMask removes NLA_F_NESTED and NLA_F_NET_BYTEORDER from an attribute's type.
	typeMask = 0x3fff
	nested   = 0x8000
)

// header is nlmsghdr without the length.
type header struct {
	typ, flags uint16
	seq, pid   uint32
}

// messages splits what one receive call returned. A message that claims to be
// longer than what is there ends the walk with ok false.
func messages(b []byte, each func(header, []byte)) (ok bool) {
	for len(b) >= headerLen {
		n := int(native.Uint32(b))
		if n < headerLen || n > len(b) {
			return false
		}
		each(header{native.Uint16(b[4:]), native.Uint16(b[6:]), native.Uint32(b[8:]), native.Uint32(b[12:])}, b[headerLen:n])
		b = b[min(align(n), len(b)):]
	}
	return len(b) == 0
}

// attrs walks over the attributes behind the first fixed bytes of body.
func attrs(body []byte, fixed int) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		if len(body) < fixed {
			return
		}
		for b := body[fixed:]; len(b) >= attrLen; {
			n := int(native.Uint16(b))
			if n < attrLen || n > len(b) {
				return
			}
			if !yield(native.Uint16(b[2:])&typeMask, b[attrLen:n]) {
				return
			}
			b = b[min(align(n), len(b)):]
		}
	}
}

func align(n int) int { return (n + 3) &^ 3 }

// addrOf reads an IPv4 or IPv6 address by its length.
func addrOf(b []byte) netip.Addr {
	a, _ := netip.AddrFromSlice(b)
	return a
}

func u32Of(b []byte) uint32 {
	if len(b) < 4 {
		return 0
	}
	return native.Uint32(b)
}

// stringOf reads a string that ends with a zero byte.
func stringOf(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}

// encoder holds messages, one behind the other.
type encoder struct {
	buf   []byte
	start int // of the message being written
}

// begin starts a message; the zeroes of its fixed part follow.
func (e *encoder) begin(typ, flags uint16, fixed int) []byte {
	e.start = len(e.buf)
	e.zero(headerLen + fixed)
	h := e.buf[e.start:]
	native.PutUint16(h[4:], typ)
	native.PutUint16(h[6:], flags|unix.NLM_F_REQUEST)
	return h[headerLen:]
}

// end completes the message begun last.
func (e *encoder) end(seq uint32) {
	h := e.buf[e.start:]
	native.PutUint32(h, uint32(len(h)))
	native.PutUint32(h[8:], seq)
}

// number gives all messages sequence numbers from first on.
func (e *encoder) number(first uint32) {
	for b := e.buf; len(b) > 0; b = b[native.Uint32(b):] {
		native.PutUint32(b[8:], first)
		first++
	}
}

func (e *encoder) reset() { e.buf, e.start = e.buf[:0], 0 }

// orFlags adds flags to the header of the message begun last.
func (e *encoder) orFlags(flags uint16) {
	h := e.buf[e.start:]
	native.PutUint16(h[6:], native.Uint16(h[6:])|flags)
}

func (e *encoder) zero(n int) {
	e.buf = append(e.buf, make([]byte, n)...)
}

func (e *encoder) bytes(typ uint16, value []byte) {
	e.open(typ, len(value))
	e.buf = append(e.buf, value...)
	e.zero(align(len(value)) - len(value))
}

func (e *encoder) open(typ uint16, length int) {
	e.buf = native.AppendUint16(e.buf, uint16(attrLen+length))
	e.buf = native.AppendUint16(e.buf, typ)
}

func (e *encoder) u32(typ uint16, value uint32) {
	e.open(typ, 4)
	e.buf = native.AppendUint32(e.buf, value)
}

func (e *encoder) u8(typ uint16, value uint8) { e.bytes(typ, []byte{value}) }

func (e *encoder) str(typ uint16, s string) { e.bytes(typ, append([]byte(s), 0)) }

// addr writes 4 or 16 bytes.
func (e *encoder) addr(typ uint16, a netip.Addr) {
	if a.Is4() {
		b := a.As4()
		e.bytes(typ, b[:])
		return
	}
	b := a.As16()
	e.bytes(typ, b[:])
}

// nest writes an attribute that holds others.
func (e *encoder) nest(typ uint16, fill func()) {
	at := len(e.buf)
	e.open(typ|nested, 0)
	fill()
	native.PutUint16(e.buf[at:], uint16(len(e.buf)-at))
}
