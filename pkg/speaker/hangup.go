package speaker

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

// hangUp ends the TCP connections of all sessions at once, as the kernel does when a
// process ends: to the neighbours it is the beginning of a graceful restart. gobgp
// hands out no connection, so they are found among the descriptors of the process.
func hangUp(b *overlay.BGP) error {
	ports := map[netip.Addr]uint16{}
	for _, n := range b.Neighbors {
		ports[n.Address] = n.Port
	}
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("list descriptors: %w", err)
	}
	var fds []int
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		far, ok := endpoint(unix.Getpeername(fd))
		near, _ := endpoint(unix.Getsockname(fd))
		if port, is := ports[far.Addr()]; ok && is && (far.Port() == port || near.Port() == b.Port) {
			fds = append(fds, fd)
		}
	}
	var errs []error
	for _, fd := range fds {
		if err := unix.Shutdown(fd, unix.SHUT_RDWR); err != nil && !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, unix.EBADF) {
			errs = append(errs, fmt.Errorf("shut down connection: %w", err))
		}
	}
	return errors.Join(errs...)
}

// endpoint is an address of a TCP or UDP socket; of no other descriptor.
func endpoint(sa unix.Sockaddr, err error) (netip.AddrPort, bool) {
	if err != nil {
		return netip.AddrPort{}, false
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)), true
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port)), true
	}
	return netip.AddrPort{}, false
}
