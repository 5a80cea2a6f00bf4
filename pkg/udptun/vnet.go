package udptun

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// vnetLen is the size of struct virtio_net_hdr (virtio 1.2, 5.1.6), which stands
// before each packet that is read from the device or written to it.
const vnetLen = 10

// vnet says what is still to be done to a packet, by whoever gets it.
type vnet struct {
	needsSum  bool   // the transport checksum at sumStart+sumOffset covers the pseudo-header alone
	gso       byte   // VIRTIO_NET_HDR_GSO_…; NONE: one packet
	headerLen uint16 // of all headers; the kernel trusts ours, we compute our own
	size      uint16 // payload bytes of each segment but the last
	sumStart  uint16
	sumOffset uint16
}

func readVnet(b []byte) vnet {
	ne := binary.NativeEndian
	return vnet{
		needsSum:  b[0]&unix.VIRTIO_NET_HDR_F_NEEDS_CSUM != 0,
		gso:       b[1] &^ unix.VIRTIO_NET_HDR_GSO_ECN,
		headerLen: ne.Uint16(b[2:]),
		size:      ne.Uint16(b[4:]),
		sumStart:  ne.Uint16(b[6:]),
		sumOffset: ne.Uint16(b[8:]),
	}
}

func (v vnet) put(b []byte) {
	ne := binary.NativeEndian
	b[0], b[1] = 0, v.gso
	if v.needsSum {
		b[0] = unix.VIRTIO_NET_HDR_F_NEEDS_CSUM
	}
	ne.PutUint16(b[2:], v.headerLen)
	ne.PutUint16(b[4:], v.size)
	ne.PutUint16(b[6:], v.sumStart)
	ne.PutUint16(b[8:], v.sumOffset)
}
