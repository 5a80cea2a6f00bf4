//go:build linux && amd64

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/twill-net/twill/pkg/nettest/faults"
)

// failure is a way for a verb to fail, and what the operator is told.
type failure struct {
	name  string
	verbs string // that fail so, one after the other; empty: that of the call
	call  func(h *host, p *namespace) call
	code  uint
	// words stand in the message: what it is about, why, what to do.
	words []string

	// at matches the step that fails, as package faults prints it, for errors that no
	// state of files and links brings about; nth, if it is not the first such step.
	at  string
	nth int
}

// TestErrors lists every error of the plugin. Each is a CNI error object on standard
// output, has the specification's code (section 5, "Error") and says what it is
// about, why, and what to do, and nothing of the pod is left.
func TestErrors(t *testing.T) {
	r := &errorRuns{bin: coveredPlugin(t), data: t.TempDir()}
	// The first process writes down what there is to cover, which is more steps.
	r.execute(t, newHost(t), call{verb: "VERSION"}, faults.Fault{})
	t.Run("table", func(t *testing.T) {
		for _, f := range slices.Concat(
			environmentErrors(), configErrors(), flannelErrors(), nodeErrors(), attachErrors(), wiringErrors(), delErrors(), statusErrors(), faultErrors(),
		) {
			t.Run(f.name, func(t *testing.T) {
				t.Parallel()
				f.run(t, r)
			})
		}
	})
	// So that the table cannot fall behind: each place in package pod that makes an
	// error was reached above, and what it says was seen.
	t.Run("complete", func(t *testing.T) {
		reached := r.coverage(t)
		excused := maps.Clone(unreachable)
		for _, m := range errorMakers(t) {
			seen := slices.ContainsFunc(r.messages, m.says.MatchString)
			switch _, excuse := excused[m.text]; {
			case excuse && reached(m):
				t.Errorf("%s: %s is reached after all", m.at, m.text)
			case excuse:
				delete(excused, m.text)
			case !reached(m):
				t.Errorf("%s: no failure in the table reaches %s", m.at, m.text)
			case !seen:
				t.Errorf("%s: no failure in the table shows the message of %s", m.at, m.text)
			}
		}
		for text := range excused {
			t.Errorf("%s is not there any more", text)
		}
	})
}

func (f failure) run(t *testing.T, r *errorRuns) {
	// Which number the step has that shall fail is seen in a run on another node.
	// Threads may change it.
	const tries = 10
	step, done := f.try(t, r, 0)
	for i := 0; !done; i++ {
		if i == tries {
			t.Fatalf("step %q had another number each time", f.at)
		}
		step, done = f.try(t, r, step)
	}
}

// try makes a node and runs the verbs. If the step that should have failed did not,
// it returns its number; 0 if that is not known.
func (f failure) try(t *testing.T, r *errorRuns, step int) (missed int, done bool) {
	h, p := newHost(t), newNamespace(t)
	c := f.call(h, p)
	verbs := strings.Fields(f.verbs)
	if len(verbs) == 0 {
		verbs = []string{c.verb}
	}
	before, links := fmt.Sprint(h.traces()), p.links()
	for _, c.verb = range verbs {
		out := r.execute(t, h, c, faults.Fault{Kind: f.kind(), Step: step})
		if missed, ok := f.met(t, out); !ok {
			return missed, false
		}
		f.check(t, c, r.read(t, c, out))
	}
	if !slices.Contains(verbs, "ADD") {
		return 0, true
	}
	if after := fmt.Sprint(h.traces()); after != before {
		t.Errorf("traces %s, before %s", after, before)
	}
	if got := p.links(); got != links {
		t.Errorf("links in the pod: %s, before %s", got, links)
	}
	// The runtime cleans up after a failed ADD with what it has.
	c.verb = "DEL"
	if _, err := h.run(c); err != nil && !slices.Contains(verbs, c.verb) && f.code != types.ErrInvalidEnvironmentVariables {
		t.Errorf("DEL after it: %v", err)
	}
	return 0, true
}

func (f failure) kind() faults.Kind {
	if f.at == "" {
		return faults.None
	}
	return faults.Fail
}

// met reports whether the step failed that should, or returns its number.
func (f failure) met(t *testing.T, out *faults.Outcome) (missed int, ok bool) {
	t.Helper()
	if f.at == "" {
		return 0, true
	}
	at, nth := regexp.MustCompile(f.at), max(f.nth, 1)
	var steps []string
	for _, s := range out.Steps {
		steps = append(steps, s.Call)
		if !at.MatchString(s.Call) {
			continue
		}
		if nth--; nth == 0 {
			return s.Number, out.Hit != nil && out.Hit.Number == s.Number
		}
	}
	if out.Hit == nil {
		t.Fatalf("there is no step %q:\n%s", f.at, strings.Join(steps, "\n"))
	}
	return 0, false // another failed, and it did not come so far
}

func (f failure) check(t *testing.T, c call, e *types.Error) {
	t.Helper()
	if e == nil {
		return
	}
	t.Logf("%s: %d %s", c.verb, e.Code, e.Msg)
	if e.Code != f.code {
		t.Errorf("%s: code %d, want %d", c.verb, e.Code, f.code)
	}
	for _, w := range f.words {
		if !strings.Contains(e.Msg, w) {
			t.Errorf("%s: does not say %q", c.verb, w)
		}
	}
}

// errorRuns executes the plugin and collects what it says.
type errorRuns struct {
	bin, data string // the plugin built with coverage, and where it leaves that

	mu       sync.Mutex
	messages []string
}

// coveredPlugin is the plugin, built to say which lines of package pod it came by.
func coveredPlugin(t *testing.T) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "twill")
	build := exec.Command("go", "build", "-trimpath", "-cover", "-coverpkg="+strings.Join(coveredPackages(), ","), "-o", bin, ".")
	build.Env = append(build.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return bin
}

// execute runs the verb, with a fault if there is one.
func (r *errorRuns) execute(t *testing.T, h *host, c call, fault faults.Fault) *faults.Outcome {
	t.Helper()
	cmd := h.command(c)
	cmd.Path = r.bin
	cmd.Env = append(cmd.Env, "GOCOVERDIR="+r.data, "GOMAXPROCS=1", "GODEBUG=asyncpreemptoff=1")
	var out *faults.Outcome
	if fault.Kind != faults.None {
		if err := h.do(func() (err error) { out, err = faults.Run(cmd, fault); return err }); err != nil {
			t.Fatal(err)
		}
		return out
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := h.do(cmd.Start)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil && !errors.As(err, new(*exec.ExitError)) {
		t.Fatal(err)
	}
	return &faults.Outcome{ExitCode: cmd.ProcessState.ExitCode(), Stdout: stdout.Bytes(), Stderr: stderr.Bytes()}
}

// read returns the error of a verb; nil if that is none of CNI.
func (r *errorRuns) read(t *testing.T, c call, out *faults.Outcome) *types.Error {
	t.Helper()
	e, err := errorObject(out.Stdout)
	if err != nil || out.ExitCode != 1 || len(out.Stderr) > 0 {
		t.Errorf("%s: exit status %d, %v, standard output %q, standard error %q", c.verb, out.ExitCode, err, out.Stdout, out.Stderr)
		return nil
	}
	version := "1.1.0"
	if v, ok := c.conf["cniVersion"].(string); ok {
		version = v
	}
	if e.CNIVersion != version {
		t.Errorf("%s: cniVersion of the error is %q, of the configuration %q", c.verb, e.CNIVersion, version)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.messages = append(r.messages, e.Msg)
	return &e.Error
}

// errorObject reads what a verb that failed prints: one object and nothing else.
func errorObject(stdout []byte) (e struct {
	CNIVersion string
	types.Error
}, err error,
) {
	d := json.NewDecoder(bytes.NewReader(stdout))
	d.DisallowUnknownFields()
	if err := d.Decode(&e); err != nil {
		return e, fmt.Errorf("no CNI error: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return e, errors.New("there is more than one object")
	}
	if e.Code == 0 || strings.TrimSpace(e.Msg) == "" {
		return e, errors.New("no CNI error: code and msg must be there")
	}
	return e, nil
}
