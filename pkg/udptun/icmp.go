package udptun

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Messages of RFC 792 and 4443.
const (
	minIPv6 = 1280

	unreachable4, netUnreachable, fragmentNeeded = 3, 0, 4
	exceeded4                                    = 11
	unreachable6, noRoute                        = 1, 0
	tooBig6                                      = 2
	exceeded6                                    = 3
)

// icmp tells senders why their packets do not arrive. The messages leave by raw
// sockets, so the kernel gives them the source address that its own would have: a
// packet with one of our addresses that came in by the device would be a martian.
type icmp struct {
	fds [2]int // IPv4, IPv6; -1: the kernel has none

	mu     sync.Mutex
	tokens int
	last   time.Time
}

// Rate of all messages together, as the kernel's own limit once was.
const (
	icmpPerSecond = 1000
	icmpBurst     = 50
)

func newICMP() (*icmp, error) {
	c := &icmp{fds: [2]int{-1, -1}}
	var err error
	if c.fds[0], err = rawSocket(unix.AF_INET, unix.IPPROTO_ICMP); err != nil {
		return nil, err
	}
	if c.fds[1], err = rawSocket(unix.AF_INET6, unix.IPPROTO_ICMPV6); err != nil {
		c.fds[1] = -1 // IPv6 is off
	}
	return c, nil
}

// rawSocket only sends: its filter blocks every type.
func rawSocket(domain, proto int) (int, error) {
	fd, err := unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if err != nil {
		return -1, fmt.Errorf("open raw socket for ICMP errors: %w: needs CAP_NET_RAW", err)
	}
	if domain == unix.AF_INET {
		const solRaw, icmpFilter = 255, 1
		err = unix.SetsockoptInt(fd, solRaw, icmpFilter, -1)
	} else {
		var all unix.ICMPv6Filter
		for i := range all.Data {
			all.Data[i] = 0xffffffff
		}
		err = unix.SetsockoptICMPv6Filter(fd, unix.IPPROTO_ICMPV6, unix.ICMPV6_FILTER, &all)
	}
	if err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("setsockopt", err)
	}
	return fd, nil
}

func (c *icmp) close() {
	for _, fd := range c.fds {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

func (c *icmp) unreachable(p packet) {
	c.send(p, [2]byte{unreachable4, netUnreachable}, [2]byte{unreachable6, noRoute}, 0)
}

func (c *icmp) exceeded(p packet) {
	c.send(p, [2]byte{exceeded4, 0}, [2]byte{exceeded6, 0}, 0)
}

func (c *icmp) tooBig(p packet, mtu int) {
	c.send(p, [2]byte{unreachable4, fragmentNeeded}, [2]byte{tooBig6, 0}, uint32(mtu))
}

// send answers the packet with a message of the type and code of its family.
func (c *icmp) send(p packet, v4, v6 [2]byte, arg uint32) {
	i, kind, room := 0, v4, 576-ipv4Len-udpLen // RFC 1812: as much as 576 bytes hold
	if p.isV6() {
		i, kind, room = 1, v6, minIPv6-ipv6Len-udpLen
	}
	if c.fds[i] < 0 || !answerable(p) || !c.allow() {
		return
	}
	var buf [minIPv6]byte
	buf[0], buf[1] = kind[0], kind[1]
	binary.BigEndian.PutUint32(buf[4:], arg)
	n := 8 + copy(buf[8:8+room], p)
	if i == 0 {
		putSum(buf[2:], sum(0, buf[:n])) // of ICMPv6 the kernel computes it
	}
	// A sender that cannot be reached cannot be told.
	_ = unix.Sendto(c.fds[i], buf[:n], unix.MSG_DONTWAIT, sockaddr(netip.AddrPortFrom(p.src(), 0)))
}

// answerable reports whether RFC 1122, 3.2.2 and RFC 4443, 2.4 allow an error
// about the packet.
func answerable(p packet) bool {
	src, dst := p.src(), p.dst()
	if src.IsUnspecified() || src.IsMulticast() || src.IsLoopback() || dst.IsMulticast() {
		return false
	}
	if p.isV6() {
		const firstInformational = 128
		return p[6] != protoICMPv6 || len(p) > ipv6Len && p[ipv6Len] >= firstInformational
	}
	const offset = 0x1fff
	if src == netip.AddrFrom4([4]byte{255, 255, 255, 255}) || binary.BigEndian.Uint16(p[6:])&offset != 0 {
		return false
	}
	if p[9] != protoICMP {
		return true
	}
	header := int(p[0]&15) * 4
	if len(p) <= header {
		return false
	}
	switch p[header] {
	case unreachable4, exceeded4, 4, 5, 12: // source quench, redirect, parameter problem
		return false
	}
	return true
}

// allow takes a token.
func (c *icmp) allow() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	// More than a second would overflow the product, and fills the bucket anyway.
	if fresh := int(min(now.Sub(c.last), time.Second) * icmpPerSecond / time.Second); fresh > 0 {
		c.tokens, c.last = min(c.tokens+fresh, icmpBurst), now
	}
	if c.tokens <= 0 {
		return false
	}
	c.tokens--
	return true
}

// paths asks the kernel for the MTU of the path to a peer.
type paths struct {
	mu  sync.Mutex
	fds [2]int // connected to the peer that was asked for last
}

func newPaths() (*paths, error) {
	p := &paths{fds: [2]int{-1, -1}}
	var err error
	if p.fds[0], err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if p.fds[1], err = unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		p.fds[1] = -1 // IPv6 is off
	}
	return p, nil
}

func (p *paths) close() {
	for _, fd := range p.fds {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// mtu returns 0 if there is no path.
func (p *paths) mtu(to *dest) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	fd, level, name := p.fds[0], unix.IPPROTO_IP, unix.IP_MTU
	if to.v6() {
		fd, level, name = p.fds[1], unix.IPPROTO_IPV6, unix.IPV6_MTU
	}
	if fd < 0 || unix.Connect(fd, sockaddr(to.addr)) != nil {
		return 0
	}
	mtu, err := unix.GetsockoptInt(fd, level, name)
	if err != nil {
		return 0
	}
	return mtu
}
