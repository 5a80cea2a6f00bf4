package nettest

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
)

// NewNamedHost makes a host with a name of its own and the addresses
// 198.51.100.<n> and 2001:db8:51::<n>. Those of NewHost begin with 11.
func (l *Lab) NewNamedHost(name string, n int) (*Host, error) {
	if !namePattern.MatchString(name) {
		return nil, fmt.Errorf("make host %q: name must match %s", name, namePattern)
	}
	if n < 2 || n > 254 {
		return nil, fmt.Errorf("make host %s: 198.51.100.%d is no address of a host: it must be 2 to 254", name, n)
	}
	return l.newHost(name, n)
}

// Reboot does to the host what a power cut and a new start do: every process in
// its namespaces ends, and what the kernel held of links, addresses, routes and
// rules is gone. So are the host's own directories, which are in memory.
func (h *Host) Reboot() error {
	err := killInside([]string{h.Path, h.mnt})
	if err == nil {
		err = h.unplug()
	}
	if err := errors.Join(err, unmountFile(h.mnt), unmountFile(h.Path)); err != nil {
		return fmt.Errorf("reboot host %s: %w", h.Name, err)
	}
	if err := h.boot(); err != nil {
		return fmt.Errorf("reboot host %s: %w", h.Name, err)
	}
	return nil
}

// unplug removes the cable: the kernel takes its time to do away with the namespace
// at its other end.
func (h *Host) unplug() error {
	sw, err := h.lab.netSwitch()
	if err != nil {
		return err
	}
	return sw.Do(func() error {
		port, err := netlink.LinkByName(h.Name)
		if err != nil {
			return fmt.Errorf("find port %s: %w", h.Name, err)
		}
		if err := netlink.LinkDel(port); err != nil {
			return fmt.Errorf("remove cable of %s: %w", h.Name, err)
		}
		return nil
	})
}
