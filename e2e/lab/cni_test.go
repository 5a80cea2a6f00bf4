package main

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/twill-net/twill/pkg/nettest"
)

// TestCNIBench measures little, but everything: each part runs, and what it says
// holds together.
func TestCNIBench(t *testing.T) {
	nettest.CheckLeaks(t)
	report, err := benchCNI(t.Context(), cniOptions{pods: []int{1, 3}, most: 5, rounds: 2, calls: []int{1, 4}})
	if err != nil {
		t.Fatal(err)
	}
	if err := report.print(); err != nil {
		t.Error(err)
	}
	var got []string
	for _, r := range report.Rows {
		got = append(got, fmt.Sprintf("%s/%d/%s", r.Case, r.Pods, r.Verb))
		figures := []cniFigures{r.Twill}
		if r.Reference != nil {
			figures = append(figures, *r.Reference)
		}
		for _, f := range figures {
			if f.MedianMS <= 0 || f.P99MS < f.MedianMS || f.CPUMS <= 0 || r.Verb == "DEL" && f.GoneMS < f.MedianMS {
				t.Errorf("%s: %+v", got[len(got)-1], f)
			}
		}
	}
	var want []string
	for _, r := range []string{
		caseNoTwill + "/1", caseDual + "/1", "host port, nftables/1", "host port, iptables/1",
		caseBridged + "/1", caseBridged + "/3", caseBridged + "/5", caseRouted + "/1", caseRouted + "/3", caseRouted + "/5",
	} {
		want = append(want, r+"/ADD", r+"/DEL")
	}
	if slices.Sort(got); !slices.Equal(got, slices.Sorted(slices.Values(want))) {
		t.Errorf("rows %s, want %s", strings.Join(got, ", "), strings.Join(want, ", "))
	}
	for i, p := range report.Parallel {
		if p.Calls != []int{1, 4}[i] || p.Twill.AddsPerSecond <= 0 || p.Reference.DelsPerSecond <= 0 || p.AddRatio <= 0 {
			t.Errorf("%+v", p)
		}
	}
	if len(report.Floor) != 3 || len(report.Parallel) != 2 {
		t.Errorf("%d floors, %d numbers of calls", len(report.Floor), len(report.Parallel))
	}
}

// A mark is met or missed by what was measured.
func TestCNIMarks(t *testing.T) {
	series := func(add, del int) *cniSeries {
		s := &cniSeries{}
		for i := range 5 {
			at := func(ms int) cniCall { return cniCall{wall: time.Duration(ms+i-2) * time.Millisecond} }
			s.adds, s.dels = append(s.adds, at(add)), append(s.dels, at(del))
		}
		return s
	}
	var r cniReport
	for _, x := range []struct {
		name      string
		pods      int
		twill     *cniSeries
		reference *cniSeries
	}{
		{caseBridged, 1, series(40, 20), series(100, 100)},
		{caseBridged, 100, series(60, 20), series(100, 100)},
		{caseBridged, 500, series(42, 21), series(200, 100)},
		{caseBridged, 1000, series(47, 20), nil},
		{caseRouted, 1, series(90, 90), series(100, 100)},
		{caseRouted, 2000, series(100, 90), nil},
		{"host port, nftables", 1, series(20, 30), series(100, 100)},
		{caseNoTwill, 1, series(40, 90), series(100, 100)},
	} {
		r.addRows(cniRow{Case: x.name, Pods: x.pods, By: byBridge}, x.twill, x.reference)
	}
	var got []string
	for _, row := range r.Rows {
		if row.Mark != nil || row.Flat != nil {
			got = append(got, strings.TrimSpace(fmt.Sprintf("%s %d %s %s %s", row.Case, row.Pods, row.Verb, row.Mark, row.Flat)))
		}
	}
	want := []string{
		"bridged 1 ADD ≤ 0.4 met", "bridged 1 DEL ≤ 0.2 met", "bridged 100 DEL ≤ 0.2 met",
		"bridged 500 ADD ≤ 0.2 missed", "bridged 500 DEL ≤ 0.2 missed", "bridged 1000 ADD  ≤ 1.15 missed", "routed 2000 ADD  ≤ 1.15 met",
		"host port, nftables 1 ADD ≤ 0.2 met", "host port, nftables 1 DEL ≤ 0.2 missed",
	}
	if !slices.Equal(got, want) {
		t.Errorf("marks\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}

	turn := func(pods int, took time.Duration) []cniTurn {
		return []cniTurn{{adds: make([]cniCall, pods), dels: make([]cniCall, pods), add: took, del: took}}
	}
	r.addParallel(8, turn(10, time.Second), turn(10, time.Second))
	r.addParallel(32, turn(39, time.Second), turn(10, time.Second))
	r.addParallel(32, turn(40, time.Second), turn(10, time.Second))
	for i, want := range []string{"", "≥ 4 missed", "≥ 4 met"} {
		if got := r.Parallel[i].Mark.String(); got != want {
			t.Errorf("%+v: mark %q, want %q", r.Parallel[i], got, want)
		}
	}
}

func TestCNIOptions(t *testing.T) {
	if err := defaultCNI.check(); err != nil {
		t.Error(err)
	}
	for _, o := range []cniOptions{
		{pods: []int{0}, most: 5, rounds: 1, calls: []int{1}},
		{pods: []int{5, 1}, most: 5, rounds: 1, calls: []int{1}},
		{pods: []int{1001}, most: 2000, rounds: 1, calls: []int{1}},
		{pods: []int{5}, most: 4, rounds: 1, calls: []int{1}},
		{pods: []int{5}, most: 5000, rounds: 1, calls: []int{1}},
		{pods: []int{5}, most: 5, rounds: 0, calls: []int{1}},
		{pods: []int{5}, most: 5, rounds: 1, calls: []int{129}},
		{pods: []int{5}, most: 5, rounds: 1},
		{most: 5, rounds: 1, calls: []int{1}},
	} {
		if err := o.check(); err == nil || !strings.Contains(err.Error(), "--") {
			t.Errorf("%+v: error %v, must name the flag", o, err)
		}
	}
}
