package nettest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// cgroupRoot is where the controllers are mounted: version 1, or a mix of both.
const cgroupRoot = "/sys/fs/cgroup"

// CgroupPath names the control group of a host's processes: /twill-lab-0a1b2c-h1.
// What is there is removed with the lab.
func (l *Lab) CgroupPath(host string) string { return "/twill-lab-" + l.ID + "-" + host }

// NewCgroup makes a control group below CgroupPath in every controller and returns
// the directories.
func (l *Lab) NewCgroup(host, child string) ([]string, error) {
	controllers, err := os.ReadDir(cgroupRoot)
	if err != nil {
		return nil, fmt.Errorf("make control group: %w", err)
	}
	var dirs []string
	for _, c := range controllers {
		if !c.IsDir() { // a link to a controller by another name
			continue
		}
		top := filepath.Join(cgroupRoot, c.Name())
		group := filepath.Join(top, l.CgroupPath(host))
		for _, dir := range []string{group, filepath.Join(group, child)} {
			err := os.Mkdir(dir, 0o755)
			if errors.Is(err, fs.ErrExist) {
				err = nil
			}
			if err == nil && c.Name() == "cpuset" {
				err = copyCPUs(top, dir)
			}
			if err != nil {
				return nil, fmt.Errorf("make control group %s: %w", dir, err)
			}
		}
		dirs = append(dirs, filepath.Join(group, child))
	}
	return dirs, nil
}

// copyCPUs: a new group has no processor, and no process may enter it.
func copyCPUs(top, dir string) error {
	for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
		b, err := os.ReadFile(filepath.Join(top, f))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, f), b, 0o644)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// removeCgroups removes the groups of a lab. A group is busy until the kernel has
// done away with its last process.
func removeCgroups(id string) error {
	groups, _ := filepath.Glob(filepath.Join(cgroupRoot, "*", "twill-lab-"+id+"-*")) // the pattern is well formed
	deadline := time.Now().Add(30 * time.Second)
	for _, g := range groups {
		for {
			err := removeCgroup(g)
			if err == nil {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("remove control group %s: %w", g, err)
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	return nil
}

// removeCgroup removes directories from the leaves up; what is in them is the
// kernel's.
func removeCgroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeCgroup(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
