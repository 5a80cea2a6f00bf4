package daemon

import (
	"cmp"
	"container/heap"
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
)

const (
	pathPeriod  = 10 * time.Minute
	pathGap     = 500 * time.Millisecond // between packets, whoever they are for
	pathTimeout = time.Second            // of waiting for an answer
	pathProbes  = 8                      // targets probed at once
)

// pathTarget is a peer that packets of a certain size must reach.
type pathTarget struct {
	Lease  string
	Addr   netip.Addr // of the peer
	Local  netip.Addr // source of the packets; invalid: as routed
	Needed int        // bytes of the largest outer IP packet
}

// pathProber finds the peers to which the network carries less than the outer
// packets need: small packets and handshakes come through, and large ones vanish.
// It sends pings that must not be fragmented.
type pathProber struct {
	log          *slog.Logger
	bell         func(why string)
	gap, timeout time.Duration

	changed bell // the targets are others
	aimed   atomic.Pointer[func() []pathTarget]

	mu     sync.Mutex
	states map[pathTarget]*pathState
	queue  pathQueue // of those that are not being probed
	free   time.Time // when the next packet may be sent
}

// pathQueue is a heap: the target that has been due for longest comes first.
type pathQueue []*pathState

func (q pathQueue) Len() int           { return len(q) }
func (q pathQueue) Less(i, j int) bool { return q[i].due.Before(q[j].due) }
func (q pathQueue) Swap(i, j int)      { q[i], q[j] = q[j], q[i] }
func (q *pathQueue) Push(x any)        { *q = append(*q, x.(*pathState)) }
func (q *pathQueue) Pop() any {
	last := len(*q) - 1
	x := (*q)[last]
	*q = (*q)[:last]
	return x
}

type pathState struct {
	pathTarget
	due     time.Time // zero: at once
	probing bool
	carries int
	at      time.Time // of the result; zero: there is none
}

// narrow tells a path on which large packets vanish.
func (s *pathState) narrow() bool { return s.carries != 0 && s.carries < s.Needed }

// newPathProber takes a bell that is rung when a path has become too narrow, is so
// no longer, or is so in another measure.
func newPathProber(log *slog.Logger, bell func(why string)) *pathProber {
	return &pathProber{
		log: log, bell: bell, gap: pathGap, timeout: pathTimeout,
		changed: newBell(), states: map[pathTarget]*pathState{},
	}
}

// aim says where the targets are to be had. It costs the caller nothing: with ten
// thousand peers, listing them at every change of one would.
func (p *pathProber) aim(targets func() []pathTarget) {
	p.aimed.Store(&targets)
	p.changed.ring("targets")
}

// set says what to probe from now on. What is known of targets that stay is kept.
func (p *pathProber) set(targets []pathTarget) {
	p.mu.Lock()
	defer p.mu.Unlock()
	states := make(map[pathTarget]*pathState, len(targets))
	for _, t := range targets {
		if s, ok := p.states[t]; ok {
			states[t] = s
		} else {
			states[t] = &pathState{pathTarget: t}
		}
	}
	p.states = states
	p.requeue()
	p.changed.ring("targets")
}

func (p *pathProber) requeue() {
	p.queue = p.queue[:0]
	for _, s := range p.states {
		if !s.probing {
			p.queue = append(p.queue, s)
		}
	}
	heap.Init(&p.queue)
}

// results returns what is known of the present targets.
func (p *pathProber) results() []overlay.PathMTU {
	return p.those(func(s *pathState) bool { return !s.at.IsZero() })
}

// tooNarrow returns the targets that full packets do not reach.
func (p *pathProber) tooNarrow() []overlay.PathMTU { return p.those((*pathState).narrow) }

func (p *pathProber) those(which func(*pathState) bool) []overlay.PathMTU {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []overlay.PathMTU
	for _, s := range p.states {
		if which(s) {
			all = append(all, overlay.PathMTU{Peer: s.Addr, Lease: s.Lease, Needed: s.Needed, Carries: s.carries, At: s.at})
		}
	}
	slices.SortFunc(all, func(a, b overlay.PathMTU) int {
		return cmp.Or(strings.Compare(a.Lease, b.Lease), a.Peer.Compare(b.Peer))
	})
	return all
}

// run probes each target when it is new, and again and again, until ctx ends.
// Without the right to send pings nothing is known of any path, which is logged.
func (p *pathProber) run(ctx context.Context) error {
	sockets := map[overlay.Family]*echoSocket{} // nil: cannot be opened
	var readers, probes sync.WaitGroup
	defer func() {
		probes.Wait()
		for _, s := range sockets {
			if s != nil {
				s.close()
			}
		}
		readers.Wait()
	}()
	slots := make(chan struct{}, pathProbes)
	for {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		}
		t, err := p.take(ctx)
		if err != nil {
			return err
		}
		f := overlay.FamilyOf(t.Addr)
		s, known := sockets[f]
		if !known {
			if s, err = openEcho(f); err != nil {
				p.log.Warn("path MTU to peers is not probed", "family", f, "error", err)
			} else {
				readers.Go(func() { s.read(ctx) })
			}
			sockets[f] = s
		}
		probes.Go(func() {
			carries := 0
			if s != nil {
				carries = p.probe(ctx, s, t.pathTarget)
			}
			p.finish(ctx, t, carries)
			<-slots
		})
	}
}

// take waits until a target is due.
func (p *pathProber) take(ctx context.Context) (*pathState, error) {
	for {
		if targets := p.aimed.Swap(nil); targets != nil {
			p.set((*targets)())
		}
		s, wait := p.next()
		if s != nil {
			return s, nil
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-p.changed:
		case <-ctx.Done():
		}
		timer.Stop()
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
}

// next returns the target that has been due for longest, or how long there is none.
func (p *pathProber) next() (*pathState, time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.queue) == 0 {
		return nil, pathPeriod
	}
	if wait := time.Until(p.queue[0].due); wait > 0 {
		return nil, wait
	}
	first := heap.Pop(&p.queue).(*pathState)
	first.probing = true
	return first, 0
}

func (p *pathProber) finish(ctx context.Context, s *pathState, carries int) {
	p.mu.Lock()
	s.probing = false
	if ctx.Err() != nil { // nothing was learned
		p.mu.Unlock()
		return
	}
	before, was := s.narrow(), s.carries
	s.carries, s.at, s.due = carries, time.Now(), time.Now().Add(jitter(pathPeriod))
	if p.states[s.pathTarget] == s {
		heap.Push(&p.queue, s)
	}
	ring := p.states[s.pathTarget] == s && (s.narrow() != before || before && was != carries)
	p.mu.Unlock()
	p.changed.ring("probed") // it may be due before what take waits for
	if ring {
		p.log.Info("path MTU to a peer has changed", "lease", s.Lease, "peer", s.Addr, "needed", s.Needed, "carries", carries)
		p.bell("path MTU")
	}
}

// Requests per size. A single loss must not look like a narrow path.
const (
	triesAlive = 3
	triesFull  = 3
	triesOther = 2
)

// pathSearch is one probe of a target.
type pathSearch struct {
	*pathProber
	socket *echoSocket
	target pathTarget
	hint   int // what a router said that it carries; 0: none did
}

// probe returns how large a packet the path carries, up to what is needed; 0 if
// the peer does not answer.
func (p *pathProber) probe(ctx context.Context, s *echoSocket, t pathTarget) int {
	x := &pathSearch{pathProber: p, socket: s, target: t}
	least := s.least()
	if !x.carried(ctx, least, triesAlive) {
		return 0
	}
	if t.Needed <= least || x.carried(ctx, t.Needed, triesFull) {
		return t.Needed
	}
	size := x.narrowest(ctx, least, t.Needed)
	// An outage that began after the first answer looks the same. It is over when the
	// full size comes through, and goes on when nothing does.
	if x.carried(ctx, t.Needed, 1) {
		return t.Needed
	}
	if !x.carried(ctx, size, triesAlive) {
		return 0
	}
	return size
}

// narrowest searches between a size that is carried and one that is not.
func (x *pathSearch) narrowest(ctx context.Context, carried, not int) int {
	for not-carried > 1 {
		size := carried + (not-carried)/2
		hinted := carried < x.hint && x.hint < not
		if hinted {
			size = x.hint
		}
		switch {
		case !x.carried(ctx, size, triesOther):
			not = size
		case hinted: // the router's word, and found to be true
			return size
		default:
			carried = size
		}
	}
	return carried
}

// carried sends a packet, and again while there is no answer. A router's word that
// it is too big is enough.
func (x *pathSearch) carried(ctx context.Context, size, tries int) bool {
	for range tries {
		if !x.pace(ctx) {
			return false
		}
		waiting, cancel := context.WithTimeout(ctx, x.timeout)
		a, err := x.socket.ping(waiting, x.target, size)
		cancel()
		switch {
		case err != nil: // no route now; the kernel's own state is the loop's concern
			x.log.Debug("path MTU probe", "lease", x.target.Lease, "error", err)
		case a.arrived:
			return true
		case a.tooBig:
			x.hint = a.mtu
			return false
		}
	}
	return false
}

// pace waits until the next packet may be sent.
func (p *pathProber) pace(ctx context.Context) bool {
	p.mu.Lock()
	at := p.free
	if now := time.Now(); at.Before(now) {
		at = now
	}
	p.free = at.Add(p.gap)
	p.mu.Unlock()
	return sleep(ctx, time.Until(at))
}
