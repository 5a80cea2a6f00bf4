// Package speaker speaks BGP for the node: it announces the node's pod subnets and
// learns the others'. gobgp does the talking, inside this process. The speaker never
// writes the kernel: what it has learned is part of the desired State, which the
// daemon makes and keeps.
//
// A session carries one address family, that of its addresses. Both ends connect.
// Graceful restart (RFC 4724) is on for all of them: while this process is away its
// neighbours keep its routes, and while one of them is away its routes are kept
// here, marked stale.
package speaker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/server"

	"github.com/twill-net/twill/pkg/overlay"
)

// Options of a Speaker.
type Options struct {
	Log *slog.Logger
	// Bell is rung when Routes has changed or Settled has become true. It must not
	// call the Speaker.
	Bell func(why string)
}

// Speaker is one node's BGP speaker. Its methods may be called from several
// goroutines. A process has at most one: gobgp keeps a part of its configuration in
// globals.
type Speaker struct {
	opts  Options
	peers sessions

	routes  atomic.Pointer[overlay.RIB]
	settled atomic.Bool
	want    atomic.Pointer[overlay.BGP] // what was set last

	mu  sync.Mutex // held while the server is configured
	srv *server.BgpServer
	// As the server has them:
	filters filters
	own     []announcement
	links   map[peering]overlay.BGPNeighbor
	// first says that the neighbours being added are those of a speaker that has
	// just started: it may be coming back from a restart.
	first bool

	work     sync.Mutex // held while the RIB is made
	watching *watching
}

// watching is the goroutine that follows the server.
type watching struct {
	cancel context.CancelFunc
	done   chan struct{}
}

// New returns a speaker that does not speak yet: Set makes it.
func New(o Options) *Speaker {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Bell == nil {
		o.Bell = func(string) {}
	}
	s := &Speaker{opts: o}
	s.peers.init(o.Log)
	return s
}

// Set makes the speaker do what b says. Sessions that b does not change go on
// undisturbed. If a part fails the rest is done all the same; Set may be called
// again with the same b, which does what is missing.
func (s *Speaker) Set(ctx context.Context, b overlay.BGP) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := check(b); err != nil {
		return err
	}
	if was := s.want.Load(); s.srv != nil && (was.ASNumber != b.ASNumber || was.RouterID != b.RouterID || was.Port != b.Port) {
		s.stop(ctx, true) // they are part of every session
	}
	if s.srv == nil {
		if err := s.start(ctx, b); err != nil {
			return err
		}
	}
	s.want.Store(&b)
	err := errors.Join(s.setFilters(ctx, b), s.setOwn(b), s.setNeighbors(ctx, b))
	s.first = false
	s.refresh()
	return err
}

// check refuses what no BGP speaker can do. The pure core has checked what the
// operator wrote.
func check(b overlay.BGP) error {
	switch {
	case b.ASNumber == 0:
		return errors.New("start BGP: AS number is 0; set Backend.ASNumber or --bgp-as-number to 1..4294967295")
	case !b.RouterID.Is4() || b.RouterID.IsUnspecified():
		return fmt.Errorf("start BGP: router id %s is not an IPv4 address", b.RouterID)
	case b.Port == 0:
		return errors.New("start BGP: port is 0; set Backend.Port to 1..65535")
	}
	return nil
}

// Routes returns what is learned: of each prefix the best paths, all equally good.
// It is the same pointer until something has changed, and nil before Set. Next hops
// are not resolved.
func (s *Speaker) Routes() *overlay.RIB { return s.routes.Load() }

// Settled reports whether every neighbour has told all it knows or had the time to:
// until then what is missing in Routes may only not have been told yet (RFC 4724,
// section 4.1).
func (s *Speaker) Settled() bool { return s.settled.Load() }

// Close ends the sessions as the end of the process would: no notification, no
// withdrawal, so that neighbours keep the routes for the restart time. Routes and
// Settled keep their values.
func (s *Speaker) Close(ctx context.Context) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stop(ctx, false)
}

// Withdraw ends the sessions in good order: neighbours forget the routes at once.
// Nothing is learned afterwards. Set starts again.
func (s *Speaker) Withdraw(ctx context.Context) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stop(ctx, true)
	s.settled.Store(false)
	s.routes.Store(nil)
}

// watch follows the server until ctx ends: each bell of the sessions or of the
// server's table makes the RIB anew.
func (s *Speaker) watch(ctx context.Context, done chan<- struct{}) {
	defer close(done)
	// Many updates come in a row: of a full table, the first is no hurry.
	const gather = 100 * time.Millisecond
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.peers.bell:
			select {
			case <-ctx.Done():
				return
			case <-time.After(gather):
			}
		case <-tick.C: // neighbours that never answer are waited for by the clock
			s.dialLate(ctx)
			if s.settled.Load() {
				continue
			}
		}
		s.refresh()
	}
}

// dialLate dials the neighbours that should have and did not.
func (s *Speaker) dialLate(ctx context.Context) {
	if !s.mu.TryLock() { // Set and stop wait for us, too
		return
	}
	defer s.mu.Unlock()
	late := s.peers.newlyLate(time.Now())
	for p := range s.links {
		if !p.passive || !late[p.address] || s.srv == nil {
			continue
		}
		if _, err := s.srv.UpdatePeer(ctx, &api.UpdatePeerRequest{Peer: s.peer(*s.want.Load(), p)}); err != nil {
			s.opts.Log.Warn("BGP neighbour cannot be dialled", "neighbor", p.address, "error", err)
		}
	}
}

// refresh publishes the RIB and Settled, and rings if they changed.
func (s *Speaker) refresh() {
	s.work.Lock()
	defer s.work.Unlock()
	want, srv := s.want.Load(), s.peers.server()
	if want == nil || srv == nil {
		return
	}
	// Before the table is read: what was told before the end is in it.
	settled := s.peers.settled(time.Now())
	rib, accepted, err := learned(srv, *want)
	if err != nil {
		s.opts.Log.Error("BGP routes cannot be read", "error", err)
		return
	}
	s.peers.count(accepted)
	why := ""
	if old := s.routes.Load(); old == nil || !slices.EqualFunc(old.Routes, rib.Routes, sameRoute) {
		s.routes.Store(rib)
		why = "bgp routes"
	}
	if settled && !s.settled.Swap(true) {
		why = "bgp settled"
	}
	if why != "" {
		s.opts.Bell(why)
	}
}

func sameRoute(a, b overlay.BGPRoute) bool { return reflect.DeepEqual(a, b) }
