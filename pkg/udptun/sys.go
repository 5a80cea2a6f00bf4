package udptun

import (
	"errors"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The data path asks the kernel without ever blocking (RawSyscall: no handshake
// with the Go scheduler) and sleeps in poll(2), in a thread of its own, not in the
// runtime's poller: a wake-up is one switch of threads.
//
// Descriptors stay in blocking mode and each call says that it does not wait: the
// mode belongs to the open file, which another process may hold, too.

// mmsghdr is struct mmsghdr of recvmmsg(2).
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
}

const rwfNoWait = 8 // RWF_NOWAIT of preadv2(2)

// tunRead reads one packet with its virtio header, or fails with EAGAIN.
func tunRead(fd int, b []byte) (int, unix.Errno) {
	iov := unix.Iovec{Base: &b[0]}
	iov.SetLen(len(b))
	n, _, e := unix.RawSyscall6(unix.SYS_PREADV2, uintptr(fd), uintptr(unsafe.Pointer(&iov)), 1, ^uintptr(0), ^uintptr(0), rwfNoWait)
	return int(n), e
}

// tunWrite writes one packet; it never waits.
func tunWrite(fd int, pieces []unix.Iovec) unix.Errno {
	_, _, e := unix.RawSyscall(unix.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(&pieces[0])), uintptr(len(pieces)))
	return e
}

func recvmmsg(fd int, m []mmsghdr) (int, unix.Errno) {
	n, _, e := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&m[0])), uintptr(len(m)), unix.MSG_DONTWAIT, 0, 0)
	return int(n), e
}

func sendmmsg(fd int, m []mmsghdr) (int, unix.Errno) {
	n, _, e := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&m[0])), uintptr(len(m)), unix.MSG_DONTWAIT, 0, 0)
	return int(n), e
}

// getsockopt reads an option that has no type of its own in x/sys.
func getsockopt(fd, level, name int, b []byte) (int, error) {
	n := uint32(len(b))
	_, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name),
		uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&n)), 0)
	if e != 0 {
		return 0, e
	}
	return int(n), nil
}

// stopper ends all threads of a tunnel that sleep or work.
type stopper struct {
	fd   int // an eventfd that every poll watches
	done atomic.Bool
}

func newStopper() (*stopper, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, err
	}
	return &stopper{fd: fd}, nil
}

func (s *stopper) stop() {
	s.done.Store(true)
	one := [8]byte{1, 1, 1, 1, 1, 1, 1, 1}
	_, _ = unix.Write(s.fd, one[:]) // cannot fail on a counter of zero; if it is not, all are awake
}

// wait sleeps until one of the descriptors is ready, of which the last is the
// stopper's own, and reports whether to go on.
func (s *stopper) wait(fds []unix.PollFd) bool {
	for !s.done.Load() {
		_, err := unix.Poll(fds, -1)
		if err == nil {
			return !s.done.Load()
		}
		if !errors.Is(err, unix.EINTR) {
			return false
		}
	}
	return false
}

func (s *stopper) pollFds(events int16, fds ...int) []unix.PollFd {
	var out []unix.PollFd
	for _, fd := range fds {
		out = append(out, unix.PollFd{Fd: int32(fd), Events: events})
	}
	return append(out, unix.PollFd{Fd: int32(s.fd), Events: unix.POLLIN})
}
