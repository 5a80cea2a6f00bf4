package kernel

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// batchSize is how many bytes of messages go in one system call: enough to make
// its cost vanish, and few enough that the errors of all fit in receiveBuffer.
const batchSize = 48 << 10

// batch collects messages that each change one object, or ask for one. The kernel
// works them off in order and answers only for those that fail and for the last, which marks
// the end of all answers.
type batch struct {
	conn  *conn
	enc   encoder
	n     uint32
	first uint32 // sequence number of the first message
	// failed is told the number of a message, counted from 0, and why.
	failed func(i int, err error)
	// each, if not nil, gets what was asked for by message i.
	each func(i int, h header, body []byte)
}

// added completes the message that was just written to enc.
func (b *batch) added() {
	b.enc.end(0)
	b.n++
}

func (b *batch) full() bool { return len(b.enc.buf) >= batchSize }

// send makes the changes and waits until all are done.
func (b *batch) send() {
	if b.n == 0 {
		return
	}
	b.enc.orFlags(unix.NLM_F_ACK)
	// Numbered only now: requests may have come between.
	b.first = b.conn.seq + 1
	b.enc.number(b.first)
	b.conn.seq += b.n
	b.answers(b.conn.send(b.enc.buf))
	b.enc.reset()
	b.n = 0
}

func (b *batch) answers(err error) {
	next := uint32(0) // the first message that may still be unanswered
	for err == nil && next < b.n {
		var buf []byte
		if buf, err = b.conn.receive(); err != nil {
			break
		}
		messages(buf, func(h header, body []byte) {
			i := h.seq - b.first // wraps like the sequence numbers themselves
			if i < next || i >= b.n {
				return
			}
			if h.typ != unix.NLMSG_ERROR {
				if b.each != nil {
					b.each(int(i), h, body)
				}
				return
			}
			next = i + 1
			if err := answer(h, body); err != nil {
				b.failed(int(i), err)
			}
		})
	}
	for ; err != nil && next < b.n; next++ {
		b.failed(int(next), fmt.Errorf("no answer: %w", err))
	}
}

// absent reports whether err says that what was to be deleted is not there.
func absent(err error) bool {
	return errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EADDRNOTAVAIL)
}
