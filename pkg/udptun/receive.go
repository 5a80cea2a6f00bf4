package udptun

import (
	"errors"

	"golang.org/x/sys/unix"
)

// buffers that one receive fills: many small packets, or a few full ones.
const (
	recvBuffers = 8
	recvLen     = 65536
)

// receiver carries packets from one socket of each family to one queue of the device.
type receiver struct {
	t     *Tunnel
	tun   int
	socks []int
	count *counters
	runs  coalescer

	msgs    [recvBuffers]mmsghdr
	iov     [recvBuffers]unix.Iovec
	control [recvBuffers]segmentControl
	mem     []byte
}

func newReceiver(t *Tunnel, tun int, socks []int, udp bool) *receiver {
	r := &receiver{t: t, tun: tun, socks: socks, count: &counters{}, mem: make([]byte, recvBuffers*recvLen)}
	r.runs.udp = udp
	for i := range r.msgs {
		r.iov[i].Base = &r.mem[i*recvLen]
		r.iov[i].SetLen(recvLen)
		r.msgs[i].hdr = unix.Msghdr{Iov: &r.iov[i], Control: &r.control[i].buf[0]}
		r.msgs[i].hdr.SetIovlen(1)
	}
	return r
}

// pull forwards what the sockets hold, up to one batch of each, and reports
// whether there was anything.
func (r *receiver) pull() (bool, error) {
	some := false
	for _, fd := range r.socks {
		n, e := r.receive(fd)
		if e != 0 {
			continue // EAGAIN, or the error of an earlier packet
		}
		some = true
		if err := r.forward(n); err != nil {
			return true, err
		}
	}
	return some, nil
}

func (r *receiver) receive(fd int) (int, unix.Errno) {
	for i := range r.msgs {
		r.msgs[i].hdr.SetControllen(len(r.control[i].buf))
	}
	return recvmmsg(fd, r.msgs[:])
}

// forward writes the packets of n buffers to the device.
func (r *receiver) forward(n int) error {
	tab := r.t.table.Load()
	for i := range n {
		m := &r.msgs[i]
		b := r.mem[i*recvLen:][:m.n]
		size := groSize(&m.hdr, r.control[i].buf[:], len(b))
		if m.hdr.Flags&unix.MSG_TRUNC != 0 || len(b) == 0 {
			r.count.drop(dropMalformed, 1)
			continue
		}
		for len(b) > 0 {
			n := min(size, len(b))
			if err := r.packet(tab, b[:n:n]); err != nil {
				return err
			}
			b = b[n:]
		}
	}
	return r.flush()
}

func (r *receiver) packet(tab *table, b []byte) error {
	p, ok := parse(b)
	switch {
	case !ok:
		r.count.drop(dropMalformed, 1)
		return nil
	case !tab.isOwn(p.dst()):
		// It would come back to the tunnel, until its time to live is over.
		r.count.drop(dropForeign, 1)
		return nil
	case !p.hop():
		r.count.drop(dropTTL, 1)
		r.t.icmp.exceeded(p)
		return nil
	}
	if !r.runs.add(p) {
		if err := r.flush(); err != nil {
			return err
		}
		r.runs.add(p) // there is room now
	}
	return nil
}

func (r *receiver) flush() error {
	for i := range r.runs.runs[:r.runs.n] {
		run := &r.runs.runs[i]
		e := tunWrite(r.tun, run.finish())
		switch {
		case e == 0:
			r.count.pass(run.n, run.length+(run.n-1)*run.header)
		case errors.Is(e, unix.EBADFD):
			return e // the device is gone
		default:
			r.count.drop(dropRefused, run.n) // the device is down, or no memory
		}
	}
	r.runs.n = 0
	return nil
}
