package e2e

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// TestNoLeak has peers come, change and go, and etcd with them: afterwards the
// daemon holds no more than before, and does nothing. CheckLeaks looks after what
// the lab leaves on this machine.
func TestNoLeak(t *testing.T) {
	nettest.CheckLeaks(t)
	c, ctx := startCluster(t, Options{Hosts: 1, Config: ConfigIPv4})
	n := c.Nodes[0]
	held := func(name string) float64 {
		v, err := n.Metric(name)
		must(t, err)
		return v
	}
	// The first of everything is no leak: a renewal, an event, a reconnection.
	churn(t, c, 3)
	reconnect(t, c, 1)
	good := newObserver(t, n).look(t)
	goroutines, fds := held("go_goroutines"), held("process_open_fds")

	churn(t, c, 67)
	reconnect(t, c, 20)
	var g, f float64
	if Eventually(ctx, func() bool {
		g, f = held("go_goroutines"), held("process_open_fds")
		return g <= goroutines && f <= fds
	}) != nil {
		t.Errorf("goroutines %.0f before, %.0f after; files %.0f before, %.0f after", goroutines, g, fds, f)
	}
	t.Logf("goroutines %.0f before, %.0f after; files %.0f before, %.0f after", goroutines, g, fds, f)
	must(t, n.WaitInSync(ctx))
	if plan, _ := overlay.Diff(newObserver(t, n).look(t), good); len(plan) > 0 {
		t.Errorf("the kernel is not as before:\n%s", plan)
	}
	if d := drifts(t, n); len(d) > 0 {
		t.Errorf("%d drifts that nobody caused, the first: %+v", len(d), d[0])
	}
	checkIdle(t, n)
}

// churn adds, changes and removes this many peers, three lease changes each.
func churn(t *testing.T, c *Cluster, peers int) {
	t.Helper()
	client := c.Etcd.Client()
	for i := range peers {
		// Nodes draw their subnets from the first hundred.
		subnet := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 5, byte(120 + i), 0}), 24)
		key, value := peerLease(subnet, "203.0.113.1", overlay.MAC{2, 0, 0, 0, 0, byte(i)})
		_, changed := peerLease(subnet, "203.0.113.2", overlay.MAC{2, 0, 0, 0, 1, byte(i)})
		must(t, putLease(t.Context(), c, key, value))
		_, err := client.Put(t.Context(), key, changed, clientv3.WithIgnoreLease())
		must(t, err)
		_, err = client.Delete(t.Context(), key)
		must(t, err)
	}
	must(t, c.Nodes[0].WaitInSync(t.Context()))
}

// reconnect kills etcd and starts it again; each time the daemon must notice a
// peer that came meanwhile.
func reconnect(t *testing.T, c *Cluster, times int) {
	t.Helper()
	n := c.Nodes[0]
	for i := range times {
		must(t, c.Etcd.Members[0].Kill9())
		must(t, c.Etcd.Start(t.Context()))
		key, value := peerLease(netip.MustParsePrefix("10.5.240.0/24"), fmt.Sprintf("203.0.113.%d", i+1), overlay.MAC{2, 0, 0, 0, 2, byte(i)})
		must(t, putLease(t.Context(), c, key, value))
		must(t, n.WaitStatus(t.Context(), "aware of the peer", func(s overlay.Status) bool { return s.Store.Connected && s.Peers == 1 }))
		_, err := c.Etcd.Client().Delete(t.Context(), key)
		must(t, err)
		must(t, n.WaitStatus(t.Context(), "rid of the peer", func(s overlay.Status) bool { return s.Peers == 0 }))
	}
	must(t, n.WaitInSync(t.Context()))
}

// checkIdle fails if the loop turns without a reason: in 5 seconds there is at
// most one pass of the ticker.
func checkIdle(t *testing.T, n *Node) {
	t.Helper()
	passes := func() (sum float64) {
		for _, kind := range []string{"full", "store"} {
			v, err := n.Metric(fmt.Sprintf("twill_passes_total{kind=%q}", kind))
			must(t, err)
			sum += v
		}
		return sum
	}
	before := passes()
	cpu, err := n.Metric("process_cpu_seconds_total")
	must(t, err)
	time.Sleep(5 * time.Second)
	more := passes() - before
	now, err := n.Metric("process_cpu_seconds_total")
	must(t, err)
	t.Logf("idle for 5 s: %.0f passes, %.3f s of CPU", more, now-cpu)
	if more > 1 {
		t.Errorf("%.0f passes in 5 s while nothing happened", more)
	}
}
