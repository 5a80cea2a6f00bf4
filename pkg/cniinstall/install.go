// Package cniinstall puts the CNI plugin and its network configuration on a node,
// and takes them away again. At each instant, and after a kill or a loss of power
// at each instant, a runtime finds the old or the new, whole, and never a
// configuration without its plugin. A second run changes nothing.
package cniinstall

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Options say what goes where.
type Options struct {
	BinDir   string // of the runtime's plugins
	ConfDir  string // of the runtime's network configurations
	Plugin   string // the plugin to install
	ConfName string // of the configuration, in ConfDir
	Mode     string // "bridged" or "routed"; empty: as the configuration there says

	AsFlannel      bool // put the plugin in the place of flannel's, too
	ReplaceFlannel bool // put the configuration in the place of flannel's, which is moved aside
	SkipConf       bool // the configuration is the operator's
	KeepPlugin     bool // Uninstall leaves the plugin, which pods that are left need
	Force          bool // go back to an older release, drop what others wrote
}

// Step is one thing that was looked at, and what became of it.
type Step struct {
	What   string `json:"what"` // directory, binary or conflist
	Path   string `json:"path"`
	Result string `json:"result"` // created, installed, replaced, unchanged, kept, removed, moved, restored or absent
	Detail string `json:"detail,omitempty"`

	do func() error // nil: nothing is to be done
}

// Report is what was done, in this order, and what the operator should see to.
type Report struct {
	Steps    []Step   `json:"steps"`
	Warnings []string `json:"warnings,omitempty"`
}

func (r *Report) warn(format string, a ...any) {
	r.Warnings = append(r.Warnings, fmt.Sprintf(format, a...))
}

// job is one run.
type job struct {
	Options
	Report
	ctx     context.Context
	content []byte // of the plugin to install
	release string
	locks   []*os.File
	flannel bool // the plugin called flannel is ours, too
}

// Install puts the plugin, and then its configuration, in place. First it looks at
// everything; if it must not go on, nothing is changed.
func Install(ctx context.Context, o Options) (Report, error) {
	j := &job{Options: o, ctx: ctx}
	defer j.close()
	err := j.source()
	if err == nil {
		err = j.directories()
	}
	var steps []Step
	if err == nil {
		steps, err = j.plan()
	}
	if err == nil {
		err = j.run(steps)
	}
	if err == nil && !j.SkipConf {
		err = j.lookBack()
	}
	return j.Report, err
}

func (j *job) close() {
	for _, f := range j.locks {
		f.Close()
	}
}

// source reads the plugin to install.
func (j *job) source() error {
	var err error
	if j.content, err = os.ReadFile(j.Plugin); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read the plugin to install: %w: name it with --plugin", err)
	}
	if err != nil {
		return explain("read the plugin to install", err)
	}
	if j.release, err = ask(j.ctx, j.Plugin); err != nil {
		return fmt.Errorf("--plugin %s: %w: name a twill binary that runs on this machine", j.Plugin, err)
	}
	return nil
}

// directories makes and locks the two.
func (j *job) directories() error {
	for _, path := range j.dirs() {
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			s := Step{What: "directory", Path: path, Result: "created", do: func() error { return makeDir(path) }}
			if err := j.run([]Step{s}); err != nil {
				return err
			}
		}
		d, err := openDir(j.ctx, path)
		if err != nil {
			return err
		}
		j.locks = append(j.locks, d)
	}
	return nil
}

// dirs are the two directories, or the one.
func (j *job) dirs() []string {
	return slices.Compact([]string{filepath.Clean(j.BinDir), filepath.Clean(j.ConfDir)})
}

// plan looks at everything. A runtime that sees the configuration must find the
// plugin, so that comes first.
func (j *job) plan() ([]Step, error) {
	names := []string{"twill"}
	have, err := j.look(filepath.Join(j.BinDir, "flannel"))
	if err != nil {
		return nil, err
	}
	// Where it once was put it is kept up to date.
	if j.flannel = j.AsFlannel || have.ours(); j.flannel {
		names = append(names, "flannel")
	}
	var steps []Step
	for _, name := range names {
		s, err := j.binary(name)
		if err != nil {
			return nil, err
		}
		steps = append(steps, s)
	}
	if j.SkipConf {
		return steps, nil
	}
	s, err := j.conflist()
	if err != nil || !j.ReplaceFlannel {
		return append(steps, s), err
	}
	aside, err := j.moveAside()
	return append(append(steps, s), aside...), err
}

// run takes the steps in order, and stops at the first that fails.
func (j *job) run(steps []Step) error {
	for _, s := range steps {
		if s.do != nil {
			if err := s.do(); err != nil {
				return err
			}
		}
		j.Steps = append(j.Steps, s)
	}
	return nil
}

// binary plans what becomes of the plugin of this name.
func (j *job) binary(name string) (Step, error) {
	path := filepath.Join(j.BinDir, name)
	s := Step{What: "binary", Path: path, Result: "replaced", do: func() error { return replace(path, j.content, 0o755, j.runs) }}
	have, err := j.look(path)
	if err != nil {
		return s, err
	}
	switch {
	case have.absent:
		s.Result, s.Detail = "installed", j.release
	case slices.Equal(have.content, j.content) && have.mode == 0o755:
		s.Result, s.Detail, s.do = "unchanged", j.release, nil
	case have.foreign != nil && name == "twill" && !j.Force:
		return s, fmt.Errorf("%s: %w: see what put it there; --force keeps it as %s and takes its place", path, have.foreign, backupOf(path))
	case have.foreign != nil:
		s.Detail = fmt.Sprintf("%s; what was there %v, and is kept as %s", j.release, have.foreign, backupOf(path))
		s.do = func() error {
			if err := replace(backupOf(path), have.content, have.mode, nil); err != nil {
				return err
			}
			return replace(path, j.content, 0o755, j.runs)
		}
	case newer(have.release, j.release) && !j.Force:
		return s, fmt.Errorf("%s: release %s is there, which is newer than %s of %s: take the newer one, or go back with --force", path, have.release, j.release, j.Plugin)
	case have.release == j.release:
		s.Detail = j.release + ", another build or another mode"
	default:
		s.Detail = have.release + " → " + j.release
	}
	return s, nil
}

// runs refuses to put a plugin in place that a runtime could not start.
func (j *job) runs(temp string) error {
	if _, err := ask(j.ctx, temp); err != nil {
		return fmt.Errorf("the plugin does not run in that directory: %w: see whether it is mounted noexec", err)
	}
	return nil
}

// backupOf is where a plugin that is not ours stays while ours has its name.
func backupOf(path string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".before-twill")
}

// file is a plugin that is there.
type file struct {
	absent  bool
	content []byte
	mode    fs.FileMode
	release string
	foreign error // why it is not Twill's
}

func (f file) ours() bool { return !f.absent && f.foreign == nil }

func (j *job) look(path string) (file, error) {
	var f file
	var err error
	if f.content, err = os.ReadFile(path); errors.Is(err, fs.ErrNotExist) {
		return file{absent: true}, nil
	}
	var info fs.FileInfo
	if err == nil {
		info, err = os.Stat(path)
	}
	if err != nil {
		return f, explain("read what is there", err)
	}
	f.mode = info.Mode().Perm()
	if len(j.content) > 0 && slices.Equal(f.content, j.content) {
		f.release = j.release // whatever its mode
		return f, nil
	}
	f.release, err = ask(j.ctx, path)
	if foreign := (*foreignError)(nil); errors.As(err, &foreign) {
		f.foreign, err = foreign, nil
	}
	return f, err
}

// conflist plans what becomes of the configuration.
func (j *job) conflist() (Step, error) {
	path := filepath.Join(j.ConfDir, j.ConfName)
	s := Step{What: "conflist", Path: path, Result: "replaced"}
	all, err := networks(j.ConfDir)
	if err != nil {
		return s, err
	}
	name, mode := choose(all, j.ConfName, j.Mode)
	want, err := render(name, mode)
	if err != nil {
		return s, err
	}
	s.Detail = fmt.Sprintf("network %s, %s", name, mode)
	s.do = func() error { return replace(path, want, 0o644, nil) }
	i := slices.IndexFunc(all, func(n network) bool { return n.file == j.ConfName })
	switch {
	case i < 0:
		s.Result = "installed"
	case slices.Equal(all[i].content, want):
		s.Result, s.do = "unchanged", nil
	case !untouched(all[i].content) && !j.Force:
		s.Result, s.Detail, s.do = "kept", "it is not as Twill wrote it", nil
		j.warn("%s was edited, or not written by Twill, and stays; --force writes it anew", path)
	}
	return s, nil
}

// lookBack warns of configurations that a runtime takes before ours: containerd and
// CRI-O use the first only.
func (j *job) lookBack() error {
	all, err := networks(j.ConfDir)
	if err != nil {
		return err
	}
	for _, n := range all {
		path := filepath.Join(j.ConfDir, n.file)
		switch {
		case n.file == j.ConfName && n.err != nil:
			j.warn("%s is not a configuration (%v): --force writes it anew", path, n.err)
		case n.file == j.ConfName && !n.uses("twill"):
			j.warn("%s does not use the plugin twill: --force writes it anew", path)
		case n.file >= j.ConfName:
		case n.err != nil:
			j.warn("%s comes before %s and is not a configuration (%v), so runtimes have no network: remove it", path, j.ConfName, n.err)
		case n.uses("flannel") && j.flannel:
			// It leads to Twill's plugin, by flannel's name.
		case n.uses("flannel"):
			j.warn("%s comes before %s, so pods get flannel's network: rename it (mv %s %s.off), or have twill do its work (--as-flannel)", path, j.ConfName, path, path)
		default:
			j.warn("%s comes before %s, so pods get the network of %s: rename it (mv %s %s.off), or give a name that comes first (--conf-name 00-twill.conflist)", path, j.ConfName, strings.Join(n.types, ", "), path, path)
		}
	}
	return nil
}
