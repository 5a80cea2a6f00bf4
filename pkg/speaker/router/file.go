package router

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// mark begins every file that we write.
const mark = "# Written by twilld"

// sibling names a hidden file beside file: on the same file system, and of no
// pattern that an include might have.
func sibling(file, suffix string) string {
	return filepath.Join(filepath.Dir(file), "."+filepath.Base(file)+suffix)
}

// write makes a new file, on disk, that the router can read and others cannot, as
// there are passwords in it. It belongs to the one who owns the file whose place
// it takes, or the directory.
func write(path, like string, text []byte) error {
	owner, err := os.Stat(like)
	if errors.Is(err, fs.ErrNotExist) {
		owner, err = os.Stat(filepath.Dir(like))
	}
	if err != nil {
		return err
	}
	// The directory is the router's: it must not lead us to another file.
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o640)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if s, ok := owner.Sys().(*syscall.Stat_t); ok && err == nil {
		err = f.Chown(int(s.Uid), int(s.Gid))
	}
	if err == nil {
		err = f.Chmod(0o640)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}

// keep saves a file that is not of our making. The first one is the operator's.
func keep(file string) error {
	if err := os.Link(file, file+".before-twill"); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("keep a copy: %w", err)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
