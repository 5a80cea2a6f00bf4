package daemon

import (
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
)

const (
	// maxDrifts is how many repairs are remembered for netctl drift.
	maxDrifts = 1000
	// maxPerPass bounds those of one pass: a deleted device takes thousands of
	// entries along, and its own record must not be pushed out by them.
	maxPerPass = 200
	// maxLogged is how many changes of one pass are logged one by one.
	maxLogged = 10
)

// driftLog remembers what others changed and the loop repaired, newest last.
type driftLog struct {
	mu    sync.Mutex
	total uint64
	last  []overlay.Drift
}

func (d *driftLog) add(entries []overlay.Drift, total int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.total += uint64(total)
	d.last = append(d.last, entries...)
	if extra := len(d.last) - maxDrifts; extra > 0 {
		d.last = append([]overlay.Drift(nil), d.last[extra:]...)
	}
}

func (d *driftLog) list() ([]overlay.Drift, uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]overlay.Drift{}, d.last...), d.total
}

// recordDrift notes deviations: each Op is what leads back to what was set.
func (d *Daemon) recordDrift(deviations overlay.Plan, why string) {
	if len(deviations) == 0 {
		return
	}
	now := time.Now()
	var entries []overlay.Drift
	for i, op := range deviations {
		kind, what, _ := strings.Cut(op.Object.String(), " ")
		d.metrics.drift(kind)
		if i >= maxPerPass {
			continue
		}
		e := overlay.Drift{Time: now, Kind: kind, What: what, Before: "absent", After: op.Object.String(), Why: why}
		if op.Before != nil {
			e.Before = op.Before.String()
		}
		if op.Verb == overlay.Delete {
			e.After = "absent"
		}
		entries = append(entries, e)
	}
	if rest := len(deviations) - maxPerPass; rest > 0 {
		entries = append(entries, overlay.Drift{Time: now, Kind: "more", What: fmt.Sprintf("%d further objects", rest), Before: "absent or changed", After: "as set", Why: why})
	}
	d.drift.add(entries, len(deviations))
	d.log.Warn("somebody changed what is ours; repairing", "objects", len(deviations), "first", deviations[0].String(), "seen", why)
}

// logPlan tells what a pass is about to change.
func (l *loop) logPlan(plan overlay.Plan, why string) {
	if len(plan) > maxLogged {
		l.log.Info("changing the kernel", "changes", len(plan), "first", plan[0].String(), "why", why)
		return
	}
	for _, op := range plan {
		l.log.Info("changing the kernel", "change", op.String(), "why", why)
	}
}

// logProblems logs the problems that were not there before, and those that ended.
func (l *loop) logProblems(problems []overlay.Problem) {
	var old []overlay.Problem
	l.update(func(r *report) { old, r.problems = r.problems, problems })
	before := make(map[overlay.Problem]bool, len(old))
	for _, p := range old {
		before[p] = true
	}
	logged := 0
	for _, p := range problems {
		if before[p] {
			delete(before, p)
			continue
		}
		if logged++; logged <= maxLogged {
			l.log.Warn("problem", "object", p.Object, "reason", p.Reason, "remedy", p.Remedy)
		}
	}
	if logged > maxLogged {
		l.log.Warn("more problems; see netctl status", "count", logged-maxLogged)
	}
	for p := range before {
		l.log.Info("problem solved", "object", p.Object, "reason", p.Reason)
	}
}
