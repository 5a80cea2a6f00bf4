package daemon

import (
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

// lockName is an abstract unix socket: it exists once per network namespace, and
// the kernel releases it however the process ends.
const lockName = "@twilld.lock"

// lockNamespace makes this process the only twilld of its network namespace.
func lockNamespace() (net.Listener, error) {
	l, err := net.Listen("unix", lockName)
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, fmt.Errorf("another twilld runs on this node (pid %s); two would undo each other's work: stop it first", lockHolder())
	}
	if err != nil {
		return nil, fmt.Errorf("take the lock %s: %w", lockName, err)
	}
	return l, nil
}

// lockHolder asks the kernel who listens on the lock.
func lockHolder() string {
	c, err := net.Dial("unix", lockName)
	if err != nil {
		return "unknown"
	}
	defer c.Close()
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return "unknown"
	}
	pid := "unknown"
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = fmt.Sprint(cred.Pid)
		}
	})
	return pid
}
