package main

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/twill-net/twill/pkg/ociimage"
)

// taker puts files of Debian's into a tree, with the libraries that they need.
type taker struct {
	debian
	to    *ociimage.Tree
	taken map[string]bool // names as the packages have them
}

// tree is the part of the image that comes from Debian, and the packages that
// something of it is from.
func (d debian) tree() (*ociimage.Tree, []debianPackage, error) {
	t := taker{debian: d, to: &ociimage.Tree{}, taken: map[string]bool{}}
	// As every Debian has it: programs and libraries are below /usr.
	for _, dir := range []string{"bin", "sbin", "lib", "lib64"} {
		t.to.Dir("usr/"+dir, 0o755)
		t.to.Link(dir, "usr/"+dir)
	}
	t.to.Dir("run", 0o755) // xtables.lock
	t.to.Link("var/run", "/run")
	t.to.Dir("tmp", fs.ModeSticky|0o777)
	t.to.File("etc/passwd", 0o644, []byte("root:x:0:0:root:/:/sbin/nologin\n"))
	t.to.File("etc/group", 0o644, []byte("root:x:0:\n"))
	names := []string{"usr/sbin/nft", "usr/lib/os-release", "etc/debian_version", "etc/protocols"}
	for _, command := range []string{"iptables", "ip6tables"} {
		for _, suffix := range []string{"", "-restore", "-save"} {
			names = append(names, "usr/sbin/"+command+"-nft"+suffix, "usr/sbin/"+command+"-legacy"+suffix)
			// Debian's alternatives, as installed.
			t.to.Link("usr/sbin/"+command+suffix, "xtables-nft-multi")
		}
	}
	for _, pattern := range []string{"usr/lib/" + d.triplet + "/xtables/libxt_*.so", "usr/lib/" + d.triplet + "/xtables/libip*t_*.so", "usr/share/common-licenses/*"} {
		found, err := filepath.Glob(filepath.Join(d.root, pattern))
		if err != nil || len(found) == 0 {
			return nil, nil, errors.Join(fmt.Errorf("find %s in Debian's packages: there is none", pattern), err)
		}
		for _, f := range found {
			names = append(names, strings.TrimPrefix(f, d.root+"/"))
		}
	}
	t.to.Link("etc/os-release", "../usr/lib/os-release")
	for _, name := range names {
		if err := t.take(name); err != nil {
			return nil, nil, err
		}
	}
	used, err := t.record()
	return t.to, used, err
}

// take puts a file, or a link and what it leads to.
func (t taker) take(name string) error {
	if t.taken[name] {
		return nil
	}
	t.taken[name] = true
	from := filepath.Join(t.root, name)
	info, err := os.Lstat(from)
	if err != nil {
		return fmt.Errorf("take file from Debian's packages: %w", err)
	}
	to := name
	if strings.HasPrefix(to, "lib") {
		to = "usr/" + to
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		target, err := os.Readlink(from)
		if err != nil {
			return err
		}
		t.to.Link(to, target)
		if !path.IsAbs(target) {
			target = path.Join(path.Dir(name), target)
		}
		return t.take(strings.TrimPrefix(target, "/"))
	}
	if err := t.to.CopyFile(to, from, info.Mode()); err != nil {
		return err
	}
	return t.takeLibraries(name)
}

// takeLibraries puts what the dynamic linker loads for a program or library, and the
// linker itself.
func (t taker) takeLibraries(name string) error {
	f, err := elf.Open(filepath.Join(t.root, name))
	if bad := (*elf.FormatError)(nil); errors.As(err, &bad) || err != nil && strings.Contains(err.Error(), "EOF") {
		return nil // no program
	} else if err != nil {
		return err
	}
	defer f.Close()
	libraries, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("read libraries of %s: %w", name, err)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			linker := make([]byte, p.Filesz)
			if _, err := p.ReadAt(linker, 0); err != nil {
				return fmt.Errorf("read dynamic linker of %s: %w", name, err)
			}
			path := strings.Trim(string(linker), "/\x00")
			if err := t.takeFirst(path, "usr/"+path); err != nil {
				return err
			}
		}
	}
	for _, l := range libraries {
		if err := t.takeFirst("lib/"+t.triplet+"/"+l, "usr/lib/"+t.triplet+"/"+l); err != nil {
			return fmt.Errorf("%s needs %s: %w", name, l, err)
		}
	}
	return nil
}

// takeFirst takes the first of the names that there is.
func (t taker) takeFirst(names ...string) error {
	for _, name := range names {
		if _, err := os.Lstat(filepath.Join(t.root, name)); err == nil {
			return t.take(name)
		}
	}
	return fmt.Errorf("take file from Debian's packages: none has %s", strings.Join(names, " or "))
}

// record notes which packages the files are from, where scanners look, and takes the
// packages' licenses.
func (t taker) record() ([]debianPackage, error) {
	var used []debianPackage
	taken := slices.Sorted(maps.Keys(t.taken))
	for _, p := range t.packages {
		has := func(name string) bool { return p.files[name] }
		if !slices.ContainsFunc(taken, has) {
			continue
		}
		used = append(used, p)
		t.to.File("var/lib/dpkg/status.d/"+p.name, 0o644, []byte(p.control))
		if license := "usr/share/doc/" + p.name + "/copyright"; p.files[license] {
			if err := t.to.CopyFile(license, filepath.Join(t.root, license), 0o644); err != nil {
				return nil, err
			}
		}
	}
	return used, nil
}
