package store

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unique"

	"go.etcd.io/etcd/api/v3/mvccpb"

	"github.com/twill-net/twill/pkg/overlay"
)

// fold is what etcd holds under the prefix, made of one complete read and all
// events since. Not safe for concurrent use; the Snapshots it gives out are.
type fold struct {
	configKey, leaseDir string // "<prefix>/config", "<prefix>/subnets/"

	revision int64
	// leases are sorted. Once a Snapshot has them they are not changed but
	// copied: shared says so.
	leases []*overlay.Lease
	shared bool
	bad    map[string]overlay.Problem // keys that are no subnet
	config foldedConfig
}

func newFold(prefix string) *fold {
	f := &fold{configKey: prefix + "/config", leaseDir: prefix + "/subnets/"}
	f.config = foldedConfig{kind: "key", name: f.configKey, modified: unread}
	f.config.remedy = fmt.Sprintf(`write one: etcdctl put %s '{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}'`, f.configKey)
	return f
}

// listing is one complete read.
type listing struct {
	revision int64
	config   *mvccpb.KeyValue // nil: there is none
	leases   []*mvccpb.KeyValue
}

// replace takes a listing for what was folded so far. A lease that has not been
// written since stays the same pointer.
func (f *fold) replace(l listing) {
	old := f.leases
	f.revision, f.shared, f.bad = l.revision, false, nil
	f.leases = make([]*overlay.Lease, 0, len(l.leases))
	for _, kv := range l.leases {
		n, ok := f.parseKey(kv)
		if !ok {
			continue
		}
		if i, found := search(old, n); found && old[i].Modified == kv.ModRevision {
			f.leases = append(f.leases, old[i])
		} else {
			f.leases = append(f.leases, newLease(n, kv))
		}
	}
	slices.SortFunc(f.leases, func(a, b *overlay.Lease) int { return a.Compare(b.Subnets) })
	f.setConfig(l.config)
}

// apply takes one event.
func (f *fold) apply(ev *mvccpb.Event) {
	kv := ev.Kv
	f.revision = max(f.revision, kv.ModRevision)
	deleted := ev.Type == mvccpb.Event_DELETE
	switch key := string(kv.Key); {
	case key == f.configKey && deleted:
		f.setConfig(nil)
	case key == f.configKey:
		f.setConfig(kv)
	case strings.HasPrefix(key, f.leaseDir) && deleted:
		f.remove(key)
	case strings.HasPrefix(key, f.leaseDir):
		f.put(kv)
	}
}

func (f *fold) put(kv *mvccpb.KeyValue) {
	n, ok := f.parseKey(kv)
	if !ok {
		return
	}
	f.own()
	l := newLease(n, kv)
	if i, found := search(f.leases, n); found {
		f.leases[i] = l
	} else {
		f.leases = slices.Insert(f.leases, i, l)
	}
}

func (f *fold) remove(key string) {
	delete(f.bad, key)
	n, err := overlay.ParseKey(strings.TrimPrefix(key, f.leaseDir))
	if err != nil {
		return
	}
	if i, found := search(f.leases, n); found {
		f.own()
		f.leases = slices.Delete(f.leases, i, i+1)
	}
}

// own makes the leases the fold's own, to be changed.
func (f *fold) own() {
	if f.shared {
		f.leases, f.shared = slices.Clone(f.leases), false
	}
}

// parseKey reads the key; one that does not parse becomes a Problem.
func (f *fold) parseKey(kv *mvccpb.KeyValue) (overlay.Subnets, bool) {
	key := string(kv.Key[len(f.leaseDir):])
	n, err := overlay.ParseKey(key)
	if err == nil {
		return n, true
	}
	if f.bad == nil {
		f.bad = map[string]overlay.Problem{}
	}
	f.bad[string(kv.Key)] = overlay.Problem{
		Object: fmt.Sprintf("lease key %q", key),
		Reason: err.Error(),
		Remedy: fmt.Sprintf("if nobody needs it: etcdctl del %q", kv.Key),
	}
	return overlay.Subnets{}, false
}

func newLease(n overlay.Subnets, kv *mvccpb.KeyValue) *overlay.Lease {
	l := &overlay.Lease{Subnets: n, Created: kv.CreateRevision, Modified: kv.ModRevision, Grant: kv.Lease}
	l.Attrs, l.Err = overlay.ParseAttrs(kv.Value)
	l.Backend = unique.Make(l.Backend).Value() // thousands say "vxlan"
	return l
}

func search(leases []*overlay.Lease, n overlay.Subnets) (int, bool) {
	return slices.BinarySearchFunc(leases, n, func(l *overlay.Lease, n overlay.Subnets) int { return l.Compare(n) })
}

// setConfig takes what the configuration's key holds now, nil for nothing.
func (f *fold) setConfig(kv *mvccpb.KeyValue) {
	if kv == nil {
		f.config.none(errors.New("there is none"))
		return
	}
	f.config.set(kv.Value, kv.ModRevision)
}

// snapshot returns the Snapshot, or nil as long as there never was a good
// configuration.
func (f *fold) snapshot() *overlay.Snapshot {
	if !f.config.have {
		return nil
	}
	f.shared = true
	s := &overlay.Snapshot{Revision: f.revision, Config: f.config.good, Leases: f.leases, Problems: f.config.problems()}
	for _, key := range slices.Sorted(maps.Keys(f.bad)) {
		s.Problems = append(s.Problems, f.bad[key])
	}
	return s
}
