package kernel

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

const (
	// receiveBuffer holds what the kernel queues for us between two reads: the
	// errors of a whole batch, each about 1 KiB of kernel memory.
	receiveBuffer = 8 << 20
	// watchBuffer holds the notifications of 10,000 peers that come at once.
	watchBuffer = 32 << 20
	sendBuffer  = 1 << 20
	// readSize is what one read takes; the kernel fills at most 32 KiB in a dump.
	readSize = 64 << 10
	// answerTimeout is only for a kernel that loses an answer, which it never does
	// with buffers of these sizes: better an error than a daemon that hangs.
	answerTimeout = 30
	dumpTries     = 5
)

// errInterrupted says that what a dump listed changed meanwhile: entries may be
// missing from it or be in it twice.
var errInterrupted = errors.New("interrupted by a change each time it was tried")

// errTruncated says that one message was larger than the read buffer.
var errTruncated = errors.New("answer larger than the buffer")

// conn is a netlink socket for requests. It belongs to the network namespace
// in which it was opened, from whatever thread it is used later. Not safe for
// concurrent use.
type conn struct {
	fd     int
	portid uint32
	seq    uint32
	buf    []byte
	req    encoder
}

func openSocket(protocol, flags, receive int) (fd int, portid uint32, err error) {
	fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|flags, protocol)
	if err != nil {
		return -1, 0, fmt.Errorf("open netlink socket: %w", err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	// The sizes matter for speed only; a kernel that refuses to go beyond
	// net.core.rmem_max still works.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receive)
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer)
	if err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return -1, 0, fmt.Errorf("bind netlink socket: %w", err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return -1, 0, fmt.Errorf("read netlink socket's name: %w", err)
	}
	return fd, sa.(*unix.SockaddrNetlink).Pid, nil
}

func openConn(protocol int) (*conn, error) {
	fd, portid, err := openSocket(protocol, 0, receiveBuffer)
	if err != nil {
		return nil, err
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: answerTimeout}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("set timeout of netlink socket: %w", err)
	}
	// Without strict checking (before Linux 4.20) the kernel ignores the filters
	// of a dump; each reader checks everything again, so it is only slower.
	for _, option := range []int{unix.NETLINK_EXT_ACK, unix.NETLINK_CAP_ACK, unix.NETLINK_GET_STRICT_CHK} {
		_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, option, 1)
	}
	return &conn{fd: fd, portid: portid, buf: make([]byte, readSize)}, nil
}

// close makes later calls fail, also when the number has another file by then.
func (c *conn) close() error {
	fd := c.fd
	c.fd = -1
	return unix.Close(fd)
}

// receive returns what the kernel sent next. Datagrams from processes, which root
// could send, are dropped.
func (c *conn) receive() ([]byte, error) {
	for {
		n, from, err := unix.Recvfrom(c.fd, c.buf, unix.MSG_TRUNC)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return nil, fmt.Errorf("read answer from the kernel: %w", err)
		}
		if sa, ok := from.(*unix.SockaddrNetlink); !ok || sa.Pid != 0 {
			continue
		}
		if n > len(c.buf) {
			c.buf = make([]byte, n+readSize)
			return nil, errTruncated
		}
		return c.buf[:n], nil
	}
}

func (c *conn) send(b []byte) error {
	for {
		err := unix.Sendto(c.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// request sends the one message that fill writes and waits for its answer.
// each, if not nil, gets the messages that come before the acknowledgement.
func (c *conn) request(fill func(*encoder), each func(header, []byte)) error {
	c.req.reset()
	fill(&c.req)
	c.req.orFlags(unix.NLM_F_ACK)
	c.seq++
	c.req.end(c.seq)
	if err := c.send(c.req.buf); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	for {
		b, err := c.receive()
		if err != nil {
			return err
		}
		done, result := false, error(nil)
		messages(b, func(h header, body []byte) {
			switch {
			case h.seq != c.seq:
			case h.typ == unix.NLMSG_ERROR:
				done, result = true, answer(h, body)
			case each != nil:
				each(h, body)
			}
		})
		if done {
			return result
		}
	}
}

// dump lists what the message that fill writes asks for. It is tried again from
// the start, after a call of reset, if the kernel says that the list changed
// under its hands; a dump that returns nil is complete.
func (c *conn) dump(ctx context.Context, fill func(*encoder), reset func(), each func(header, []byte)) error {
	var err error
	for range dumpTries {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		reset()
		err = c.dumpOnce(fill, each)
		if !errors.Is(err, errInterrupted) && !errors.Is(err, errTruncated) {
			return err
		}
	}
	return err
}

func (c *conn) dumpOnce(fill func(*encoder), each func(header, []byte)) error {
	c.req.reset()
	fill(&c.req)
	c.req.orFlags(unix.NLM_F_DUMP)
	c.seq++
	c.req.end(c.seq)
	if err := c.send(c.req.buf); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	// Whatever happens, the dump is read to its end: the kernel refuses the next
	// one until then.
	var failed error
	for {
		b, err := c.receive()
		if errors.Is(err, errTruncated) {
			failed = err
			continue
		}
		if err != nil {
			return err
		}
		done := false
		whole := messages(b, func(h header, body []byte) {
			if h.seq != c.seq || done {
				return
			}
			if h.flags&unix.NLM_F_DUMP_INTR != 0 && failed == nil {
				failed = errInterrupted
			}
			switch h.typ {
			case unix.NLMSG_DONE, unix.NLMSG_ERROR:
				done = true
				if err := answer(h, body); err != nil {
					failed = err
				}
			default:
				each(h, body)
			}
		})
		if !whole && failed == nil {
			failed = errTruncated
		}
		if done {
			return failed
		}
	}
}

// answer reads an NLMSG_ERROR or NLMSG_DONE: nil, or the error number with the
// kernel's own explanation where it gives one (NLMSGERR_ATTR_MSG).
func answer(h header, body []byte) error {
	if len(body) < 4 {
		return nil // NLMSG_DONE of an old kernel
	}
	code := int32(native.Uint32(body))
	if code >= 0 {
		return nil
	}
	errno := unix.Errno(-code)
	if h.flags&unix.NLM_F_ACK_TLVS == 0 {
		return errno
	}
	fixed := 4
	if h.typ == unix.NLMSG_ERROR {
		fixed += headerLen
		if h.flags&unix.NLM_F_CAPPED == 0 && len(body) >= 8 { // the whole request precedes
			fixed = 4 + align(int(native.Uint32(body[4:])))
		}
	}
	for typ, v := range attrs(body, fixed) {
		if typ == unix.NLMSGERR_ATTR_MSG {
			return fmt.Errorf("%w: %s", errno, stringOf(v))
		}
	}
	return errno
}
