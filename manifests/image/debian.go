package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// debian is the unpacked packages of one architecture.
type debian struct {
	root     string // with all packages unpacked in it
	triplet  string // names the directory of the architecture's libraries
	packages []debianPackage
}

// debianPackage is a package that was unpacked.
type debianPackage struct {
	name, version string
	control       string          // its stanza, for what looks for known holes in images
	files         map[string]bool // that came with it
}

// triplets are the architectures that an image can be made for, in Go's words,
// which are Debian's.
func triplets() map[string]string {
	return map[string]string{"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}
}

// wanted are the packages that something is taken from; those they depend on come
// along.
func wanted() []string { return []string{"iptables", "nftables", "base-files"} }

// fetchDebian fetches and unpacks the packages into work, unless that has been done.
func fetchDebian(arch, work string) (debian, error) {
	d := debian{triplet: triplets()[arch]}
	if d.triplet == "" {
		return d, fmt.Errorf("make an image for GOARCH %q: must be amd64 or arm64", arch)
	}
	dir, err := filepath.Abs(filepath.Join(work, "debian-"+arch))
	if err != nil {
		return d, err
	}
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		if err := download(arch, dir); err != nil {
			return d, fmt.Errorf("fetch Debian's packages for %s: %w: this needs Debian with apt and a mirror that has %[1]s; elsewhere use manifests/image/Dockerfile", arch, err)
		}
	} else if err != nil {
		return d, err
	}
	d.root = filepath.Join(dir, "root")
	return d, d.read(filepath.Join(dir, "archives"))
}

// download fills dir, which appears when it is complete. apt's state is a
// directory of its own: neither what the machine has installed nor the
// architectures that it knows matter.
func download(arch, dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	temp, err := os.MkdirTemp(filepath.Dir(dir), filepath.Base(dir)+".*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(temp)
	state, archives, root := filepath.Join(temp, "apt"), filepath.Join(temp, "archives"), filepath.Join(temp, "root")
	for _, d := range []string{filepath.Join(state, "lists/partial"), filepath.Join(state, "archives/partial"), archives, root} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	options := []string{"-q"}
	for _, o := range []string{
		"APT::Architecture=" + arch, "APT::Architectures=" + arch, "Dir::State=" + state, "Dir::State::status=/dev/null",
		"Dir::Cache=" + state, "APT::Sandbox::User=", "Acquire::Languages=none", "APT::Update::Error-Mode=any",
	} {
		options = append(options, "-o", o)
	}
	run := func(name string, args ...string) (string, error) {
		cmd := exec.Command(name, args...)
		cmd.Dir, cmd.Env = archives, append(os.Environ(), "LC_ALL=C")
		out, err := cmd.Output()
		if ee := (*exec.ExitError)(nil); errors.As(err, &ee) {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(ee.Stderr)))
		}
		if err != nil {
			return "", fmt.Errorf("run %s: %w", name, err)
		}
		return string(out), nil
	}
	if _, err := run("apt-get", append(options, "update")...); err != nil {
		return err
	}
	needed, err := run("apt-cache", slices.Concat(options, []string{
		"depends", "--recurse", "--no-recommends", "--no-suggests",
		"--no-conflicts", "--no-breaks", "--no-replaces", "--no-enhances",
	}, wanted())...)
	if err != nil {
		return err
	}
	var names []string
	for line := range strings.Lines(needed) {
		// A name at the margin is a package; in angle brackets it is one of a kind.
		if name := strings.TrimSpace(line); strings.HasPrefix(line, name) && !strings.HasPrefix(name, "<") {
			names = append(names, name)
		}
	}
	if _, err := run("apt-get", slices.Concat(options, []string{"download"}, names)...); err != nil {
		return err
	}
	files, _ := filepath.Glob(filepath.Join(archives, "*.deb")) // the pattern is well formed
	for _, f := range files {
		if _, err := run("dpkg-deb", "-x", f, root); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(state); err != nil {
		return err
	}
	return os.Rename(temp, dir)
}

// read learns which packages there are and what came with each.
func (d *debian) read(archives string) error {
	files, _ := filepath.Glob(filepath.Join(archives, "*.deb")) // sorted
	for _, f := range files {
		control, err := exec.Command("dpkg-deb", "-f", f).Output()
		if err != nil {
			return fmt.Errorf("read package %s: %w", f, err)
		}
		p := debianPackage{control: string(control), files: map[string]bool{}}
		for line := range strings.Lines(p.control) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
			switch key {
			case "Package":
				p.name = value
			case "Version":
				p.version = value
			}
		}
		// The format of tar tvf: the name is the sixth word, "./usr/sbin/nft".
		list, err := exec.Command("dpkg-deb", "-c", f).Output()
		if err != nil {
			return fmt.Errorf("list package %s: %w", f, err)
		}
		for line := range strings.Lines(string(list)) {
			if words := strings.Fields(line); len(words) > 5 {
				p.files[strings.TrimPrefix(words[5], "./")] = true
			}
		}
		d.packages = append(d.packages, p)
	}
	if len(d.packages) == 0 {
		return fmt.Errorf("no package is in %s: remove its directory, and it is fetched again", archives)
	}
	return nil
}
