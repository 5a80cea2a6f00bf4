package udptun

import (
	"encoding/binary"
	"math/bits"
)

// The Internet checksum (RFC 1071) does not depend on the byte order as long as
// words are read and the result is written in the same one: the machine's own.

// sum adds b to a ones' complement sum of 64 bits. Only the last piece of a
// packet may have an odd length.
func sum(acc uint64, b []byte) uint64 {
	var c uint64
	ne := binary.NativeEndian
	for len(b) >= 64 {
		acc, c = bits.Add64(acc, ne.Uint64(b[0:8]), c)
		acc, c = bits.Add64(acc, ne.Uint64(b[8:16]), c)
		acc, c = bits.Add64(acc, ne.Uint64(b[16:24]), c)
		acc, c = bits.Add64(acc, ne.Uint64(b[24:32]), c)
		acc, c = bits.Add64(acc, ne.Uint64(b[32:40]), c)
		acc, c = bits.Add64(acc, ne.Uint64(b[40:48]), c)
		acc, c = bits.Add64(acc, ne.Uint64(b[48:56]), c)
		acc, c = bits.Add64(acc, ne.Uint64(b[56:64]), c)
		b = b[64:]
	}
	for len(b) >= 8 {
		acc, c = bits.Add64(acc, ne.Uint64(b), c)
		b = b[8:]
	}
	if len(b) > 0 {
		var last [8]byte
		copy(last[:], b)
		acc, c = bits.Add64(acc, ne.Uint64(last[:]), c)
	}
	acc, c = bits.Add64(acc, 0, c)
	return acc + c
}

// fold reduces a sum to 16 bits.
func fold(acc uint64) uint16 {
	acc = acc>>32 + acc&0xffffffff
	acc = acc>>16 + acc&0xffff
	acc = acc>>16 + acc&0xffff
	acc = acc>>16 + acc&0xffff
	return uint16(acc)
}

// pseudo adds the pseudo-header: addresses, protocol, length of the transport
// header and payload.
func pseudo(addrs []byte, proto byte, length int) uint64 {
	tail := [8]byte{3: proto}
	binary.BigEndian.PutUint32(tail[4:], uint32(length))
	return sum(sum(0, addrs), tail[:])
}

// putSum stores the checksum of what acc has added up.
func putSum(at []byte, acc uint64) {
	binary.NativeEndian.PutUint16(at, ^fold(acc))
}
