package daemon

import (
	"context"
	"log/slog"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/store"
)

// leaseStore is where the leases live: etcd or the Kubernetes API.
type leaseStore interface {
	// Watch emits complete Snapshots until something goes wrong.
	Watch(ctx context.Context, emit func(*overlay.Snapshot)) error
	leaseWriter
	Status() overlay.StoreStatus
	Close() error
}

// leaseWriter is what the keeper writes with.
type leaseWriter interface {
	// Do makes one write; done is false if something else was written meanwhile.
	Do(context.Context, overlay.Step) (done bool, err error)
	// Renew keeps a lease that has an end from ending.
	Renew(context.Context, overlay.Lease) (time.Duration, error)
}

func openStore(c Config, log *slog.Logger) (leaseStore, error) {
	if c.Kubernetes {
		kube := c.Kube
		kube.Log = log
		return store.OpenKube(kube)
	}
	etcd := c.Etcd
	etcd.Log = log
	return store.OpenEtcd(etcd)
}
