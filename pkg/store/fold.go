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

// foldedConfig is the network configuration in force and what has become of it.
type foldedConfig struct {
	good     overlay.Config
	have     bool     // there was a good one
	modified int64    // revision of the key that was read last, good or not
	warnings []string // of that one
	refused  error    // why that one is not good; the good one is older
}

// unread is the revision of a configuration that was not looked for yet; 0 is that
// of one that is not there.
const unread = -1

func newFold(prefix string) *fold {
	return &fold{configKey: prefix + "/config", leaseDir: prefix + "/subnets/", config: foldedConfig{modified: unread}}
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

// setConfig takes what the configuration's key holds now, nil for nothing. A
// configuration that is not good changes nothing but says so.
func (f *fold) setConfig(kv *mvccpb.KeyValue) {
	c := &f.config
	c.warnings = nil
	if kv == nil {
		c.modified, c.refused = 0, errors.New("there is none")
		return
	}
	c.modified = kv.ModRevision
	parsed, warnings, err := overlay.ParseConfig(kv.Value)
	if c.refused = err; err == nil {
		c.good, c.have, c.warnings = parsed, true, warnings
	}
}

// snapshot returns the Snapshot, or nil as long as there never was a good
// configuration.
func (f *fold) snapshot() *overlay.Snapshot {
	if !f.config.have {
		return nil
	}
	f.shared = true
	s := &overlay.Snapshot{Revision: f.revision, Config: f.config.good, Leases: f.leases}
	if f.config.refused != nil {
		s.Problems = append(s.Problems, f.configProblem())
	}
	for _, key := range slices.Sorted(maps.Keys(f.bad)) {
		s.Problems = append(s.Problems, f.bad[key])
	}
	return s
}

// configProblem tells of the configuration that was refused.
func (f *fold) configProblem() overlay.Problem {
	p := overlay.Problem{
		Object: "config",
		Reason: fmt.Sprintf("%s: %v", f.configKey, f.config.refused),
		Remedy: "correct it: it is looked at again as soon as it is written",
	}
	if f.config.modified == 0 {
		p.Remedy = fmt.Sprintf(`write one: etcdctl put %s '{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}'`, f.configKey)
	}
	if f.config.have {
		p.Remedy += "; the last good one stays in force"
	}
	return p
}
