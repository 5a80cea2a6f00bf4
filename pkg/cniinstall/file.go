package cniinstall

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// tempPattern names files that are not in place yet. No runtime reads them: a
// plugin has no such name, and a configuration ends in .conf, .conflist or .json.
const tempPattern = ".twill-install-*.tmp"

// lockPatience is how long a run waits for another one.
const lockPatience = time.Minute

// openDir locks a directory and removes what killed runs left there. The lock goes
// with the file, or with the program.
func openDir(ctx context.Context, path string) (*os.File, error) {
	d, err := os.Open(path)
	if err != nil {
		return nil, explain("open directory "+path, err)
	}
	if err := lock(ctx, d); err != nil {
		return nil, errors.Join(explain("lock directory "+path, err), d.Close())
	}
	stale, err := filepath.Glob(filepath.Join(path, tempPattern))
	for _, f := range stale {
		err = errors.Join(err, os.Remove(f))
	}
	if err != nil {
		return nil, errors.Join(explain("remove what a killed run left", err), d.Close())
	}
	return d, nil
}

func lock(ctx context.Context, f *os.File) error {
	ctx, cancel := context.WithTimeout(ctx, lockPatience)
	defer cancel()
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil || !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: another install-cni is at work there", ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// makeDir makes a directory, and those above it, that are not there yet.
func makeDir(path string) error {
	err := os.MkdirAll(path, 0o755)
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		return explain("create directory "+path, err)
	}
	return nil
}

// replace puts content in place of the file at path. Whenever the program or the
// machine stops, the old file is there, or the new one whole. A program that is
// executed meanwhile goes on with the old one. check looks at the new file before it
// is in place; it may be nil.
func replace(path string, content []byte, mode fs.FileMode, check func(temp string) error) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, tempPattern)
	if err != nil {
		return explain("write "+path, err)
	}
	temp := f.Name()
	_, err = f.Write(content)
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil && check != nil {
		err = check(temp)
	}
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		return explain("write "+path, errors.Join(err, os.Remove(temp)))
	}
	if err := syncDir(dir); err != nil {
		return explain("write "+path, err)
	}
	return nil
}

func remove(path string) error {
	err := os.Remove(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		return explain("remove "+path, err)
	}
	return nil
}

// syncDir makes what was created, renamed or removed there survive a loss of power.
func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	err = d.Sync()
	if errors.Is(err, syscall.EINVAL) { // some network file systems have no such thing
		err = nil
	}
	return errors.Join(err, d.Close())
}

// explain adds the remedy to an error of the file system, which names the path.
func explain(doing string, err error) error {
	for _, known := range []struct {
		is     error
		remedy string
	}{
		{syscall.EROFS, "the file system is mounted read-only: remount it, or name another directory"},
		{syscall.ENOSPC, "free some space there"},
		{syscall.EDQUOT, "free some space there"},
		{syscall.ENOTDIR, "name a directory"},
		{syscall.EISDIR, "a directory is in the way: remove it"},
		{fs.ErrPermission, "run as root; if that is so, see lsattr and the security module's log"},
	} {
		if errors.Is(err, known.is) {
			return fmt.Errorf("%s: %w: %s", doing, err, known.remedy)
		}
	}
	return fmt.Errorf("%s: %w", doing, err)
}
