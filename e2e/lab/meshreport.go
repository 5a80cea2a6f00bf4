package main

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"text/tabwriter"
)

// meshReport is the full mesh and, beside it, the same nodes with reflectors.
type meshReport []meshResult

// meshResult is one run. All times begin with the start of a process, but for
// LeaveSeconds, which begins with the deletion of a lease.
type meshResult struct {
	Nodes             int     `json:"nodes"`
	Reflectors        int     `json:"reflectors"`
	Sessions          int     `json:"sessions"`
	StartedSeconds    float64 `json:"started_s"`     // all processes are started
	KernelSeconds     float64 `json:"kernel_s"`      // all routes are in all kernels, by lease or BGP
	SessionsSeconds   float64 `json:"sessions_s"`    // the last session is established
	ConvergedSeconds  float64 `json:"converged_s"`   // all routes are learned by all
	AskingSeconds     float64 `json:"asking_s"`      // by so much what is learned may have been so earlier
	JoinKernelSeconds float64 `json:"join_kernel_s"` // one more node: in all kernels
	JoinSeconds       float64 `json:"join_s"`        // and learned by all
	LeaveSeconds      float64 `json:"leave_s"`       // gone from all kernels
	CPUSeconds        spread  `json:"cpu_s"`         // of a node until all were converged
	RSSMiB            spread  `json:"rss_mib"`
	AnonMiB           spread  `json:"anon_mib"`
	IdlePercent       spread  `json:"idle_cpu_percent"`
}

// spread is a figure of every node, that of the reflectors apart.
type spread struct {
	Nodes      []float64 `json:"nodes"`
	Reflectors []float64 `json:"reflectors,omitempty"`
}

func (s *spread) add(reflector bool, v float64) {
	if reflector {
		s.Reflectors = append(s.Reflectors, v)
	} else {
		s.Nodes = append(s.Nodes, v)
	}
}

func (r *meshResult) title() string {
	if r.Reflectors == 0 {
		return "mesh"
	}
	return fmt.Sprintf("%d reflectors", r.Reflectors)
}

func (report meshReport) print() error {
	if len(report) == 0 {
		return nil
	}
	fmt.Printf("%d nodes with backend bgp, each a real twilld: %d CPUs, %s\n\n", report[0].Nodes, runtime.NumCPU(), runtime.Version())
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', tabwriter.AlignRight)
	row := func(name string, cell func(*meshResult) string) {
		fmt.Fprint(w, name+"\t")
		for i := range report {
			fmt.Fprint(w, cell(&report[i])+"\t")
		}
		fmt.Fprintln(w)
	}
	number := func(name string, of func(*meshResult) float64) {
		row(name, func(r *meshResult) string { return fmt.Sprintf("%.2f", of(r)) })
	}
	spreads := func(name, format string, of func(*meshResult) *spread) {
		row(name+", min / median / max", func(r *meshResult) string { return ofSpread(of(r).Nodes, format) })
		row("of a reflector", func(r *meshResult) string { return ofSpread(of(r).Reflectors, format) })
	}
	row("", (*meshResult).title)
	row("BGP sessions", func(r *meshResult) string { return fmt.Sprint(r.Sessions) })
	number("all processes started s", func(r *meshResult) float64 { return r.StartedSeconds })
	number("all routes in all kernels s", func(r *meshResult) float64 { return r.KernelSeconds })
	number("last session established s", func(r *meshResult) float64 { return r.SessionsSeconds })
	number("all routes learned by all s", func(r *meshResult) float64 { return r.ConvergedSeconds })
	number("at most so much earlier s", func(r *meshResult) float64 { return r.AskingSeconds })
	spreads("CPU s of a node until then", "%.2f", func(r *meshResult) *spread { return &r.CPUSeconds })
	spreads("resident MiB then", "%.1f", func(r *meshResult) *spread { return &r.RSSMiB })
	spreads("of it the node's own MiB", "%.1f", func(r *meshResult) *spread { return &r.AnonMiB })
	number("one more node: in all kernels s", func(r *meshResult) float64 { return r.JoinKernelSeconds })
	number("learned by all s", func(r *meshResult) float64 { return r.JoinSeconds })
	number("its lease deleted: gone from all kernels s", func(r *meshResult) float64 { return r.LeaveSeconds })
	spreads("idle CPU % of a node", "%.3f", func(r *meshResult) *spread { return &r.IdlePercent })
	return w.Flush()
}

func ofSpread(v []float64, format string) string {
	if len(v) == 0 {
		return "-"
	}
	v = slices.Clone(v)
	slices.Sort(v)
	return fmt.Sprintf(format+" / "+format+" / "+format, v[0], v[len(v)/2], v[len(v)-1])
}
