package store

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/twill-net/twill/pkg/overlay"
)

// Kube is the lease store in the Kubernetes API: a lease is what a Node's podCIDRs
// and flannel's annotations say. Its methods are safe for concurrent use.
type Kube struct {
	cfg    KubeConfig
	names  annotations
	health *health

	client atomic.Pointer[kubeClient]
	node   atomic.Pointer[string] // this node's name; nil: not asked for yet

	claimed claims

	// watching is held by Watch; the others are its own.
	watching sync.Mutex
	fold     *kubeFold
	failed   bool // the last Watch failed: what the files say may be newer
}

// OpenKube checks the configuration and reads the files. It does not connect: the
// API may be away.
func OpenKube(cfg KubeConfig) (*Kube, error) {
	cfg, err := cfg.normalize()
	if err != nil {
		return nil, err
	}
	names, err := newAnnotations(cfg.AnnotationPrefix)
	if err != nil {
		return nil, err
	}
	client, err := cfg.connect()
	if err != nil {
		return nil, err
	}
	k := &Kube{cfg: cfg, names: names, claimed: claims{news: make(chan struct{}, 1)}}
	k.client.Store(client)
	if cfg.NodeName != "" {
		k.node.Store(&cfg.NodeName)
	}
	k.health = newHealth(cfg.Log, overlay.StoreStatus{
		Kind: "kubernetes", Endpoints: []string{client.url}, Prefix: cfg.AnnotationPrefix,
		InCluster: client.inCluster, Kubeconfig: cfg.Kubeconfig, NetConfig: cfg.NetConfig,
	})
	k.fold = k.newFold()
	return k, nil
}

func (k *Kube) newFold() *kubeFold {
	f := newKubeFold(k.names, k.cfg)
	f.claimed = &k.claimed
	return f
}

// Close ends idle connections. Calls in progress end with their contexts.
func (k *Kube) Close() error {
	k.client.Load().close()
	return nil
}

// Status returns the state of the connection.
func (k *Kube) Status() overlay.StoreStatus {
	s := k.health.get()
	if name := k.node.Load(); name != nil {
		s.Node = *name
	}
	return s
}

// Renew has nothing to do: a Node's lease ends with the Node.
func (k *Kube) Renew(context.Context, overlay.Lease) (time.Duration, error) { return 0, nil }

// Expiry returns 0 for each lease: none runs out.
func (k *Kube) Expiry(_ context.Context, leases []*overlay.Lease) ([]time.Duration, error) {
	return make([]time.Duration, len(leases)), nil
}

// Snapshot reads everything once. If the configuration is no good, running stands
// in for it and the Snapshot has a Problem; without a running one it is an error.
func (k *Kube) Snapshot(ctx context.Context, running overlay.Config) (*overlay.Snapshot, error) {
	f := k.newFold()
	f.config.good, f.config.have = running, !running.Equal(overlay.Config{})
	f.readConfig()
	err := k.resolve(ctx, f)
	if err == nil {
		err = k.readAll(ctx, f)
	}
	if err != nil {
		if ctx.Err() == nil {
			k.health.down(err)
		}
		return nil, err
	}
	k.health.up()
	k.health.folded(f.number(), f.config.fault())
	s := f.snapshot()
	if s != nil {
		return s, nil
	}
	if err := f.config.fault(); err != nil {
		return nil, err
	}
	return nil, errors.New("read the network configuration: no file is named; give --net-config-path")
}

// resolve finds this node's name, which is that of its Node.
func (k *Kube) resolve(ctx context.Context, f *kubeFold) error {
	if name := k.node.Load(); name != nil {
		f.self = *name
		return nil
	}
	if k.cfg.PodName == "" { // a Reader
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	c := k.client.Load()
	var pod corev1.Pod
	what := access{verb: "get", resource: "pods", namespace: k.cfg.PodNamespace, name: k.cfg.PodName}
	if err := c.core.Get().Namespace(what.namespace).Resource("pods").Name(what.name).Do(ctx).Into(&pod); err != nil {
		return c.explain(what, err)
	}
	if pod.Spec.NodeName == "" {
		return errors.New("pod " + k.cfg.PodNamespace + "/" + k.cfg.PodName + " is on no node; is POD_NAME the name of twilld's own pod?")
	}
	f.self = pod.Spec.NodeName
	k.node.Store(&f.self)
	return nil
}
