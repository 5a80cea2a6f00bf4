// Package nettest makes labs: hosts and pods as network namespaces on a switch
// that leads nowhere, with a real etcd, for tests, the demo and the benchmarks.
//
// A Lab has a random id that every named thing of it carries: namespaces are
// tw<id>-h1, tw<id>-h1-p1, tw<id>-sw and stand in /run/netns as `ip netns add`
// makes them; logs and state stand in /run/twill-lab/<id>. A lab whose owner was
// killed is removed by the next one that is made (Sweep). Needs root.
package nettest

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// Options of a Lab. The zero value is an ordinary one.
type Options struct {
	// Keep lets the lab outlive this process, with all that runs in it. Only
	// Down, or Close, removes it.
	Keep bool
	// MTU of the cables between hosts and switch, in bytes; 0 is 1500.
	MTU int
	// Program is the path of the lab program, which etcd and the traffic tools
	// are part of. Empty: built from ./e2e/lab when first needed.
	Program string
}

// Lab is a set of namespaces and processes that are removed together. Its methods
// may be called from several goroutines.
type Lab struct {
	ID  string // six hexadecimal digits
	Dir string // logs and state, on a tmpfs

	opts  Options
	spawn *spawner

	mu      sync.Mutex
	env     []string
	sw      *netSwitch
	hosts   int
	procs   []*Process
	closers []func() error
}

// New makes an empty lab, after removing those whose owners are dead.
func New(opts Options) (*Lab, error) {
	unlock, err := lockBase()
	if err != nil {
		return nil, fmt.Errorf("make lab: %w", err)
	}
	defer unlock()
	if err := sweep(); err != nil {
		return nil, fmt.Errorf("make lab: %w", err)
	}
	id := newID()
	l := &Lab{ID: id, Dir: filepath.Join(baseDir, id), opts: opts}
	if err := os.MkdirAll(l.logDir(), 0o755); err != nil {
		return nil, fmt.Errorf("make lab: %w", err)
	}
	o, err := self()
	if err == nil {
		o.Kept = opts.Keep
		err = o.write(l.Dir)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make lab: %w", err), os.RemoveAll(l.Dir))
	}
	l.spawn = newSpawner()
	return l, nil
}

// NewT makes a lab for one test, removed when the test ends. If the test fails,
// the ends of all logs are part of its output.
func NewT(t testing.TB) *Lab {
	t.Helper()
	l, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			l.logTails(t)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// NewNS makes one bare namespace with loopback up for one test, for which no
// switch or second namespace is needed.
func NewNS(t testing.TB) *NS {
	t.Helper()
	n, err := NewT(t).NewNS("ns")
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// NewHosts makes a lab with n hosts for one test.
func NewHosts(t testing.TB, n int) (*Lab, []*Host) {
	t.Helper()
	l := NewT(t)
	hosts, err := l.NewHosts(n)
	if err != nil {
		t.Fatal(err)
	}
	return l, hosts
}

// Close ends every process in the lab and removes the lab.
func (l *Lab) Close() error {
	l.mu.Lock()
	procs, closers := l.procs, l.closers
	l.procs, l.closers, l.sw = nil, nil, nil
	l.mu.Unlock()

	var errs []error
	for _, c := range slices.Backward(closers) {
		errs = append(errs, c())
	}
	for _, p := range slices.Backward(procs) {
		errs = append(errs, p.Kill9())
	}
	l.spawn.stop()
	errs = append(errs, teardown(l.ID))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close lab %s: %w", l.ID, err)
	}
	return nil
}

// Leave ends this process's part in a kept lab and leaves the lab running.
func (l *Lab) Leave() error {
	l.mu.Lock()
	closers := l.closers
	l.closers = nil
	l.mu.Unlock()
	var errs []error
	for _, c := range slices.Backward(closers) {
		errs = append(errs, c())
	}
	return errors.Join(errs...)
}

// Setenv sets an environment variable for all programs that are started in the
// lab from now on, also by `lab exec`.
func (l *Lab) Setenv(name, value string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.env = slices.DeleteFunc(slices.Clone(l.env), func(e string) bool {
		return strings.HasPrefix(e, name+"=")
	})
	l.env = append(l.env, name+"="+value)
	o, err := readOwner(l.Dir)
	if err == nil {
		o.Env = l.env
		err = o.write(l.Dir)
	}
	if err != nil {
		return fmt.Errorf("set %s in lab %s: %w", name, l.ID, err)
	}
	return nil
}

// Program returns the path of the lab program.
func (l *Lab) Program() (string, error) {
	if l.opts.Program != "" {
		return l.opts.Program, nil
	}
	return BuildProgram("./e2e/lab")
}

func (l *Lab) logDir() string { return filepath.Join(l.Dir, "log") }

func (l *Lab) onClose(f func() error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closers = append(l.closers, f)
}

// logTails shows the last lines of each log.
func (l *Lab) logTails(t testing.TB) {
	const lines = 60
	logs, err := filepath.Glob(filepath.Join(l.logDir(), "*.log"))
	if err != nil {
		t.Error(err)
	}
	for _, f := range logs {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Error(err)
			continue
		}
		all := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
		t.Logf("%s:\n%s", filepath.Base(f), strings.Join(all[max(0, len(all)-lines):], "\n"))
	}
}

func newID() string {
	b := make([]byte, 3)
	rand.Read(b) // never fails (crypto/rand)
	return hex.EncodeToString(b)
}
