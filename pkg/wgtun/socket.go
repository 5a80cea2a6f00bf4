package wgtun

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// socketDir is where wg(8) and wgctrl look for devices in user space.
const socketDir = "/var/run/wireguard"

// socket is where clients read and set the configuration.
type socket struct {
	path     string
	listener *net.UnixListener
	events   *os.File // inotify of path
}

// listen makes the socket in a directory that nobody else can enter, and moves it
// to its place when it is ready. One that a killed process left is replaced. (The
// ipc package would set the umask of the whole daemon meanwhile.)
func listen(name string) (*socket, error) {
	s := &socket{path: filepath.Join(socketDir, name+".sock")}
	if c, err := net.Dial("unix", s.path); err == nil {
		c.Close()
		return nil, fmt.Errorf("listen on %s: another process answers there: end it", s.path)
	}
	if err := os.MkdirAll(socketDir, 0o755); err != nil {
		return nil, fmt.Errorf("make directory of the WireGuard sockets: %w; it must be writable", err)
	}
	dir, err := os.MkdirTemp(socketDir, "."+name+".")
	if err != nil {
		return nil, fmt.Errorf("make WireGuard socket: %w; %s must be writable", err, socketDir)
	}
	defer os.RemoveAll(dir)
	made := filepath.Join(dir, "sock")
	s.listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: made, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("make WireGuard socket: %w", err)
	}
	s.listener.SetUnlinkOnClose(false) // it knows the first name alone
	err = os.Chmod(made, 0o600)
	if err == nil {
		s.events, err = watch(made)
	}
	if err == nil {
		err = os.Rename(made, s.path)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make WireGuard socket: %w", err), s.close())
	}
	return s, nil
}

// watch reports changes of the file itself, wherever it is moved.
func watch(path string) (*os.File, error) {
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make inotify: %w", err)
	}
	// A socket that is open keeps its inode: its removal is a change of the number
	// of its names.
	if _, err := unix.InotifyAddWatch(fd, path, unix.IN_ATTRIB|unix.IN_DELETE_SELF); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("watch %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), "inotify"), nil
}

// waitRemoved returns when the socket was removed, or closed.
func (s *socket) waitRemoved() {
	buf := make([]byte, 4096)
	for {
		if _, err := s.events.Read(buf); err != nil {
			return
		}
		if _, err := os.Lstat(s.path); errors.Is(err, os.ErrNotExist) {
			return
		}
	}
}

func (s *socket) close() error {
	err := s.listener.Close()
	if s.events != nil {
		err = errors.Join(err, s.events.Close())
	}
	if gone := os.Remove(s.path); gone != nil && !errors.Is(gone, os.ErrNotExist) {
		err = errors.Join(err, gone)
	}
	return err
}
