package udptun

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Socket options that are not in x/sys, of linux/udp.h.
const (
	udpSegment = 103
	udpGRO     = 104
)

// buffers of a socket in bytes: at 10 Gbit/s, 4 ms of a peer that bursts.
const socketBuffer = 8 << 20

// endpoint is a UDP socket.
type endpoint struct {
	fd  int
	v6  bool
	gso bool // takes UDP_SEGMENT
}

// listen binds a socket to the address and the port. Several may do so.
func listen(local netip.AddrPort) (endpoint, error) {
	e := endpoint{v6: local.Addr().Is6()}
	domain := unix.AF_INET
	if e.v6 {
		domain = unix.AF_INET6
	}
	var err error
	if e.fd, err = unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return e, os.NewSyscallError("socket", err)
	}
	if err := e.set(); err != nil {
		unix.Close(e.fd)
		return e, err
	}
	err = unix.Bind(e.fd, sockaddr(local))
	if err == nil {
		return e, nil
	}
	unix.Close(e.fd)
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return e, fmt.Errorf("UDP port %d is in use by another program: flanneld still running? stop it or set Backend.Port (`ss -lunp sport = :%d` names it): %w", local.Port(), local.Port(), err)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return e, fmt.Errorf("no interface has the address: %w", err)
	case errors.Is(err, unix.EACCES):
		return e, fmt.Errorf("port %d needs CAP_NET_BIND_SERVICE: %w", local.Port(), err)
	}
	return e, os.NewSyscallError("bind", err)
}

// set makes the options what the data path expects, also those of a socket that
// was handed over.
func (e *endpoint) set() error {
	level, discover, do := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO
	if e.v6 {
		level, discover, do = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO
	}
	for _, o := range []struct{ level, name, value int }{
		{unix.SOL_SOCKET, unix.SO_REUSEPORT, 1},
		{level, discover, do},
		{unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1},
	} {
		if o.name == unix.IPV6_V6ONLY && (!e.v6 || e.bound()) {
			continue
		}
		if err := unix.SetsockoptInt(e.fd, o.level, o.name, o.value); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	for force, plain := range map[int]int{unix.SO_RCVBUFFORCE: unix.SO_RCVBUF, unix.SO_SNDBUFFORCE: unix.SO_SNDBUF} {
		if unix.SetsockoptInt(e.fd, unix.SOL_SOCKET, force, socketBuffer) != nil {
			// Without CAP_NET_ADMIN: what the administrator allows.
			_ = unix.SetsockoptInt(e.fd, unix.SOL_SOCKET, plain, socketBuffer)
		}
	}
	// Kernels before 4.18 and 5.0 have neither: one packet per datagram, then.
	e.gso = unix.SetsockoptInt(e.fd, unix.IPPROTO_UDP, udpSegment, 0) == nil
	_ = unix.SetsockoptInt(e.fd, unix.IPPROTO_UDP, udpGRO, 1)
	return nil
}

func (e *endpoint) bound() bool {
	local, ok := localAddr(e.fd)
	return ok && local.Port() != 0
}

// setFragment lets the outer packets of the socket be fragmented, or not again.
func (e *endpoint) setFragment(on bool) {
	level, discover, value := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO
	if e.v6 {
		level, discover = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER
	}
	if on {
		value = unix.IP_PMTUDISC_DONT // of the same value for IPv6
	}
	_ = unix.SetsockoptInt(e.fd, level, discover, value) // it was set before
}

// localAddr returns the address of a UDP socket.
func localAddr(fd int) (netip.AddrPort, bool) {
	if t, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); err != nil || t != unix.IPPROTO_UDP {
		return netip.AddrPort{}, false
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return netip.AddrPort{}, false
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)), true
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port)), true
	}
	return netip.AddrPort{}, false
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

// dest is where datagrams go, in the kernel's form.
type dest struct {
	addr netip.AddrPort
	raw  [unix.SizeofSockaddrInet6]byte
	len  uint32
}

func newDest(a netip.AddrPort) *dest {
	a = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
	d := &dest{addr: a, len: unix.SizeofSockaddrInet4}
	ip := a.Addr().AsSlice()
	family, at := uint16(unix.AF_INET), 4
	if len(ip) > 4 {
		family, at, d.len = unix.AF_INET6, 8, unix.SizeofSockaddrInet6
	}
	binary.NativeEndian.PutUint16(d.raw[:], family)
	binary.BigEndian.PutUint16(d.raw[2:], a.Port())
	copy(d.raw[at:], ip)
	return d
}

func (d *dest) v6() bool { return d.len == unix.SizeofSockaddrInet6 }

// segmentControl is the control message UDP_SEGMENT.
type segmentControl struct {
	_   [0]uint64 // aligned as the kernel wants it
	buf [32]byte
}

func (c *segmentControl) set(h *unix.Msghdr, size int) {
	cm := (*unix.Cmsghdr)(unsafe.Pointer(&c.buf[0]))
	cm.Level, cm.Type = unix.IPPROTO_UDP, udpSegment
	cm.SetLen(unix.CmsgLen(2))
	binary.NativeEndian.PutUint16(c.buf[unix.CmsgLen(0):], uint16(size))
	h.Control = &c.buf[0]
	h.SetControllen(unix.CmsgSpace(2))
}

// groSize finds the control message UDP_GRO: the length of each datagram in the
// buffer but the last. n if there is none.
func groSize(h *unix.Msghdr, control []byte, n int) int {
	if int(h.Controllen) < unix.CmsgLen(4) {
		return n
	}
	cm := (*unix.Cmsghdr)(unsafe.Pointer(&control[0]))
	if cm.Level != unix.IPPROTO_UDP || cm.Type != udpGRO {
		return n
	}
	if size := int(binary.NativeEndian.Uint32(control[unix.CmsgLen(0):])); size > 0 {
		return size
	}
	return n
}
