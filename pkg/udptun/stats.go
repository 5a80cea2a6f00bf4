package udptun

import (
	"encoding/binary"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Stats count since Open.
type Stats struct {
	Sent     Traffic // from the device to peers
	Received Traffic // from peers to the device
}

// Traffic counts inner IP packets, as they are on the wire: what an offload holds
// together counts one by one.
type Traffic struct {
	Packets, Bytes uint64
	Drops          Drops
}

// Drops are packets that went no further, by reason.
type Drops struct {
	Malformed uint64 // no IP packet, or not all of one
	TTL       uint64 // time to live over; the sender was told
	NoPeer    uint64 // sent: no peer has the destination; the sender was told
	NoSocket  uint64 // sent: the peer's address is of a family that has no socket here
	TooBig    uint64 // sent: more than the path to the peer takes; the sender was told
	Foreign   uint64 // received: not for a subnet of this node
	Refused   uint64 // the kernel did not take it: firewall, no route to the peer, device down
	Overflow  uint64 // received: socket buffer full
}

type dropReason int

const (
	dropMalformed dropReason = iota
	dropTTL
	dropNoPeer
	dropNoSocket
	dropTooBig
	dropForeign
	dropRefused
	dropReasons
)

// counters are of one thread; others only read them.
type counters struct {
	packets, bytes atomic.Uint64
	drops          [dropReasons]atomic.Uint64
}

func (c *counters) pass(packets, bytes int) {
	c.packets.Add(uint64(packets))
	c.bytes.Add(uint64(bytes))
}

func (c *counters) drop(r dropReason, n int) { c.drops[r].Add(uint64(n)) }

func (t *Traffic) add(c *counters) {
	t.Packets += c.packets.Load()
	t.Bytes += c.bytes.Load()
	d := &t.Drops
	for r, n := range map[dropReason]*uint64{
		dropMalformed: &d.Malformed, dropTTL: &d.TTL, dropNoPeer: &d.NoPeer, dropNoSocket: &d.NoSocket,
		dropTooBig: &d.TooBig, dropForeign: &d.Foreign, dropRefused: &d.Refused,
	} {
		*n += c.drops[r].Load()
	}
}

// overflow returns how many packets a socket had no room for, since it was made.
func overflow(fd int) uint64 {
	const soMeminfo, drops = 55, 8 // SO_MEMINFO, SK_MEMINFO_DROPS
	b := make([]byte, 64)
	n, err := getsockopt(fd, unix.SOL_SOCKET, soMeminfo, b)
	if err != nil || n < 4*(drops+1) {
		return 0
	}
	return uint64(binary.NativeEndian.Uint32(b[4*drops:]))
}
