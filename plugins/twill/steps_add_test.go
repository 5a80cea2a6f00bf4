//go:build linux && amd64

package main

import (
	"strings"

	"github.com/twill-net/twill/pkg/nettest/faults"
)

// adds walks ADD.
func (w *walk) adds() {
	w.must(w.attached()) // the second is like all that follow
	w.reset()
	c := w.add(w.pod)
	clean := w.trace(c, faults.Fault{})
	if clean.ExitCode != 0 {
		w.t.Fatalf("ADD: %s%s", clean.Stdout, clean.Stderr)
	}
	w.must(w.del(c, clean.Stdout))
	w.reset()
	w.steps(clean, w.tryAdd)
}

func (w *walk) tryAdd(f faults.Fault) bool {
	w.reset()
	c := w.add(w.pod)
	out := w.trace(c, f)
	if out.Hit == nil {
		w.must(w.del(c, out.Stdout))
		return false
	}
	w.counts["faults"]++
	switch {
	case out.Killed:
		w.counts["ADD killed"]++
		w.afterKilledAdd(c, f, out)
	case out.ExitCode == 0:
		w.counts["ADD succeeded in spite of it"]++
		w.afterAdd(c, f, out)
	default:
		w.counts["ADD failed"]++
		w.afterFailedAdd(c, f, out)
	}
	return true
}

// afterAdd looks at a success: the pod must be whole.
func (w *walk) afterAdd(c call, f faults.Fault, out *faults.Outcome) {
	if err := w.whole(c, out.Stdout); err != nil {
		w.wrong(f, out, "ADD succeeds, CHECK does not: %v", err)
		return
	}
	w.mustLeaveNothing(f, out, w.del(c, out.Stdout))
}

// afterFailedAdd: nothing is left at once, and the next ADD succeeds.
func (w *walk) afterFailedAdd(c call, f faults.Fault, out *faults.Outcome) {
	msg, err := cniError(out)
	if err != nil {
		w.wrong(f, out, "%v", err)
		return
	}
	if left := w.left(); len(left) > 0 {
		w.wrong(f, out, "ADD fails (%s) and leaves\n\t%s", msg, strings.Join(left, "\n\t"))
		return
	}
	result, err := w.run(c)
	if err == nil {
		err = w.whole(c, result)
	}
	if err != nil {
		w.wrong(f, out, "ADD after it: %v", err)
		return
	}
	w.mustLeaveNothing(f, out, w.del(c, result))
}

// afterKilledAdd: the runtime calls DEL, with or without the namespace, or makes
// another sandbox first.
func (w *walk) afterKilledAdd(c call, f faults.Fault, out *faults.Outcome) {
	n := w.counts["ADD killed"]
	gone, another := n%2 == 0, n/2%2 == 0
	if gone {
		w.emptyPod()
	}
	if !another {
		w.mustLeaveNothing(f, out, w.del(c, nil))
		return
	}
	pod := w.newPod()
	defer pod.remove()
	next := w.add(pod).with("runtimeConfig", w.sc.again)
	result, err := w.run(next)
	if err != nil {
		w.wrong(f, out, "ADD of another pod: %v", err)
		return
	}
	if _, err := w.run(w.del(c, nil)); err != nil {
		w.wrong(f, out, "DEL: %v", err)
		return
	}
	if err := w.whole(next, result); err != nil {
		w.wrong(f, out, "after DEL the other pod is not whole: %v", err)
		return
	}
	w.mustLeaveNothing(f, out, w.del(next, result))
}
