package nettest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrInUse means that the owner of the lab is alive.
var ErrInUse = errors.New("lab is in use")

// Info describes a lab of any process.
type Info struct {
	ID         string
	PID        int // of the owner
	Alive      bool
	Kept       bool
	Created    time.Time
	Namespaces []string // "h1", "h1-p1", …
	Env        []string // of all programs in the lab, see Lab.Setenv
}

// List returns all labs on this machine, the oldest first.
func List() ([]Info, error) {
	ids, err := labIDs()
	if err != nil {
		return nil, fmt.Errorf("list labs: %w", err)
	}
	var infos []Info
	for _, id := range ids {
		o, err := readOwner(filepath.Join(baseDir, id))
		if err != nil {
			return nil, fmt.Errorf("list labs: %w", err)
		}
		i := Info{ID: id, PID: o.PID, Alive: o.alive(), Kept: o.Kept, Created: o.Created, Env: o.Env}
		for _, p := range netnsPaths(id) {
			i.Namespaces = append(i.Namespaces, strings.TrimPrefix(filepath.Base(p), prefix(id)))
		}
		infos = append(infos, i)
	}
	slices.SortFunc(infos, func(a, b Info) int { return a.Created.Compare(b.Created) })
	return infos, nil
}

// NS returns a namespace of the lab by its short name, "h1" or "h1-p1", to run
// commands in.
func (i Info) NS(name string) (*NS, error) {
	if !slices.Contains(i.Namespaces, name) {
		return nil, fmt.Errorf("find namespace %q in lab %s: it has %s", name, i.ID, strings.Join(i.Namespaces, ", "))
	}
	n := &NS{Name: name, Path: netnsPath(i.ID, name), env: func() []string { return i.Env }}
	// A pod, "h1-p1", sees the files of its host.
	host, _, _ := strings.Cut(name, "-")
	if m := mntPath(i.ID, host); exists(m) {
		n.mnt = m
	}
	return n, nil
}

// Sweep removes the labs whose owner is dead, except kept ones.
func Sweep() error {
	unlock, err := lockBase()
	if err != nil {
		return fmt.Errorf("sweep labs: %w", err)
	}
	defer unlock()
	return sweep()
}

func sweep() error {
	entries, err := os.ReadDir(baseDir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		dir := filepath.Join(baseDir, e.Name())
		o, err := readOwner(dir)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		switch {
		case o.alive() || o.Kept && o.thisBoot():
		case idPattern.MatchString(e.Name()):
			errs = append(errs, teardown(e.Name()))
		case strings.HasPrefix(e.Name(), binPrefix):
			errs = append(errs, os.RemoveAll(dir))
		}
	}
	errs = append(errs, sweepFiles())
	return errors.Join(errs...)
}

// sweepFiles removes names of namespaces that a reboot left, where /run is on a
// disk: files on which nothing is mounted, of labs that are gone.
func sweepFiles() error {
	names, _ := filepath.Glob(filepath.Join(netnsDir, "tw*-*")) // the pattern is well formed
	var errs []error
	for _, p := range names {
		id, _, _ := strings.Cut(filepath.Base(p)[len("tw"):], "-")
		if !idPattern.MatchString(id) || exists(filepath.Join(baseDir, id)) {
			continue
		}
		var fs unix.Statfs_t
		if err := unix.Statfs(p, &fs); err == nil && fs.Type != unix.NSFS_MAGIC {
			errs = append(errs, os.Remove(p))
		}
	}
	return errors.Join(errs...)
}

// Down removes the lab with this id. Its owner must have ended, or it is ErrInUse.
func Down(id string) error {
	unlock, err := lockBase()
	if err != nil {
		return fmt.Errorf("remove lab %s: %w", id, err)
	}
	defer unlock()
	ids, err := labIDs()
	if err == nil && !slices.Contains(ids, id) {
		err = fs.ErrNotExist
	}
	var o owner
	if err == nil {
		o, err = readOwner(filepath.Join(baseDir, id))
	}
	if err == nil && o.alive() {
		err = fmt.Errorf("pid %d: %w", o.PID, ErrInUse)
	}
	if err == nil {
		err = teardown(id)
	}
	if err != nil {
		return fmt.Errorf("remove lab %s: %w", id, err)
	}
	return nil
}

var idPattern = regexp.MustCompile(`^[0-9a-f]{6}$`)

func labIDs() ([]string, error) {
	entries, err := os.ReadDir(baseDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var ids []string
	for _, e := range entries {
		if idPattern.MatchString(e.Name()) {
			ids = append(ids, e.Name())
		}
	}
	return ids, nil
}

// teardown removes what a lab consists of, all found by its id. Removing what is
// gone already succeeds, so that an interrupted teardown can be repeated.
func teardown(id string) error {
	netns := netnsPaths(id)
	mnts, _ := filepath.Glob(mntPath(id, "*")) // the pattern is well formed
	errs := []error{killInside(append(slices.Clone(netns), mnts...)), removeCgroups(id)}
	// Host mount namespaces first: each holds mounts of all network namespaces.
	for _, p := range append(mnts, netns...) {
		errs = append(errs, unmountFile(p))
	}
	errs = append(errs, os.RemoveAll(diskDir(id)), os.RemoveAll(filepath.Join(baseDir, id)))
	return errors.Join(errs...)
}

func unmountFile(path string) error {
	// EINVAL: not mounted; killed between making the file and the mount, or the
	// file outlived a reboot.
	err := unix.Unmount(path, unix.MNT_DETACH)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// killInside ends all processes that run in one of the namespaces: no record of
// processes is as complete as the kernel's.
func killInside(paths []string) error {
	inside := map[nsID]bool{}
	for _, p := range paths {
		if id, err := statNS(p); err == nil {
			inside[id] = true
		}
	}
	if len(inside) == 0 {
		return nil
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		pids := pidsInside(inside)
		if len(pids) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("kill processes %v: still there", pids)
		}
		for _, pid := range pids {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("kill process %d: %w", pid, err)
			}
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// nsID identifies a namespace by its inode on the kernel's nsfs.
type nsID struct{ dev, ino uint64 }

func statNS(path string) (nsID, error) {
	var s unix.Stat_t
	if err := unix.Stat(path, &s); err != nil {
		return nsID{}, err
	}
	return nsID{s.Dev, s.Ino}, nil
}

func pidsInside(inside map[nsID]bool) []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		for _, kind := range []string{"net", "mnt"} {
			// An error: the process has ended.
			id, err := statNS(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
			if err == nil && inside[id] {
				pids = append(pids, pid)
				break
			}
		}
	}
	return pids
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
