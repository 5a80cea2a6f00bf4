package ociimage

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"time"
)

// Tree is a directory tree in the making: what a layer holds. Everything in it
// belongs to root, whoever made it. Directories above a name come by themselves,
// with mode 0755; a name that is put twice is what it was put as last. The zero
// value is empty.
type Tree struct{ nodes map[string]node }

// node is a directory, a symbolic link if it has a target, or a file.
type node struct {
	mode    fs.FileMode // with fs.ModeDir or fs.ModeSymlink
	target  string
	content []byte
}

// Dir puts a directory.
func (t *Tree) Dir(name string, mode fs.FileMode) { t.put(name, node{mode: fs.ModeDir | mode}) }

// File puts a file.
func (t *Tree) File(name string, mode fs.FileMode, content []byte) {
	t.put(name, node{mode: mode, content: content})
}

// Link puts a symbolic link.
func (t *Tree) Link(name, target string) {
	t.put(name, node{mode: fs.ModeSymlink | 0o777, target: target})
}

// CopyFile puts a file with the content of the file at from.
func (t *Tree) CopyFile(name, from string, mode fs.FileMode) error {
	content, err := os.ReadFile(from)
	if err != nil {
		return fmt.Errorf("copy file: %w", err)
	}
	t.File(name, mode, content)
	return nil
}

func (t *Tree) put(name string, n node) {
	if t.nodes == nil {
		t.nodes = map[string]node{}
	}
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	t.nodes[name] = n
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if _, there := t.nodes[dir]; !there {
			t.nodes[dir] = node{mode: fs.ModeDir | 0o755}
		}
	}
}

// Merge puts all that is in o.
func (t *Tree) Merge(o *Tree) {
	for name, n := range o.nodes {
		if _, there := t.nodes[name]; !there || !n.mode.IsDir() {
			t.put(name, n)
		}
	}
}

// Names returns what is in the tree, sorted, without a leading slash.
func (t *Tree) Names() []string { return slices.Sorted(maps.Keys(t.nodes)) }

// writeTar writes the tree as a tar archive in which everything is of one moment.
// Trees that hold the same give the same bytes.
func (t *Tree) writeTar(to io.Writer, moment time.Time) error {
	w := tar.NewWriter(to)
	for _, name := range t.Names() {
		n := t.nodes[name]
		h := &tar.Header{Name: name, Mode: unixMode(n.mode), ModTime: moment, Typeflag: tar.TypeReg, Size: int64(len(n.content))}
		switch {
		case n.mode.IsDir():
			h.Typeflag, h.Name = tar.TypeDir, name+"/"
		case n.mode&fs.ModeSymlink != 0:
			h.Typeflag, h.Linkname = tar.TypeSymlink, n.target
		}
		if err := w.WriteHeader(h); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
		if _, err := w.Write(n.content); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
	}
	return w.Close()
}

// unixMode: fs.FileMode has the sticky bit and its like in other places.
func unixMode(m fs.FileMode) int64 {
	mode := int64(m.Perm())
	for bit, unix := range map[fs.FileMode]int64{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
		if m&bit != 0 {
			mode |= unix
		}
	}
	return mode
}

// Extract writes the tree into a new directory, dir.
func (t *Tree) Extract(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return fmt.Errorf("extract tree: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("extract tree: %w", err)
	}
	defer root.Close()
	for _, name := range t.Names() {
		n := t.nodes[name]
		switch {
		case n.mode.IsDir():
			// Chmod, for the umask takes bits of Mkdir's away.
			err = errors.Join(root.Mkdir(name, 0o755), root.Chmod(name, n.mode))
		case n.mode&fs.ModeSymlink != 0:
			err = root.Symlink(n.target, name)
		default:
			err = errors.Join(root.WriteFile(name, n.content, 0o600), root.Chmod(name, n.mode))
		}
		if err != nil {
			return fmt.Errorf("extract %s: %w", name, err)
		}
	}
	return nil
}
