package main

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// cniReport is what came of it.
type cniReport struct {
	// Load is the machine's load average, of a minute, before: above a half per
	// CPU or so, the figures are of the machine's other work too.
	Load     float64       `json:"load_before"`
	Floor    []cniFloor    `json:"floor"`
	Rows     []cniRow      `json:"one_at_a_time"`
	Parallel []cniParallel `json:"many_at_once"`
	// Overflows is how often the machine's neighbour table was full meanwhile
	// (gc_thresh3, 1,024 entries, of all namespaces together).
	Overflows int64 `json:"neighbour_table_overflows"`
}

// cniFigures are of a number of calls.
type cniFigures struct {
	MedianMS float64 `json:"median_ms"`
	P99MS    float64 `json:"p99_ms"`
	CPUMS    float64 `json:"cpu_ms"`            // median
	GoneMS   float64 `json:"gone_ms,omitempty"` // DEL: median of the time until the link is gone
}

type cniFloor struct {
	What string `json:"what"`
	cniFigures
}

// cniRow is one verb, one pod at a time.
type cniRow struct {
	Case      string      `json:"case"`
	Pods      int         `json:"pods"` // on the node, beside the one that comes and goes
	Verb      string      `json:"verb"`
	Twill     cniFigures  `json:"twill"`
	By        string      `json:"reference,omitempty"`
	Reference *cniFigures `json:"reference_figures,omitempty"`
	Ratio     float64     `json:"ratio,omitempty"`     // of the medians, to the reference's
	Growth    float64     `json:"growth,omitempty"`    // of Twill's median since the first number of pods
	Mark      *cniMark    `json:"mark,omitempty"`      // of the ratio
	Flat      *cniMark    `json:"flat_mark,omitempty"` // of the growth
}

// cniParallel is a number of calls at once.
type cniParallel struct {
	Calls     int      `json:"calls"`
	Twill     cniRates `json:"twill"`
	By        string   `json:"reference"`
	Reference cniRates `json:"reference_rates"`
	AddRatio  float64  `json:"add_ratio"` // ADDs per second, to the reference's
	DelRatio  float64  `json:"del_ratio"`
	Mark      *cniMark `json:"mark,omitempty"` // of add_ratio
}

type cniRates struct {
	AddsPerSecond float64 `json:"adds_per_s"`
	AddP99MS      float64 `json:"add_p99_ms"`
	AddCPUMS      float64 `json:"add_cpu_ms"`
	DelsPerSecond float64 `json:"dels_per_s"` // until the last link is gone
	DelP99MS      float64 `json:"del_p99_ms"` // until DEL returns
}

// cniMark is what a figure is to reach.
type cniMark struct {
	Limit   float64 `json:"limit"`
	AtLeast bool    `json:"at_least,omitempty"` // else at most
	Met     bool    `json:"met"`
}

func atMost(limit, got float64) *cniMark { return &cniMark{Limit: limit, Met: got <= limit} }
func atLeast(limit, got float64) *cniMark {
	return &cniMark{Limit: limit, AtLeast: true, Met: got >= limit}
}

func (m *cniMark) String() string {
	if m == nil {
		return ""
	}
	sign, met := "≤", "missed"
	if m.AtLeast {
		sign = "≥"
	}
	if m.Met {
		met = "met"
	}
	return fmt.Sprintf("%s %s %s", sign, strconv.FormatFloat(m.Limit, 'f', -1, 64), met)
}

// cniSeries is one network's part in the rounds.
type cniSeries struct {
	pods       []*cniPod
	adds, dels []cniCall
}

func (s *cniSeries) add(ctx context.Context, n *cniNetwork, round int) error {
	c, err := n.add(ctx, s.pods[round])
	s.adds = append(s.adds, c)
	return err
}

func (s *cniSeries) del(ctx context.Context, n *cniNetwork, round int) error {
	c, err := n.delAway(ctx, s.pods[round])
	s.dels = append(s.dels, c)
	return err
}

// percentile is of values, q from 0 to 1.
func percentile(calls []cniCall, q float64, of func(cniCall) time.Duration) float64 {
	var v []time.Duration
	for _, c := range calls {
		v = append(v, of(c))
	}
	if len(v) == 0 {
		return 0
	}
	slices.Sort(v)
	return ms(v[min(int(q*float64(len(v))), len(v)-1)])
}

func callWall(c cniCall) time.Duration { return c.wall }
func callCPU(c cniCall) time.Duration  { return c.cpu }
func callGone(c cniCall) time.Duration { return c.gone }

func figuresOf(calls []cniCall) cniFigures {
	return cniFigures{
		MedianMS: percentile(calls, 0.5, callWall), P99MS: percentile(calls, 0.99, callWall),
		CPUMS: percentile(calls, 0.5, callCPU), GoneMS: percentile(calls, 0.5, callGone),
	}
}

// addRows adds ADD's row and DEL's.
func (r *cniReport) addRows(row cniRow, twill, reference *cniSeries) {
	for _, verb := range []string{"ADD", "DEL"} {
		calls := func(s *cniSeries) []cniCall {
			if verb == "ADD" {
				return s.adds
			}
			return s.dels
		}
		row := row
		row.Verb, row.Twill = verb, figuresOf(calls(twill))
		if reference == nil {
			row.By = ""
		} else {
			f := figuresOf(calls(reference))
			row.Reference, row.Ratio = &f, row.Twill.MedianMS/f.MedianMS
		}
		row.setMarks(r.Rows)
		r.Rows = append(r.Rows, row)
	}
}

// setMarks are those of the project's issue on the CNI plugin.
func (row *cniRow) setMarks(before []cniRow) {
	const flat = 1.15
	first := slices.IndexFunc(before, func(b cniRow) bool { return b.Case == row.Case && b.Verb == row.Verb })
	if first >= 0 && before[first].Pods < row.Pods {
		row.Growth = row.Twill.MedianMS / before[first].Twill.MedianMS
		if row.Verb == "ADD" && row.Reference == nil {
			row.Flat = atMost(flat, row.Growth)
		}
	}
	switch {
	case row.Reference == nil, row.Case == caseNoTwill, row.Case == caseDual, row.Case == caseRouted:
	case row.Case == caseBridged && row.Verb == "ADD":
		switch row.Pods {
		case 1:
			row.Mark = atMost(0.4, row.Ratio)
		case 500:
			row.Mark = atMost(0.2, row.Ratio)
		}
	default: // DEL, and both with a host port
		row.Mark = atMost(0.2, row.Ratio)
	}
}

func ratesOf(turns []cniTurn) cniRates {
	var adds, dels []cniCall
	var add, del time.Duration
	for _, t := range turns {
		adds, dels = append(adds, t.adds...), append(dels, t.dels...)
		add, del = add+t.add, del+t.del
	}
	return cniRates{
		AddsPerSecond: float64(len(adds)) / add.Seconds(), AddP99MS: percentile(adds, 0.99, callWall), AddCPUMS: percentile(adds, 0.5, callCPU),
		DelsPerSecond: float64(len(dels)) / del.Seconds(), DelP99MS: percentile(dels, 0.99, callWall),
	}
}

func (r *cniReport) addParallel(calls int, twill, reference []cniTurn) {
	p := cniParallel{Calls: calls, By: byBridge, Twill: ratesOf(twill), Reference: ratesOf(reference)}
	p.AddRatio = p.Twill.AddsPerSecond / p.Reference.AddsPerSecond
	p.DelRatio = p.Twill.DelsPerSecond / p.Reference.DelsPerSecond
	if calls == 32 {
		p.Mark = atLeast(4, p.AddRatio)
	}
	r.Parallel = append(r.Parallel, p)
}

func (r cniReport) print() error {
	fmt.Printf("CNI, IPv4: %d CPUs, %s, load before %.2f; median / 99 %% / CPU in ms, of DEL also until the link is gone\n\n", runtime.NumCPU(), runtime.Version(), r.Load)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', 0)
	for _, f := range r.Floor {
		fmt.Fprintf(w, "exec %s\t%s\t\n", f.What, f.cniFigures)
	}
	fmt.Fprintln(w)
	fmt.Fprintln(w, "one at a time\tpods\t\ttwill\treference\t\tratio\tmark\tgrowth\tmark\t")
	for _, row := range r.Rows {
		ref, ratio, growth := "", "", ""
		if row.Reference != nil {
			ref, ratio = row.Reference.String(), fmt.Sprintf("%.2f", row.Ratio)
		}
		if row.Growth != 0 {
			growth = fmt.Sprintf("%.2f", row.Growth)
		}
		fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t\n", row.Case, row.Pods, row.Verb, row.Twill, row.By, ref, ratio, row.Mark, growth, row.Flat)
	}
	fmt.Fprintln(w)
	fmt.Fprintln(w, "many at once\tcalls\t\ttwill\treference\t\tratio\tmark\t")
	for _, p := range r.Parallel {
		fmt.Fprintf(w, "ADDs per s / p99 / CPU\t%d\t\t%s\t%s\t%s\t%.1f\t%s\t\n", p.Calls, p.Twill.adds(), p.By, p.Reference.adds(), p.AddRatio, p.Mark)
		fmt.Fprintf(w, "DELs per s, links gone / p99\t%d\t\t%s\t%s\t%s\t%.1f\t\t\n", p.Calls, p.Twill.dels(), p.By, p.Reference.dels(), p.DelRatio)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Printf("\nthe neighbour table was full %d times\n", r.Overflows)
	return nil
}

func (f cniFigures) String() string {
	s := fmt.Sprintf("%.1f / %.1f / %.1f", f.MedianMS, f.P99MS, f.CPUMS)
	if f.GoneMS > 0 {
		s += fmt.Sprintf(", %.1f", f.GoneMS)
	}
	return s
}

func (r cniRates) adds() string {
	return fmt.Sprintf("%.0f / %.1f / %.1f", r.AddsPerSecond, r.AddP99MS, r.AddCPUMS)
}

func (r cniRates) dels() string { return fmt.Sprintf("%.0f / %.1f", r.DelsPerSecond, r.DelP99MS) }

// readNeighbours returns how often the tables of IPv4 and IPv6 neighbours had no room.
func readNeighbours() (int64, error) {
	var full int64
	for _, table := range []string{"arp_cache", "ndisc_cache"} {
		b, err := os.ReadFile("/proc/thread-self/net/stat/" + table)
		if err != nil {
			return 0, err
		}
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		column := slices.Index(strings.Fields(lines[0]), "table_fulls")
		for _, cpu := range lines[1:] {
			if f := strings.Fields(cpu); column >= 0 && column < len(f) {
				n, err := strconv.ParseInt(f[column], 16, 64)
				if err != nil {
					return 0, fmt.Errorf("read /proc/net/stat/%s: %w", table, err)
				}
				full += n
			}
		}
	}
	return full, nil
}
