package daemon

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"sync"
	"time"

	sdnotify "github.com/coreos/go-systemd/v22/daemon"

	"github.com/twill-net/twill/pkg/kernel"
	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/wgtun"
)

// loop is the one goroutine that writes to the kernel.
//
// A full pass reads the kernel, so it finds what others did; kernel events and
// the ticker ask for it. When only the store has something new and the last pass
// was clean, what the kernel holds is known, and the pass starts from there: one
// more peer among 10,000 costs one peer's messages.
type loop struct {
	*Daemon
	node    node
	outside []outside
	former  former

	running overlay.Config    // in force; zero before the first good one
	seen    *overlay.Snapshot // the last one taken from the store
	snap    *overlay.Snapshot // the same with the running config
	desired *overlay.Snapshot // the one want was computed for
	self    overlay.Self      // the one want was computed for
	attrs   overlay.Attrs     // what the lease is to say once want is in the kernel
	want    *overlay.State    // never changed once set
	found   []overlay.Problem // by Desired, with want
	clashes []overlay.Problem // with what others have in the kernel, at the last full pass

	// applied is what the kernel holds since the last clean pass; nil: unknown.
	applied *overlay.State
	retry   time.Duration // pause before the next try after a failure; 0: none
	ready   bool
	begin   sync.Once // closes written
}

const (
	retryLeast = 200 * time.Millisecond
	retryMost  = 5 * time.Second
	// kernelPause bounds how often kernel events make the loop read everything:
	// a program that fights us must not burn the node.
	kernelPause = 100 * time.Millisecond
	// wireGuardResync is the time between two looks at a WireGuard device's peers.
	wireGuardResync = 10 * time.Second
)

func (d *Daemon) reconcile(ctx context.Context) error {
	l := d.newLoop()
	d.storeBell.ring("start") // so that it is said at once what is waited for
	kernelBell := d.kernelBell
	var rested <-chan time.Time
	timer := time.NewTimer(l.pause())
	defer timer.Stop()
	for {
		full, why := true, "timer"
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-rested:
			kernelBell, rested = d.kernelBell, nil
			continue
		case why = <-d.storeBell:
			full = l.applied == nil
		case why = <-kernelBell:
			kernelBell = nil
		case <-timer.C:
		}
		l.run(ctx, why, full)
		if kernelBell == nil && rested == nil {
			rested = time.After(kernelPause)
		}
		// A pass that only follows the store puts no full one off.
		if full || l.retry > 0 {
			timer.Reset(l.pause())
		}
	}
}

func (d *Daemon) newLoop() *loop {
	udp := newUDPTunnel(d)
	udp.resume()
	return &loop{
		Daemon: d, node: node{Daemon: d},
		former:  former{file: formerFile(d.cfg.SubnetFile)},
		outside: []outside{udp, &wireGuards{Daemon: d, devices: map[string]*wgtun.Device{}}, d.bgp, d.extensions},
	}
}

// pause returns how long until the next full pass that nothing asks for.
func (l *loop) pause() time.Duration {
	switch {
	case l.retry > 0:
		return l.retry
	case l.want != nil && len(l.want.WGPeers) > 0:
		return jitter(wireGuardResync) // WireGuard tells nobody that it was changed
	}
	return jitter(l.cfg.Resync)
}

// waitError is something the loop cannot do without, and that comes or not.
type waitError struct{ error }

// run makes a pass and takes note of how it went.
func (l *loop) run(ctx context.Context, why string, full bool) {
	began := time.Now()
	changes, failures, err := l.pass(ctx, why, full)
	if ctx.Err() != nil {
		return
	}
	waiting := ""
	var w waitError
	if errors.As(err, &w) {
		waiting = err.Error()
	} else if err != nil {
		failures = append(failures, err.Error())
	}
	clean := err == nil && len(failures) == 0
	if clean {
		l.retry = 0
	} else {
		l.applied = nil
		l.retry = min(max(2*l.retry, retryLeast), retryMost)
	}
	l.metrics.pass(full, time.Since(began), len(failures))
	l.update(func(r *report) {
		if waiting != "" && waiting != r.waiting {
			l.log.Warn("waiting", "for", waiting)
		}
		r.clean, r.waiting = clean, waiting
		r.heartbeat = time.Now()
		p := &r.pass
		p.At, p.Why, p.Took, p.Changes, p.Failures = began, why, time.Since(began), changes, failures
		p.Count++
		if full && waiting == "" {
			p.LastFull = began
		}
	})
	for i, f := range failures {
		if i == maxLogged {
			l.log.Error("more changes failed", "count", len(failures)-i)
			break
		}
		l.log.Error("change failed", "error", f)
	}
	if clean && !l.ready {
		l.ready = true
		l.log.Info("ready", "lease", l.self.Key(), "peers", len(l.snap.Leases)-1)
		notify(sdnotify.SdNotifyReady)
	}
}

// pass brings the kernel to what the leases say.
func (l *loop) pass(ctx context.Context, why string, full bool) (changes int, failures []string, err error) {
	if err := l.learn(ctx, full); err != nil {
		return 0, nil, err
	}
	failures = l.prepare(ctx)
	// What prepare has made is in the kernel, and not in what was applied.
	full = full || l.wantsTUN()
	have := l.applied
	if full {
		state, err := l.kernel.Observe(ctx, kernel.ScopeOf(l.running, *l.want, l.self.Uplink))
		if err != nil {
			return 0, nil, fmt.Errorf("read the kernel's state: %w", err)
		}
		if l.applied != nil {
			state.KeepRoamed(l.applied)
			deviations, _ := overlay.Diff(state, *l.applied)
			l.recordDrift(deviations, why)
		}
		have = &state
		l.clashes = overlay.CheckOverlap(l.running, l.self.Subnets, l.snap.Leases, state.Foreign)
	}
	plan, refused := overlay.Diff(*have, *l.want)
	settled := l.bgp.settled()
	if !settled {
		plan = plan.KeepRoutes()
	}
	if full {
		l.clashes = append(append(l.clashes, refused...), l.kernel.Problems()...)
	}
	l.logPlan(plan, why)
	if len(plan) > 0 {
		began := time.Now()
		for _, f := range l.kernel.Apply(ctx, plan) {
			failures = append(failures, f.Error())
		}
		l.metrics.apply.Observe(time.Since(began).Seconds())
	}
	if peers := l.lostSessions(plan); len(peers) > 0 {
		l.log.Info("shaking hands with WireGuard peers that may hold lost sessions", "peers", len(peers), "why", why)
		if err := l.kernel.Handshake(ctx, peers); err != nil {
			failures = append(failures, err.Error())
		}
	}
	l.begin.Do(func() { close(l.written) })
	l.logProblems(slices.Concat(l.found, l.node.problems(), l.clashes, l.pathProblems(), l.extensions.problems(), l.bgp.problems()))
	if l.blocked(refused) {
		return 0, nil, errors.New(refused[0].String())
	}
	if len(failures) > 0 {
		return len(plan), failures, nil
	}
	if !settled {
		l.applied = nil // there may be more in the kernel than is wanted
		return len(plan), nil, l.handOff()
	}
	for _, o := range l.outside {
		o.retire(ctx, l.want)
	}
	l.applied = l.want
	// A pod that is scheduled here finds the hand-off.
	err = errors.Join(l.handOff(), l.former.save(l.running.Backend))
	l.publish(err == nil)
	return len(plan), nil, err
}

// wantsTUN reports whether a program of user space has a device to make that was
// not there at the last pass.
func (l *loop) wantsTUN() bool {
	return slices.ContainsFunc(l.want.Links, func(w overlay.Link) bool {
		return w.Kind == overlay.KindTUN && (l.applied == nil || !l.applied.HasLink(w.Name))
	})
}

// lostSessions returns the WireGuard peers that may hold a session which plan has found
// this node without: who was added again, and who was known before twilld started, or
// before the device was down. A new node, or peer, has none to lose.
func (l *loop) lostSessions(plan overlay.Plan) (peers []overlay.WGPeer) {
	known := func(p overlay.WGPeer) bool {
		if l.applied == nil {
			return l.node.wasWireGuard()
		}
		_, ok := l.applied.WGPeer(p)
		return ok
	}
	for _, op := range plan {
		switch o := op.Object.(type) {
		case overlay.WGPeer:
			if op.Verb == overlay.Add && known(o) {
				peers = append(peers, o)
			}
		case overlay.Link:
			if have, ok := op.Before.(overlay.Link); ok && o.Up && !have.Up {
				peers = append(peers, l.want.WGPeersOf(o.Name)...)
			}
		}
	}
	return peers
}

// publish asks the keeper to lease what the node is. Before a node says that it is
// reached in another way, it must be: so this comes last.
func (l *loop) publish(ready bool) {
	if c := l.claim.Load(); c == nil || !c.config.Equal(l.running) || c.attrs != l.attrs || c.ready != ready {
		l.claim.Store(&claim{l.running, l.attrs, ready})
		l.keeperBell.ring("claim")
	}
}

// blocked reports whether a problem keeps our own link from being made.
func (l *loop) blocked(problems []overlay.Problem) bool {
	for _, p := range problems {
		for _, link := range l.want.Links {
			if p.Object == "link "+link.Name {
				return true
			}
		}
	}
	return false
}

// learn takes up what is new: config, own addresses, lease; and computes what the
// kernel should hold. Nothing is written before all of it is known once.
func (l *loop) learn(ctx context.Context, full bool) error {
	snap := l.snapshot.Load()
	if snap == nil {
		return waitError{l.storeError()}
	}
	if err := l.takeUp(ctx, snap); err != nil {
		return waitError{err}
	}
	if full || !l.node.known {
		if err := l.node.identify(ctx, l.snap); err != nil {
			return waitError{err}
		}
	}
	if err := l.node.equip(ctx, l.running.Backend); err != nil {
		return waitError{err}
	}
	l.former.expire(l.snap.Leases, l.self.Subnets, time.Now())
	l.former.keep(func(b overlay.BackendConfig) error {
		if b.Type == "extension" { // its commands were told what they need
			return nil
		}
		return l.node.equip(ctx, b)
	})
	self := l.node.self
	var err error
	if l.attrs, err = overlay.PublishedAttrs(l.running, self); err != nil {
		return err
	}
	held := l.held.Load()
	if held == nil {
		l.publish(false)
		return waitError{l.leaseError()}
	}
	self.Subnets = *held
	self.Former = l.former.backends()
	if self.RIB, err = l.bgp.routes(ctx, self.Uplink, full); err != nil {
		return err
	}
	l.desire(self)
	return nil
}

// takeUp puts a new Snapshot in force.
func (l *loop) takeUp(ctx context.Context, snap *overlay.Snapshot) error {
	if snap == l.seen {
		return nil
	}
	accepted, err := l.accept(ctx, snap)
	if err != nil {
		return err
	}
	l.seen, l.snap = snap, accepted
	return nil
}

// accept decides on the config of a Snapshot. One that running pods would not
// survive is refused: the running one stays.
func (l *loop) accept(ctx context.Context, snap *overlay.Snapshot) (*overlay.Snapshot, error) {
	held := l.held.Load()
	if held == nil {
		// No pod stands on what was read before: what is corrected now counts.
		if err := l.usable(snap.Config); err != nil {
			return nil, fmt.Errorf("a usable network configuration: %w", err)
		}
		if !l.running.Equal(snap.Config) {
			l.running, l.node.known = snap.Config, false
			l.former.load(snap.Config.Backend, time.Now())
		}
	}
	if snap.Config.Equal(l.running) {
		return snap, nil
	}
	err := l.running.CheckTransition(snap.Config, *held, snap.Leases)
	if err == nil && !slices.Equal(l.running.Networks(), snap.Config.Networks()) {
		err = l.node.fits(ctx, snap.Config, *held, snap.Leases)
	}
	if err != nil {
		refused := *snap
		refused.Config = l.running
		refused.Problems = append(refused.Problems[:len(refused.Problems):len(refused.Problems)], overlay.Problem{
			Object: "config", Reason: "the stored configuration is not taken up: " + err.Error(), Remedy: "the running one stays in force",
		})
		return &refused, nil
	}
	l.log.Info("network configuration changed", "backend", snap.Config.Backend.Type, "networks", snap.Config.Networks())
	l.former.add(l.running.Backend, snap.Config.Backend, time.Now())
	l.running = snap.Config
	return snap, nil
}

// usable says why this version cannot carry packets by the configuration, or nil.
func (l *loop) usable(c overlay.Config) error {
	if !c.V4.Enabled() && !l.cfg.Kubernetes {
		return errors.New("EnableIPv4: false: leases in etcd are named by their IPv4 subnet, so IPv4 must be on")
	}
	return c.CheckBackend()
}

// desire recomputes what is wanted if anything it depends on is new.
func (l *loop) desire(self overlay.Self) {
	if l.want != nil && l.desired == l.snap && reflect.DeepEqual(self, l.self) {
		return
	}
	want, found := overlay.Desired(l.snap, self)
	l.want, l.found, l.desired, l.self = &want, found, l.snap, self
	snap := l.snap
	l.paths.aim(func() []pathTarget { return pathTargets(snap, self) })
	mtu, err := overlay.PodMTU(l.running, self)
	l.update(func(r *report) {
		r.self, r.config = self, l.running
		if err == nil {
			r.podMTU = mtu
		}
	})
}

// pathTargets are the peers that full packets of the uplink must reach.
func pathTargets(snap *overlay.Snapshot, self overlay.Self) []pathTarget {
	var out []pathTarget
	for _, l := range snap.Leases {
		for _, f := range []overlay.Family{overlay.IPv4, overlay.IPv6} {
			if a := l.Public(f); l.Subnets != self.Subnets && a.IsValid() && l.Err == nil {
				out = append(out, pathTarget{Lease: l.Key(), Addr: a, Needed: self.Uplink.MTU})
			}
		}
	}
	return out
}

// pathProblems names the peers on the way to which large packets are lost.
func (l *loop) pathProblems() []overlay.Problem {
	var out []overlay.Problem
	for _, p := range l.paths.tooNarrow() {
		out = append(out, overlay.Problem{
			Object: "path to " + p.Peer.String(),
			Reason: fmt.Sprintf("carries packets of %d bytes at most, and those to lease %s may have %d", p.Carries, p.Lease, p.Needed),
			Remedy: fmt.Sprintf("set the MTU of %s to %d on every node, or Backend.MTU of vxlan or wireguard, or mend the network between", l.self.Uplink.Name, p.Carries),
		})
	}
	return out
}

func (l *loop) storeError() error {
	s := l.store.Status()
	if s.Error != "" {
		return fmt.Errorf("the store: %s", s.Error)
	}
	return fmt.Errorf("the first complete answer of the store (%v)", s.Endpoints)
}

func (l *loop) leaseError() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.report.leaseErr != "" {
		return fmt.Errorf("a lease: %s", l.report.leaseErr)
	}
	return errors.New("a lease")
}
