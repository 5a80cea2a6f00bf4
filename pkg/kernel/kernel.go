// Package kernel is the only writer of a node's network state. It reads what is
// Twill's (Observe), makes planned changes (Apply), and tells when somebody
// else changed something (Watch). It knows no policy: what should be there is
// decided in package overlay.
package kernel

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

// Options configure a Kernel.
type Options struct {
	Log *slog.Logger
}

// Kernel reads and writes the network state of one network namespace: the one
// of the thread that called Open. Its methods may be called from any goroutine,
// with one exception: a sysctl belongs to the namespace of the thread that opens
// its file, a program runs in that of the thread that starts it, and a WireGuard
// in user space is found by its socket in the file system, so Observe and Apply
// must be called by a thread in the namespaces of Open.
type Kernel struct {
	log      *slog.Logger
	firewall *firewall
	nexthops bool
	events   *monitor

	wireguard *wireguard
	// scope is that of the last Observe: Watch looks for the same things.
	scope atomic.Pointer[Scope]

	mu   sync.Mutex // held during Observe, Apply and Interfaces
	conn *conn
}

// Scope says what Observe and Watch look at besides what is ours.
type Scope struct {
	Networks []netip.Prefix        // routes of others that overlap these are Foreign
	Places   map[netip.Prefix]bool // and those to exactly these
	Sysctls  []string              // files below /proc/sys
	Uplink   string                // Watch rings when this link or an address on it changes
}

// Failure is an operation that Apply could not do.
type Failure struct {
	Op  overlay.Op
	Err error
}

func (f Failure) Error() string { return fmt.Sprintf("%s: %v", f.Op, f.Err) }

// Unwrap returns the cause.
func (f Failure) Unwrap() error { return f.Err }

// Open opens the sockets of a Kernel in the calling thread's network namespace.
func Open(opts Options) (*Kernel, error) {
	k := &Kernel{log: opts.Log}
	k.scope.Store(&Scope{})
	var err error
	if k.conn, err = openConn(unix.NETLINK_ROUTE); err != nil {
		return nil, err
	}
	if k.events, err = openMonitor(); err != nil {
		return nil, errors.Join(err, k.conn.close())
	}
	if k.firewall, err = newFirewall(opts); err != nil {
		return nil, errors.Join(err, k.events.close(), k.conn.close())
	}
	k.wireguard = openWireGuard()
	k.nexthops = k.conn.hasNexthops()
	return k, nil
}

// Close closes the sockets. A Watch that is running returns.
func (k *Kernel) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return errors.Join(k.wireguard.close(), k.firewall.close(), k.events.close(), k.conn.close())
}

// HasNexthops reports whether the kernel has nexthop objects (Linux 5.3).
func (k *Kernel) HasNexthops() bool { return k.nexthops }

// HasWireGuard reports whether the kernel has WireGuard (Linux 5.6). If that is a
// module, it has been loaded by now.
func (k *Kernel) HasWireGuard() bool { return k.wireguard.inKernel }

// hasNexthops asks for an object that cannot exist: a kernel that knows the
// question says ENOENT or EINVAL.
func (c *conn) hasNexthops() bool {
	err := c.request(func(e *encoder) {
		e.begin(unix.RTM_GETNEXTHOP, 0, unix.SizeofNhmsg)
		e.u32(unix.NHA_ID, ^uint32(0))
	}, nil)
	return !errors.Is(err, unix.EOPNOTSUPP)
}
