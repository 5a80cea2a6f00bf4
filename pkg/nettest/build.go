package nettest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const binPrefix = "bin-"

// Build returns the path of a program of this module, "./e2e/lab": see BuildProgram.
func Build(t testing.TB, pkg string) string {
	t.Helper()
	path, err := BuildProgram(pkg)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// BuildProgram returns the path of a program of this module. It is built once per
// process, with the GOFLAGS of the environment, and removed by the Sweep after
// the end of the process. If TWILL_BIN_DIR is set, the program must be there.
func BuildProgram(pkg string) (string, error) {
	name := filepath.Base(pkg)
	if dir := os.Getenv("TWILL_BIN_DIR"); dir != "" {
		path, err := filepath.Abs(filepath.Join(dir, name))
		if err == nil {
			_, err = os.Stat(path)
		}
		if err != nil {
			return "", fmt.Errorf("find program %s in TWILL_BIN_DIR: %w", name, err)
		}
		return path, nil
	}
	path, err := build(pkg, name)
	if err != nil {
		return "", fmt.Errorf("build %s: %w", pkg, err)
	}
	return path, nil
}

func build(pkg, name string) (string, error) {
	dir, err := binDir()
	if err != nil {
		return "", err
	}
	// Parallel tests of this process wait for the first to build.
	lock, err := os.Open(dir)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := flock(lock); err != nil {
		return "", err
	}
	path := filepath.Join(dir, name)
	if exists(path) {
		return path, nil
	}
	mod, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("find module: %w", err)
	}
	tmp := filepath.Join(dir, "."+name)
	cmd := exec.Command("go", "build", "-o", tmp, pkg)
	cmd.Dir = filepath.Dir(strings.TrimSpace(string(mod)))
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return path, os.Rename(tmp, path)
}

// binDir returns the directory of this process's programs and makes it if need be.
func binDir() (string, error) {
	unlock, err := lockBase()
	if err != nil {
		return "", err
	}
	defer unlock()
	o, err := self()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(baseDir, fmt.Sprintf("%s%d-%s", binPrefix, o.PID, o.Start))
	if err := os.Mkdir(dir, 0o755); err != nil {
		if errors.Is(err, os.ErrExist) {
			return dir, nil
		}
		return "", err
	}
	return dir, o.write(dir)
}
