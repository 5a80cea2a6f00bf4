package store

import (
	"context"
	"fmt"
	"sync"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/twill-net/twill/pkg/overlay"
)

// pageSize is the number of leases read at once: about half a MiB.
const pageSize = 2000

// Etcd is the lease store in etcd v3. Its methods are safe for concurrent use.
type Etcd struct {
	cfg    EtcdConfig
	client *clientv3.Client
	health *health

	// watching is held by Watch; the others are its own.
	watching sync.Mutex
	fold     *fold
	cluster  uint64 // id of the cluster that fold was read from
}

// OpenEtcd checks the configuration and reads the TLS files. It does not connect:
// etcd may be away.
func OpenEtcd(cfg EtcdConfig) (*Etcd, error) {
	cfg, err := cfg.normalize()
	if err != nil {
		return nil, err
	}
	security, err := cfg.tls()
	if err != nil {
		return nil, err
	}
	if cfg.Password != "" && security == nil {
		cfg.Log.Warn("the etcd password goes over the network in clear; use https", "endpoints", cfg.Endpoints)
	}
	client, err := clientv3.New(cfg.client(security))
	if err != nil {
		return nil, fmt.Errorf("make etcd client: %w", err)
	}
	return &Etcd{cfg: cfg, client: client, health: newHealth(cfg.Log, cfg.status()), fold: newFold(cfg.Prefix)}, nil
}

// Close ends all connections and calls in progress.
func (e *Etcd) Close() error {
	if err := e.client.Close(); err != nil {
		return fmt.Errorf("close etcd client: %w", err)
	}
	return nil
}

// Status returns the state of the connection.
func (e *Etcd) Status() overlay.StoreStatus { return e.health.get() }

// Snapshot reads everything once. If the stored configuration is no good, running
// stands in for it and the Snapshot has a Problem; without a running one it is an
// error.
func (e *Etcd) Snapshot(ctx context.Context, running overlay.Config) (*overlay.Snapshot, error) {
	f := newFold(e.cfg.Prefix)
	f.config.good, f.config.have = running, !running.Equal(overlay.Config{})
	l, _, err := e.list(ctx)
	if err != nil {
		if ctx.Err() == nil {
			e.health.down(err)
		}
		return nil, err
	}
	f.replace(l)
	e.health.up()
	e.health.folded(f.revision, f.config.fault())
	s := f.snapshot()
	if s == nil {
		return nil, f.config.fault()
	}
	return s, nil
}

// list reads the configuration and all leases at one revision, and the id of the
// cluster.
func (e *Etcd) list(ctx context.Context) (l listing, cluster uint64, err error) {
	r, err := e.get(ctx, e.fold.configKey)
	if err != nil {
		return l, 0, err
	}
	l.revision = r.Header.Revision
	if len(r.Kvs) > 0 {
		l.config = r.Kvs[0]
	}
	end := clientv3.GetPrefixRangeEnd(e.fold.leaseDir)
	for next, more := e.fold.leaseDir, true; more; {
		page, err := e.get(ctx, next, clientv3.WithRange(end), clientv3.WithLimit(pageSize), clientv3.WithRev(l.revision))
		if err != nil {
			return l, 0, err
		}
		l.leases = append(l.leases, page.Kvs...)
		if more = page.More && len(page.Kvs) > 0; more {
			next = string(page.Kvs[len(page.Kvs)-1].Key) + "\x00"
		}
	}
	return l, r.Header.ClusterId, nil
}

func (e *Etcd) get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	r, err := e.client.Get(ctx, key, opts...)
	if err != nil {
		return nil, e.cfg.explain("read", key, err)
	}
	return r, nil
}
