package cniinstall

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// covered are the plugins of flannel's configuration whose work Twill's does.
var covered = []string{"flannel", "portmap", "bandwidth"}

// moveAside plans that flannel's configurations go out of the runtime's sight, after
// ours is in place: at each instant the first one is either flannel's or ours.
func (j *job) moveAside() ([]Step, error) {
	all, err := networks(j.ConfDir)
	if err != nil {
		return nil, err
	}
	var steps []Step
	for _, n := range all {
		if n.file == j.ConfName || !n.uses("flannel") {
			continue
		}
		path := filepath.Join(j.ConfDir, n.file)
		for _, t := range n.types {
			if !slices.Contains(covered, t) {
				j.warn("plugin %s of %s has no part in %s: add it there if pods need it", t, path, j.ConfName)
			}
		}
		steps = append(steps, Step{What: "conflist", Path: path, Result: "moved", Detail: "to " + backupOf(path), do: func() error { return rename(path, backupOf(path)) }})
	}
	return steps, nil
}

// moveBack plans the way back, and returns the configurations that it brings: they
// come before ours goes. One that is there again already is newer.
func (j *job) moveBack(all []network) (steps []Step, back []network) {
	backups, _ := filepath.Glob(filepath.Join(j.ConfDir, ".*.before-twill")) // the one error is a bad pattern
	for _, backup := range backups {
		file := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(backup), "."), ".before-twill")
		path := filepath.Join(j.ConfDir, file)
		if backupOf(path) != backup || filepath.Ext(file) != ".conf" && filepath.Ext(file) != ".conflist" {
			continue // a plugin's, where both share one directory
		}
		s := Step{What: "conflist", Path: path, Result: "restored", Detail: "from " + backup, do: func() error { return rename(backup, path) }}
		if slices.ContainsFunc(all, func(n network) bool { return n.file == file }) {
			s.Result, s.Detail, s.do = "kept", "it is there again", func() error { return remove(backup) }
		} else if content, err := os.ReadFile(backup); err == nil {
			back = append(back, parseNetwork(file, content))
		}
		steps = append(steps, s)
	}
	return steps, back
}

func rename(from, to string) error {
	err := os.Rename(from, to)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // somebody else removed it
	}
	if err == nil {
		err = syncDir(filepath.Dir(to))
	}
	if err != nil {
		return explain(fmt.Sprintf("move %s to %s", from, to), err)
	}
	return nil
}
