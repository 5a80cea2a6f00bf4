package store

import (
	"fmt"
	"math/rand/v2"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// TestFoldEqualsRead writes at random, compacts at random, breaks the watch at
// random, and compares what was folded with what is read anew.
func TestFoldEqualsRead(t *testing.T) {
	nettest.CheckLeaks(t)
	r := newRig(t, nettest.EtcdOptions{})
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	r.put(t, "config", goodConfig)
	e := r.open(t)
	f := follow(t, e)
	var old []*overlay.Snapshot
	var texts []string
	for range 60 {
		last := scribble(t, r, rnd)
		if rnd.IntN(4) == 0 {
			// The first of the two watches to resume may find its history gone.
			if err := r.Members[0].Kill9(); err != nil {
				t.Fatal(err)
			}
			if err := r.Members[0].Start(); err != nil {
				t.Fatal(err)
			}
			last = scribble(t, r, rnd)
		}
		if rnd.IntN(3) == 0 {
			if err := r.Compact(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		folded := f.reach(t, last)
		fresh, err := e.Snapshot(t.Context(), overlay.Config{})
		if err != nil {
			t.Fatal(err)
		}
		if describe(fresh) != describe(folded) {
			t.Fatalf("folded:\n%s\nread:\n%s", describe(folded), describe(fresh))
		}
		old, texts = append(old, folded), append(texts, describe(folded))
	}
	for i, s := range old {
		if describe(s) != texts[i] {
			t.Fatalf("Snapshot of revision %d has changed since it was emitted:\n%s\nwas\n%s", s.Revision, describe(s), texts[i])
		}
	}
	t.Logf("watch errors: %v", f.errors())
}

// scribble writes a few random transactions under the prefix and returns the
// revision of the last.
func scribble(t *testing.T, r *rig, rnd *rand.Rand) int64 {
	t.Helper()
	if rnd.IntN(5) == 0 {
		r.put(t, "config", goodConfig)
	}
	var last int64
	for range 1 + rnd.IntN(20) {
		ops := map[string]clientv3.Op{} // a transaction writes a key once
		for range 1 + rnd.IntN(5) {
			key := defaultPrefix + "/subnets/" + randomKey(rnd)
			if rnd.IntN(3) == 0 {
				ops[key] = clientv3.OpDelete(key)
			} else {
				ops[key] = clientv3.OpPut(key, randomValue(rnd))
			}
		}
		// One that is always written: each transaction has an event.
		key := defaultPrefix + "/subnets/10.5.255.0-24"
		ops[key] = clientv3.OpPut(key, randomValue(rnd))
		var all []clientv3.Op
		for _, op := range ops {
			all = append(all, op)
		}
		eventually(t, func() string {
			c, err := r.Client().Txn(t.Context()).Then(all...).Commit()
			if err != nil {
				return err.Error()
			}
			last = c.Header.Revision
			return ""
		})
	}
	return last
}

func randomKey(rnd *rand.Rand) string {
	switch n := rnd.IntN(40); {
	case n == 0:
		return "garbage"
	case n == 1:
		return "10.5.1.0-24/deeper"
	case n < 10:
		return fmt.Sprintf("10.5.%d.0-24&fd00:5:0:%x::-64", n, n)
	default:
		return fmt.Sprintf("10.5.%d.0-24", n)
	}
}

func randomValue(rnd *rand.Rand) string {
	if rnd.IntN(10) == 0 {
		return "{"
	}
	return nodeValue(rnd.IntN(1000))
}
