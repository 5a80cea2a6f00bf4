package main

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
)

// throughputReport is what came of all rounds.
type throughputReport struct {
	// Load is the machine's load average, of a minute, before the first round:
	// above a half per CPU or so, the figures are of the machine's other work too.
	Load float64         `json:"load_before"`
	Rows []throughputRow `json:"rows"`
}

// throughputRow is one backend: medians, and the medians of each round's ratio to
// the bare path of that round.
type throughputRow struct {
	Backend string   `json:"backend"`
	Speed   speed    `json:"speed"`
	Ratio   speed    `json:"ratio"` // udp_lost in it is without meaning: 0
	Below   []string `json:"below_mark,omitempty"`
	Error   string   `json:"error,omitempty"`

	user bool
}

// figure is one column of the report.
type figure struct {
	title string
	of    func(*speed) *float64
	rate  bool // more is better, and marks.rate is its mark
}

func figures() []figure {
	return []figure{
		{"TCP ×1 Gb/s", func(s *speed) *float64 { return &s.TCP1 }, true},
		{"TCP ×4 Gb/s", func(s *speed) *float64 { return &s.TCP4 }, true},
		{"UDP kpps", func(s *speed) *float64 { return &s.UDP }, true},
		{"CPU µs/packet", func(s *speed) *float64 { return &s.Packet }, false},
		{"p50 µs", func(s *speed) *float64 { return &s.P50 }, false},
		{"p99 µs", func(s *speed) *float64 { return &s.P99 }, false},
	}
}

// newReport takes the medians. The first runner is the bare path.
func newReport(all []*runner) []throughputRow {
	var rows []throughputRow
	for _, r := range all {
		row := throughputRow{Backend: r.name, user: r.user}
		if r.err != nil {
			row.Error = r.err.Error()
		}
		if len(r.rounds) > 0 {
			lost := func(s *speed) *float64 { return &s.Lost }
			row.Speed.Lost = median(values(r.rounds, lost))
			for _, f := range figures() {
				*f.of(&row.Speed) = median(values(r.rounds, f.of))
				*f.of(&row.Ratio) = median(ratios(r, all[0], f.of))
			}
			row.Below = r.belowMarks(all, &row.Ratio)
		}
		rows = append(rows, row)
	}
	return rows
}

// belowMarks names the figures that miss their mark.
func (r *runner) belowMarks(all []*runner, toBare *speed) []string {
	var below []string
	for _, f := range figures() {
		if !f.rate || r.marks.rate == 0 {
			continue
		}
		ref := slices.IndexFunc(all, func(x *runner) bool { return x.name == r.marks.of })
		got := cents(median(ratios(r, all[ref], f.of)))
		if got < r.marks.rate {
			below = append(below, fmt.Sprintf("%s is %.2f of %s's, the mark is %.2f", f.title, got, r.marks.of, r.marks.rate))
		}
	}
	if r.marks.p50 > 0 && cents(toBare.P50) > r.marks.p50 {
		below = append(below, fmt.Sprintf("p50 is %.2f times %s's, the mark is %.2f", toBare.P50, bare, r.marks.p50))
	}
	return below
}

// cents rounds a ratio to what is shown: 0.95 is not below 0.95.
func cents(ratio float64) float64 { return math.Round(100*ratio) / 100 }

func values(rounds []speed, of func(*speed) *float64) []float64 {
	var out []float64
	for i := range rounds {
		out = append(out, *of(&rounds[i]))
	}
	return out
}

// ratios are those of the rounds that both have. A runner that fails is measured
// no more, so the n-th of one is of the same round as the n-th of the other.
func ratios(r, ref *runner, of func(*speed) *float64) []float64 {
	var out []float64
	for i := range min(len(r.rounds), len(ref.rounds)) {
		out = append(out, *of(&r.rounds[i])/(*of(&ref.rounds[i])))
	}
	return out
}

// median returns 0 for no value.
func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	slices.Sort(v)
	return v[len(v)/2]
}

func printReport(report throughputReport, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(os.Stdout).Encode(report)
	}
	return report.print()
}

func (report throughputReport) print() error {
	fmt.Printf("between pods on two hosts, with the ratio to the bare veth path: %d CPUs, load %.1f before\n\n", runtime.NumCPU(), report.Load)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(w, "\t")
	for _, f := range figures() {
		fmt.Fprintf(w, "%s\t\t", f.title)
	}
	fmt.Fprintln(w, "UDP lost\t")
	for _, row := range report.Rows {
		if row.Speed == (speed{}) {
			continue
		}
		fmt.Fprintf(w, "%s\t", row.Backend)
		for _, f := range figures() {
			if f.of(&row.Speed) == &row.Speed.Packet && row.user {
				fmt.Fprint(w, "-\t-\t") // most of the road is in another process
				continue
			}
			fmt.Fprintf(w, "%.1f\t%.2f\t", *f.of(&row.Speed), *f.of(&row.Ratio))
		}
		fmt.Fprintf(w, "%.1f %%\t\n", 100*row.Speed.Lost)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Println()
	for _, row := range report.Rows {
		if len(row.Below) > 0 {
			fmt.Printf("below mark: %s: %s\n", row.Backend, strings.Join(row.Below, "; "))
		}
		if row.Error != "" {
			fmt.Printf("broken off: %s: %s\n", row.Backend, row.Error)
		}
	}
	return nil
}
