package daemon

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"sync/atomic"

	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/speaker"
	"github.com/twill-net/twill/pkg/speaker/router"
)

// bgp has the node's routes told to others, by twilld's own speaker or by a router
// that is configured for it.
type bgp struct {
	*Daemon

	// What the external router is to do, and why it does not. A reload takes its
	// time: a task does it beside the loop.
	wish   atomic.Pointer[overlay.BGP]
	bell   bell
	failed atomic.Pointer[overlay.Problem]

	mu      sync.Mutex // guards what follows, which the local API reads too
	speaker *speaker.Speaker
	router  *router.Router

	learned  *overlay.RIB // as the speaker gave it
	resolved *overlay.RIB // the same with next hops resolved
}

func (b *bgp) prepare(ctx context.Context, want *overlay.State) error {
	facts := want.Outside.BGP
	if facts == nil {
		return nil
	}
	if b.cfg.BGP.External {
		b.wish.Store(facts)
		b.bell.ring("pass")
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.speaker == nil {
		b.speaker = speaker.New(speaker.Options{Log: b.log, Bell: b.storeBell.ring})
	}
	return b.speaker.Set(ctx, *facts)
}

// run is the task that configures the external router.
func (b *bgp) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-b.bell:
		}
		err := b.configure(ctx, *b.wish.Load())
		if ctx.Err() != nil {
			return ctx.Err()
		}
		var p *overlay.Problem
		if err != nil {
			p = &overlay.Problem{Object: "router " + b.cfg.Router.Kind, Reason: err.Error(), Remedy: "it goes on with what it has; this is tried again in every full pass"}
		}
		if old := b.failed.Swap(p); (old == nil) != (p == nil) || p != nil && *old != *p {
			b.storeBell.ring("router") // so that it is told
		}
	}
}

func (b *bgp) configure(ctx context.Context, facts overlay.BGP) error {
	b.mu.Lock()
	r := b.router
	b.mu.Unlock()
	if r == nil {
		o := b.cfg.Router
		o.Log = b.log
		var err error
		if r, err = router.New(o); err != nil {
			return err
		}
		b.mu.Lock()
		b.router = r
		b.mu.Unlock()
	}
	_, err := r.Set(ctx, facts)
	return err
}

// problems says why the external router is not as it should be.
func (b *bgp) problems() []overlay.Problem {
	if p := b.failed.Load(); p != nil {
		return []overlay.Problem{*p}
	}
	return nil
}

func (b *bgp) retire(ctx context.Context, want *overlay.State) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if want.Outside.BGP != nil || b.speaker == nil {
		return
	}
	b.speaker.Withdraw(ctx)
	b.speaker, b.learned, b.resolved = nil, nil, nil
}

// close ends the speaker so that the neighbours keep our routes: the daemon will be
// back, and the packets never stop.
func (b *bgp) close(ctx context.Context) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.speaker != nil {
		b.speaker.Close(ctx)
	}
}

// settled reports whether what the speaker has not learned is not there. Before
// that no learned route is taken away: after a restart the neighbours tell again
// what the kernel still has (RFC 4724).
func (b *bgp) settled() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.speaker == nil || b.speaker.Settled()
}

// routes returns what was learned. The next hops that are not on the uplink's link
// are looked up in the kernel when something is new, and in every full pass: the
// routes to them are not ours.
func (b *bgp) routes(ctx context.Context, uplink overlay.Uplink, full bool) (*overlay.RIB, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.speaker == nil {
		return nil, nil
	}
	rib := b.speaker.Routes()
	if rib == b.learned && !full || rib == nil {
		return b.resolved, nil
	}
	hops, err := b.kernel.Resolve(ctx, rib.Remote(uplink.OnLink))
	if err != nil {
		return nil, fmt.Errorf("look up next hops: %w", err)
	}
	if rib == b.learned && b.resolved != nil && maps.Equal(hops, b.resolved.Hops) {
		return b.resolved, nil
	}
	b.learned, b.resolved = rib, &overlay.RIB{Routes: rib.Routes, Hops: hops}
	return b.resolved, nil
}

// status is what netctl bgp shows.
func (b *bgp) status(ctx context.Context) (overlay.BGPStatus, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.router != nil:
		return b.router.Status(ctx)
	case b.speaker != nil:
		return b.speaker.Status(), nil
	}
	return overlay.BGPStatus{}, fmt.Errorf("backend bgp is not in use on this node")
}
