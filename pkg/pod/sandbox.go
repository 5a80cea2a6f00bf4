package pod

import (
	"errors"
	"fmt"
	"io/fs"
	"runtime"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// sandbox is the network namespace of a pod. The process stays in the host's
// namespace; the socket here was opened in the pod's and belongs there for good.
type sandbox struct {
	path string
	ns   netns.NsHandle
	nl   *netlink.Handle
}

// openSandbox opens the namespace at path. The caller closes it.
func openSandbox(path string) (*sandbox, error) {
	ns, err := netns.GetFromPath(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fail(types.ErrUnknownContainer, "CNI_NETNS %s does not exist: the container is gone; let the runtime make a new sandbox", path)
	}
	if err != nil {
		return nil, fail(types.ErrInvalidNetNS, "CNI_NETNS %s: %v: must be the path of a network namespace", path, err)
	}
	s := &sandbox{path: path, ns: ns}
	if err := s.open(); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *sandbox) open() error {
	own, err := netns.GetFromPath("/proc/thread-self/ns/net")
	if err != nil {
		return ioFail("open the host's network namespace", err)
	}
	defer own.Close()
	if own.Equal(s.ns) {
		return fail(types.ErrInvalidNetNS, "CNI_NETNS %s is the host's own network namespace: a pod on the host's network needs no plugin", s.path)
	}
	err = s.enter(func() (err error) {
		s.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if errors.Is(err, unix.EINVAL) {
		return fail(types.ErrInvalidNetNS, "CNI_NETNS %s is not a network namespace: must be the path of one", s.path)
	}
	if err != nil {
		return ioFail("enter network namespace "+s.path, err)
	}
	return nil
}

// enter runs f on a thread inside the namespace.
func (s *sandbox) enter(f func() error) error {
	runtime.LockOSThread()
	own, err := netns.GetFromPath("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer own.Close()
	if err := netns.Set(s.ns); err != nil {
		runtime.UnlockOSThread()
		return err
	}
	err = f()
	if back := netns.Set(own); back != nil {
		// The thread stays locked, and is never used for the host again.
		return errors.Join(err, fmt.Errorf("return to the host's network namespace: %w", back))
	}
	runtime.UnlockOSThread()
	return err
}

// place is the pod's namespace for one end of its veth.
func (s *sandbox) place() place { return place{nl: s.nl, in: s.enter} }

// identity is what tells this namespace from a later one at the same path.
func (s *sandbox) identity() Namespace {
	var st unix.Stat_t
	if err := unix.Fstat(int(s.ns), &st); err != nil {
		return Namespace{Path: s.path}
	}
	return Namespace{Path: s.path, Device: st.Dev, Inode: st.Ino}
}

func (s *sandbox) close() {
	if s.nl != nil {
		s.nl.Close()
	}
	s.ns.Close()
}
