//go:build linux && amd64

package cniinstall

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/nettest/faults"
)

// After each step that changes something the program is killed, or a step fails. Then
// each file is the one of before or the one of after, whole; a runtime that finds the
// configuration finds its plugin; and the next run completes the work.
func TestFaultAtEachStep(t *testing.T) {
	for _, w := range []work{
		{name: "install", before: flannels, args: []string{"--as-flannel"}},
		{name: "upgrade", before: func(n *node) { flannels(n); n.must("--mode=routed") }, args: []string{"--plugin=new", "--mode=bridged"}},
		{name: "uninstall", before: func(n *node) { flannels(n); n.must("--as-flannel") }, args: []string{"--uninstall"}},
	} {
		t.Run(w.name, func(t *testing.T) {
			n := newNode(t)
			w.before(n)
			before := n.state()
			out := w.run(n, faults.Fault{})
			after := n.state()
			if out.ExitCode != exitDone || before == after {
				t.Fatalf("without a fault: exit code %d: %s%s", out.ExitCode, out.Stdout, out.Stderr)
			}
			w.after, w.whole, w.says = after, strings.Fields(before+" "+after), said(n, out)
			tried := 0
			for _, s := range out.Steps {
				var kinds []faults.Kind
				switch call, _, _ := strings.Cut(s.Call, " "); {
				case strings.Contains(s.Call, "standard output"):
				case s.Changes: // a kill before is a kill after the last one
					kinds = []faults.Kind{faults.KillAfter, faults.Fail}
				case call == "openat" || call == "flock" || call == "fsync":
					kinds = []faults.Kind{faults.Fail}
				}
				for _, kind := range kinds {
					w.fault(t, faults.Fault{Kind: kind, Step: s.Number})
					tried++
				}
			}
			t.Logf("%d faults", tried)
			if tried < 15 {
				t.Error("too few to mean anything")
			}
		})
	}
}

// work is a command on a node.
type work struct {
	name   string
	before func(n *node)
	args   []string

	// Without a fault:
	after string
	whole []string // files of before and after
	says  string
}

// said is what a run has to tell, whatever the node.
func said(n *node, out *faults.Outcome) string {
	return strings.ReplaceAll(string(out.Stderr), n.dir, "")
}

func (w work) run(n *node, f faults.Fault) *faults.Outcome {
	n.Helper()
	cmd := exec.Command(os.Args[0], n.args(w.args...)...)
	cmd.Env = append(os.Environ(), "TWILL_CHILD=command")
	out, err := faults.Run(cmd, f)
	if err != nil {
		n.Fatal(err)
	}
	return out
}

func (w work) fault(t *testing.T, f faults.Fault) {
	n := newNode(t)
	w.before(n)
	out := w.run(n, f)
	got := n.state()
	at := f.Kind.String() + " nothing"
	if out.Hit != nil {
		at = f.Kind.String() + " " + out.Hit.String()
	}
	for _, file := range strings.Fields(got) {
		if temp := strings.HasPrefix(file, ".twill-install-"); temp && f.Kind != faults.Fail {
			continue // until the next run
		}
		if !slices.Contains(w.whole, file) {
			t.Errorf("%s: left %s", at, file)
		}
	}
	if strings.Contains(got, "10-twill.conflist") && !strings.Contains(got, " twill=") {
		t.Errorf("%s: a configuration without its plugin: %s", at, got)
	}
	if !strings.Contains(got, "flannel=") {
		t.Errorf("%s: flannel's configuration without its plugin: %s", at, got)
	}
	done := got == w.after && said(n, out) == w.says
	if f.Kind == faults.Fail && (out.ExitCode == exitDone && !done || out.ExitCode != exitDone && len(out.Stderr) == 0) {
		t.Errorf("%s: exit code %d, left %s: %s", at, out.ExitCode, got, out.Stderr)
	}
	if code, stdout, stderr := n.install(w.args...); code != exitDone || n.state() != w.after {
		t.Errorf("%s: the next run: exit code %d, left %s\nwant %s\n%s%s", at, code, n.state(), w.after, stdout, stderr)
	}
}
