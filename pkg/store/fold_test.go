package store

import (
	"fmt"
	"runtime"
	"testing"

	"go.etcd.io/etcd/api/v3/mvccpb"

	"github.com/twill-net/twill/pkg/overlay"
)

func leaseKV(key, value string, revision int64) *mvccpb.KeyValue {
	return &mvccpb.KeyValue{
		Key: []byte(defaultPrefix + "/subnets/" + key), Value: []byte(value),
		CreateRevision: revision, ModRevision: revision, Version: 1, Lease: 7,
	}
}

func putEvent(kv *mvccpb.KeyValue) *mvccpb.Event {
	return &mvccpb.Event{Type: mvccpb.Event_PUT, Kv: kv}
}

func deleteEvent(key string, revision int64) *mvccpb.Event {
	return &mvccpb.Event{Type: mvccpb.Event_DELETE, Kv: &mvccpb.KeyValue{Key: []byte(key), ModRevision: revision}}
}

// foldOf returns a fold of n leases.
func foldOf(t testing.TB, n int) *fold {
	t.Helper()
	f := newFold(defaultPrefix)
	f.replace(listingOf(n))
	if s := f.snapshot(); s == nil || len(s.Leases) != n {
		t.Fatalf("folded %s", describe(s))
	}
	return f
}

func listingOf(n int) listing {
	l := listing{revision: int64(n) + 1, config: &mvccpb.KeyValue{ModRevision: 1, Value: []byte(`{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}`)}}
	for i := range n {
		l.leases = append(l.leases, leaseKV(fmt.Sprintf("10.%d.%d.0-24", i>>8, i&255), nodeValue(i), int64(i)+2))
	}
	return l
}

func TestFoldKeepsPointers(t *testing.T) {
	f := foldOf(t, 100)
	before := f.snapshot()
	f.apply(putEvent(leaseKV("10.0.7.0-24", nodeValue(500), 200)))
	f.apply(deleteEvent(defaultPrefix+"/subnets/10.0.9.0-24", 201))
	f.apply(putEvent(leaseKV("10.9.0.0-24", nodeValue(501), 202)))
	after := f.snapshot()
	if len(before.Leases) != 100 || len(after.Leases) != 100 || after.Revision != 202 {
		t.Fatalf("%d leases before, %d after, revision %d", len(before.Leases), len(after.Leases), after.Revision)
	}
	same := 0
	for _, l := range after.Leases {
		if before.Lease(l.Subnets) == l {
			same++
		}
	}
	if same != 98 {
		t.Errorf("%d of 98 leases are the same pointer", same)
	}
	f.replace(listingOf(100)) // what was read before: all but the three
	for i, l := range f.snapshot().Leases {
		if want := before.Leases[i]; l != want && l.Key() != "10.0.7.0-24" && l.Key() != "10.0.9.0-24" {
			t.Errorf("after reading again, %s is another pointer", l.Key())
		}
	}
}

// FuzzFold: whatever stands in etcd, a fold of events is a fold of the end state.
func FuzzFold(f *testing.F) {
	f.Add("10.5.1.0-24", nodeValue(1), goodConfig, false)
	f.Add("10.5.1.0-24&fd00::-64", `{"PublicIP":"198.18.0.1","PublicIPv6":"2001:db8::1"}`, `{`, true)
	f.Add("10.5.1.0-24&fd00:0::-64", `null`, ``, true)
	f.Fuzz(func(t *testing.T, key, value, config string, remove bool) {
		kv := leaseKV(key, value, 10)
		ckv := &mvccpb.KeyValue{Key: []byte(defaultPrefix + "/config"), Value: []byte(config), ModRevision: 11}
		other := leaseKV("10.5.7.0-24", nodeValue(7), 5)

		byEvents := newFold(defaultPrefix)
		byEvents.replace(listing{revision: 5, config: &mvccpb.KeyValue{ModRevision: 1, Value: []byte(goodConfig)}, leases: []*mvccpb.KeyValue{other}})
		byEvents.apply(putEvent(kv))
		byEvents.apply(putEvent(ckv))
		end := listing{revision: 11, config: ckv, leases: []*mvccpb.KeyValue{other, kv}}
		if key == "10.5.7.0-24" {
			end.leases = end.leases[1:]
		}
		if remove {
			byEvents.apply(deleteEvent(string(kv.Key), 12))
			end.revision, end.leases = 12, end.leases[:len(end.leases)-1]
		}
		byList := newFold(defaultPrefix)
		byList.replace(listing{config: &mvccpb.KeyValue{ModRevision: 1, Value: []byte(goodConfig)}})
		byList.replace(end)
		if a, b := describe(byEvents.snapshot()), describe(byList.snapshot()); a != b {
			t.Errorf("by events:\n%s\nby listing:\n%s", a, b)
		}
	})
}

func BenchmarkReplace10000(b *testing.B) {
	l := listingOf(10000)
	for b.Loop() {
		newFold(defaultPrefix).replace(l)
	}
}

// BenchmarkReplaceUnchanged10000 is a read after a lost watch, when nothing has
// changed.
func BenchmarkReplaceUnchanged10000(b *testing.B) {
	f, l := foldOf(b, 10000), listingOf(10000)
	for b.Loop() {
		f.replace(l)
	}
}

func BenchmarkFoldOneEvent10000(b *testing.B) {
	f := foldOf(b, 10000)
	var s *overlay.Snapshot
	for b.Loop() {
		f.apply(putEvent(leaseKV("10.5.7.0-24", nodeValue(500), 20000)))
		s = f.snapshot()
	}
	runtime.KeepAlive(s)
}

// BenchmarkFoldBatch10000 folds 1,000 events into one Snapshot.
func BenchmarkFoldBatch10000(b *testing.B) {
	f, l := foldOf(b, 10000), listingOf(1000)
	for b.Loop() {
		for _, kv := range l.leases {
			f.apply(putEvent(kv))
		}
		f.snapshot()
	}
}

// BenchmarkMemory10000 reports what 10,000 folded leases hold on the heap.
func BenchmarkMemory10000(b *testing.B) {
	l := listingOf(10000)
	var f *fold
	for b.Loop() {
		var before, after runtime.MemStats
		f = nil
		runtime.GC()
		runtime.ReadMemStats(&before)
		f = newFold(defaultPrefix)
		f.replace(l)
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(int64(after.HeapAlloc)-int64(before.HeapAlloc))/(1<<20), "MiB")
	}
	runtime.KeepAlive(f)
}
