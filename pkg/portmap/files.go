package portmap

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

// Files in the directory. An entry's file is named <attachment>.json.
const (
	lockFile  = "lock"
	toolFile  = "firewall" // which tool wrote the rules; absent when there are none
	entryFile = ".json"
	tempFile  = ".tmp" // of a writer that was killed, if nobody holds the lock
)

// files is the directory while its lock is held.
type files struct {
	path string
	lock *os.File
	// entries are those whose pods may run, dead those whose links are gone or
	// whose files cannot be read: nothing can be done with them but delete them.
	entries, dead []Entry
	lost          bool         // a file cannot be read: nobody knows its rules
	tool          overlay.Tool // that wrote the rules; empty: there are none
}

// open waits until no other process works on the directory, and reads it.
func (d Dir) open() (*files, error) {
	if err := os.MkdirAll(d.path, 0o755); err != nil {
		return nil, fmt.Errorf("create directory of host ports: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(d.path, lockFile), os.O_RDONLY|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock of host ports: %w", err)
	}
	for {
		if err = syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != syscall.EINTR {
			break
		}
	}
	f := &files{path: d.path, lock: lock}
	if err == nil {
		err = f.read()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", lock.Name(), err), lock.Close())
	}
	return f, nil
}

// close gives the lock back, as the kernel does for a process that dies.
func (f *files) close() { f.lock.Close() }

func (f *files) read() error {
	names, err := os.ReadDir(f.path)
	if err != nil {
		return err
	}
	links, err := newLinks()
	if err != nil {
		return err
	}
	defer links.close()
	for _, n := range names {
		name := filepath.Join(f.path, n.Name())
		switch {
		case n.Name() == toolFile:
			b, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			f.tool = overlay.Tool(b)
		case strings.HasSuffix(n.Name(), tempFile):
			if err := os.Remove(name); err != nil {
				return err
			}
		case strings.HasSuffix(n.Name(), entryFile):
			e, err := readEntry(name)
			if err != nil {
				return err
			}
			bad := e.Validate() != nil || e.empty()
			f.lost = f.lost || bad
			if bad || !links.exists(e.HostLink) {
				f.dead = append(f.dead, e)
			} else {
				f.entries = append(f.entries, e)
			}
		}
	}
	return nil
}

// readEntry returns an entry that asks for nothing if the file makes no sense, as
// after a crash of the node: its pod did not survive that either.
func readEntry(name string) (Entry, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return Entry{}, err
	}
	var e Entry
	attachment := strings.TrimSuffix(filepath.Base(name), entryFile)
	if json.Unmarshal(b, &e) != nil || e.Attachment != attachment {
		return Entry{Attachment: attachment}, nil
	}
	return e, nil
}

// put writes an entry's file, as a whole or not at all.
func (f *files) put(e Entry) error {
	b, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("encode host ports: %w", err)
	}
	return f.write(e.Attachment+entryFile, b)
}

func (f *files) write(name string, b []byte) error {
	path := filepath.Join(f.path, name)
	err := os.WriteFile(path+tempFile, b, 0o600)
	if err == nil {
		err = os.Rename(path+tempFile, path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", path, err), f.remove(name+tempFile))
	}
	return nil
}

// remove deletes a file, if there is one.
func (f *files) remove(name string) error {
	if err := os.Remove(filepath.Join(f.path, name)); err != nil && !isAbsent(err) {
		return fmt.Errorf("delete record of host ports: %w", err)
	}
	return nil
}

func (f *files) drop(entries []Entry) error {
	var errs []error
	for _, e := range entries {
		errs = append(errs, f.remove(e.Attachment+entryFile))
	}
	return errors.Join(errs...)
}

// mark remembers which tool the rules are written with, before they are.
func (f *files) mark(tool overlay.Tool) error {
	if f.tool == tool {
		return nil
	}
	f.tool = tool
	if tool == "" {
		return f.remove(toolFile)
	}
	return f.write(toolFile, []byte(tool))
}

// isAbsent reports that there is no such file, or no directory that it could be in.
func isAbsent(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR)
}

// links asks the kernel which links there are, in the network namespace of the
// thread that called newLinks.
type links int

func newLinks() (links, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open socket: %w", err)
	}
	return links(fd), nil
}

func (l links) close() { unix.Close(int(l)) }

// exists is true when in doubt.
func (l links) exists(name string) bool {
	r, err := unix.NewIfreq(name)
	if name == "" || err != nil {
		return true
	}
	return !errors.Is(unix.IoctlIfreq(int(l), unix.SIOCGIFINDEX, r), unix.ENODEV)
}
