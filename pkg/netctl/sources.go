package netctl

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"time"

	"github.com/twill-net/twill/pkg/kernel"
	"github.com/twill-net/twill/pkg/overlay"
)

// Store is where the cluster's leases are.
type Store interface {
	Snapshot(ctx context.Context, running overlay.Config) (*overlay.Snapshot, error)
	// Expiry returns for each lease how long it still lives. It costs a question
	// to the store per lease.
	Expiry(ctx context.Context, leases []*overlay.Lease) ([]time.Duration, error)
	Close() error
}

// Kernel is the node's own network state.
type Kernel interface {
	Observe(ctx context.Context, scope kernel.Scope) (overlay.State, error)
	Close() error
}

func openKernel() (Kernel, error) {
	return kernel.Open(kernel.Options{Log: slog.New(slog.DiscardHandler)})
}

// sight is what one command sees: each part, or why it is not there.
type sight struct {
	status    overlay.Status
	statusErr error

	snap     *overlay.Snapshot // nil: see storeErr
	storeErr error
	// expiry is filled on demand, by lease.
	expiry map[*overlay.Lease]time.Duration

	self    SelfReply
	selfErr error

	have      overlay.State
	kernelErr error

	// want, plan and the problems need all of the above.
	want     overlay.State
	plan     overlay.Plan
	refused  []overlay.Problem // changes that a stranger's object stands in the way of
	problems []overlay.Problem // what else makes no sense
}

// look reads the daemon, the store and the kernel, in this order: what is newest
// is read last, so that no lease looks lost that is only new.
func (a *app) look(ctx context.Context, ttl bool) *sight {
	s := &sight{}
	client := NewClient(a.socket)
	s.status, s.statusErr = within(ctx, a.timeout, client.Status)
	if s.selfErr = s.statusErr; s.selfErr == nil {
		s.self, s.selfErr = within(ctx, a.timeout, client.Self)
	}
	s.storeErr = a.readStore(ctx, s, ttl)
	if s.selfErr == nil && len(s.self.Config.Networks()) == 0 {
		s.selfErr = fmt.Errorf("twilld has not taken up a lease yet: %s", s.status.Reason)
	}
	switch {
	case s.selfErr == nil:
		s.have, s.kernelErr = a.observe(ctx, s.self)
	case s.snap != nil: // the stored configuration tells as well what to look at
		s.have, s.kernelErr = a.observe(ctx, SelfReply{Config: s.snap.Config})
	default:
		s.kernelErr = s.selfErr
	}
	if s.complete() {
		s.compare()
	}
	return s
}

func within[T any](ctx context.Context, d time.Duration, f func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	return f(ctx)
}

func (a *app) readStore(ctx context.Context, s *sight, ttl bool) error {
	cfg, err := a.store.overDaemon(s.status.Store, s.statusErr)
	if err != nil {
		return err
	}
	st, err := a.openStore(cfg)
	if err != nil {
		return fmt.Errorf("open store: %w", err)
	}
	defer st.Close()
	read := func(ctx context.Context) (*overlay.Snapshot, error) { return st.Snapshot(ctx, s.self.Config) }
	if s.snap, err = within(ctx, a.timeout, read); err != nil {
		s.snap = nil
		return fmt.Errorf("read store: %w", err)
	}
	if !ttl {
		return nil
	}
	left, err := within(ctx, a.timeout, func(ctx context.Context) ([]time.Duration, error) {
		return st.Expiry(ctx, s.snap.Leases)
	})
	if err != nil {
		return fmt.Errorf("read store: %w", err)
	}
	s.expiry = make(map[*overlay.Lease]time.Duration, len(left))
	for i, l := range s.snap.Leases {
		if !l.Reserved() {
			s.expiry[l] = left[i]
		}
	}
	return nil
}

func (a *app) observe(ctx context.Context, self SelfReply) (overlay.State, error) {
	k, err := a.openKernel()
	if err != nil {
		return overlay.State{}, asRoot("open kernel", err)
	}
	defer k.Close()
	// The sysctls that matter do not depend on leases.
	own, _ := overlay.Desired(&overlay.Snapshot{Config: self.Config}, self.Self)
	have, err := k.Observe(ctx, kernel.ScopeOf(self.Config, own, self.Self.Uplink))
	if err != nil {
		return overlay.State{}, asRoot("read kernel", err)
	}
	return have, nil
}

// asRoot adds the remedy if there is one.
func asRoot(doing string, err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%s: %w; run netctl as root", doing, err)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// complete reports whether the store's and the node's view are both there.
func (s *sight) complete() bool { return s.snap != nil && s.selfErr == nil && s.kernelErr == nil }

// noteMissing says what could not be read, and what is not known for it.
func (a *app) noteMissing(s *sight) {
	for i, err := range []error{s.selfErr, s.storeErr, s.kernelErr} {
		if err != nil && (i < 2 || err != s.selfErr) {
			a.note(err)
		}
	}
	if s.selfErr != nil && s.kernelErr == nil {
		a.note(errors.New("nothing is compared: which subnet, keys and options this node has, and which routes it learned by BGP, only twilld knows"))
	}
}

// accepted returns the backends that packets may come by: the running one, the
// former ones, and last the stored one, which may be on its way.
func (s *sight) accepted() []overlay.BackendConfig {
	var out []overlay.BackendConfig
	if s.selfErr == nil {
		out = append(append(out, s.self.Config.Backend), s.self.Self.Former...)
	}
	if s.snap != nil {
		out = append(out, s.snap.Config.Backend)
	}
	return out
}

// backendOf names what a node publishes; empty: nothing, or it cannot be told.
// flannel leaves the type out for udp and alloc; which of the two it is, this
// node's own backends say.
func (s *sight) backendOf(l *overlay.Lease) string {
	if l.Backend != "" || vacant(l) || l.Err != nil {
		return l.Backend
	}
	for _, b := range s.accepted() {
		if b.Carries(l) {
			return b.Type
		}
	}
	return ""
}

// vacant reports whether nobody lives in a lease: it is a reservation that no node has
// taken. (A Node of Kubernetes has no end either, but is one.)
func vacant(l *overlay.Lease) bool { return l.Reserved() && l.Node == "" && l.Backend == "" }

// compare does what the daemon's next pass does, with the configuration that the
// daemon runs: one that it refused is a problem, not a plan.
func (s *sight) compare() {
	snap := *s.snap
	snap.Config = s.self.Config
	s.want, s.problems = overlay.Desired(&snap, s.self.Self)
	if err := s.self.Config.CheckTransition(s.snap.Config, s.self.Self.Subnets, s.snap.Leases); !s.snap.Config.Equal(s.self.Config) && err != nil {
		s.problems = append(s.problems, overlay.Problem{
			Object: "config", Reason: "the stored configuration is not taken up: " + err.Error(), Remedy: "the running one stays in force",
		})
	}
	s.plan, s.refused = overlay.Diff(s.have, s.want)
	s.problems = append(s.problems, overlay.CheckOverlap(snap.Config, s.self.Self.Subnets, snap.Leases, s.have.Foreign)...)
}
