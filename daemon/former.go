package daemon

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/pod"
)

// linger is how long a node accepts packets by a backend after the last peer has
// stopped to publish it: so long a peer may take to hear of it.
const linger = time.Minute

// former remembers the backends that were configured before the running one. The
// node goes on to accept packets by them, and to send by them to peers that still
// publish them: a cluster moves to another backend node by node.
type former struct {
	file string
	all  []formerBackend
}

type formerBackend struct {
	backend overlay.BackendConfig
	needed  time.Time // when a peer last published it
}

// formerFile is beside subnet.env. It holds keys, so it is for root alone.
func formerFile(subnetFile string) string {
	return filepath.Join(filepath.Dir(subnetFile), "twill-backends.json")
}

// load reads what an earlier process accepted. A file that makes no sense is a
// memory lost, and no more.
func (f *former) load(running overlay.BackendConfig, now time.Time) {
	content, err := os.ReadFile(f.file)
	if err != nil {
		return
	}
	var backends []overlay.BackendConfig
	if json.Unmarshal(content, &backends) != nil {
		return
	}
	for _, b := range backends {
		f.add(b, running, now)
	}
}

// add keeps b beside running, if both can be.
func (f *former) add(b, running overlay.BackendConfig, now time.Time) {
	f.all = slices.DeleteFunc(f.all, func(x formerBackend) bool { return !x.backend.Coexists(running) || !x.backend.Coexists(b) })
	if b.Coexists(running) && !b.Bare() {
		f.all = append(f.all, formerBackend{b, now})
	}
}

// expire lets go of those that no peer publishes any more.
func (f *former) expire(leases []*overlay.Lease, self overlay.Subnets, now time.Time) {
	for i, x := range f.all {
		if publishes(leases, self, x.backend) {
			f.all[i].needed = now
		}
	}
	f.all = slices.DeleteFunc(f.all, func(x formerBackend) bool { return now.Sub(x.needed) > linger })
}

// keep lets go of those that the node cannot do any more.
func (f *former) keep(able func(overlay.BackendConfig) error) {
	f.all = slices.DeleteFunc(f.all, func(x formerBackend) bool { return able(x.backend) != nil })
}

func publishes(leases []*overlay.Lease, self overlay.Subnets, b overlay.BackendConfig) bool {
	return slices.ContainsFunc(leases, func(l *overlay.Lease) bool {
		return l.Subnets != self && !(l.Reserved() && l.Backend == "") && b.Carries(l)
	})
}

// backends returns them, the last one first.
func (f *former) backends() []overlay.BackendConfig {
	var out []overlay.BackendConfig
	for _, x := range slices.Backward(f.all) {
		out = append(out, x.backend)
	}
	return out
}

// save writes down what is accepted now, for the process after this one.
func (f *former) save(running overlay.BackendConfig) error {
	content, err := json.Marshal(append([]overlay.BackendConfig{running}, f.backends()...))
	if err != nil {
		return err
	}
	if old, err := os.ReadFile(f.file); err == nil && string(old) == string(content) {
		return nil
	}
	return pod.ReplaceFile(f.file, content, 0o600)
}
