//go:build linux && amd64

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
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

	// at is the step that fails, as package faults prints it, for errors that no
	// state of files and links brings about. errno is what it returns; 0: what fits.
	at    string
	errno syscall.Errno
}

// TestErrors lists every error of the plugin. Each is a CNI error object on standard
// output, has the specification's code (section 5, "Error") and says what it is
// about, why, and what to do, and nothing of the pod is left.
func TestErrors(t *testing.T) {
	r := &errorRuns{bin: coveredPlugin(t), data: t.TempDir()}
	t.Run("table", func(t *testing.T) {
		for _, f := range slices.Concat(
			environmentErrors(), configErrors(), flannelErrors(), nodeErrors(), wiringErrors(), delErrors(), statusErrors(), faultErrors(),
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
		for _, m := range errorMakers(t) {
			switch seen := slices.ContainsFunc(r.messages, m.says.MatchString); {
			case unreachable[m.text] != "":
				if reached(m) && seen {
					t.Errorf("%s: %s is reached after all", m.at, m.text)
				}
			case !reached(m):
				t.Errorf("%s: no failure in the table reaches %s", m.at, m.text)
			case !seen:
				t.Errorf("%s: no failure in the table shows the message of %s", m.at, m.text)
			}
		}
	})
}

func (f failure) run(t *testing.T, r *errorRuns) {
	h, p := newHost(t), newNamespace(t)
	c := f.call(h, p)
	verbs := strings.Fields(f.verbs)
	if len(verbs) == 0 {
		verbs = []string{c.verb}
	}
	before, links := fmt.Sprint(h.traces()), p.links()
	for _, c.verb = range verbs {
		f.check(t, r.fail(t, f, h, p, c))
	}
	if !slices.Contains(verbs, "ADD") {
		return
	}
	if after := fmt.Sprint(h.traces()); after != before {
		t.Errorf("traces %s, before %s", after, before)
	}
	if got := p.links(); got != links {
		t.Errorf("links in the pod: %s, before %s", got, links)
	}
}

func (f failure) check(t *testing.T, e *types.Error) {
	t.Helper()
	if e == nil {
		return
	}
	if e.Code != f.code {
		t.Errorf("code %d, want %d: %s", e.Code, f.code, e.Msg)
	}
	for _, w := range f.words {
		if !strings.Contains(e.Msg, w) {
			t.Errorf("%q does not say %q", e.Msg, w)
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

func (r *errorRuns) command(h *host, c call) *exec.Cmd {
	cmd := h.command(c)
	cmd.Path = r.bin
	cmd.Env = append(cmd.Env, "GOCOVERDIR="+r.data)
	return cmd
}

// fail runs the verb and returns its error; nil if it has none that is one of CNI.
func (r *errorRuns) fail(t *testing.T, f failure, h *host, p *namespace, c call) *types.Error {
	t.Helper()
	var code int
	var stdout, stderr []byte
	if f.at == "" {
		code, stdout, stderr = r.execute(t, h, c)
	} else {
		out := r.inject(t, f, h, p, c)
		code, stdout, stderr = out.ExitCode, out.Stdout, out.Stderr
	}
	e, err := errorObject(stdout)
	if err != nil || code != 1 || len(stderr) > 0 {
		t.Errorf("%s: exit status %d, %v, stdout %q, stderr %q", c.verb, code, err, stdout, stderr)
		return nil
	}
	version := "1.1.0"
	if v, ok := c.conf["cniVersion"].(string); ok {
		version = v
	}
	if e.CNIVersion != version {
		t.Errorf("cniVersion of the error is %q, of the configuration %q", e.CNIVersion, version)
	}
	t.Logf("%s %d %s", c.verb, e.Code, e.Msg)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.messages = append(r.messages, e.Msg)
	return &e.Error
}

func (r *errorRuns) execute(t *testing.T, h *host, c call) (code int, stdout, stderr []byte) {
	t.Helper()
	cmd := r.command(h, c)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := h.do(cmd.Start)
	if err == nil {
		err = cmd.Wait()
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.Bytes(), errs.Bytes()
}

// inject runs the verb with the fault. Which number the step has is seen in a run
// before, whose effects are taken back; threads may change it.
func (r *errorRuns) inject(t *testing.T, f failure, h *host, p *namespace, c call) *faults.Outcome {
	t.Helper()
	step := regexp.MustCompile(f.at)
	trace := func(fault faults.Fault) *faults.Outcome {
		t.Helper()
		cmd := r.command(h, c)
		cmd.Env = append(cmd.Env, "GOMAXPROCS=1", "GODEBUG=asyncpreemptoff=1")
		var out *faults.Outcome
		if err := h.do(func() (err error) { out, err = faults.Run(cmd, fault); return err }); err != nil {
			t.Fatal(err)
		}
		return out
	}
	const tries = 10
	number := 0
	for range tries {
		out := trace(faults.Fault{Kind: faults.Fail, Step: number, Err: f.errno})
		if out.Hit != nil && step.MatchString(out.Hit.Call) {
			return out
		}
		var steps []string
		for _, s := range out.Steps {
			steps = append(steps, s.Call)
		}
		if number = slices.IndexFunc(steps, step.MatchString) + 1; number == 0 {
			t.Fatalf("%s has no step %q:\n%s", c.verb, f.at, strings.Join(steps, "\n"))
		}
		if c.verb == "STATUS" || c.verb == "CHECK" {
			continue
		}
		h.must(call{verb: "DEL", id: "c", netns: c.netns, conf: c.conf, env: c.env})
		if c.verb != "ADD" {
			c = f.call(h, p)
		}
	}
	t.Fatalf("step %q moved in each of %d runs", f.at, tries)
	return nil
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
