package nettest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// CaptureOptions say what to capture. The zero value is all on eth0.
type CaptureOptions struct {
	Iface     string           // empty is eth0
	VXLANPort uint16           // 0 is 4789
	Keep      func(Frame) bool // nil keeps every frame
}

// Capture collects the frames that an interface sends and receives.
type Capture struct {
	opts CaptureOptions
	file *os.File
	done chan struct{}

	stop    sync.Once
	stopErr error

	mu     sync.Mutex
	frames []Frame
	more   chan struct{} // closed and replaced with every new frame
}

// Capture begins to collect. The lab stops it at its end at the latest.
func (n *NS) Capture(opts CaptureOptions) (*Capture, error) {
	if opts.Iface == "" {
		opts.Iface = "eth0"
	}
	if opts.VXLANPort == 0 {
		opts.VXLANPort = 4789
	}
	c := &Capture{opts: opts, done: make(chan struct{}), more: make(chan struct{})}
	if err := n.Do(c.open); err != nil {
		return nil, fmt.Errorf("capture on %s in %s: %w", opts.Iface, n.Name, err)
	}
	go c.read()
	n.lab.onClose(func() error {
		_, err := c.Stop()
		return err
	})
	return c, nil
}

func (c *Capture) open() error {
	iface, err := net.InterfaceByName(c.opts.Iface)
	if err != nil {
		return err
	}
	// Without a protocol it captures nothing until it is bound to the interface.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	const buffer = 128 << 20 // bytes: a burst of thousands of frames, 64 KiB each
	err = os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, buffer))
	if err == nil {
		const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // in network byte order
		err = os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: iface.Index}))
	}
	if err != nil {
		return errors.Join(err, unix.Close(fd))
	}
	c.file = os.NewFile(uintptr(fd), "capture")
	return nil
}

// read ends when the socket is closed.
func (c *Capture) read() {
	defer close(c.done)
	raw, err := c.file.SyscallConn()
	if err != nil {
		return
	}
	d := decoder{vxlanPort: c.opts.VXLANPort}
	buf := make([]byte, 512) // the headers, outer and inner, are enough
	for {
		var n int
		var from unix.Sockaddr
		var got error
		err := raw.Read(func(fd uintptr) bool {
			n, from, got = unix.Recvfrom(int(fd), buf, 0)
			return !errors.Is(got, unix.EAGAIN)
		})
		if err != nil {
			return
		}
		// ENETDOWN: the interface went down; the socket goes on when it is up.
		if ll, ok := from.(*unix.SockaddrLinklayer); ok && got == nil {
			c.add(d, buf[:n], ll)
		}
	}
}

func (c *Capture) add(d decoder, b []byte, from *unix.SockaddrLinklayer) {
	f := d.bare
	if from.Hatype == unix.ARPHRD_ETHER || from.Hatype == unix.ARPHRD_LOOPBACK {
		f = d.ethernet
	}
	frame := f(b)
	frame.Time = time.Now()
	frame.Out = from.Pkttype == unix.PACKET_OUTGOING
	if c.opts.Keep != nil && !c.opts.Keep(*frame) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.frames = append(c.frames, *frame)
	close(c.more)
	c.more = make(chan struct{})
}

// Frames returns what has been collected up to now.
func (c *Capture) Frames() []Frame {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.frames)
}

// Wait returns the first collected frame that matches, as soon as there is one.
func (c *Capture) Wait(ctx context.Context, match func(Frame) bool) (Frame, error) {
	seen := 0
	for {
		c.mu.Lock()
		frames, more := c.frames, c.more
		c.mu.Unlock()
		if i := slices.IndexFunc(frames[seen:], match); i >= 0 {
			return frames[seen+i], nil
		}
		seen = len(frames)
		select {
		case <-more:
		case <-ctx.Done():
			return Frame{}, fmt.Errorf("wait for frame on %s: none of %d matches: %w", c.opts.Iface, seen, ctx.Err())
		}
	}
}

// Stop ends the capture and returns all frames. It is an error if the kernel had
// to drop some, as then what is not there may have been. A second call is the
// same as the first.
func (c *Capture) Stop() ([]Frame, error) {
	c.stop.Do(func() { c.stopErr = c.close() })
	return c.Frames(), c.stopErr
}

func (c *Capture) close() error {
	var stats *unix.TpacketStats
	var statsErr error
	raw, err := c.file.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			stats, statsErr = unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS)
		})
	}
	err = errors.Join(err, statsErr, c.file.Close())
	<-c.done
	if err == nil && stats.Drops > 0 {
		err = fmt.Errorf("kernel dropped %d frames", stats.Drops)
	}
	if err != nil {
		return fmt.Errorf("stop capture on %s: %w", c.opts.Iface, err)
	}
	return nil
}
