package store

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

func disconnected(e *Etcd, reason string) func() string {
	return func() string {
		s := e.Status()
		if !s.Connected && strings.Contains(s.Error, reason) {
			return ""
		}
		return fmt.Sprintf("status is not down for %q: %+v", reason, s)
	}
}

func connected(e *Etcd) func() string {
	return func() string {
		if s := e.Status(); !s.Connected || s.Error != "" {
			return fmt.Sprintf("status is not up: %+v", s)
		}
		return ""
	}
}

// TestBadContents corrects and spoils the configuration while it is watched, among
// keys and values that nobody can read.
func TestBadContents(t *testing.T) {
	nettest.CheckLeaks(t)
	r := newRig(t, nettest.EtcdOptions{})
	var log logs
	e := r.open(t, func(c *EtcdConfig) { c.Log = log.logger() })
	f := follow(t, e)

	shows := func(text string) {
		t.Helper()
		eventually(t, func() string {
			if s := e.Status(); !s.Connected || !strings.Contains(s.Error, text) {
				return fmt.Sprintf("status does not say %q: %+v", text, s)
			}
			return ""
		})
	}
	shows("/coreos.com/network/config: there is none (write one: etcdctl put")
	if _, err := e.Snapshot(t.Context(), overlay.Config{}); err == nil || !strings.Contains(err.Error(), "there is none") {
		t.Errorf("Snapshot without a configuration: %v", err)
	}
	r.put(t, "config", `{"Network":"10.5.0.0/16","SubnetLen":33}`)
	shows("SubnetLen: 33: must be 18..30")
	r.put(t, "config", `{{`)
	shows("not JSON")
	if f.count() != 0 {
		t.Errorf("emitted %s", describe(f.snapshot()))
	}

	s := f.reach(t, r.put(t, "config", `{"Network":"10.5.0.0/16","Sloth":1,"Backend":{"Type":"vxlan"}}`))
	if s.Config.Backend.Type != "vxlan" || len(s.Problems) != 0 {
		t.Errorf("after the correction: %s", describe(s))
	}
	good := s.Config
	if e.Status().Error != "" {
		t.Errorf("status: %+v", e.Status())
	}

	// Spoilt and deleted: the last good one stays, and it is said.
	for _, spoil := range []func() int64{
		func() int64 { return r.put(t, "config", `{"Network":"10.6.0.0"}`) },
		func() int64 { return r.del(t, "config") },
	} {
		s = f.reach(t, spoil())
		if !s.Config.Equal(good) || len(s.Problems) != 1 || s.Problems[0].Object != "config" || s.Problems[0].Remedy == "" {
			t.Errorf("after spoiling: %s", describe(s))
		}
		// netctl, which was not there before, borrows the daemon's.
		if fresh, err := e.Snapshot(t.Context(), good); err != nil || describe(fresh) != describe(s) {
			t.Errorf("a fresh Snapshot is\n%snot\n%s%v", describe(fresh), describe(s), err)
		}
	}
	f.reach(t, r.put(t, "config", goodConfig))

	r.put(t, "subnets/10.5.1.0-24", `{`)
	r.put(t, "subnets/10.5.2.0-24", nodeValue(2))
	r.put(t, "subnets/garbage", nodeValue(3))
	r.put(t, "subnets/10.5.3.0-24/x", nodeValue(3))
	r.put(t, "subnets/10.5.4.0-24&fd00:0::-64", nodeValue(4)) // spelt so by nobody
	r.put(t, "subnetsfoo/10.5.9.0-24", nodeValue(9))
	s = f.reach(t, r.put(t, "subnets/10.5.5.0-24&fd00:5::-64", nodeValue(5)))
	if len(s.Leases) != 3 || s.Leases[0].Err == nil || s.Leases[1].Err != nil || !s.Leases[2].V6.IsValid() || len(s.Problems) != 3 {
		t.Errorf("with garbage: %s", describe(s))
	}
	if fresh, err := e.Snapshot(t.Context(), overlay.Config{}); err != nil || describe(fresh) != describe(s) {
		t.Errorf("a fresh Snapshot is\n%snot\n%s%v", describe(fresh), describe(s), err)
	}
	for _, key := range []string{"garbage", "10.5.3.0-24/x", "10.5.4.0-24&fd00:0::-64", "10.5.1.0-24"} {
		s = f.reach(t, r.del(t, "subnets/"+key))
	}
	if len(s.Leases) != 2 || len(s.Problems) != 0 {
		t.Errorf("without garbage: %s", describe(s))
	}

	for text, times := range map[string]int{"unknown key Sloth is ignored": 1, "not JSON": 1, "there is none": 2, "etcd connected": 1} {
		if n := strings.Count(log.String(), text); n != times {
			t.Errorf("%q is logged %d times, not %d:\n%s", text, n, times, log.String())
		}
	}
}

// TestOutage stops etcd, changes everything behind the watcher's back, throws the
// history away and brings etcd back.
func TestOutage(t *testing.T) {
	nettest.CheckLeaks(t)
	r := newRig(t, nettest.EtcdOptions{})
	r.put(t, "config", goodConfig)
	for n := range 5 {
		r.put(t, fmt.Sprintf("subnets/10.5.%d.0-24", n), nodeValue(n))
	}
	var log logs
	e := r.open(t, func(c *EtcdConfig) { c.Log = log.logger() })
	f := follow(t, e)
	before := f.wait(t, "5 leases", func(s *overlay.Snapshot) bool { return len(s.Leases) == 5 })

	// The watcher's host is cut off, not etcd: its client still writes.
	if err := r.host.Cut(); err != nil {
		t.Fatal(err)
	}
	r.put(t, "subnets/10.5.1.0-24", nodeValue(101)) // another node behind a known subnet
	r.del(t, "subnets/10.5.2.0-24")
	last := r.put(t, "subnets/10.5.9.0-24", nodeValue(9))
	if err := r.Compact(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, disconnected(e, ""))
	if f.snapshot() != before {
		t.Errorf("emitted while cut off: %s", describe(f.snapshot()))
	}
	if err := r.host.Restore(); err != nil {
		t.Fatal(err)
	}
	after := f.reach(t, last)
	eventually(t, connected(e))
	if fresh, err := e.Snapshot(t.Context(), overlay.Config{}); err != nil || describe(fresh) != describe(after) {
		t.Errorf("a fresh Snapshot is\n%snot\n%s%v", describe(fresh), describe(after), err)
	}
	if before.Leases[0] != after.Leases[0] || before.Leases[1] == after.Leases[1] {
		t.Error("a lease is the same pointer if, and only if, it was not written")
	}

	// etcd goes away for 10 s, and is compacted as it comes back.
	if err := r.Stop(); err != nil {
		t.Fatal(err)
	}
	eventually(t, disconnected(e, "connection refused"))
	time.Sleep(10 * time.Second) // the outage itself: attempts must not pile up
	if err := r.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	back := time.Now()
	eventually(t, connected(e))
	t.Logf("connected again %v after etcd was ready; Watch ended with: %v", time.Since(back), f.errors())
	f.reach(t, r.put(t, "subnets/10.5.10.0-24", nodeValue(10)))
	if n := strings.Count(log.String(), "etcd unavailable"); n < 2 || n > 4 {
		t.Errorf("2 outages make %d log lines:\n%s", n, log.String())
	}
}

// TestRestoredFromBackup takes etcd back to an earlier state.
func TestRestoredFromBackup(t *testing.T) {
	nettest.CheckLeaks(t)
	r := newRig(t, nettest.EtcdOptions{})
	r.put(t, "config", goodConfig)
	r.put(t, "subnets/10.5.1.0-24", nodeValue(1))
	e := r.open(t)
	f := follow(t, e)
	for n := range 20 {
		f.reach(t, r.put(t, "subnets/10.5.2.0-24", nodeValue(n)))
	}
	// The whole state is lost, as if restored from nothing: revisions start anew.
	if err := r.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(r.lab.Dir, r.Members[0].Name)); err != nil {
		t.Fatal(err)
	}
	if err := r.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.put(t, "config", goodConfig)
	r.put(t, "subnets/10.5.3.0-24", nodeValue(3))
	s := f.wait(t, "the new lease", func(s *overlay.Snapshot) bool { return s.Lease(mustKey(t, "10.5.3.0-24")) != nil })
	if len(s.Leases) != 1 || s.Revision != 3 {
		t.Errorf("after a new start of etcd: %s", describe(s))
	}
}

func TestLeaderKilled(t *testing.T) {
	nettest.CheckLeaks(t)
	r := newRig(t, nettest.EtcdOptions{Members: 3})
	r.put(t, "config", goodConfig)
	e := r.open(t)
	f := follow(t, e)
	f.reach(t, r.put(t, "subnets/10.5.1.0-24", nodeValue(1)))
	leader, err := r.Leader(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := leader.Kill9(); err != nil {
		t.Fatal(err)
	}
	f.reach(t, r.put(t, "subnets/10.5.2.0-24", nodeValue(2)))
	eventually(t, connected(e))

	// One of three is no cluster: the survivor says that there is no leader.
	var other *nettest.Member
	for _, m := range r.Members {
		if m != leader {
			other = m
		}
	}
	if err := other.Kill9(); err != nil {
		t.Fatal(err)
	}
	eventually(t, disconnected(e, "no leader"))
	_, err = e.Do(t.Context(), overlay.Step{Act: overlay.Create, Lease: overlay.Lease{Subnets: mustKey(t, "10.5.3.0-24"), Attrs: node(t, 3)}})
	if err == nil {
		t.Error("a write without a quorum succeeded")
	}
	t.Logf("write without a quorum: %v", err)
	for _, m := range []*nettest.Member{leader, other} {
		if err := m.Start(); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.reach(t, r.put(t, "subnets/10.5.4.0-24", nodeValue(4)))
	eventually(t, connected(e))
	t.Logf("watch ended with: %v", f.errors())
}

// TestHungEtcd stops etcd's processes where they stand.
func TestHungEtcd(t *testing.T) {
	nettest.CheckLeaks(t)
	r := newRig(t, nettest.EtcdOptions{})
	r.put(t, "config", goodConfig)
	e := r.open(t)
	f := follow(t, e)
	f.reach(t, r.put(t, "subnets/10.5.1.0-24", nodeValue(1)))
	if err := r.Pause(); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	eventually(t, disconnected(e, ""))
	t.Logf("noticed after %v: %s", time.Since(begin), e.Status().Error)
	if err := r.Resume(); err != nil {
		t.Fatal(err)
	}
	eventually(t, connected(e))
	f.reach(t, r.put(t, "subnets/10.5.2.0-24", nodeValue(2)))
}

// TestManyPages reads more than a page, as many events come in between.
func TestManyPages(t *testing.T) {
	nettest.CheckLeaks(t)
	r := newRig(t, nettest.EtcdOptions{})
	const n = 2*pageSize + 1
	fill(t, r.Client(), n)
	e := r.open(t)
	s, err := e.Snapshot(t.Context(), overlay.Config{})
	if err != nil || len(s.Leases) != n {
		t.Fatalf("%d leases of %d: %v", len(s.Leases), n, err)
	}
	f := follow(t, e)
	last := f.reach(t, fill(t, r.Client(), 1000)) // 1,000 written again
	if fresh, err := e.Snapshot(t.Context(), overlay.Config{}); err != nil || describe(fresh) != describe(last) {
		t.Errorf("the folded Snapshot differs from a fresh one: %v", err)
	}
	t.Logf("1,000 writes: %d Snapshots", f.count())
}

func TestUnreachable(t *testing.T) {
	nettest.CheckLeaks(t)
	e, err := OpenEtcd(EtcdConfig{Endpoints: []string{"http://127.0.0.1:1"}})
	if err != nil {
		t.Fatal(err)
	}
	f := follow(t, e)
	eventually(t, disconnected(e, "read /coreos.com/network/config: etcd http://127.0.0.1:1: dial tcp 127.0.0.1:1: connect: connection refused; is etcd running there?"))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := e.Renew(ctx, overlay.Lease{Grant: 1}); err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("renew: %v", err)
	}
	if f.count() != 0 {
		t.Error("emitted something")
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	if _, err := e.Snapshot(ctx, overlay.Config{}); err == nil || !strings.Contains(err.Error(), "closed") {
		t.Errorf("read of a closed store: %v", err)
	}
}

// fill writes the configuration and n leases, and returns the last revision.
func fill(t testing.TB, c *clientv3.Client, n int) int64 {
	t.Helper()
	if _, err := c.Put(t.Context(), defaultPrefix+"/config", `{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}`); err != nil {
		t.Fatal(err)
	}
	grant, err := c.Grant(t.Context(), 3600)
	if err != nil {
		t.Fatal(err)
	}
	const batch = 100
	var revision int64
	for i := 0; i < n; i += batch {
		var ops []clientv3.Op
		for j := i; j < min(n, i+batch); j++ {
			key := fmt.Sprintf("%s/subnets/10.%d.%d.0-24", defaultPrefix, j>>8, j&255)
			ops = append(ops, clientv3.OpPut(key, nodeValue(j), clientv3.WithLease(grant.ID)))
		}
		r, err := c.Txn(t.Context()).Then(ops...).Commit()
		if err != nil {
			t.Fatal(err)
		}
		revision = r.Header.Revision
	}
	return revision
}
