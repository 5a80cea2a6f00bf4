package cniinstall

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Uninstall removes the configuration, then the plugin, under both names, and puts
// back what was there before. It removes what is Twill's and nothing else; a plugin
// that a configuration still needs stays, unless Force. Plugin and Mode are not used.
func Uninstall(ctx context.Context, o Options) (Report, error) {
	j := &job{Options: o, ctx: ctx}
	defer j.close()
	for _, path := range j.dirs() {
		d, err := openDir(ctx, path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return j.Report, err
		}
		j.locks = append(j.locks, d)
	}
	all, err := networks(j.ConfDir)
	if err != nil {
		return j.Report, err
	}
	back, returned := j.moveBack(all)
	conf, stays := j.withdraw(append(all, returned...))
	steps := append(back, conf)
	var refused []error
	names := []string{"twill", "flannel"}
	if j.KeepPlugin {
		names = names[1:]
	}
	for _, name := range names {
		found, err := j.withdrawBinary(name, stays)
		refused = append(refused, err)
		steps = append(steps, found...)
	}
	return j.Report, errors.Join(append([]error{j.run(steps)}, refused...)...)
}

// withdraw plans what becomes of our configuration, and returns those that stay.
func (j *job) withdraw(all []network) (Step, []network) {
	path := filepath.Join(j.ConfDir, j.ConfName)
	s := Step{What: "conflist", Path: path, Result: "absent"}
	var stays []network
	for _, n := range all {
		switch {
		case n.file != j.ConfName:
			stays = append(stays, n)
		case untouched(n.content) || j.Force:
			s.Result, s.do = "removed", func() error { return remove(path) }
		default:
			stays = append(stays, n)
			s.Result, s.Detail = "kept", "it is not as Twill wrote it"
			j.warn("%s was edited, or not written by Twill, and stays; --force removes it", path)
		}
	}
	return s, stays
}

// withdrawBinary plans what becomes of the plugin of this name: no step for
// flannel's if we have nothing to do with it.
func (j *job) withdrawBinary(name string, stays []network) ([]Step, error) {
	path := filepath.Join(j.BinDir, name)
	backup := backupOf(path)
	_, err := os.Lstat(backup)
	backedUp := err == nil
	s := Step{What: "binary", Path: path}
	have, err := j.look(path)
	if err != nil {
		return nil, err
	}
	switch {
	case backedUp && (have.absent || have.ours()):
		s.Result, s.Detail = "restored", "from "+backup
		s.do = func() error {
			if err := os.Rename(backup, path); err != nil {
				return explain("restore "+path, err)
			}
			return syncDir(filepath.Dir(path))
		}
	case have.absent && name == "twill":
		s.Result = "absent"
	case have.absent, have.foreign != nil && name == "flannel" && !backedUp:
		return nil, nil
	case have.foreign != nil:
		s.Result, s.Detail = "kept", have.foreign.Error()
		if backedUp {
			s.Detail += "; what was there before Twill is " + backup
		}
	default:
		for _, n := range stays {
			if n.uses(name) && !j.Force {
				s.Result, s.Detail = "kept", have.release
				return []Step{s}, fmt.Errorf("%s stays, for %s uses it and every pod would fail: remove that file first, or give --force", path, filepath.Join(j.ConfDir, n.file))
			}
		}
		s.Result, s.Detail = "removed", have.release
		s.do = func() error { return remove(path) }
	}
	return []Step{s}, nil
}
