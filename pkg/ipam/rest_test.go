package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// node is a node whose addresses rest for a minute and are kept for their pods.
// The clock of addresses is the time their files were written.
type node struct {
	*testing.T
	Dir
	sets     [][]Range
	sticky   bool
	coolDown time.Duration
}

// newNode has the addresses .2 to .6.
func newNode(t *testing.T, sticky bool, coolDown time.Duration) *node {
	return &node{T: t, Dir: NewDir(t.TempDir(), "net"), sets: newSets("198.18.1.0/29"), sticky: sticky, coolDown: coolDown}
}

func (n *node) request(pod string) Request {
	return Request{Owner: Owner{"of-" + pod, "eth0"}, Sets: n.sets, Pod: pod, Sticky: n.sticky, CoolDown: n.coolDown}
}

// add returns the last part of the pod's addresses.
func (n *node) add(pod string, wanted ...netip.Addr) string {
	n.Helper()
	req := n.request(pod)
	req.Wanted = wanted
	got, err := n.Allocate(req)
	var full *ExhaustedError
	if errors.As(err, &full) {
		return fmt.Sprintf("%d in use, %d at rest", full.InUse, full.AtRest)
	}
	if err != nil {
		n.Fatal(err)
	}
	var out []string
	for _, a := range got {
		s := a.Prefix.Addr().String()
		out = append(out, s[strings.LastIndexAny(s, ".:")+1:])
	}
	return strings.Join(out, " ")
}

func (n *node) del(pods ...string) {
	n.Helper()
	for _, pod := range pods {
		if err := n.Release(Owner{"of-" + pod, "eth0"}, nil, ReleaseOptions{Pod: pod, Sticky: n.sticky, CoolDown: n.coolDown}); err != nil {
			n.Fatal(err)
		}
	}
}

func (n *node) want(got, want string) {
	n.Helper()
	if got != want {
		n.Fatalf("got %s, want %s", got, want)
	}
}

// wait lets time go by for what rests.
func (n *node) wait(d time.Duration) {
	n.Helper()
	for _, name := range append(n.notes("*", "*"), n.notes("tidied")...) {
		st, err := os.Lstat(name)
		if err != nil {
			n.Fatal(err)
		}
		if err := os.Chtimes(name, time.Time{}, st.ModTime().Add(-d)); err != nil {
			n.Fatal(err)
		}
	}
}

func (n *node) notes(pattern ...string) []string {
	n.Helper()
	names, err := filepath.Glob(filepath.Join(append([]string{n.state}, pattern...)...))
	if err != nil {
		n.Fatal(err)
	}
	return names
}

func TestCoolDown(t *testing.T) {
	n := newNode(t, false, time.Minute)
	for i := range 5 {
		n.want(n.add(fmt.Sprint("default/p", i)), fmt.Sprint(i+2))
	}
	n.want(n.add("default/more"), "5 in use, 0 at rest")
	n.del("default/p1")
	n.wait(50 * time.Second)
	n.del("default/p2")
	n.want(n.add("default/more"), "3 in use, 2 at rest")
	n.want(n.add("default/p1"), "3 in use, 2 at rest") // no pod has a name that helps
	var full *ExhaustedError
	if err := n.Free(n.request("")); !errors.As(err, &full) || time.Until(full.Next).Round(time.Second) != 10*time.Second ||
		!strings.Contains(err.Error(), "2 at rest, the next one free at 20") {
		t.Errorf("status: %v", err)
	}
	if err := n.Free(Request{Sets: n.sets}); err != nil {
		t.Errorf("status without cool-down: %v", err)
	}
	n.wait(15 * time.Second)
	if err := n.Free(n.request("")); err != nil {
		t.Errorf("status: %v", err)
	}
	n.want(n.add("default/more"), "3")
	n.want(n.add("default/even-more"), "4 in use, 1 at rest")
	if got := n.notes("rest", "*"); !slices.Equal(got, []string{n.restFile(netip.MustParseAddr("198.18.1.4"))}) {
		t.Errorf("at rest: %v", got)
	}
	// Who asks for an address knows what he does.
	n.want(n.add("default/operator", addrs("198.18.1.4")...), "4")
	if got := n.notes("rest", "*"); len(got) != 0 {
		t.Errorf("at rest: %v", got)
	}
	// Switched off, it is over at once.
	n.del("default/operator")
	n.coolDown = 0
	n.want(n.add("default/off"), "4")
}

// No address rests for ever because a clock was wrong.
func TestClock(t *testing.T) {
	n := newNode(t, false, time.Minute)
	n.sets = newSets("198.18.1.0/30")
	n.want(n.add("default/p"), "2")
	for _, tt := range []struct {
		passed time.Duration
		want   string
	}{
		{0, "0 in use, 1 at rest"},
		{59 * time.Second, "0 in use, 1 at rest"},
		{61 * time.Second, "2"},
		{-30 * time.Second, "0 in use, 1 at rest"}, // set back a little: it rests a little longer
		{-61 * time.Second, "2"},
		{50 * 365 * 24 * time.Hour, "2"},
		{-50 * 365 * 24 * time.Hour, "2"},
	} {
		n.del("default/p")
		n.wait(tt.passed)
		if got := n.add("default/q"); got != tt.want {
			t.Errorf("%s after the release: %s, want %s", tt.passed, got, tt.want)
		}
		n.del("default/q")
		n.wait(time.Hour)
		n.want(n.add("default/p"), "2")
	}
}

// An address that is in use cannot rest, whatever a killed process left.
func TestRestOfTheKilled(t *testing.T) {
	n := newNode(t, true, time.Minute)
	n.want(n.add("default/a"), "2")
	n.del("default/a")
	rest := n.restFile(netip.MustParseAddr("198.18.1.2"))
	for content, want := range map[string]string{
		"default/a/eth0\n":        "2",
		"":                        "3", // not known to be its own
		"default/a/et":            "3",
		"default/other/eth0\n":    "3",
		"\n":                      "3",
		"default/a/eth0\njunk\n_": "2",
	} {
		writeFile(t, rest, content)
		if got := n.add("default/a"); got != want {
			t.Errorf("%q: %s, want %s", content, got, want)
		}
		n.del("default/a")
		n.wait(time.Hour)
		writeFile(t, n.stickyFile("default/a/eth0"), "default/a/eth0\n198.18.1.2\n")
		writeFile(t, n.lastFile(0), "198.18.1.2")
	}
	writeFile(t, rest, "default/a/eth0\n")
	for content, want := range map[string]string{
		"default/a/eth0\n198.18.1.2\n":      "2",
		"default/a/eth0\n198.18.1.2":        "3", // may have been .20
		"default/a/eth0":                    "3",
		"":                                  "3",
		"default/other/eth0\n198.18.1.2\n":  "3", // the same hash
		"default/a/eth0\n1\n\n198.18.1.2\n": "2",
	} {
		writeFile(t, n.stickyFile("default/a/eth0"), content)
		writeFile(t, n.lastFile(0), "198.18.1.2")
		if got := n.add("default/a"); got != want {
			t.Errorf("%q: %s, want %s", content, got, want)
		}
		n.del("default/a")
		n.wait(time.Hour)
		writeFile(t, rest, "default/a/eth0\n")
	}
}

// In a network so wide that no address is given twice, nothing piles up.
func TestGarbage(t *testing.T) {
	n := newNode(t, true, time.Minute)
	n.sets = newSets("fd00::/64")
	const pods = maxKept + 200
	for i := range pods {
		n.want(n.add(fmt.Sprint("default/p", i)), fmt.Sprintf("%x", i+2))
		n.del(fmt.Sprint("default/p", i))
	}
	if got := len(n.notes("rest", "*")); got != pods {
		t.Fatalf("%d at rest, want %d", got, pods)
	}
	n.wait(tidyEvery + time.Second)
	n.want(n.add("default/q"), fmt.Sprintf("%x", pods+2))
	n.del("default/q")
	if rest, sticky := len(n.notes("rest", "*")), len(n.notes("sticky", "*")); rest != maxKept || sticky != maxKept {
		t.Errorf("%d addresses kept for %d pods, want %d", rest, sticky, maxKept)
	}
	n.want(n.add("default/q"), fmt.Sprintf("%x", pods+2))
	n.want(n.add("default/p0"), fmt.Sprintf("%x", pods+3)) // was forgotten

	// Without pods' names, what has rested goes.
	n.sticky = false
	if err := os.RemoveAll(filepath.Join(n.state, "sticky")); err != nil {
		t.Fatal(err)
	}
	n.wait(tidyEvery + time.Second)
	n.del("default/q", "default/p0")
	if rest := n.notes("rest", "*"); len(rest) != 2 {
		t.Errorf("at rest: %v", rest)
	}
}

// What is swept rests as well, if anything does.
func TestSweepRests(t *testing.T) {
	n := newNode(t, false, time.Minute)
	for i := range 5 {
		n.add(fmt.Sprint("default/p", i))
	}
	n.del("default/p0")
	freed, err := n.Sweep(func(o Owner) bool { return o.ContainerID != "of-default/p1" })
	if err != nil || fmt.Sprint(freed) != "[198.18.1.3]" {
		t.Fatalf("freed %v, %v", freed, err)
	}
	n.want(n.add("default/q"), "3 in use, 2 at rest")
	n.wait(time.Hour)
	n.want(n.add("default/q"), "2")
	n.wait(MaxCoolDown)
	if _, err := n.Sweep(func(Owner) bool { return true }); err != nil {
		t.Fatal(err)
	}
	if got := n.notes("rest", "*"); len(got) != 0 {
		t.Errorf("at rest: %v", got)
	}
}

// A long run of addresses at rest is jumped over, too.
func TestRestingBlock(t *testing.T) {
	n := newNode(t, false, time.Minute)
	n.sets = newSets("198.18.1.0/24")
	for i := range 253 {
		n.add(fmt.Sprint("default/p", i))
	}
	for i := range 252 {
		n.del(fmt.Sprint("default/p", i))
	}
	n.want(n.add("default/q"), "1 in use, 252 at rest")
	if err := os.Remove(n.restFile(netip.MustParseAddr("198.18.1.200"))); err != nil {
		t.Fatal(err)
	}
	n.want(n.add("default/q"), "200")
	a := netip.MustParseAddr("198.18.1.100")
	if err := os.Chtimes(n.restFile(a), time.Time{}, time.Now().Add(-time.Hour)); err != nil {
		t.Fatal(err)
	}
	n.want(n.add("default/r"), "100")
}

func TestBadCoolDown(t *testing.T) {
	d := NewDir(t.TempDir(), "net")
	for _, c := range []time.Duration{-1, MaxCoolDown + 1} {
		if _, err := d.Allocate(Request{Owner: Owner{"c", "eth0"}, Sets: onlyV4, CoolDown: c}); err == nil || !strings.Contains(err.Error(), "between 0s and 24h") {
			t.Errorf("%s: %v", c, err)
		}
	}
}
