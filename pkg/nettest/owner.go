package nettest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// baseDir is a private tmpfs: bind mounts of mount namespaces (see newMountNS)
// must not propagate, and etcd's data in memory needs no fsync.
const baseDir = "/run/twill-lab"

// owner is the process that made a directory in baseDir. A pid alone may be
// another process's by now: the start time and the boot tell them apart.
type owner struct {
	PID     int       `json:"pid"`
	Start   string    `json:"start"` // /proc/<pid>/stat field 22, clock ticks since boot
	Boot    string    `json:"boot"`
	Created time.Time `json:"created"`
	Kept    bool      `json:"kept,omitempty"`
	Env     []string  `json:"env,omitempty"`
}

func self() (owner, error) {
	o := owner{PID: os.Getpid(), Created: time.Now()}
	var err error
	if o.Start, err = startTime(o.PID); err != nil {
		return o, err
	}
	o.Boot, err = bootID()
	return o, err
}

func (o owner) alive() bool {
	start, err := startTime(o.PID)
	return err == nil && start == o.Start && o.thisBoot()
}

func (o owner) thisBoot() bool {
	boot, err := bootID()
	return err == nil && boot == o.Boot
}

// write is atomic: a reader sees the old owner or the new one.
func (o owner) write(dir string) error {
	b, err := json.Marshal(o)
	if err != nil {
		return err
	}
	tmp := filepath.Join(dir, ".owner.json")
	if err := os.WriteFile(tmp, b, 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(dir, "owner.json"))
}

// readOwner returns the zero owner, which is dead, for a directory without one:
// it was left by a process killed while making it.
func readOwner(dir string) (owner, error) {
	var o owner
	b, err := os.ReadFile(filepath.Join(dir, "owner.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return o, nil
	}
	if err != nil {
		return o, err
	}
	if err := json.Unmarshal(b, &o); err != nil {
		return o, fmt.Errorf("read %s/owner.json: %w", dir, err)
	}
	return o, nil
}

func startTime(pid int) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}
	// The command name, field 2, is in parentheses and may contain anything.
	s := string(b)
	fields := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
	const stateField, startField = 3, 22
	if len(fields) <= startField-stateField {
		return "", fmt.Errorf("read /proc/%d/stat: %d fields", pid, len(fields))
	}
	if fields[0] == "Z" { // ended, not yet waited for
		return "", fmt.Errorf("read /proc/%d/stat: process has ended", pid)
	}
	return fields[startField-stateField], nil
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// lockBase makes baseDir and the directory of named namespaces if need be and
// locks both against other processes that make or remove labs.
func lockBase() (unlock func(), err error) {
	f, err := os.OpenFile(baseDir+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := flock(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if err := errors.Join(mountBase(), shareNetnsDir()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() { f.Close() }, nil
}

func flock(f *os.File) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("flock", err)
		}
	}
}

func mountBase() error {
	if err := os.MkdirAll(baseDir, 0o755); err != nil {
		return err
	}
	mounted, err := isMountPoint(baseDir)
	if err != nil || mounted {
		return err
	}
	if err := unix.Mount("twill-lab", baseDir, "tmpfs", unix.MS_NOSUID, "mode=0755"); err != nil {
		return fmt.Errorf("mount tmpfs on %s: %w", baseDir, err)
	}
	if err := unix.Mount("", baseDir, "", unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make %s private: %w", baseDir, err)
	}
	return nil
}

func isMountPoint(dir string) (bool, error) {
	var d, parent unix.Stat_t
	if err := unix.Stat(dir, &d); err != nil {
		return false, fmt.Errorf("stat %s: %w", dir, err)
	}
	if err := unix.Stat(filepath.Dir(dir), &parent); err != nil {
		return false, fmt.Errorf("stat %s: %w", filepath.Dir(dir), err)
	}
	return d.Dev != parent.Dev, nil
}
