package nettest

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// onOwnThread runs fn on a thread that ends with it, so that fn may leave it in
// whatever namespace it likes.
func onOwnThread(fn func() error) error {
	errs := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // not unlocked: the thread ends with the goroutine
		if unix.Gettid() == unix.Getpid() {
			// The main thread never ends, and /proc/self is its. Hold it, so
			// that fn gets another.
			errs <- onOwnThread(fn)
			runtime.UnlockOSThread()
			return
		}
		errs <- fn()
	}()
	return <-errs
}

// newNetNS makes a network namespace with loopback up and mounts it at path.
func newNetNS(path string) error {
	return onOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		const loopback = 1 // the first interface of every namespace
		if err := netlink.LinkSetUp(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: loopback}}); err != nil {
			return fmt.Errorf("set loopback up: %w", err)
		}
		return bindNS("net", unix.Gettid(), path)
	})
}

// newMountNS makes a mount namespace for the host in netns and mounts it at
// path: without a process to hold it, a host costs nothing while idle.
func newMountNS(path, netns, lockFile string) error {
	return onOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		// Slave: namespaces mounted later in /run/netns are seen inside, and
		// nothing mounted inside is seen outside.
		if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("make / slave: %w", err)
		}
		if err := setns(netns); err != nil {
			return err
		}
		if err := errors.Join(mountOwnDirs(), mountSys(), bindLock(lockFile)); err != nil {
			return err
		}
		// A mount namespace cannot be mounted in itself: another goroutine is
		// on a thread that is still outside.
		tid, errs := unix.Gettid(), make(chan error)
		go func() { errs <- bindNS("mnt", tid, path) }()
		return <-errs
	})
}

// mountOwnDirs gives a host its own empty copy of the directories in which the
// programs of a node keep their state.
func mountOwnDirs() error {
	for _, dir := range []string{
		"/run/flannel", "/run/twill", "/var/lib/cni", "/etc/cni", "/opt/cni", "/run/containerd",
		"/run/wireguard", "/run/bird", "/etc/bird", "/run/frr", "/etc/frr",
	} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		var st unix.Stat_t // routers run as users of their own
		if err := unix.Stat(dir, &st); err != nil {
			return err
		}
		if err := unix.Mount("twill-lab", dir, "tmpfs", unix.MS_NOSUID, fmt.Sprintf("mode=0755,uid=%d,gid=%d", st.Uid, st.Gid)); err != nil {
			return fmt.Errorf("mount tmpfs on %s: %w", dir, err)
		}
	}
	return nil
}

// mountSys makes /sys/class/net show this thread's network namespace, and keeps
// the control groups that are mounted below.
func mountSys() error {
	cgroup, err := unix.OpenTree(unix.AT_FDCWD, "/sys/fs/cgroup",
		unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return fmt.Errorf("clone /sys/fs/cgroup: %w", err)
	}
	defer unix.Close(cgroup)
	if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		return fmt.Errorf("mount sysfs: %w", err)
	}
	if err := unix.MoveMount(cgroup, "", unix.AT_FDCWD, "/sys/fs/cgroup", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("move /sys/fs/cgroup: %w", err)
	}
	return nil
}

// bindLock gives a host its own lock for legacy iptables: hosts do not share one.
func bindLock(lockFile string) error {
	const xtables = "/run/xtables.lock"
	for _, f := range []string{lockFile, xtables} {
		if err := touch(f); err != nil {
			return err
		}
	}
	if err := unix.Mount(lockFile, xtables, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount %s: %w", xtables, err)
	}
	return nil
}

func bindNS(kind string, tid int, path string) error {
	// Exclusive: a name that is taken is an error, not a mount on top of another.
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/%s", tid, kind), path, "", unix.MS_BIND, ""); err != nil {
		return errors.Join(fmt.Errorf("mount %s: %w", path, err), os.Remove(path))
	}
	return nil
}

func touch(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

// shareNetnsDir makes /run/netns the way ip(8) does: its own shared mount, so that
// what is mounted there later also appears in other mount namespaces.
func shareNetnsDir() error {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return err
	}
	err := unix.Mount("", netnsDir, "", unix.MS_SHARED|unix.MS_REC, "")
	if !errors.Is(err, unix.EINVAL) {
		return os.NewSyscallError("share "+netnsDir, err)
	}
	if err := unix.Mount(netnsDir, netnsDir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("mount %s on itself: %w", netnsDir, err)
	}
	if err := unix.Mount("", netnsDir, "", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("share %s: %w", netnsDir, err)
	}
	return nil
}
