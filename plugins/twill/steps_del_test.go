//go:build linux && amd64

package main

import (
	"strings"

	"github.com/twill-net/twill/pkg/nettest/faults"
)

// dels walks DEL.
func (w *walk) dels() {
	w.must(w.attached())
	c := w.attached()
	clean := w.trace(c, faults.Fault{})
	if clean.ExitCode != 0 {
		w.t.Fatalf("DEL: %s%s", clean.Stdout, clean.Stderr)
	}
	w.steps(clean, w.tryDel)
}

// attached is the DEL of a pod that was just attached.
func (w *walk) attached() call {
	c := w.add(w.pod)
	out := w.must(c)
	w.ips = nil
	for _, ip := range w.result(c, out).IPs {
		w.ips = append(w.ips, ip.Address.IP.String())
	}
	if !w.sc.gone {
		return w.del(c, out)
	}
	w.emptyPod()
	return w.del(c, nil)
}

func (w *walk) tryDel(f faults.Fault) bool {
	c := w.attached()
	out := w.trace(c, f)
	if out.Hit == nil {
		return false
	}
	w.counts["faults"]++
	switch {
	case out.Killed:
		w.counts["DEL killed"]++
		w.afterKilledDel(c, f, out)
		return true
	case out.ExitCode == 0:
		w.counts["DEL succeeded in spite of it"]++
		if left := w.settled(); len(left) > 0 {
			w.wrong(f, out, "DEL succeeds and leaves\n\t%s", strings.Join(left, "\n\t"))
			return true
		}
	default:
		w.counts["DEL failed"]++
		if _, err := cniError(out); err != nil {
			w.wrong(f, out, "%v", err)
			return true
		}
	}
	w.mustLeaveNothing(f, out, c)
	return true
}

// afterKilledDel: another pod may get what is free already, the addresses above
// all, before the runtime calls DEL again, with or without the namespace. That pod
// must not notice.
func (w *walk) afterKilledDel(c call, f faults.Fault, out *faults.Outcome) {
	if w.counts["DEL killed"]%2 == 0 && !w.sc.gone {
		w.emptyPod()
	}
	pod := w.newPod()
	defer pod.remove()
	next := w.add(pod).with("runtimeConfig", w.same())
	result, err := w.run(next)
	if err != nil { // not all is free
		w.counts["successors refused"]++
		w.mustLeaveNothing(f, out, c)
		return
	}
	w.counts["successors"]++
	if _, err := w.run(c); err != nil {
		w.wrong(f, out, "DEL: %v", err)
		return
	}
	if err := w.whole(next, result); err != nil {
		w.wrong(f, out, "DEL once more takes from the pod that came after: %v", err)
		return
	}
	w.mustLeaveNothing(f, out, w.del(next, result))
}

// same asks for the addresses that the pod before had.
func (w *walk) same() map[string]any {
	run := map[string]any{"ips": w.ips}
	for k, v := range w.sc.run {
		run[k] = v
	}
	return run
}
