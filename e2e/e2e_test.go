package e2e

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/nettest"
)

// newCluster makes a cluster for one test. When the test ends, no log may tell of
// a data race or a panic.
func newCluster(t *testing.T, opts Options) (*Cluster, context.Context) {
	t.Helper()
	lab := nettest.NewT(t)
	t.Cleanup(func() { checkLogs(t, lab) })
	c, err := New(t.Context(), lab, opts)
	if err != nil {
		t.Fatal(err)
	}
	return c, t.Context()
}

// startCluster is newCluster with every daemon running and in sync.
func startCluster(t *testing.T, opts Options) (*Cluster, context.Context) {
	t.Helper()
	c, ctx := newCluster(t, opts)
	must(t, c.Start(ctx))
	must(t, c.WaitPeers(ctx))
	return c, ctx
}

func checkLogs(t *testing.T, lab *nettest.Lab) {
	logs, err := filepath.Glob(filepath.Join(lab.Dir, "log", "*"))
	if err != nil || len(logs) == 0 {
		t.Errorf("no logs in %s: %v", lab.Dir, err)
	}
	for _, file := range logs {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Error(err)
		}
		for _, bad := range []string{"panic: ", "goroutine 1 ["} {
			if strings.Contains(string(b), bad) {
				t.Errorf("%s tells of %q", filepath.Base(file), bad)
			}
		}
		for _, race := range races(string(b)) {
			t.Errorf("%s tells of a data race:\n%s", filepath.Base(file), race)
		}
	}
}

// gobgpRace begins both stacks of a race that gobgp 4.8 has with itself: ListPath
// reads a path's stale flag while the session's goroutine sets it. Nothing is lost
// by it: an event follows, and the table is read again.
const gobgpRace = "github.com/osrg/gobgp/v4/"

// races returns the reports of the race detector, gobgp's own apart.
func races(log string) []string {
	var out []string
	for _, report := range strings.Split(log, "==================") {
		if !strings.Contains(report, "DATA RACE") {
			continue
		}
		gobgp, other := 0, 0
		lines := strings.Split(report, "\n")
		for i, line := range lines {
			if !strings.Contains(line, " at 0x") {
				continue
			}
			switch frame := firstFrame(lines[i+1:]); {
			case strings.HasPrefix(frame, gobgpRace):
				gobgp++
			case frame != "[failed to restore the stack]": // it was too long ago
				other++
			}
		}
		if gobgp == 0 || other > 0 {
			out = append(out, report)
		}
	}
	return out
}

// firstFrame is the function at the top of a stack, with those of the standard library
// which it called left out.
func firstFrame(stack []string) string {
	for _, line := range stack {
		function, isFrame := strings.CutPrefix(line, "  ")
		if !isFrame {
			return ""
		}
		// The first part of a module's path is a host's name.
		path, _, _ := strings.Cut(function, "(")
		host, _, module := strings.Cut(path, "/")
		if strings.HasPrefix(path, "[") || strings.HasPrefix(path, "main.") || module && strings.Contains(host, ".") {
			return function
		}
	}
	return ""
}

// TestRaces has what the race detector prints.
func TestRaces(t *testing.T) {
	report := func(first, second string) string {
		return "==================\nWARNING: DATA RACE\nRead at 0x00c0001 by goroutine 7:\n" + first +
			"\nPrevious write at 0x00c0001 by goroutine 8:\n" + second + "\nGoroutine 7 (running) created at:\n  main.main()\n==================\n"
	}
	const (
		gobgp   = "  github.com/osrg/gobgp/v4/internal/pkg/table.(*Path).IsStale()\n      path.go:1 +0x1\n  github.com/twill-net/twill/pkg/speaker.(*Speaker).read()\n      rib.go:2 +0x2\n"
		inMap   = "  runtime.mapaccess2()\n      map.go:1 +0x1\n" + gobgp
		inSort  = "  internal/abi.X()\n      x.go:3 +0x1\n  slices.SortFunc[go.shape.[]*uint8]()\n      sort.go:1 +0x1\n"
		ours    = "  github.com/twill-net/twill/pkg/speaker.(*Speaker).read()\n      rib.go:2 +0x2\n" + gobgp
		unknown = "  [failed to restore the stack]\n"
	)
	for _, x := range []struct {
		first, second string
		want          int
	}{{gobgp, gobgp, 0}, {inMap, gobgp, 0}, {inSort + gobgp, gobgp, 0}, {inSort + ours, gobgp, 1}, {gobgp, unknown, 0}, {unknown, unknown, 1}, {unknown, ours, 1}, {gobgp, ours, 1}, {ours, ours, 1}} {
		if got := len(races("text\n" + report(x.first, x.second) + "text\n")); got != x.want {
			t.Errorf("%d races, want %d, in\n%s", got, x.want, report(x.first, x.second))
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// onePod adds a pod to each node.
func onePod(t *testing.T, c *Cluster) []*Pod {
	t.Helper()
	var pods []*Pod
	for _, n := range c.Nodes {
		p, err := n.AddPod("p1")
		must(t, err)
		pods = append(pods, p)
	}
	return pods
}
