//go:build linux && amd64

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"

	"github.com/twill-net/twill/pkg/nettest/faults"
)

// TestFaultAtEveryStep has every step of ADD and DEL fail, and kills the plugin
// before and after each: every netlink message, every file, every helper. What
// follows then, DEL or another ADD, leaves nothing of the pod on the node: no
// link, address, route, neighbour, rule, qdisc or file.
func TestFaultAtEveryStep(t *testing.T) {
	for _, sc := range scenarios() {
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			for _, verb := range []struct {
				name string
				walk func(*walk)
			}{{"ADD", (*walk).adds}, {"DEL", (*walk).dels}} {
				if sc.gone && verb.name == "ADD" {
					continue
				}
				t.Run(verb.name, func(t *testing.T) {
					t.Parallel()
					verb.walk(newWalk(t, sc))
				})
			}
		})
	}
}

// walk goes through the steps of one verb.
type walk struct {
	*host
	sc     scenario
	pods   string // where the namespaces are
	pod    *podNS
	before state    // of the node and an empty pod
	ips    []string // of the last pod
	ids    int      // of containers
	made   int      // namespaces
	counts map[string]int
}

func newWalk(t *testing.T, sc scenario) *walk {
	w := &walk{sc: sc, counts: map[string]int{}}
	w.fresh(t)
	return w
}

// fresh makes a new node: the first, and another when a fault has spoiled it.
func (w *walk) fresh(t testing.TB) {
	w.host, w.pods = newHost(t), t.TempDir()
	w.pod = w.newPod()
	for k, v := range w.sc.conf {
		w.conf[k] = v
	}
	if w.sc.flannel {
		w.subnetEnv()
	}
	if w.sc.warm {
		neighbour := w.newPod().add("other").with("runtimeConfig", w.sc.neighbour).with("mode", nil)
		neighbour.env = tools()
		w.must(neighbour)
	}
	w.before = w.world()
}

// subnetEnv makes the node one of flannel's.
func (w *walk) subnetEnv() {
	w.t.Helper()
	env := fmt.Sprintf("FLANNEL_NETWORK=%s\nFLANNEL_SUBNET=%s\nFLANNEL_IPV6_NETWORK=%s\nFLANNEL_IPV6_SUBNET=%s\nFLANNEL_MTU=%d\nFLANNEL_IPMASQ=true\n",
		dualStack.Networks[0], dualStack.Subnets[0], dualStack.Networks[1], dualStack.Subnets[1], dualStack.MTU)
	w.conf["subnetFile"] = filepath.Join(w.dir, "run", "subnet.env")
	w.conf["ipam"] = map[string]any{"dataDir": w.conf["dataDir"]}
	w.conf["dataDir"] = filepath.Join(w.dir, "scratch")
	if err := os.WriteFile(w.conf["subnetFile"].(string), []byte(env), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// world is the state of the node and of the pod.
func (w *walk) world() state {
	s := append(w.network("cni0"), w.files()...)
	for _, line := range w.pod.network("lo") {
		s.add("pod: %s", line)
	}
	slices.Sort(s)
	return s
}

// left is what there is beyond what was there before, and what of the other pod is
// gone.
func (w *walk) left() state {
	now := w.world()
	left := now.minus(w.before)
	for _, line := range w.before.minus(now) {
		if !strings.HasPrefix(line, "neighbour") { // the kernel forgets them
			left.add("no more: %s", line)
		}
	}
	return left
}

// settled waits until nothing is left, and returns what is for too long: a
// namespace that was closed dies in the background, and takes its links along.
func (w *walk) settled() state {
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if left := w.left(); len(left) == 0 || time.Now().After(deadline) {
			return left
		}
	}
}

// add attaches the scenario's pod, whose containers come and go.
func (w *walk) add(p *podNS) call {
	w.ids++
	c := p.add(fmt.Sprint("c", w.ids)).with("runtimeConfig", w.sc.run)
	c.env = append(tools(), "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web")
	return c
}

// tools is where the helpers of the plugin are.
func tools() []string { return []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"} }

// podNS is a pod's namespace at a path that goes with it.
type podNS struct {
	*namespace
	at string
}

func (w *walk) newPod() *podNS {
	w.t.Helper()
	w.made++
	p := &podNS{newNamespace(w.t), filepath.Join(w.pods, fmt.Sprint(w.made))}
	if err := os.Symlink(p.path(), p.at); err != nil {
		w.t.Fatal(err)
	}
	return p
}

func (p *podNS) add(id string) call { return call{verb: "ADD", id: id, netns: p.at} }

func (p *podNS) remove() {
	if err := os.Remove(p.at); err != nil {
		p.t.Fatal(err)
	}
	p.close()
}

// trace runs the plugin with a fault.
func (w *walk) trace(c call, f faults.Fault) *faults.Outcome {
	w.t.Helper()
	cmd := w.command(c)
	// Steps come in the same order, mostly.
	cmd.Env = append(cmd.Env, "GOMAXPROCS=1", "GODEBUG=asyncpreemptoff=1")
	var out *faults.Outcome
	if err := w.do(func() (err error) { out, err = faults.Run(cmd, f); return err }); err != nil {
		w.t.Fatalf("%s, %s step %d: %v", c.verb, f.Kind, f.Step, err)
	}
	return out
}

// steps calls try with each kind of fault at each step, until there are no more. A
// run may have some steps less than another: try reports whether the fault was met.
func (w *walk) steps(clean *faults.Outcome, try func(faults.Fault) bool) {
	known := len(clean.Steps)
	first := 1 + slices.IndexFunc(clean.Steps, func(s faults.Step) bool { return strings.Contains(s.Call, w.sc.from) })
	if first == 0 {
		w.t.Fatalf("no step has %s in it", w.sc.from)
	}
	for _, s := range clean.Steps[first-1:] {
		w.t.Log(strings.ReplaceAll(s.String(), w.dir, ""))
	}
	changed := false
	for step, more := first, true; step <= known || more; step++ {
		kinds := []faults.Kind{faults.Fail}
		if step > known || clean.Steps[step-1].Changes {
			// Before the next one is the same as after this one.
			if !changed {
				kinds = append(kinds, faults.KillBefore)
			}
			kinds = append(kinds, faults.KillAfter)
			changed = true
		}
		for _, kind := range kinds {
			const tries = 3
			more = false
			for i := 0; !more && (i == 0 || step <= known && i < tries); i++ {
				more = try(faults.Fault{Kind: kind, Step: step})
			}
			if w.counts["defects"] >= many {
				w.t.Fatalf("%d defects: the rest is not walked", many)
			}
		}
	}
	w.t.Logf("%d steps; %v", known-first+1, w.counts)
	if w.counts["faults"] < (known-first)/2 {
		w.t.Error("most steps were not met again")
	}
}

// many is the number of defects after which a walk gives up.
const many = 20

// wrong reports a defect, and goes on with a new node.
func (w *walk) wrong(f faults.Fault, out *faults.Outcome, format string, a ...any) {
	w.t.Helper()
	w.counts["defects"]++
	text := fmt.Sprintf("%s step %s: %s", f.Kind, out.Hit, fmt.Sprintf(format, a...))
	w.t.Error(strings.ReplaceAll(text, w.dir, ""))
	w.fresh(w.t)
}

// reset takes away what is the node's, for an ADD to make it again.
func (w *walk) reset() {
	w.t.Helper()
	if w.sc.warm {
		return
	}
	l, err := w.nl.LinkByName("cni0")
	if err == nil {
		err = w.nl.LinkDel(l)
	} else if errors.As(err, new(netlink.LinkNotFoundError)) {
		err = nil
	}
	if err := errors.Join(err, os.RemoveAll(filepath.Join(w.dir, "networks")), os.RemoveAll(filepath.Join(w.dir, "scratch"))); err != nil {
		w.t.Fatal(err)
	}
}

// emptyPod makes the namespace go, and another come.
func (w *walk) emptyPod() {
	w.pod.remove()
	w.pod = w.newPod()
}

func (w *walk) del(c call, result []byte) call {
	c.verb = "DEL"
	if len(result) > 0 {
		c = c.with("prevResult", prev(w.t, result))
	}
	return c
}

// cniError returns what a verb that failed says, or what is wrong with that.
func cniError(out *faults.Outcome) (string, error) {
	e := &types.Error{}
	if err := json.Unmarshal(out.Stdout, e); err != nil || e.Code == 0 || e.Msg == "" {
		return "", fmt.Errorf("exit code %d without a CNI error: %q %q", out.ExitCode, out.Stdout, out.Stderr)
	}
	if len(out.Stderr) > 0 {
		return "", fmt.Errorf("writes to standard error: %s", out.Stderr)
	}
	return fmt.Sprintf("code %d, %s", e.Code, e.Msg), nil
}

func (w *walk) whole(c call, result []byte) error {
	if !json.Valid(result) {
		return fmt.Errorf("result %q", result)
	}
	c.verb = "CHECK"
	_, err := w.run(c.with("prevResult", prev(w.t, result)))
	return err
}

// mustLeaveNothing calls DEL, after which the node is as it was.
func (w *walk) mustLeaveNothing(f faults.Fault, out *faults.Outcome, c call) {
	w.t.Helper()
	if _, err := w.run(c); err != nil {
		w.wrong(f, out, "DEL: %v", err)
		return
	}
	if left := w.settled(); len(left) > 0 {
		w.wrong(f, out, "after DEL there is\n\t%s", strings.Join(left, "\n\t"))
	}
}
