//go:build linux && amd64

package faults

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// caller is a thread at the beginning of a call.
type caller struct {
	*thread
	main bool // of the program itself, not of a helper
}

// effect says what is seen of a call: a zero value if it is no step.
type effect struct {
	what    string
	changes bool
	late    bool // it tells how a change went
}

// call is how a system call is looked at.
type call struct {
	name   string
	err    syscall.Errno // what it may return on a machine in need
	effect func(c caller, a [6]uint64) effect
}

// calls lists the system calls that can be steps.
func calls(nr uint64) (call, bool) {
	c, ok := map[uint64]call{
		unix.SYS_SOCKET:     {"socket", unix.ENOBUFS, socket},
		unix.SYS_BIND:       {"bind", unix.ENOMEM, onNetlink},
		unix.SYS_CONNECT:    {"connect", unix.ECONNREFUSED, connect},
		unix.SYS_SENDTO:     {"sendto", unix.ENOBUFS, sendto},
		unix.SYS_SENDMSG:    {"sendmsg", unix.ENOBUFS, sendmsg},
		unix.SYS_RECVFROM:   {"recvfrom", unix.ENOBUFS, onNetlink},
		unix.SYS_RECVMSG:    {"recvmsg", unix.ENOBUFS, onNetlink},
		unix.SYS_SETSOCKOPT: {"setsockopt", unix.ENOMEM, setsockopt},
		unix.SYS_SETNS:      {"setns", unix.ENOMEM, always},

		unix.SYS_OPENAT:     {"openat", unix.ENFILE, openat},
		unix.SYS_READ:       {"read", unix.EIO, read},
		unix.SYS_PREAD64:    {"pread", unix.EIO, read},
		unix.SYS_GETDENTS64: {"getdents", unix.EIO, read},
		unix.SYS_NEWFSTATAT: {"stat", unix.EIO, stat},
		unix.SYS_WRITE:      {"write", unix.ENOSPC, write},
		unix.SYS_PWRITE64:   {"pwrite", unix.ENOSPC, write},
		unix.SYS_WRITEV:     {"writev", unix.ENOSPC, write},
		unix.SYS_FTRUNCATE:  {"ftruncate", unix.EIO, changesFile},
		unix.SYS_FSYNC:      {"fsync", unix.EIO, asksFile},
		unix.SYS_FDATASYNC:  {"fdatasync", unix.EIO, asksFile},
		unix.SYS_FLOCK:      {"flock", unix.ENOLCK, asksFile},

		unix.SYS_RENAME:    {"rename", unix.EIO, paths(0, 1)},
		unix.SYS_RENAMEAT:  {"rename", unix.EIO, pathsAt(0, 2)},
		unix.SYS_RENAMEAT2: {"rename", unix.EIO, pathsAt(0, 2)},
		unix.SYS_UNLINK:    {"unlink", unix.EIO, paths(0)},
		unix.SYS_UNLINKAT:  {"unlink", unix.EIO, pathsAt(0)},
		unix.SYS_RMDIR:     {"rmdir", unix.EIO, paths(0)},
		unix.SYS_MKDIR:     {"mkdir", unix.ENOSPC, paths(0)},
		unix.SYS_MKDIRAT:   {"mkdir", unix.ENOSPC, pathsAt(0)},
		unix.SYS_LINK:      {"link", unix.ENOSPC, paths(0, 1)},
		unix.SYS_LINKAT:    {"link", unix.ENOSPC, pathsAt(0, 2)},
		unix.SYS_SYMLINK:   {"symlink", unix.ENOSPC, paths(0, 1)},
		unix.SYS_SYMLINKAT: {"symlink", unix.ENOSPC, paths(0, 2)},
		unix.SYS_UTIMENSAT: {"utimensat", unix.EIO, pathsAt(0)},

		unix.SYS_FORK:   {"fork", unix.EAGAIN, forks},
		unix.SYS_VFORK:  {"vfork", unix.EAGAIN, forks},
		unix.SYS_CLONE:  {"clone", unix.EAGAIN, clone},
		unix.SYS_CLONE3: {"clone3", unix.EAGAIN, clone3},
		unix.SYS_EXECVE: {"execve", unix.ENOMEM, execve},
	}[nr]
	return c, ok
}

// step returns the call that the thread is about to make, if it is a step. Of what
// a helper does before it changes anything, only its start is one: a helper that
// fails there is like one that does not start.
func (th *thread) step(main bool) (Step, bool) {
	c, ok := calls(th.call.nr)
	if !ok {
		return Step{}, false
	}
	e := c.effect(caller{th, main}, th.call.args)
	if e.what == "" || !main && !e.changes && !e.late {
		return Step{}, false
	}
	return Step{Call: c.name + " " + e.what, Changes: e.changes, Err: c.err}, true
}

func always(caller, [6]uint64) effect { return effect{what: "network namespace"} }

func socket(_ caller, a [6]uint64) effect {
	switch a[0] {
	case unix.AF_NETLINK:
		return effect{what: "netlink " + protocol(a[2])}
	case unix.AF_UNIX:
		return effect{what: "unix"}
	}
	return effect{what: fmt.Sprintf("family %d", a[0])}
}

func connect(c caller, a [6]uint64) effect {
	b := c.memory(a[1], min(a[2], 128))
	if len(b) < 2 || binary.NativeEndian.Uint16(b) != unix.AF_UNIX {
		return effect{what: fmt.Sprintf("descriptor %d", a[0])}
	}
	name := strings.TrimRight(strings.Replace(string(b[2:]), "\x00", "@", 1), "\x00")
	if !strings.HasPrefix(name, "@") || name == "@" {
		name, _, _ = strings.Cut(string(b[2:]), "\x00")
	}
	return effect{what: "unix " + name}
}

// onNetlink is a call about a netlink socket that sends nothing.
func onNetlink(c caller, a [6]uint64) effect {
	proto, ok := c.proc.netlink[a[0]]
	if !ok {
		return effect{}
	}
	if q := c.proc.asked[a[0]]; q.what != "" && c.call.nr != unix.SYS_BIND {
		return effect{what: "answer to " + q.what, late: q.changes}
	}
	return effect{what: "netlink " + protocol(proto)}
}

func sendto(c caller, a [6]uint64) effect { return c.send(a[0], c.memory(a[1], a[2])) }

func sendmsg(c caller, a [6]uint64) effect {
	hdr := c.memory(a[1], 32) // struct msghdr: name, its length, vector, its length
	if len(hdr) < 32 {
		return effect{what: "?", changes: true}
	}
	vec := c.memory(binary.NativeEndian.Uint64(hdr[16:]), 16*binary.NativeEndian.Uint64(hdr[24:]))
	var data []byte
	for ; len(vec) >= 16; vec = vec[16:] {
		data = append(data, c.memory(binary.NativeEndian.Uint64(vec), binary.NativeEndian.Uint64(vec[8:]))...)
	}
	return c.send(a[0], data)
}

func (c caller) send(fd uint64, data []byte) effect {
	proto, ok := c.proc.netlink[fd]
	if !ok {
		return effect{what: fmt.Sprintf("%d bytes", len(data)), changes: true}
	}
	e := netlinkEffect(proto, data)
	c.proc.asked[fd] = e
	return e
}

// setsockopt is how legacy iptables hands a table to the kernel.
func setsockopt(_ caller, a [6]uint64) effect {
	const ipt, ip6t = unix.IPPROTO_IP, unix.IPPROTO_IPV6
	const replace = 64 // IPT_SO_SET_REPLACE, IP6T_SO_SET_REPLACE
	if (a[1] == ipt || a[1] == ip6t) && a[2] == replace {
		return effect{what: "replace table", changes: true}
	}
	return effect{}
}

func openat(c caller, a [6]uint64) effect {
	name := c.path(a[0], a[1])
	const creating = unix.O_CREAT | unix.O_TRUNC
	if isOwn(name) {
		return effect{}
	}
	for _, f := range []struct {
		bit  uint64
		name string
	}{{unix.O_CREAT, "O_CREAT"}, {unix.O_EXCL, "O_EXCL"}, {unix.O_TRUNC, "O_TRUNC"}} {
		if a[2]&f.bit != 0 {
			name += " " + f.name
		}
	}
	return effect{what: name, changes: a[2]&creating != 0}
}

// isOwn reports a file that Go's runtime or a loader reads for itself.
func isOwn(name string) bool {
	for _, p := range []string{"/proc/self/", "/sys/kernel/mm/", "/sys/fs/cgroup/", "/sys/devices/system/cpu", "/etc/ld.so.", "/lib/", "/usr/lib/", "/dev/null"} {
		if strings.HasPrefix(name, p) {
			return true
		}
	}
	return false
}

func read(c caller, a [6]uint64) effect {
	name := c.file(a[0])
	if a[0] <= 2 || !strings.HasPrefix(name, "/") || isOwn(strings.Replace(name, fmt.Sprintf("/proc/%d/", c.proc.pid), "/proc/self/", 1)) {
		return effect{}
	}
	return effect{what: name}
}

func stat(c caller, a [6]uint64) effect {
	if a[3]&unix.AT_EMPTY_PATH != 0 {
		return effect{}
	}
	return effect{what: c.path(a[0], a[1])}
}

func write(c caller, a [6]uint64) effect {
	name := c.file(a[0])
	switch {
	case isOwn(name):
		return effect{}
	case strings.HasPrefix(name, "/"), strings.HasPrefix(name, "socket:"):
	case c.main && a[0] == 1:
		name = "standard output"
	case c.main && a[0] > 2 && strings.HasPrefix(name, "pipe:"):
		name = "pipe to a helper"
	default:
		return effect{} // the runtime's eventfd
	}
	return effect{what: fmt.Sprintf("%s (%d)", name, a[2]), changes: true}
}

func asksFile(c caller, a [6]uint64) effect { return effect{what: c.file(a[0])} }

func changesFile(c caller, a [6]uint64) effect { return effect{what: c.file(a[0]), changes: true} }

// paths are the arguments that are names of files; pathsAt those that come with
// a descriptor of a directory before each.
func paths(args ...int) func(caller, [6]uint64) effect {
	return func(c caller, a [6]uint64) effect {
		var names []string
		for _, i := range args {
			names = append(names, c.text(a[i]))
		}
		return effect{what: strings.Join(names, " to "), changes: true}
	}
}

func pathsAt(args ...int) func(caller, [6]uint64) effect {
	return func(c caller, a [6]uint64) effect {
		var names []string
		for _, i := range args {
			names = append(names, c.path(a[i], a[i+1]))
		}
		return effect{what: strings.Join(names, " to "), changes: true}
	}
}

func forks(caller, [6]uint64) effect { return effect{what: "helper", changes: true} }

func clone(c caller, a [6]uint64) effect {
	if a[0]&unix.CLONE_THREAD != 0 {
		return effect{} // Go dies of its own accord without threads
	}
	return forks(c, a)
}

func clone3(c caller, a [6]uint64) effect {
	b := c.memory(a[0], 8) // struct clone_args: flags first
	if len(b) < 8 {
		return effect{}
	}
	return clone(c, [6]uint64{binary.NativeEndian.Uint64(b)})
}

func execve(c caller, a [6]uint64) effect {
	return effect{what: c.text(a[0]), changes: true}
}

// file names what a descriptor is: a path, "pipe:[1]", "socket:[1]".
func (th *thread) file(fd uint64) string {
	name, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", th.tid, int32(fd)))
	if err != nil {
		return ""
	}
	return name
}

// path reads a file's name that may be relative to a directory's descriptor.
func (th *thread) path(dir, addr uint64) string {
	name := th.text(addr)
	if name == "" || filepath.IsAbs(name) {
		return name
	}
	if int32(dir) != unix.AT_FDCWD {
		return filepath.Join(th.file(dir), name)
	}
	cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", th.tid))
	if err != nil {
		return name
	}
	return filepath.Join(cwd, name)
}

// text reads a string that ends with a zero byte.
func (th *thread) text(addr uint64) string {
	var out []byte
	for len(out) < unix.PathMax {
		// Up to the end of the page: the next one may not be there.
		part := th.memory(addr, pageSize-addr%pageSize)
		before, _, found := bytes.Cut(part, []byte{0})
		out = append(out, before...)
		if found || len(part) == 0 {
			break
		}
		addr += uint64(len(part))
	}
	return string(out)
}

const (
	pageSize  = 4096
	maxMemory = 1 << 20
)

// memory reads what the thread has there, or less.
func (th *thread) memory(addr, length uint64) []byte {
	if length == 0 || length > maxMemory {
		return nil
	}
	buf := make([]byte, length)
	local := []unix.Iovec{{Base: &buf[0], Len: length}}
	n, err := unix.ProcessVMReadv(th.tid, local, []unix.RemoteIovec{{Base: uintptr(addr), Len: int(length)}}, 0)
	if err != nil {
		return nil
	}
	return buf[:n]
}
