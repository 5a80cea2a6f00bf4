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

// After each step that changes something the program is killed, or such a step fails. Then
// each file is the one of before or the one of after, whole; a runtime that finds the
// configuration finds its plugin; and the next run completes the work.
func TestFaultAtEachStep(t *testing.T) {
	for _, w := range []work{
		{"install", flannels, []string{"--as-flannel"}},
		{"upgrade", func(n *node) { flannels(n); n.must("--as-flannel", "--mode=routed") }, []string{"--plugin=new", "--as-flannel", "--mode=bridged"}},
		{"uninstall", func(n *node) { flannels(n); n.must("--as-flannel") }, []string{"--uninstall"}},
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
			whole := strings.Fields(before + " " + after)
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
					w.fault(t, faults.Fault{Kind: kind, Step: s.Number}, whole, after)
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

func (w work) fault(t *testing.T, f faults.Fault, whole []string, after string) {
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
		if !slices.Contains(whole, file) {
			t.Errorf("%s: left %s", at, file)
		}
	}
	if strings.Contains(got, "10-twill.conflist") && !strings.Contains(got, " twill=") {
		t.Errorf("%s: a configuration without its plugin: %s", at, got)
	}
	if !strings.Contains(got, "flannel=") {
		t.Errorf("%s: flannel's configuration without its plugin: %s", at, got)
	}
	if f.Kind == faults.Fail && out.Hit != nil && (out.ExitCode == exitDone) != (got == after && len(out.Stderr) == 0) {
		t.Errorf("%s: exit code %d, left %s: %s", at, out.ExitCode, got, out.Stderr)
	}
	if code, stdout, stderr := n.install(w.args...); code != exitDone || n.state() != after {
		t.Errorf("%s: the next run: exit code %d, left %s\nwant %s\n%s%s", at, code, n.state(), after, stdout, stderr)
	}
}
