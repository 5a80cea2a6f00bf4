//go:build linux && amd64

package ipam

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/twill-net/twill/pkg/nettest/faults"
)

// Every file operation of ADD, DEL and GC fails once, and once the process is
// killed before it and behind it. An ADD that says it failed left nothing; what a
// killed one left, Release frees; what is freed rests; nobody else notices.
func TestFaultAtEveryStep(t *testing.T) {
	const pod, other = "default/a", "default/b"
	for _, tt := range []struct {
		name string
		job  job
		// prepare makes the pod "default/a" be in its state before the job.
		prepare func(n *node)
	}{
		{"add, first", job{Do: "add"}, func(*node) {}},
		{"add, own again", job{Do: "add"}, func(n *node) { n.add(pod); n.del(pod) }},
		{"add, kept for another", job{Do: "add"}, func(n *node) {
			for _, p := range []string{"c", "d", "e", "f"} {
				n.add(p)
			}
			n.del("c", "d", "e", "f")
			n.wait(time.Hour)
		}},
		{"add, requested", job{Do: "add", Request: Request{Wanted: addrs("198.18.1.5")}}, func(*node) {}},
		{"del, known", job{Do: "del", Known: addrs("198.18.1.3 fd00::3")}, func(n *node) { n.add(pod) }},
		{"del, unknown", job{Do: "del"}, func(n *node) { n.add(pod) }},
		{"sweep", job{Do: "sweep"}, func(n *node) { n.add(other); n.del(other); n.add(other); n.add(pod) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			start := func() (*node, job) {
				n := newNode(t, true, time.Minute)
				n.sets = newSets("198.18.1.0/29", "fd00::/64")
				n.add(other)
				tt.prepare(n)
				req := n.request(pod)
				req.Wanted = tt.job.Request.Wanted
				return n, job{DataDir: strings.TrimSuffix(n.path, "/net"), Do: tt.job.Do, Request: req, Known: tt.job.Known, Times: 1}
			}
			_, j := start()
			out, err := faults.Run(j.command(t), faults.Fault{})
			if err != nil || out.ExitCode != 0 {
				t.Fatalf("without a fault: %v: %s", err, out.Stdout)
			}
			t.Logf("%d steps", len(out.Steps))
			for _, s := range out.Steps {
				for _, kind := range []faults.Kind{faults.Fail, faults.KillBefore, faults.KillAfter} {
					if kind != faults.Fail && !s.Changes {
						continue // as behind the last one that changed something
					}
					n, j := start()
					n.fault(j, faults.Fault{Kind: kind, Step: s.Number})
				}
			}
		})
	}
}

// fault runs the job with a fault, and looks at what is left.
func (n *node) fault(j job, f faults.Fault) {
	n.Helper()
	before := state(n.T, n.Dir)
	out, err := faults.Run(j.command(n), f)
	if err != nil {
		n.Fatal(err)
	}
	if out.Hit == nil {
		n.Fatalf("step %d was not reached: %s", f.Step, out.Stdout)
	}
	where := fmt.Sprintf("%s %s", f.Kind, out.Hit)
	o := j.Request.Owner
	mine := func(s string) bool { return strings.HasSuffix(s, " "+o.String()) }
	if j.Do == "add" && f.Kind == faults.Fail {
		held := len(state(n.T, n.Dir)) - len(before)
		if out.ExitCode == 0 && held != 2 || out.ExitCode != 0 && (held != 0 || len(reserved(n, n.Dir)) != len(before)) {
			n.Errorf("%s: exit code %d (%s), %d addresses", where, out.ExitCode, out.Stdout, held)
		}
	}
	opts := ReleaseOptions{Pod: j.Request.Pod, Sticky: true, CoolDown: time.Minute}
	if err := n.Release(o, j.Known, opts); err != nil {
		n.Errorf("%s: then release: %v", where, err)
	}
	if err := n.Release(o, nil, opts); err != nil {
		n.Errorf("%s: then release: %v", where, err)
	}
	others := slices.DeleteFunc(slices.Clone(before), mine)
	if got := state(n.T, n.Dir); !slices.Equal(got, others) || len(reserved(n, n.Dir)) != len(others) {
		n.Errorf("%s: then released: %v, files %v, want %v", where, got, reserved(n, n.Dir), others)
	}
	if j.Do != "add" {
		for _, s := range before {
			// The one write that fails is told by the error; the address is freed all the same.
			told := f.Kind == faults.Fail && out.ExitCode != 0
			a := netip.MustParseAddr(strings.Fields(s)[0])
			if r, err := n.restOf(a); mine(s) && !told && (err != nil || !r.within(time.Minute, time.Now())) {
				n.Errorf("%s: %s is freed and does not rest", where, a)
			}
		}
	}
}

// operations are the system calls on files of an ADD and a DEL beside n other
// pods, the round robin right behind them.
func operations(t *testing.T, n int, req Request) (add, del []string) {
	t.Helper()
	dir := t.TempDir()
	d := NewDir(dir, "net")
	a := netip.MustParseAddr("198.18.0.2")
	for range n {
		writeFile(t, d.Path(a), "x\r\neth0")
		a = a.Next()
	}
	writeFile(t, d.lastFile(0), a.Prev().String())
	writeFile(t, d.state+"/tidied", "")
	req.Owner, req.Sets = Owner{"c", "eth0"}, newSets("198.18.0.0/16")
	var out [2][]string
	for i, do := range []string{"add", "del"} {
		j := job{DataDir: dir, Do: do, Request: req, Known: []netip.Addr{a}, Times: 1}
		got, err := faults.Run(j.command(t), faults.Fault{})
		if err != nil || got.ExitCode != 0 {
			t.Fatalf("%s: %v: %s", do, err, got.Stdout)
		}
		for _, s := range got.Steps {
			out[i] = append(out[i], strings.NewReplacer(dir+"/net/", "", a.String(), "ADDR").Replace(s.Call))
		}
	}
	return out[0], out[1]
}

// How much is done for a pod does not depend on how many there are; and what rests
// costs nothing where nothing rests.
func TestOperations(t *testing.T) {
	add, del := operations(t, 10, Request{})
	for _, s := range slices.Concat(add, del) {
		if strings.Contains(s, ".twill") || strings.HasPrefix(s, "getdents") {
			t.Errorf("without cool-down and sticky addresses: %s", s)
		}
	}
	if len(add) > 11 || len(del) > 6 {
		t.Errorf("ADD does %q, DEL %q", add, del)
	}
	for _, req := range []Request{{}, {CoolDown: time.Minute}, {Pod: "default/a", Sticky: true, CoolDown: time.Minute}} {
		add, del := operations(t, 10, req)
		addMany, delMany := operations(t, 3000, req)
		if len(add) != len(addMany) || len(del) != len(delMany) {
			t.Errorf("beside 10 pods ADD does %q, DEL %q; beside 3000 %q, %q", add, del, addMany, delMany)
		}
	}
}
