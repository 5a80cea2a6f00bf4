package udptun

import (
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// Files returns duplicates of the device's queues and of the sockets, for the
// next Tunnel. As long as they are open and nobody reads them, the kernel queues
// packets: 500 in each queue of the device, 8 MiB in each socket. The caller
// closes them.
func (t *Tunnel) Files() ([]*os.File, error) {
	var files []*os.File
	add := func(fd int, name string) error {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("duplicate %s: %w", name, err)
		}
		files = append(files, os.NewFile(uintptr(dup), name))
		return nil
	}
	for i, tun := range t.tuns {
		err := add(tun, t.opts.Device)
		for _, e := range t.socks[i] {
			if err == nil {
				err = add(e.fd, "udp")
			}
		}
		if err != nil {
			for _, f := range files {
				f.Close()
			}
			return nil, err
		}
	}
	return files, nil
}

// handed are descriptors that were handed over.
type handed struct {
	tuns  []int
	socks []bound
}

type bound struct {
	fd int
	at netip.AddrPort
}

// adopt duplicates those files that are queues of the device or UDP sockets.
func adopt(files []*os.File, device string) (handed, error) {
	var h handed
	for _, f := range files {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return h, fmt.Errorf("duplicate %s: %w", f.Name(), err)
		}
		if at, ok := localAddr(fd); ok {
			h.socks = append(h.socks, bound{fd, at})
		} else if name, ok := tunName(fd); ok && name == device {
			h.tuns = append(h.tuns, fd)
		} else {
			unix.Close(fd)
		}
	}
	return h, nil
}

func (h *handed) tun() int {
	if len(h.tuns) == 0 {
		return -1
	}
	fd := h.tuns[0]
	h.tuns = h.tuns[1:]
	return fd
}

// socket returns one that is bound to the address, a new one if need be.
func (h *handed) socket(at netip.AddrPort) (endpoint, error) {
	for i, s := range h.socks {
		if s.at == at {
			h.socks = append(h.socks[:i:i], h.socks[i+1:]...)
			e := endpoint{fd: s.fd, v6: at.Addr().Is6()}
			if err := e.set(); err != nil {
				unix.Close(e.fd)
				return e, err
			}
			return e, nil
		}
	}
	return listen(at)
}

// close closes what was not used: another port, another address.
func (h *handed) close() {
	for _, fd := range h.tuns {
		unix.Close(fd)
	}
	for _, s := range h.socks {
		unix.Close(s.fd)
	}
}
