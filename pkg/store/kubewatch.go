package store

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/twill-net/twill/pkg/overlay"
)

const (
	// configEvery is the time between two looks at the configuration's file.
	configEvery = 2 * time.Second
	// settle is how long more events are waited for before a Snapshot is made of
	// them: nodes that boot together, come together.
	settle = 20 * time.Millisecond
	// spread is the time over which nodes come back to an API that was away, or read
	// everything again, for each node of the cluster: an API server that has
	// restarted is asked by a thousand a second and not by all at once.
	spread     = time.Millisecond
	leastPause = 50 * time.Millisecond
)

// Watch emits a Snapshot as soon as everything is read, and then after each batch of
// events and each change of the configuration, until something goes wrong: the API
// cannot be reached, a right is missing. The caller pauses and calls again; Status
// has the reason. What was folded so far is kept, and the watch resumed where it
// ended: everything is only read again if the API no longer knows that revision.
//
// Nothing is emitted before there is a good configuration. emit is called from
// Watch's goroutine. A second Watch waits for the first to end.
func (k *Kube) Watch(ctx context.Context, emit func(*overlay.Snapshot)) error {
	k.watching.Lock()
	defer k.watching.Unlock()
	err := k.watch(ctx, emit)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	k.failed = true
	k.health.down(err)
	return err
}

func (k *Kube) watch(ctx context.Context, emit func(*overlay.Snapshot)) error {
	if k.failed {
		if err := k.again(ctx); err != nil {
			return err
		}
	}
	if err := k.resolve(ctx, k.fold); err != nil {
		return err
	}
	for first := true; ; first = false {
		before := k.fold.config
		k.fold.readConfig()
		err := k.start(ctx, func(w watch.Interface) error {
			k.failed = false
			k.health.up()
			k.publish(before, emit)
			return k.follow(ctx, w, emit)
		})
		switch {
		case apierrors.IsResourceExpired(err), apierrors.IsGone(err):
			k.cfg.Log.Info("reading all nodes again", "reason", err)
			k.fold.expired()
			if !first && !k.pause(ctx) {
				return ctx.Err()
			}
		case errors.Is(err, errBroken):
			// Whether the API is there, and why not, the next try tells.
			k.cfg.Log.Debug("watching nodes again", "reason", err)
			if !k.pause(ctx) {
				return ctx.Err()
			}
		case err != nil:
			return err
		}
		// Without an error the API server has ended the watch, as it does from time to
		// time. It goes on from where it was.
	}
}

// again reads the files anew, after a while: a certificate may have been renewed, or
// the kubeconfig corrected.
func (k *Kube) again(ctx context.Context) error {
	if !k.pause(ctx) {
		return ctx.Err()
	}
	c, err := k.cfg.connect()
	if err != nil {
		return err
	}
	k.client.Swap(c).close()
	k.health.at(c.url)
	return nil
}

func (k *Kube) pause(ctx context.Context) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(leastPause + rand.N(spread*time.Duration(1+len(k.fold.nodes)))):
		return true
	}
}

// start begins a watch at the fold's revision, or reads everything first, and calls
// follow with it.
func (k *Kube) start(ctx context.Context, follow func(watch.Interface) error) error {
	ctx, cancel := context.WithCancel(ctx) // ends the request, whatever reads it
	defer cancel()
	if k.fold.revision != "" {
		w, err := k.open(ctx, metav1.ListOptions{ResourceVersion: k.fold.revision, AllowWatchBookmarks: true})
		if err != nil {
			return err
		}
		defer w.Stop()
		return follow(w)
	}
	f := k.newFold()
	f.self, f.config, f.text, f.least = k.fold.self, k.fold.config, k.fold.text, k.fold.least
	w, err := k.read(ctx, f)
	if err != nil {
		return err
	}
	f.keep(k.fold)
	k.fold = f
	if w == nil { // it was a list
		return k.start(ctx, follow)
	}
	defer w.Stop()
	return follow(w)
}

// readAll reads everything once.
func (k *Kube) readAll(ctx context.Context, f *kubeFold) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w, err := k.read(ctx, f)
	if w != nil {
		w.Stop()
	}
	return err
}

// read folds all Nodes and returns the watch that goes on from there, or nil if it
// has to be started.
//
// The Nodes come one by one, at the head of a watch ("watch list", Kubernetes 1.32
// and later), from the API server's memory: ten thousand nodes that do this cost etcd
// nothing, and neither end holds all Nodes in full at any time. An API server that
// cannot do it is asked for a list, from its memory as well ("0").
func (k *Kube) read(ctx context.Context, f *kubeFold) (watch.Interface, error) {
	yes := true
	from := f.least // what was seen shall not be unseen
	if from == "" {
		from = "0"
	}
	w, err := k.open(ctx, metav1.ListOptions{
		SendInitialEvents: &yes, AllowWatchBookmarks: true,
		ResourceVersion: from, ResourceVersionMatch: metav1.ResourceVersionMatchNotOlderThan,
	})
	if err == nil {
		if err = k.fill(f, w); err != nil {
			w.Stop()
		}
	}
	switch {
	case err == nil:
		return w, nil
	case apierrors.IsInvalid(err), errors.Is(err, errNoWatchList):
		return nil, k.list(ctx, f, from)
	case from != "0" && apierrors.IsTimeout(err):
		// An etcd that was restored from a backup never reaches that revision.
		k.fold.least = ""
	}
	return nil, err
}

// errNoWatchList says that an old API server did not understand the question.
var errNoWatchList = errors.New("the API server sends no list with a watch")

// fill folds the Nodes at the head of a watch.
func (k *Kube) fill(f *kubeFold, w watch.Interface) error {
	for ev := range w.ResultChan() {
		switch n, ok := ev.Object.(*corev1.Node); {
		case ev.Type == watch.Error:
			return k.refused(ev)
		case ev.Type == watch.Bookmark && ok:
			if n.Annotations[metav1.InitialEventsAnnotationKey] != "true" {
				return errNoWatchList
			}
			f.seen(n.ResourceVersion)
			return nil
		case ok:
			f.put(n)
		}
	}
	return errBroken
}

var watchNodes = access{verb: "watch", resource: "nodes"}

// list reads all Nodes at once.
func (k *Kube) list(ctx context.Context, f *kubeFold, from string) error {
	c := k.client.Load()
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	var l corev1.NodeList
	if err := c.core.Get().Resource("nodes").Param("resourceVersion", from).Do(ctx).Into(&l); err != nil {
		return c.explain(access{verb: "list", resource: "nodes"}, err)
	}
	f.nodes = make(map[string]*kubeNode, len(l.Items))
	f.seen(l.ResourceVersion)
	for i := range l.Items {
		f.put(&l.Items[i])
	}
	return nil
}

// listTimeout bounds a list of ten thousand Nodes.
const listTimeout = time.Minute

func (k *Kube) open(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	c := k.client.Load()
	// client-go would try ten times, and not say so meanwhile.
	r := c.core.Get().MaxRetries(0).Resource("nodes").Param("watch", "true").Param("resourceVersion", o.ResourceVersion).Param("allowWatchBookmarks", "true")
	if o.SendInitialEvents != nil {
		r.Param("sendInitialEvents", strconv.FormatBool(*o.SendInitialEvents)).Param("resourceVersionMatch", string(o.ResourceVersionMatch))
	}
	w, err := r.Watch(ctx)
	if err == nil {
		if _, ok := w.(*watch.StreamWatcher); ok {
			return w, nil
		}
		// client-go takes some errors, a TLS handshake that the other end breaks off
		// for one, for the end of a watch without events. A question gets the reason.
		if err = c.ask(ctx); err == nil {
			err = errBroken
		}
	}
	return nil, c.explain(watchNodes, err)
}

// ask finds out whether the API can be reached. (client-go would try again and again.)
func (k *kubeClient) ask(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, k.core.Get().AbsPath("/version").URL().String(), nil)
	if err != nil {
		return err
	}
	answer, err := k.core.Client.Do(r)
	if err != nil {
		return err
	}
	return answer.Body.Close()
}

// follow folds events until the watch ends.
func (k *Kube) follow(ctx context.Context, w watch.Interface, emit func(*overlay.Snapshot)) error {
	config := time.NewTicker(configEvery)
	defer config.Stop()
	var due <-chan time.Time // a Snapshot is
	before := k.fold.config
	for {
		changed := false
		select {
		case <-ctx.Done():
			return ctx.Err()
		case ev, ok := <-w.ResultChan():
			if !ok || ev.Type == watch.Error {
				if due != nil {
					k.publish(before, emit)
				}
				if !ok {
					return nil
				}
				return k.refused(ev)
			}
			changed = k.apply(ev)
		case <-config.C:
			changed = k.fold.readConfig()
		case <-k.claimed.news:
			changed = true
		case <-due:
			due = nil
			k.publish(before, emit)
			before = k.fold.config
		}
		if changed && due == nil {
			due = time.After(settle + spread/100*time.Duration(len(k.fold.nodes)))
		}
	}
}

// apply folds one event and reports whether it says anything new.
func (k *Kube) apply(ev watch.Event) (changed bool) {
	n, ok := ev.Object.(*corev1.Node)
	if !ok {
		return false
	}
	k.fold.seen(n.ResourceVersion)
	switch ev.Type {
	case watch.Added, watch.Modified:
		changed = k.fold.put(n)
	case watch.Deleted:
		changed = k.fold.remove(n.Name)
	}
	if !changed {
		k.health.folded(k.fold.number(), k.fold.config.fault())
	}
	return changed
}

// errBroken says that a watch ended in the middle of an event: the connection was
// lost.
var errBroken = errors.New("the connection was lost")

// refused is the error of an event that is one.
func (k *Kube) refused(ev watch.Event) error {
	err := apierrors.FromObject(ev.Object)
	if apierrors.HasStatusCause(err, "ClientWatchDecoding") { // client-go's own
		return fmt.Errorf("%w: %w", errBroken, err)
	}
	if s, ok := ev.Object.(*metav1.Status); ok && s.Code == http.StatusGone {
		return err
	}
	return k.client.Load().explain(watchNodes, err)
}

// publish emits the Snapshot, if there is one, and logs what is new about the
// configuration.
func (k *Kube) publish(before foldedConfig, emit func(*overlay.Snapshot)) {
	k.health.folded(k.fold.number(), k.fold.config.fault())
	k.fold.config.report(before, k.cfg.Log)
	if s := k.fold.snapshot(); s != nil {
		emit(s)
	}
}
