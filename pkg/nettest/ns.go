package nettest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// NS is a network namespace of a lab.
type NS struct {
	Name string // within the lab: "h1", "h1-p1"
	Path string // bind mount of the namespace: /run/netns/tw<id>-<Name>

	lab *Lab            // nil: of another process, see Info.NS
	mnt string          // bind mount of the mount namespace, or empty: the machine's
	env func() []string // added to the environment of commands
}

// MountNS is the path of the bind mount of the mount namespace, empty if commands
// see the machine's files.
func (n *NS) MountNS() string { return n.mnt }

// Do runs fn with the calling thread in the namespace. Sockets that fn opens and
// commands that it starts itself are inside; goroutines that it starts are not.
func (n *NS) Do(fn func() error) (err error) {
	runtime.LockOSThread()
	was, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter %s: %w", n.Name, err)
	}
	if err := setns(n.Path); err != nil {
		unix.Close(was)
		runtime.UnlockOSThread()
		return fmt.Errorf("enter %s: %w", n.Name, err)
	}
	defer func() {
		back := unix.Setns(was, unix.CLONE_NEWNET)
		unix.Close(was)
		if back != nil { // stays locked: the thread ends with its goroutine
			err = errors.Join(err, fmt.Errorf("leave %s: %w", n.Name, back))
			return
		}
		runtime.UnlockOSThread()
	}()
	return fn()
}

func setns(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("setns %s: %w", path, err)
	}
	return nil
}

// DialContext connects from within the namespace. The address is numeric: there
// is no resolver in a lab.
func (n *NS) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	var c net.Conn
	err := n.Do(func() (err error) {
		c, err = (&net.Dialer{}).DialContext(ctx, network, addr)
		return err
	})
	return c, err
}

// Command prepares a program to run inside, with root as its directory. It is the
// caller's to start. Unlike those of Run and Start, it survives a killed test
// until the next Sweep.
func (n *NS) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	enter := []string{"--net=" + n.Path}
	if n.mnt != "" {
		enter = append(enter, "--mount="+n.mnt)
	}
	enter = append(enter, "--", name)
	cmd := exec.CommandContext(ctx, "nsenter", append(enter, args...)...)
	cmd.Env = append(os.Environ(), n.env()...)
	return cmd
}

// Run runs a program inside to its end and returns its standard output. The error
// holds its standard error.
func (n *NS) Run(name string, args ...string) (string, error) {
	cmd := n.Command(context.Background(), name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err := n.lab.spawn.do(cmd.Start)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		text := strings.TrimSpace(stderr.String())
		return stdout.String(), fmt.Errorf("run %s %s in %s: %w: %s", name, strings.Join(args, " "), n.Name, err, text)
	}
	return stdout.String(), nil
}

// NewNS makes a bare namespace with loopback up, on no switch. The name is made
// of lower case letters and digits.
func (l *Lab) NewNS(name string) (*NS, error) {
	if !namePattern.MatchString(name) {
		return nil, fmt.Errorf("make namespace %q: name must match %s", name, namePattern)
	}
	return l.newNS(name)
}

var namePattern = regexp.MustCompile(`^[a-z][a-z0-9]{0,11}$`)

func (l *Lab) newNS(name string) (*NS, error) {
	n := &NS{Name: name, Path: netnsPath(l.ID, name), lab: l, env: l.environ}
	if err := newNetNS(n.Path); err != nil {
		return nil, fmt.Errorf("make namespace %s: %w", name, err)
	}
	return n, nil
}

func (l *Lab) environ() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.env
}

const netnsDir = "/run/netns"

func prefix(id string) string { return "tw" + id + "-" }

func netnsPath(id, name string) string { return filepath.Join(netnsDir, prefix(id)+name) }

func netnsPaths(id string) []string {
	paths, _ := filepath.Glob(netnsPath(id, "*")) // the pattern is well formed
	return paths
}

func mntPath(id, host string) string { return filepath.Join(baseDir, id, host+".mnt") }

func diskDir(id string) string { return "/var/tmp/twill-lab-" + id }
