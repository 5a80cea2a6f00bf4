package store

import (
	"context"
	"errors"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/twill-net/twill/pkg/overlay"
)

// Watch reads everything, emits it, and emits it anew after each batch of events,
// until something goes wrong: compaction, a lost leader, a lost right, etcd not to
// be reached at the start. The caller pauses and calls again, which reads
// everything again; Status has the reason, and it is logged. A lost connection is
// no error: the watch goes on from where it was as soon as there is another, and
// Status tells of it meanwhile.
//
// Nothing is emitted before there is a good configuration. emit is called from
// Watch's goroutine, which waits for it; events that come meanwhile make one
// Snapshot. A second Watch waits for the first to end.
func (e *Etcd) Watch(ctx context.Context, emit func(*overlay.Snapshot)) error {
	e.watching.Lock()
	defer e.watching.Unlock()
	err := e.watch(ctx, emit)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if errors.Is(err, rpctypes.ErrCompacted) { // etcd is well
		e.cfg.Log.Info("reading all leases again", "reason", err)
		return err
	}
	e.health.down(err)
	return err
}

func (e *Etcd) watch(ctx context.Context, emit func(*overlay.Snapshot)) error {
	l, cluster, err := e.list(ctx)
	if err != nil {
		return err
	}
	if cluster != e.cluster { // revisions of another cluster mean nothing here
		e.cluster, e.fold.leases = cluster, nil
	}
	before := e.fold.config
	e.fold.replace(l)
	e.health.up()
	e.publish(before, emit)

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := &session{Etcd: e, ctx: ctx, cluster: cluster}
	s.revision.Store(l.revision)
	ctx = context.WithValue(ctx, sessionKey{}, s)
	// A watcher of our own: closing it ends its goroutines.
	w := clientv3.NewWatcher(e.client)
	defer w.Close()
	return e.follow(clientv3.WithRequireLeader(ctx), w, s, emit)
}

// follow folds events into what was read. Two watches, since a role may allow just
// these; and progress notes, so that a resumed watch does not start at a revision
// long compacted. While a resumed watch catches up, the other may be ahead for a
// moment; nobody writes the configuration and a lease so that they need each other.
func (e *Etcd) follow(ctx context.Context, w clientv3.Watcher, s *session, emit func(*overlay.Snapshot)) error {
	from := []clientv3.OpOption{clientv3.WithRev(e.fold.revision + 1), clientv3.WithProgressNotify()}
	config := w.Watch(ctx, e.fold.configKey, from...)
	leases := w.Watch(ctx, e.fold.leaseDir, append(from, clientv3.WithPrefix())...)
	for {
		before, changed := e.fold.config, false
		var err error
		select {
		case r, ok := <-config:
			changed, err = e.take(r, ok, e.fold.configKey)
		case r, ok := <-leases:
			changed, err = e.take(r, ok, e.fold.leaseDir)
		}
		for more := true; more && err == nil; {
			var also bool
			select {
			case r, ok := <-config:
				also, err = e.take(r, ok, e.fold.configKey)
			case r, ok := <-leases:
				also, err = e.take(r, ok, e.fold.leaseDir)
			default:
				more = false
			}
			changed = changed || also
		}
		if changed {
			s.revision.Store(e.fold.revision)
			e.publish(before, emit)
		}
		if err != nil {
			return err
		}
	}
}

// take folds one response of the watch of key and reports whether there was
// anything in it.
func (e *Etcd) take(r clientv3.WatchResponse, ok bool, key string) (bool, error) {
	if !ok {
		return false, errors.New("watch " + key + ": the etcd client is closed")
	}
	if err := r.Err(); err != nil {
		return false, e.cfg.explain("watch", key, err)
	}
	for _, ev := range r.Events {
		e.fold.apply(ev)
	}
	return len(r.Events) > 0, nil
}

// publish emits the Snapshot, if there is one, and logs what is new about the
// configuration.
func (e *Etcd) publish(before foldedConfig, emit func(*overlay.Snapshot)) {
	e.health.folded(e.fold.revision, e.fold.config.fault())
	e.fold.config.report(before, e.cfg.Log)
	if s := e.fold.snapshot(); s != nil {
		emit(s)
	}
}
