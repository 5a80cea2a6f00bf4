package cniinstall

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/mod/semver"
)

// patience is how long a program may take to say what it is.
const patience = 10 * time.Second

// foreignError says that a file is certainly not Twill's plugin.
type foreignError struct{ reason string }

func (e *foreignError) Error() string { return "is not Twill's plugin: " + e.reason }

// ask returns the release of the plugin at path. Without a command in its
// environment a CNI plugin says what it is, and does nothing. A *foreignError is an
// answer; with any other error nobody knows whose the plugin is.
func ask(ctx context.Context, path string) (string, error) {
	limited, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("it did not end within %s; remove it if it never does", patience))
	defer cancel()
	cmd := exec.CommandContext(limited, path)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	about := &head{limit: 4096}
	cmd.Stdout, cmd.Stderr = about, about
	cmd.WaitDelay = time.Second // for children that keep the output open
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case limited.Err() != nil:
		return "", fmt.Errorf("ask %s for its release: %w", path, context.Cause(limited))
	case errors.Is(err, syscall.ENOEXEC), errors.Is(err, fs.ErrPermission), errors.Is(err, fs.ErrNotExist):
		return "", &foreignError{err.Error()} // or of another machine, or not executable, or its interpreter is not there
	case err != nil && !errors.As(err, &exit), exit != nil && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL:
		return "", fmt.Errorf("ask %s for its release: %w", path, err) // this machine's trouble: no memory, no process
	}
	line, _, _ := strings.Cut(about.String(), "\n")
	if release, ok := strings.CutPrefix(line, "CNI plugin twill "); ok && err == nil {
		return strings.TrimSpace(release), nil
	}
	const long = 100
	switch {
	case line != "":
		return "", &foreignError{fmt.Sprintf("it says %.*q", long, line)}
	case err != nil:
		return "", &foreignError{err.Error()}
	}
	return "", &foreignError{"it says nothing"}
}

// head keeps the beginning of what is written.
type head struct {
	bytes.Buffer
	limit int
}

func (h *head) Write(p []byte) (int, error) {
	h.Buffer.Write(p[:min(len(p), max(0, h.limit-h.Len()))])
	return len(p), nil
}

// newer reports whether release a comes after b. Both are as git describe --tags
// names them: v1.2.3, v1.2.3-rc.1, or v1.2.3-4-gabcdef for 4 commits after a tag. What
// has no tag in its name (devel, a bare commit) has no place in the order and is
// never newer.
func newer(a, b string) bool {
	tagA, commitsA := describe(a)
	tagB, commitsB := describe(b)
	if !semver.IsValid(tagA) || !semver.IsValid(tagB) {
		return false
	}
	if c := semver.Compare(tagA, tagB); c != 0 {
		return c > 0
	}
	return commitsA > commitsB
}

func describe(release string) (tag string, commits int) {
	m := regexp.MustCompile(`^(.*?)(?:-(\d+)-g[0-9a-f]+)?(?:-dirty)?$`).FindStringSubmatch(release)
	if m == nil {
		return "", 0
	}
	commits, _ = strconv.Atoi(m[2])
	return "v" + strings.TrimPrefix(m[1], "v"), commits
}
