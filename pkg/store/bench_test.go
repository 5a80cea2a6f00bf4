package store

import (
	"fmt"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// BenchmarkSnapshot10000 reads 10,000 leases from etcd.
func BenchmarkSnapshot10000(b *testing.B) {
	r := newRig(b, nettest.EtcdOptions{})
	fill(b, r.Client(), 10000)
	e := r.open(b)
	for b.Loop() {
		if s, err := e.Snapshot(b.Context(), overlay.Config{}); err != nil || len(s.Leases) != 10000 {
			b.Fatal(err)
		}
	}
}

// BenchmarkEvent10000 is from one write in etcd to the Snapshot that shows it.
func BenchmarkEvent10000(b *testing.B) {
	r := newRig(b, nettest.EtcdOptions{})
	fill(b, r.Client(), 10000)
	e := r.open(b)
	f := follow(b, e)
	f.wait(b, "10,000 leases", func(s *overlay.Snapshot) bool { return len(s.Leases) == 10000 })
	i := 0
	for b.Loop() {
		i++
		f.reach(b, r.put(b, "subnets/10.99.0.0-24", nodeValue(i)))
	}
}

// BenchmarkBurst1000 is 1,000 writes at once, to the Snapshot that shows the last.
func BenchmarkBurst1000(b *testing.B) {
	r := newRig(b, nettest.EtcdOptions{})
	fill(b, r.Client(), 10000)
	f := follow(b, r.open(b))
	f.wait(b, "10,000 leases", func(s *overlay.Snapshot) bool { return len(s.Leases) == 10000 })
	i := 0
	for b.Loop() {
		var last int64
		for range 10 {
			var ops []clientv3.Op
			for range 100 {
				i++
				ops = append(ops, clientv3.OpPut(fmt.Sprintf("%s/subnets/10.%d.%d.0-24", defaultPrefix, 40+i>>8&63, i&255), nodeValue(i)))
			}
			t, err := r.Client().Txn(b.Context()).Then(ops...).Commit()
			if err != nil {
				b.Fatal(err)
			}
			last = t.Header.Revision
		}
		f.reach(b, last)
	}
}
