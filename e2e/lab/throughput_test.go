package main

import (
	"errors"
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/twill-net/twill/pkg/nettest"
)

func TestMain(m *testing.M) {
	code := m.Run()
	if err := nettest.Sweep(); err != nil {
		panic(err)
	}
	os.Exit(code)
}

// even is a speed all of whose figures are x times base.
func even(x float64) speed {
	return speed{TCP1: 10 * x, TCP4: 20 * x, UDP: 100 * x, Packet: 5 * x, P50: 20 * x, P99: 50 * x}
}

// TestReport takes medians of ratios round by round, and compares with marks.
func TestReport(t *testing.T) {
	all := []*runner{
		// The machine had half its speed in the second round.
		{name: bare, rounds: []speed{even(1), even(0.5), even(1)}},
		{name: "vxlan", marks: marks{of: bare, rate: 0.8}, rounds: []speed{even(0.8), even(0.4), even(0.9)}},
		{name: "udp", marks: marks{of: "vxlan", rate: 0.8}, rounds: []speed{even(0.6), even(0.31), even(0.7)}},
		{name: "host-gw", marks: marks{of: bare, rate: 0.8, p50: 1.2}, err: errors.New("gone"), rounds: []speed{
			{TCP1: 9, TCP4: 10, UDP: 100, Packet: 5, P50: 25, P99: 50},
		}},
		{name: "bgp", err: errors.New("port taken")},
	}
	report := newReport(all)
	want := []throughputRow{
		{Backend: bare, Speed: even(1), Ratio: even(1)},
		{Backend: "vxlan", Speed: even(0.8)},
		{Backend: "udp", Below: []string{
			"TCP ×1 Gb/s is 0.78 of vxlan's, the mark is 0.80",
			"TCP ×4 Gb/s is 0.78 of vxlan's, the mark is 0.80",
			"UDP kpps is 0.78 of vxlan's, the mark is 0.80",
		}},
		{Backend: "host-gw", Error: "gone", Below: []string{
			"TCP ×4 Gb/s is 0.50 of bare's, the mark is 0.80",
			"p50 is 1.25 times bare's, the mark is 1.20",
		}},
		{Backend: "bgp", Error: "port taken"},
	}
	if len(report) != len(want) {
		t.Fatalf("%d rows, want %d", len(report), len(want))
	}
	for i, w := range want {
		got := report[i]
		if got.Backend != w.Backend || got.Error != w.Error || !slices.Equal(got.Below, w.Below) {
			t.Errorf("row %d is\n%+v, want\n%+v", i, got, w)
		}
	}
	if got := report[1].Ratio; got.TCP1 != 0.8 || got.P50 != 0.8 {
		t.Errorf("vxlan's ratios are %+v, want 0.8: that of its middle round", got)
	}
	if got := report[2].Speed.UDP; got != 60 {
		t.Errorf("udp carries %.0f kpps, want the median, 60", got)
	}
}

// TestRoad measures between two hosts; once the cable is cut, every measurement
// fails instead of hanging.
func TestRoad(t *testing.T) {
	nettest.CheckLeaks(t)
	_, hosts := nettest.NewHosts(t, 2)
	places, err := findSeats()
	if err != nil {
		t.Fatal(err)
	}
	r := road{from: hosts[0].NS, to: hosts[1].NS}
	for _, r.addr = range []netip.Addr{hosts[1].IPv4, hosts[1].IPv6} {
		got, err := r.measure(places)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range figures() {
			if *f.of(&got) <= 0 {
				t.Errorf("%s to %s is %v", f.title, r.addr, *f.of(&got))
			}
		}
		if got.Lost < 0 || got.Lost > 1 || got.P99 < got.P50 {
			t.Errorf("to %s: %+v", r.addr, got)
		}
	}
	if err := hosts[1].Cut(); err != nil {
		t.Fatal(err)
	}
	if got, err := r.stream(1); err == nil {
		t.Errorf("TCP over a cut cable: %.1f Gb/s", got)
	}
	var got speed
	err = onOwnThread(func() error { return r.flood(places, &got) })
	if err == nil {
		t.Errorf("UDP over a cut cable: %+v", got)
	}
}
