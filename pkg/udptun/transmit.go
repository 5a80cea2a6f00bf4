package udptun

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// readSlots packets of full size fit into a sender's memory. More would only push
// the data out of the processor's cache before it is sent.
const (
	readSlots = 8
	slotLen   = 64 + 65536 // the virtio header ends at byte 64: the copy is aligned
	slotHead  = 64 - vnetLen
)

// sender carries packets from one queue of the device to the peers.
type sender struct {
	t     *Tunnel
	tun   int
	boxes [2]*outbox // IPv4, IPv6; nil: no socket of the family
	other *receiver  // of the same queue and thread
	count *counters

	mem     []byte
	at      int
	scratch [maxIPLen]byte
}

// pull sends what the device's queue holds, as much as the memory takes, and
// reports whether there was anything.
func (s *sender) pull() (bool, error) {
	defer s.flush()
	for s.at+slotLen <= len(s.mem) {
		b := s.mem[s.at+slotHead : s.at+slotLen]
		n, e := tunRead(s.tun, b)
		switch {
		case e == unix.EAGAIN:
			return s.at > 0, nil
		case e == unix.EBADFD:
			return false, fmt.Errorf("read: %w: somebody has deleted the device", e)
		case e != 0, n < vnetLen: // one packet that the kernel cannot describe
			s.count.drop(dropMalformed, 1)
			return true, nil
		}
		s.at += (64 - vnetLen + n + 63) &^ 63
		s.packet(b[vnetLen:n], readVnet(b))
	}
	return true, nil
}

func (s *sender) packet(b []byte, v vnet) {
	p, ok := parse(b)
	if !ok {
		s.count.drop(dropMalformed, 1)
		return
	}
	to, ok := s.t.table.Load().peers.Lookup(p.dst())
	if !ok {
		s.count.drop(dropNoPeer, 1)
		s.t.icmp.unreachable(p)
		return
	}
	box := s.boxes[0]
	if to.v6() {
		box = s.boxes[1]
	}
	if box == nil {
		s.count.drop(dropNoSocket, 1)
		s.t.icmp.unreachable(p)
		return
	}
	if !p.hop() {
		s.count.drop(dropTTL, 1)
		s.t.icmp.exceeded(p)
		return
	}
	if v.gso == unix.VIRTIO_NET_HDR_GSO_NONE {
		if v.needsSum && !finishSum(p, v) {
			s.count.drop(dropMalformed, 1)
			return
		}
		s.open(box, to, len(p))
		box.push(p)
		return
	}
	seg, ok := newSegmenter(p, v)
	if !ok {
		s.count.drop(dropMalformed, 1)
		return
	}
	for i := range seg.n {
		s.open(box, to, seg.length(i))
		header, payload := seg.segment(i, box.slot())
		box.push(header)
		box.push(payload)
	}
}

func (s *sender) open(box *outbox, to *dest, size int) {
	if !box.open(to, size) {
		s.send(box)
		box.open(to, size) // an empty one has room
	}
}

// flush sends all that is held back; the memory of the packets is free again.
func (s *sender) flush() {
	for _, box := range s.boxes {
		if box != nil && box.n > 0 {
			s.send(box)
		}
	}
	s.at = 0
}

func (s *sender) send(o *outbox) {
	raw := o.prepare()
	for i := 0; i < len(raw); {
		n, e := sendmmsg(o.fd, raw[i:])
		if e == 0 {
			for j := range n {
				s.count.pass(o.msgs[i+j].n, o.msgs[i+j].total)
			}
			i += n
			continue
		}
		switch e {
		case unix.EINTR:
		case unix.EAGAIN, unix.ENOBUFS:
			if !s.room(o.fd) {
				i = len(raw)
			}
		default:
			s.failed(o, i, e)
			i++
		}
	}
	o.reset()
}

// room waits for the network card, whose queue is full: packets stay in the
// device's. Those that arrive meanwhile go on.
func (s *sender) room(fd int) bool {
	fds := s.t.stop.pollFds(unix.POLLIN, s.other.socks...)
	for i := range fds {
		if int(fds[i].Fd) == fd {
			fds[i].Events |= unix.POLLOUT
		}
	}
	if !s.t.stop.wait(fds) {
		return false
	}
	_, err := s.other.pull()
	return err == nil // without a device there is nothing to send, either
}

// failed sends the packets of a message one by one, to find those that can go.
func (s *sender) failed(o *outbox, i int, e unix.Errno) {
	m := &o.msgs[i]
	if e != unix.EMSGSIZE && (m.n == 1 || e != unix.EIO && e != unix.EINVAL) {
		s.count.drop(dropRefused, m.n)
		return
	}
	if e == unix.EIO {
		// The outgoing device computes no checksums, which UDP_SEGMENT needs.
		o.gso = false
	}
	o.packets(i, s.scratch[:], func(p packet) { s.single(o, m.to, p) })
}

// single sends one packet on the path of errors. One that is too big for the path
// is refused, if its sender asked for that, or leaves in fragments.
func (s *sender) single(o *outbox, to *dest, p packet) {
	_, err := unix.SendmsgN(o.fd, p, nil, sockaddr(to.addr), unix.MSG_DONTWAIT)
	if errors.Is(err, unix.EMSGSIZE) {
		mtu := s.t.paths.mtu(to) - outerLen(to.v6())
		if p.mayNotFragment() && mtu > 0 && mtu < len(p) && (!p.isV6() || mtu >= minIPv6) {
			s.count.drop(dropTooBig, 1)
			s.t.icmp.tooBig(p, mtu)
			return
		}
		o.setFragment(true)
		_, err = unix.SendmsgN(o.fd, p, nil, sockaddr(to.addr), unix.MSG_DONTWAIT)
		o.setFragment(false)
	}
	if err != nil {
		s.count.drop(dropRefused, 1)
		return
	}
	s.count.pass(1, len(p))
}

// outerLen is what the tunnel adds to a packet.
func outerLen(v6 bool) int {
	if v6 {
		return ipv6Len + udpLen
	}
	return ipv4Len + udpLen
}
