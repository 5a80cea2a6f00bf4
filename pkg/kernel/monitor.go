package kernel

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

// monitor is the socket on which the kernel tells of changes.
type monitor struct {
	file *os.File

	mu sync.Mutex
	// echoes counts the notifications that are still to come of our own changes:
	// only of the kinds that do not say which socket asked for them. nil while
	// nobody listens.
	echoes map[echo]int
}

// echo is what a notification of our own change will look like.
type echo struct {
	typ    uint16 // 0: none is expected
	family uint8
	index  uint32
	addr   netip.Addr
	mac    overlay.MAC
}

// addrEcho is that of an IPv6 address; those of IPv4 name the socket.
func addrEcho(verb overlay.Verb, p netip.Prefix, index uint32) echo {
	if p.Addr().Is4() {
		return echo{}
	}
	e := echo{typ: unix.RTM_NEWADDR, index: index, addr: p.Addr()}
	if verb == overlay.Delete {
		e.typ = unix.RTM_DELADDR
	}
	return e
}

// neighborEcho is that of a forwarding entry, or of the deletion of an ARP or NDP
// entry; new ones name the socket.
func neighborEcho(verb overlay.Verb, n neighbor) echo {
	e := echo{typ: unix.RTM_NEWNEIGH, family: n.family, index: n.index, addr: n.dst}
	if n.family == unix.AF_BRIDGE {
		e.mac = n.mac
	}
	switch {
	case verb == overlay.Delete:
		e.typ = unix.RTM_DELNEIGH
	case n.family != unix.AF_BRIDGE:
		return echo{}
	}
	return e
}

func groups() []int {
	return []int{
		unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE,
		unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_NEIGH, unix.RTNLGRP_NEXTHOP,
		unix.RTNLGRP_IPV4_NETCONF, unix.RTNLGRP_IPV6_NETCONF,
	}
}

// openMonitor opens the socket; it hears nothing before start.
func openMonitor() (*monitor, error) {
	fd, _, err := openSocket(unix.NETLINK_ROUTE, unix.SOCK_NONBLOCK, watchBuffer)
	if err != nil {
		return nil, err
	}
	return &monitor{file: os.NewFile(uintptr(fd), "rtnetlink")}, nil
}

func (m *monitor) close() error { return m.file.Close() }

func (m *monitor) start() error {
	m.forget()
	if err := m.file.SetReadDeadline(time.Time{}); err != nil {
		return fmt.Errorf("watch network: %w", err)
	}
	for _, group := range groups() {
		// A kernel without nexthop objects has no such group, and no such events.
		if err := m.member(unix.NETLINK_ADD_MEMBERSHIP, group); err != nil && group != unix.RTNLGRP_NEXTHOP {
			return fmt.Errorf("watch network: join group %d: %w", group, err)
		}
	}
	return nil
}

// stop leaves the groups, so that nothing fills the socket while nobody reads.
func (m *monitor) stop() {
	for _, group := range groups() {
		_ = m.member(unix.NETLINK_DROP_MEMBERSHIP, group) // fails if the socket is closed
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.echoes = nil
}

func (m *monitor) member(option, group int) error {
	raw, err := m.file.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_NETLINK, option, group) })
	if err != nil {
		return err
	}
	return failed
}

// read hands over what the kernel tells until ctx ends or the socket breaks. If
// events came faster than they were read, and some are gone, lost is true.
func (m *monitor) read(ctx context.Context, each func(b []byte, lost bool) error) error {
	defer context.AfterFunc(ctx, func() { _ = m.file.SetReadDeadline(time.Unix(1, 0)) })()
	raw, err := m.file.SyscallConn()
	if err != nil {
		return err
	}
	buf := make([]byte, readSize)
	for {
		var n int
		var from unix.Sockaddr
		var failed error
		err := raw.Read(func(fd uintptr) bool {
			n, from, failed = unix.Recvfrom(int(fd), buf, 0)
			return failed != unix.EAGAIN
		})
		switch {
		case err != nil:
			return err
		case failed == unix.EINTR:
			continue
		case failed == unix.ENOBUFS:
			if err := each(nil, true); err != nil {
				return err
			}
			continue
		case failed != nil:
			return failed
		}
		if sa, ok := from.(*unix.SockaddrNetlink); !ok || sa.Pid != 0 {
			continue
		}
		if err := each(buf[:n], false); err != nil {
			return err
		}
	}
}

// forget drops all expectations.
func (m *monitor) forget() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.echoes = map[echo]int{}
}

// expect announces the notifications of changes that are about to be made.
func (m *monitor) expect(changes []change) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.echoes == nil {
		return
	}
	for _, c := range changes {
		if c.echo.typ != 0 {
			m.echoes[c.echo]++
		}
	}
}

// take reports whether e was expected, and expects it once less.
func (m *monitor) take(e echo) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.echoes[e]
	if n > 1 {
		m.echoes[e] = n - 1
	} else {
		delete(m.echoes, e)
	}
	return n > 0
}
