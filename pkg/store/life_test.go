package store

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// claim asks Next and does what it says until there is nothing to do.
func claim(t testing.TB, e *Etcd, f *follower, c overlay.Claim) (overlay.Lease, error) {
	t.Helper()
	for {
		s := f.wait(t, "anything", func(*overlay.Snapshot) bool { return true })
		step, err := c.Next(s.Config, s.Leases, rand.IntN)
		if err != nil || step.Act == overlay.Hold {
			return step.Lease, err
		}
		if _, err := e.Do(t.Context(), step); err != nil {
			return step.Lease, err
		}
		if step.Act == overlay.Create {
			c.Prefer = step.Lease.Subnets
		}
		// Won or lost, somebody has written since.
		f.reach(t, s.Revision+1)
	}
}

func TestRaceForSubnets(t *testing.T) {
	nettest.CheckLeaks(t)
	r := newRig(t, nettest.EtcdOptions{})
	const nodes = 20
	r.put(t, "config", fmt.Sprintf(`{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.%d.0","Backend":{"Type":"vxlan"}}`, nodes))

	var wg sync.WaitGroup
	var mu sync.Mutex
	got := map[string]int{}
	for n := range nodes {
		e := r.open(t)
		f := follow(t, e)
		wg.Go(func() {
			l, err := claim(t, e, f, overlay.Claim{Attrs: node(t, n)})
			mu.Lock()
			defer mu.Unlock()
			got[l.Key()]++
			if err != nil {
				t.Errorf("node %d: %v", n, err)
			}
		})
	}
	wg.Wait()
	if len(got) != nodes {
		t.Errorf("%d nodes have %d subnets: %v", nodes, len(got), got)
	}

	e := r.open(t)
	_, err := claim(t, e, follow(t, e), overlay.Claim{Attrs: node(t, nodes)})
	if err == nil || !strings.Contains(err.Error(), "no free /24 subnet from 10.5.1.0 to 10.5.20.0") {
		t.Errorf("claim in a full pool: %v", err)
	}
	// The lost races have left no etcd lease behind.
	leases, err := r.Client().Leases(t.Context())
	if err != nil || len(leases.Leases) != nodes {
		t.Errorf("%d etcd leases for %d keys: %v", len(leases.Leases), nodes, err)
	}
}

func TestLifeOfLease(t *testing.T) {
	nettest.CheckLeaks(t)
	r := newRig(t, nettest.EtcdOptions{})
	r.put(t, "config", goodConfig)
	e := r.open(t, func(c *EtcdConfig) { c.TTL = 300 * time.Second })
	f := follow(t, e)
	c := overlay.Claim{Attrs: node(t, 1)}
	l := mustClaim(t, e, f, c)

	kv := r.get(t, "subnets/"+l.Key())
	if string(kv) != nodeValue(1) {
		t.Errorf("the stored value is %s", kv)
	}

	// Renewal: the time starts anew, the key is not written, nobody wakes up.
	before, emitted := f.snapshot(), f.count()
	ttl, err := e.Renew(t.Context(), l)
	if err != nil || ttl != 300*time.Second {
		t.Errorf("renew: %v, %v", ttl, err)
	}
	fresh, err := e.Snapshot(t.Context(), overlay.Config{})
	if err != nil || fresh.Revision != before.Revision || f.count() != emitted {
		t.Errorf("after the renewal: revision %d, %d emitted, %v; before: %d, %d", fresh.Revision, f.count(), err, before.Revision, emitted)
	}
	left, err := e.Expiry(t.Context(), fresh.Leases)
	if err != nil || len(left) != 1 || left[0] <= 0 || left[0] > 300*time.Second {
		t.Errorf("expiry: %v, %v", left, err)
	}

	// What the node publishes changes; the key keeps its etcd lease.
	c.Attrs, c.Prefer, c.Held = node(t, 2), l.Subnets, true
	c.Attrs.Data, c.Attrs.VTEP = l.Data, l.VTEP // a new address, the same device
	moved := mustClaim(t, e, f, c)
	if moved.Key() != l.Key() || moved.Grant != l.Grant || moved.PublicIP != c.Attrs.PublicIP {
		t.Errorf("after a change of address: %+v, before: %+v", moved, l)
	}

	// The key is deleted: the same subnet is taken again, with a new etcd lease.
	f.reach(t, r.del(t, "subnets/"+l.Key()))
	again := mustClaim(t, e, f, c)
	if again.Key() != l.Key() || again.Grant == l.Grant || again.Grant == 0 {
		t.Errorf("after the deletion: %+v, before: %+v", again, l)
	}

	// The etcd lease is revoked: the renewal says so, and the key is made anew.
	if _, err := r.Client().Revoke(t.Context(), clientv3.LeaseID(again.Grant)); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Renew(t.Context(), again); !errors.Is(err, ErrLeaseGone) {
		t.Errorf("renewal of a revoked lease: %v", err)
	}
	f.wait(t, "no lease", func(s *overlay.Snapshot) bool { return len(s.Leases) == 0 })
	last := mustClaim(t, e, f, c)
	if last.Key() != l.Key() {
		t.Errorf("after the revocation: %s, before: %s", last.Key(), l.Key())
	}

	// Removal takes the etcd lease along.
	if done, err := e.Do(t.Context(), overlay.Step{Act: overlay.Remove, Lease: last}); !done || err != nil {
		t.Errorf("remove: %v, %v", done, err)
	}
	f.wait(t, "no lease", func(s *overlay.Snapshot) bool { return len(s.Leases) == 0 })
	if _, err := e.Renew(t.Context(), last); !errors.Is(err, ErrLeaseGone) {
		t.Errorf("renewal of a removed lease: %v", err)
	}
	if err := f.errors(); err != nil {
		t.Error(err)
	}
}

func TestReservationStays(t *testing.T) {
	nettest.CheckLeaks(t)
	r := newRig(t, nettest.EtcdOptions{})
	r.put(t, "config", goodConfig)
	r.put(t, "subnets/10.5.77.0-24", `{"PublicIP":"198.18.0.1","PublicIPv6":null}`)
	e := r.open(t)
	f := follow(t, e)
	l := mustClaim(t, e, f, overlay.Claim{Attrs: node(t, 1)})
	if l.Key() != "10.5.77.0-24" || !l.Reserved() || l.VTEP.VNI != 1 {
		t.Errorf("the reservation became %+v", l)
	}
	before := f.snapshot().Revision
	if ttl, err := e.Renew(t.Context(), l); ttl != 0 || err != nil {
		t.Errorf("renewal of a reservation: %v, %v", ttl, err)
	}
	if s, err := e.Snapshot(t.Context(), overlay.Config{}); err != nil || s.Revision != before {
		t.Errorf("the renewal wrote: %v", err)
	}
	if left, err := e.Expiry(t.Context(), f.snapshot().Leases); err != nil || left[0] != 0 {
		t.Errorf("expiry of a reservation: %v, %v", left, err)
	}
}

// TestFences writes in between what was seen and what is done.
func TestFences(t *testing.T) {
	nettest.CheckLeaks(t)
	r := newRig(t, nettest.EtcdOptions{})
	r.put(t, "config", goodConfig)
	grant, err := r.Client().Grant(t.Context(), 600)
	if err != nil {
		t.Fatal(err)
	}
	const key = "subnets/10.5.9.0-24"
	r.put(t, key, nodeValue(1), clientv3.WithLease(grant.ID))
	e := r.open(t)
	s, err := e.Snapshot(t.Context(), overlay.Config{})
	if err != nil {
		t.Fatal(err)
	}
	seen := *s.Leases[0]
	r.put(t, key, nodeValue(2), clientv3.WithLease(grant.ID)) // flannel renews

	ours := seen
	ours.Attrs = node(t, 3)
	for _, act := range []overlay.Act{overlay.Create, overlay.Update, overlay.Remove} {
		if done, err := e.Do(t.Context(), overlay.Step{Act: act, Lease: ours}); done || err != nil {
			t.Errorf("%s on an old view: %v, %v", act, done, err)
		}
	}
	if v := r.get(t, key); string(v) != nodeValue(2) {
		t.Errorf("the foreign write is lost: %s", v)
	}

	// On the new view, the update keeps flannel's etcd lease.
	s, err = e.Snapshot(t.Context(), overlay.Config{})
	if err != nil {
		t.Fatal(err)
	}
	ours = *s.Leases[0]
	ours.Attrs = node(t, 3)
	if done, err := e.Do(t.Context(), overlay.Step{Act: overlay.Update, Lease: ours}); !done || err != nil {
		t.Errorf("update: %v, %v", done, err)
	}
	s, err = e.Snapshot(t.Context(), overlay.Config{})
	if err != nil || s.Leases[0].Grant != int64(grant.ID) || s.Leases[0].PublicIP != ours.PublicIP {
		t.Errorf("after the update: %s, %v", describe(s), err)
	}

	// An update of a key that is gone makes none.
	r.del(t, key)
	if done, err := e.Do(t.Context(), overlay.Step{Act: overlay.Update, Lease: *s.Leases[0]}); done || err != nil {
		t.Errorf("update of a deleted key: %v, %v", done, err)
	}

	// An etcd lease that others use too is not revoked.
	r.put(t, key, nodeValue(1), clientv3.WithLease(grant.ID))
	r.put(t, "subnets/10.5.10.0-24", nodeValue(2), clientv3.WithLease(grant.ID))
	if s, err = e.Snapshot(t.Context(), overlay.Config{}); err != nil {
		t.Fatal(err)
	}
	if done, err := e.Do(t.Context(), overlay.Step{Act: overlay.Remove, Lease: *s.Leases[0]}); !done || err != nil {
		t.Errorf("remove: %v, %v", done, err)
	}
	r.get(t, "subnets/10.5.10.0-24")
}

// TestUnknownOutcome lets the answer to a create get lost: the key that was made
// must live on, and be found by the next claim.
func TestUnknownOutcome(t *testing.T) {
	nettest.CheckLeaks(t)
	r := newRig(t, nettest.EtcdOptions{})
	r.put(t, "config", goodConfig)
	e := r.open(t)
	lease := overlay.Lease{Subnets: mustKey(t, "10.5.3.0-24"), Attrs: node(t, 1)}

	if _, err := e.Snapshot(t.Context(), overlay.Config{}); err != nil {
		t.Fatal(err)
	}
	if err := r.Pause(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	done, err := e.Do(ctx, overlay.Step{Act: overlay.Create, Lease: lease})
	if done || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("create without an answer: %v, %v", done, err)
	}
	if err := r.Resume(); err != nil {
		t.Fatal(err)
	}
	l := mustClaim(t, e, follow(t, e), overlay.Claim{Attrs: node(t, 1), Prefer: lease.Subnets})
	if l.Key() != lease.Key() {
		t.Errorf("claimed %s", l.Key())
	}
}

func mustClaim(t testing.TB, e *Etcd, f *follower, c overlay.Claim) overlay.Lease {
	t.Helper()
	l, err := claim(t, e, f, c)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func mustKey(t testing.TB, key string) overlay.Subnets {
	t.Helper()
	n, err := overlay.ParseKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func (r *rig) get(t testing.TB, key string) []byte {
	t.Helper()
	g, err := r.Client().Get(t.Context(), defaultPrefix+"/"+key)
	if err != nil || len(g.Kvs) != 1 {
		t.Fatalf("get %s: %v, %v", key, g, err)
	}
	return g.Kvs[0].Value
}
