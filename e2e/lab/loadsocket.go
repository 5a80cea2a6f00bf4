package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// dead is after how many seconds without an answer a road is given up.
const dead = 10

// listen opens a socket at the road's end and returns its port.
func (r road) listen(kind int) (fd, port int, err error) {
	err = r.to.Do(func() error {
		if fd, err = unix.Socket(r.family(), kind|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err = unix.Bind(fd, r.sockaddr(0)); err == nil && kind == unix.SOCK_STREAM {
			err = unix.Listen(fd, 16)
		}
		if err == nil {
			err = giveUp(fd)
		}
		var own unix.Sockaddr
		if err == nil {
			own, err = unix.Getsockname(fd)
		}
		if err != nil {
			unix.Close(fd)
			return err
		}
		switch a := own.(type) {
		case *unix.SockaddrInet4:
			port = a.Port
		case *unix.SockaddrInet6:
			port = a.Port
		}
		return nil
	})
	if err != nil {
		return 0, 0, fmt.Errorf("listen on %s in %s: %w", r.addr, r.to.Name, err)
	}
	return fd, port, nil
}

// dial opens a socket at the road's beginning, connected to its end.
func (r road) dial(kind, port int) (fd int, err error) {
	err = r.from.Do(func() error {
		if fd, err = unix.Socket(r.family(), kind|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err = giveUp(fd); err == nil {
			err = unix.Connect(fd, r.sockaddr(port))
		}
		if err != nil {
			unix.Close(fd)
		}
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("connect %s to %s: %w", r.from.Name, r.addr, err)
	}
	return fd, nil
}

// giveUp has calls on a socket fail on a dead road, also connect and accept.
func giveUp(fd int) error {
	for _, option := range []int{unix.SO_SNDTIMEO, unix.SO_RCVTIMEO} {
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, option, &unix.Timeval{Sec: dead}); err != nil {
			return err
		}
	}
	return nil
}

// connection makes a TCP connection to the listener l.
func (r road) connection(l, port int) (out, in int, err error) {
	if out, err = r.dial(unix.SOCK_STREAM, port); err != nil {
		return 0, 0, err
	}
	if in, _, err = unix.Accept4(l, unix.SOCK_CLOEXEC); err != nil {
		unix.Close(out)
		return 0, 0, fmt.Errorf("accept from %s: %w", r.from.Name, err)
	}
	for _, fd := range []int{out, in} {
		if err == nil {
			err = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
		}
		if err == nil {
			err = giveUp(fd)
		}
	}
	if err != nil {
		unix.Close(out)
		unix.Close(in)
		return 0, 0, fmt.Errorf("prepare connection from %s: %w", r.from.Name, err)
	}
	return out, in, nil
}

// udp opens the sockets at the road's end and beginning.
func (r road) udp() (in, out int, err error) {
	in, port, err := r.listen(unix.SOCK_DGRAM)
	if err != nil {
		return 0, 0, err
	}
	if out, err = r.dial(unix.SOCK_DGRAM, port); err != nil {
		unix.Close(in)
		return 0, 0, err
	}
	return in, out, nil
}

func (r road) family() int {
	if r.addr.Is6() {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

func (r road) sockaddr(port int) unix.Sockaddr {
	if r.addr.Is6() {
		return &unix.SockaddrInet6{Addr: r.addr.As16(), Port: port}
	}
	return &unix.SockaddrInet4{Addr: r.addr.As4(), Port: port}
}
