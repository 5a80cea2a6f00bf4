package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"github.com/twill-net/twill/pkg/overlay"
)

// Do makes one write, on the condition that the store still is what the Step was
// decided on. If done is false, the race was lost: decide again, from a newer
// Snapshot. After an error the write may have happened or not; a later Snapshot
// shows it.
//
// A Snapshot newer than the one decided on need not show the write yet. So after a
// Create, whatever came of it, the claim must Prefer the subnet of the Step: to
// decide too early is then only a race lost, and never a second subnet.
func (e *Etcd) Do(ctx context.Context, step overlay.Step) (done bool, err error) {
	if step.Act == overlay.Hold {
		return true, nil
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	key := e.fold.leaseDir + step.Lease.Key()
	switch step.Act {
	case overlay.Create:
		done, err = e.create(ctx, key, step.Lease.Value())
	case overlay.Update:
		// The key keeps its lease, or its lack of one. If etcd has ended the lease
		// meanwhile, the key is gone with it and the condition fails.
		done, err = e.commit(ctx, unchanged(key, step.Lease), clientv3.OpPut(key, string(step.Lease.Value()), clientv3.WithIgnoreLease()))
	case overlay.Remove:
		done, err = e.commit(ctx, unchanged(key, step.Lease), clientv3.OpDelete(key))
		if done && !step.Lease.Reserved() {
			e.revokeUnused(ctx, clientv3.LeaseID(step.Lease.Grant))
		}
	default:
		return false, fmt.Errorf("write lease %s: no such act: %d", key, step.Act)
	}
	if err != nil {
		return false, e.cfg.explain(step.Act.String(), key, err)
	}
	return done, nil
}

// create makes the key with a lease of its own.
func (e *Etcd) create(ctx context.Context, key string, value []byte) (bool, error) {
	grant, err := e.client.Grant(ctx, int64(e.cfg.TTL/time.Second))
	if err != nil {
		return false, err
	}
	absent := clientv3.Compare(clientv3.Version(key), "=", 0)
	done, err := e.commit(ctx, absent, clientv3.OpPut(key, string(value), clientv3.WithLease(grant.ID)))
	if !done && (err == nil || refused(err)) {
		e.revoke(ctx, grant.ID)
	}
	// After any other error the key may be there, or come yet: to revoke its lease
	// would delete it when it is already in use. Without a key it just runs out.
	return done, err
}

func unchanged(key string, l overlay.Lease) clientv3.Cmp {
	return clientv3.Compare(clientv3.ModRevision(key), "=", l.Modified)
}

func (e *Etcd) commit(ctx context.Context, condition clientv3.Cmp, op clientv3.Op) (bool, error) {
	r, err := e.client.Txn(ctx).If(condition).Then(op).Commit()
	if err != nil {
		return false, err
	}
	return r.Succeeded, nil
}

// revokeUnused revokes the lease unless other keys hang on it.
func (e *Etcd) revokeUnused(ctx context.Context, id clientv3.LeaseID) {
	r, err := e.client.TimeToLive(ctx, id, clientv3.WithAttachedKeys())
	if err == nil && r.TTL > 0 && len(r.Keys) == 0 {
		e.revoke(ctx, id)
	}
}

// revoke tidies up. What is left if it fails is a lease without keys, which runs
// out.
func (e *Etcd) revoke(ctx context.Context, id clientv3.LeaseID) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
	defer cancel()
	if _, err := e.client.Revoke(ctx, id); err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		e.cfg.Log.Debug("revoke unused etcd lease", "lease", fmt.Sprintf("%x", id), "error", err)
	}
}

// Renew starts the lease's time anew and returns it. The key is not written, so
// nobody who watches wakes up. A reservation has no time: 0. The error is
// ErrLeaseGone if it is too late.
func (e *Etcd) Renew(ctx context.Context, l overlay.Lease) (time.Duration, error) {
	if l.Reserved() {
		return 0, nil
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	ttl, err := e.keepAlive(ctx, l.Grant)
	if err == nil && ttl <= 0 {
		err = ErrLeaseGone
	}
	if err != nil {
		return 0, e.cfg.explain("renew", e.fold.leaseDir+l.Key(), err)
	}
	return ttl, nil
}

// keepAlive is one exchange on a stream of its own. (The client's KeepAliveOnce
// tries again at once, and without end, when etcd cannot be reached.)
func (e *Etcd) keepAlive(ctx context.Context, grant int64) (time.Duration, error) {
	stream, err := pb.NewLeaseClient(e.client.ActiveConnection()).LeaseKeepAlive(ctx)
	if err != nil {
		return 0, err
	}
	if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: grant}); err != nil {
		return 0, err
	}
	r, err := stream.Recv()
	if err != nil {
		return 0, err
	}
	return time.Duration(r.TTL) * time.Second, nil
}

// expiryCalls is how many of Expiry's questions are open at a time.
const expiryCalls = 16

// Expiry returns for each lease how long it still lives: 0 for a reservation,
// negative for one that is gone. One question per lease, so only for people who
// ask.
func (e *Etcd) Expiry(ctx context.Context, leases []*overlay.Lease) ([]time.Duration, error) {
	out := make([]time.Duration, len(leases))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(expiryCalls)
	for i, l := range leases {
		if l.Reserved() {
			continue
		}
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, callTimeout)
			defer cancel()
			r, err := e.client.TimeToLive(ctx, clientv3.LeaseID(l.Grant))
			if err != nil {
				return e.cfg.explain("read the lifetime of", e.fold.leaseDir+l.Key(), err)
			}
			out[i] = time.Duration(r.TTL) * time.Second
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return out, nil
}
