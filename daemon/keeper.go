package daemon

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/store"
)

// claim is what the loop asks the keeper to hold.
type claim struct {
	config overlay.Config
	attrs  overlay.Attrs
	ready  bool // the kernel is as the leases say
}

// keeper gets this node's lease and keeps it: it compares claim and Snapshot and
// makes one conditional write at a time, until there is nothing to write. It
// never gives a lease up: while the store is away, the node stays what it is.
type keeper struct {
	*Daemon
	prefer overlay.Subnets
	ours   bool          // prefer was written or held by this process
	last   overlay.Attrs // that prefer had then
	// acted is the Snapshot of the last write: what it changed is only to be seen
	// in a later one. (Revisions do not tell: those of a store that was restored
	// from a backup, or made anew, are lower.)
	acted   *overlay.Snapshot
	renewAt time.Time // of the lease held; zero: it was never renewed by us
	renewed overlay.Lease
}

const (
	retryPause = time.Second
	renewRetry = time.Minute
)

func (d *Daemon) keepLease(ctx context.Context) error {
	k := &keeper{Daemon: d, prefer: formerSubnets(d.cfg.SubnetFile)}
	for {
		wait := k.step(ctx)
		var timer <-chan time.Time
		if wait > 0 {
			timer = time.After(jitter(wait))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-k.keeperBell:
		case <-timer:
		}
	}
}

// step makes at most one write and one renewal, and returns when it wants to be
// called again, 0 for not before the bell.
func (k *keeper) step(ctx context.Context) time.Duration {
	decide, renew := k.decide(ctx), k.renew(ctx)
	if decide == 0 || renew == 0 {
		return max(decide, renew)
	}
	return min(decide, renew)
}

func (k *keeper) decide(ctx context.Context) time.Duration {
	want, snap := k.claim.Load(), k.snapshot.Load()
	if want == nil || snap == nil || snap == k.acted {
		return 0
	}
	step, err := k.next(want, snap)
	if err != nil {
		k.fail("no lease", err)
		return retryPause * 10
	}
	if step.Act == overlay.Hold {
		k.hold(step.Lease)
		return 0
	}
	if step.Act == overlay.Announce {
		k.hold(step.Lease)
	}
	k.log.Info("writing lease", "do", step.Act.String(), "lease", step.Lease.Key(), "why", step.Why)
	if step.Act == overlay.Create {
		// The next Snapshot may not show it yet: to create it again is a race lost
		// against ourselves, and not a second subnet.
		k.prefer = step.Lease.Subnets
	}
	done, err := k.store.Do(ctx, step)
	if err != nil {
		k.fail("write lease", err)
		return retryPause
	}
	k.acted = snap
	switch {
	case !done:
		k.log.Info("lease changed meanwhile, deciding again", "lease", step.Lease.Key())
	case step.Act != overlay.Remove:
		k.prefer, k.ours, k.last = step.Lease.Subnets, true, step.Lease.Attrs
	case k.prefer == (overlay.Subnets{}):
		k.prefer = step.Lease.Subnets // the family that still fits is kept
	}
	return retryPause
}

// next asks what is to be written. Kubernetes knows nodes by name, etcd by what
// they publish.
func (k *keeper) next(want *claim, snap *overlay.Snapshot) (overlay.Step, error) {
	if k.cfg.Kubernetes {
		c := overlay.NodeClaim{Node: k.store.Status().Node, Attrs: want.attrs, Allocate: k.cfg.Kube.Allocate, Prefer: k.prefer, Ready: want.ready}
		return c.Next(want.config, snap, rand.IntN)
	}
	c := overlay.Claim{Attrs: want.attrs, Prefer: k.prefer, Held: k.ours, Last: k.last}
	return c.Next(want.config, snap.Leases, rand.IntN)
}

// hold takes note that the store agrees with the claim.
func (k *keeper) hold(l overlay.Lease) {
	k.update(func(r *report) { r.leaseErr = "" })
	k.last = l.Attrs
	if old := k.held.Load(); old == nil || *old != l.Subnets {
		if old != nil {
			k.log.Warn("this node's subnet has changed; pods of the old one must be restarted", "old", old.Key(), "new", l.Key())
		} else {
			k.log.Info("lease held", "lease", l.Key(), "reserved", l.Reserved())
		}
		k.prefer, k.ours = l.Subnets, true
		k.held.Store(&l.Subnets)
		k.storeBell.ring("lease")
	}
	if k.renewed.Grant != l.Grant {
		k.renewAt = time.Time{}
	}
	k.renewed = l
}

// renew keeps the lease alive. It does not touch the key, so nobody else notices.
func (k *keeper) renew(ctx context.Context) time.Duration {
	if k.renewed.Reserved() {
		return 0
	}
	if wait := time.Until(k.renewAt); wait > 0 {
		return wait
	}
	ttl, err := k.store.Renew(ctx, k.renewed)
	switch {
	case errors.Is(err, store.ErrLeaseGone):
		// The key goes with it; the Snapshot that says so makes us lease it again.
		k.log.Warn("the store no longer knows our lease", "lease", k.renewed.Key())
		k.renewAt = time.Now().Add(renewRetry)
	case err != nil:
		k.fail("renew lease", err)
		k.renewAt = time.Now().Add(renewRetry)
	default:
		// A third of its life, so that two failures in a row cost nothing; earlier
		// if the operator asks for a wider margin.
		k.update(func(r *report) { r.leaseErr = "" })
		k.renewAt = time.Now().Add(min(ttl/3, max(ttl-k.cfg.RenewMargin, time.Second)))
		k.log.Debug("lease renewed", "lease", k.renewed.Key(), "ttl", ttl)
	}
	k.metrics.renewal(err)
	return time.Until(k.renewAt)
}

func (k *keeper) fail(what string, err error) {
	text := what + ": " + err.Error()
	k.update(func(r *report) {
		if r.leaseErr != text {
			k.log.Warn("lease", "error", text)
		}
		r.leaseErr = text
	})
}
