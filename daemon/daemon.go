package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"

	"github.com/twill-net/twill/pkg/kernel"
	"github.com/twill-net/twill/pkg/overlay"
)

// Daemon holds the parts of twilld and what they tell each other. Only the
// reconcile loop writes to the kernel, and only the keeper to the store.
type Daemon struct {
	cfg     Config
	version string
	log     *slog.Logger
	started time.Time

	store      leaseStore
	kernel     *kernel.Kernel
	bgp        *bgp
	paths      *pathProber
	extensions *extensions

	snapshot atomic.Pointer[overlay.Snapshot] // the last complete one; never taken back
	claim    atomic.Pointer[claim]            // what the loop wants leased
	held     atomic.Pointer[overlay.Subnets]  // what the keeper holds

	storeBell    bell          // a new Snapshot or lease
	kernelBell   bell          // something changed that we did not
	keeperBell   bell          // the claim or the Snapshot changed
	podBell      bell          // the plugin handed links over
	firewallBell bell          // somebody changed a rule
	written      chan struct{} // closed after the first write to the kernel

	drift   driftLog
	metrics *metrics

	mu     sync.Mutex // guards report
	report report
}

// report is what the loop and the keeper last said of themselves.
type report struct {
	self      overlay.Self
	config    overlay.Config
	podMTU    int
	clean     bool   // the last pass left nothing undone
	waiting   string // what the loop waits for before it can do a pass
	leaseErr  string // why there is no lease, or none renewed
	pass      overlay.PassStatus
	problems  []overlay.Problem
	heartbeat time.Time
}

// Run runs twilld until ctx ends. The data path stays as it is then.
func Run(ctx context.Context, cfg Config, version string, log *slog.Logger) error {
	lock, err := lockNamespace()
	if err != nil {
		return err
	}
	defer lock.Close()

	d := &Daemon{
		cfg: cfg, version: version, log: log, started: time.Now(),
		storeBell: newBell(), kernelBell: newBell(), keeperBell: newBell(), podBell: newBell(), firewallBell: newBell(),
		written: make(chan struct{}),
	}
	d.metrics = newMetrics(d)
	d.bgp = &bgp{Daemon: d, bell: newBell()}
	d.paths = newPathProber(log, d.storeBell.ring)
	d.extensions = newExtensions(d)
	if d.store, err = openStore(cfg, log); err != nil {
		return err
	}
	defer d.store.Close()
	if d.kernel, err = kernel.Open(kernel.Options{Log: log}); err != nil {
		return fmt.Errorf("open the kernel's network interfaces: %w; twilld needs CAP_NET_ADMIN", err)
	}
	defer d.kernel.Close()
	servers, err := d.listen()
	if err != nil {
		return err
	}
	from := d.store.Status()
	log.Info("started", "version", version, "store", from.Kind, "endpoints", from.Endpoints, "prefix", from.Prefix)

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.forever(ctx, "watch store", d.watchStore) })
	g.Go(func() error { return d.forever(ctx, "watch kernel", d.watchKernel) })
	g.Go(func() error { return d.forever(ctx, "probe paths", d.paths.run) })
	g.Go(func() error { return d.extensions.run(ctx) })
	g.Go(func() error { return d.bgp.run(ctx) })
	g.Go(func() error { return d.keepLease(ctx) })
	g.Go(func() error { return d.reconcile(ctx) })
	g.Go(func() error { return d.forever(ctx, "serve the plugin", d.servePlugin) })
	g.Go(func() error { return d.tidy(ctx) })
	g.Go(func() error { return d.keepPorts(ctx) })
	for _, s := range servers {
		g.Go(func() error { return s.serve(ctx) })
	}
	err = g.Wait()
	d.bgp.close(context.WithoutCancel(ctx))
	notify(daemon.SdNotifyStopping)
	log.Info("stopped; routes and rules stay in place")
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// forever runs a task again whenever it ends, more and more slowly while it fails
// at once.
func (d *Daemon) forever(ctx context.Context, name string, task func(context.Context) error) error {
	const least, most = 100 * time.Millisecond, 2 * time.Second
	pause := least
	for {
		began := time.Now()
		err := task(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if time.Since(began) > most {
			pause = least
		}
		d.log.Debug("task ended, starting again", "task", name, "error", err)
		if !sleep(ctx, jitter(pause)) {
			return ctx.Err()
		}
		pause = min(2*pause, most)
	}
}

func (d *Daemon) watchStore(ctx context.Context) error {
	return d.store.Watch(ctx, func(s *overlay.Snapshot) {
		d.snapshot.Store(s)
		d.storeBell.ring("store")
		d.keeperBell.ring("store")
	})
}

// watchKernel begins when the first pass has written: ten thousand notifications
// of our own work would only slow it down. What happened before the watch stood is
// found by reading everything.
func (d *Daemon) watchKernel(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-d.written:
	}
	return d.kernel.Watch(ctx, func(why string) {
		d.kernelBell.ring(why)
		if why == kernel.FirewallChanged {
			d.firewallBell.ring(why)
		}
	})
}

func (d *Daemon) update(f func(*report)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f(&d.report)
}

// bell wakes one goroutine; ringing twice before it wakes is ringing once. The
// channel carries the first reason, for people.
type bell chan string

func newBell() bell { return make(bell, 1) }

func (b bell) ring(why string) {
	select {
	case b <- why:
	default:
	}
}

// jitter spreads d by a fifth to either side, so that 10,000 nodes do not act as
// one.
func jitter(d time.Duration) time.Duration {
	return d*4/5 + time.Duration(rand.Int64N(int64(d)*2/5+1))
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// notify tells systemd, if it started us.
func notify(state string) {
	if os.Getenv("NOTIFY_SOCKET") != "" {
		_, _ = daemon.SdNotify(false, state) // systemd's time-out is the report
	}
}
