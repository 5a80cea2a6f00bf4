package nettest

import (
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// CheckLeaks makes the test fail if, after all its cleanups, there are goroutines,
// file descriptors, labs of this process, or links in the machine's namespace that
// are not there now. It is the first call of a test that is not parallel.
func CheckLeaks(t testing.TB) {
	t.Helper()
	before := observeLeaks(t)
	t.Cleanup(func() {
		// What was told to end may need a moment.
		deadline := time.Now().Add(5 * time.Second)
		for {
			left := observeLeaks(t)
			maps.DeleteFunc(left, func(k, _ string) bool { _, ok := before[k]; return ok })
			if len(left) == 0 {
				return
			}
			if time.Now().After(deadline) {
				for _, k := range slices.Sorted(maps.Keys(left)) {
					t.Errorf("left behind: %s %s", k, left[k])
				}
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	})
}

// observeLeaks names all that can leak, with details for the report.
func observeLeaks(t testing.TB) map[string]string {
	t.Helper()
	seen := goroutines()
	if err := addFiles(seen); err != nil {
		t.Fatalf("check leaks: %v", err)
	}
	links, err := net.Interfaces()
	if err != nil {
		t.Fatalf("check leaks: %v", err)
	}
	for _, l := range links {
		seen[fmt.Sprintf("link %d", l.Index)] = l.Name
	}
	labs, err := List()
	if err != nil {
		t.Fatalf("check leaks: %v", err)
	}
	for _, l := range labs {
		if l.PID == os.Getpid() {
			seen["lab "+l.ID] = strings.Join(l.Namespaces, " ")
		}
	}
	return seen
}

// goroutines returns all but those of the testing package and the runtime.
func goroutines() map[string]string {
	buf := make([]byte, 1<<20)
	for {
		n := runtime.Stack(buf, true)
		if n < len(buf) {
			buf = buf[:n]
			break
		}
		buf = make([]byte, 2*len(buf))
	}
	seen := map[string]string{}
	for g := range strings.SplitSeq(string(buf), "\n\n") {
		head, stack, _ := strings.Cut(g, "\n")
		if strings.Contains(stack, "created by testing.") || strings.Contains(stack, "nettest.goroutines(") ||
			strings.Contains(stack, "os/signal.loop") {
			continue
		}
		name, _, _ := strings.Cut(head, " [") // the state in brackets changes
		seen[name] = stack
	}
	return seen
}

func addFiles(seen map[string]string) error {
	const dir = "/proc/self/fd"
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(dir, e.Name()))
		// An error: the descriptor of the directory itself. The poller is the
		// runtime's and stays.
		if err != nil || target == "anon_inode:[eventpoll]" || target == "anon_inode:[eventfd]" {
			continue
		}
		seen["fd "+e.Name()+" "+target] = ""
	}
	return nil
}
