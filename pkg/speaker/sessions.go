package speaker

import (
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/apiutil"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"
	"github.com/osrg/gobgp/v4/pkg/server"

	"github.com/twill-net/twill/pkg/overlay"
)

// How long what is not told is waited for.
const (
	// settleTime is how long after the start neighbours that do not answer are given.
	settleTime = 30 * time.Second
	// refusalTime is how long after the start a refused connection may be that of a
	// neighbour that is just starting, too.
	refusalTime = 10 * time.Second
	// silentTime is how long a neighbour without graceful restart, which need not say
	// when it has told all, is given.
	silentTime = 5 * time.Second
)

// passiveTime is how long a neighbour that should dial has for it.
const passiveTime = time.Minute

// session is what is known of one session beside what the server counts.
type session struct {
	neighbor overlay.BGPNeighbor
	up       bool
	since    time.Time // of being up or not
	step     time.Time // of the last step of the state machine, to
	state    bgp.FSMState
	flaps    uint64
	told     bool   // its End-of-RIB came
	marks    bool   // it sends one: it can restart gracefully
	refused  bool   // it has refused a connection
	late     bool   // it did not dial when it should have: we do
	accepted uint64 // its prefixes that passed the filters
	why      cause  // why it is not up
	farewell cause  // the notification that ends it
}

// sessions holds them. Its lock is a leaf: the server's goroutines call it with
// locks of theirs held.
type sessions struct {
	log  *slog.Logger
	bell chan struct{}

	mu      sync.Mutex
	srv     *server.BgpServer
	started time.Time
	dropped map[string]uint64 // signatureCounters at the start
	all     map[netip.Addr]*session
}

func (t *sessions) init(log *slog.Logger) {
	t.log, t.bell, t.all = log, make(chan struct{}, 1), map[netip.Addr]*session{}
}

func (t *sessions) ring() {
	select {
	case t.bell <- struct{}{}:
	default: // is rung
	}
}

func (t *sessions) begin(srv *server.BgpServer, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.srv, t.started, t.all = srv, now, map[netip.Addr]*session{}
	t.dropped = signatureCounters()
}

func (t *sessions) end() *server.BgpServer {
	t.mu.Lock()
	defer t.mu.Unlock()
	srv := t.srv
	t.srv = nil
	clear(t.all)
	return srv
}

func (t *sessions) server() *server.BgpServer {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.srv
}

// put adds a neighbour, or changes what is said of it.
func (t *sessions) put(n overlay.BGPNeighbor) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.all[n.Address]
	if s == nil {
		s = &session{since: time.Now()}
		t.all[n.Address] = s
	}
	s.neighbor = n
}

func (t *sessions) remove(a netip.Addr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.all, a)
}

// update changes one session under the lock; one that is gone is left.
func (t *sessions) update(a netip.Addr, change func(*session)) {
	t.mu.Lock()
	if s := t.all[a]; s != nil {
		change(s)
	}
	t.mu.Unlock()
}

// count notes how many prefixes of each neighbour passed the filters.
func (t *sessions) count(accepted map[netip.Addr]uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for a, s := range t.all {
		s.accepted = accepted[a]
	}
}

// late reports whether the neighbour has not dialled in its time.
func (t *sessions) late(a netip.Addr) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.all[a]
	return s != nil && s.late
}

// newlyLate marks the neighbours whose time to dial has just ended.
func (t *sessions) newlyLate(now time.Time) map[netip.Addr]bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := map[netip.Addr]bool{}
	for a, s := range t.all {
		if !s.up && !s.late && now.Sub(s.since) > passiveTime {
			s.late, out[a] = true, true
		}
	}
	return out
}

// told notes the End-of-RIB of a neighbour.
func (t *sessions) told(a netip.Addr) {
	t.update(a, func(s *session) { s.told = true })
	t.ring()
}

// reason is why the session is not up.
func (s *session) reason(now time.Time) cause {
	// An answer takes a moment. The kernel has acknowledged the connection, so that
	// nothing else is to be heard of what is lost.
	const answer = 3 * time.Second
	if (s.state == bgp.BGP_FSM_OPENSENT || s.state == bgp.BGP_FSM_OPENCONFIRM) && now.Sub(s.step) > answer {
		return s.why.or(cause{mute, ""})
	}
	// What it said once does not explain why it does not dial any more.
	const old = 10 * time.Second
	if awaits(s.neighbor) && !s.late && now.Sub(s.step) > old {
		return cause{awaited, ""}
	}
	return s.why
}

// event notes a step of a session's state machine.
func (t *sessions) event(e *apiutil.WatchEventMessage_PeerEvent, at time.Time) {
	if e.Type != apiutil.PEER_EVENT_STATE {
		return
	}
	st := e.Peer.State
	up := st.SessionState == bgp.BGP_FSM_ESTABLISHED
	t.update(st.NeighborAddress, func(s *session) {
		why := ofEvent(st.DisconnectReason, st.DisconnectMessage)
		if st.DisconnectReason == api.PeerState_DISCONNECT_REASON_INVALID_MSG && s.state == bgp.BGP_FSM_OPENCONFIRM {
			// gobgp takes nothing but a KEEPALIVE there. What comes instead is a
			// notification, whose text gobgp keeps to itself.
			why = cause{rejected, ""}
		}
		s.step, s.state = at, st.SessionState
		switch {
		case up && !s.up:
			s.told, s.why, s.farewell = false, cause{}, cause{}
			s.marks = slices.ContainsFunc(st.RemoteCap, func(c bgp.ParameterCapabilityInterface) bool {
				return c.Code() == bgp.BGP_CAP_GRACEFUL_RESTART
			})
			t.log.Info("BGP session is up", "neighbor", st.NeighborAddress, "name", s.neighbor.Name)
		case !up && s.up:
			if why.kind == lost && s.farewell.kind != nothing {
				why = s.farewell
			}
			s.flaps++
			s.why = why
			t.log.Info("BGP session is down", "neighbor", st.NeighborAddress, "name", s.neighbor.Name, "reason", why.text(s.neighbor, nil))
		case !up:
			s.why = s.why.or(why)
			return
		default:
			return
		}
		s.up, s.since = up, at
	})
	t.ring()
}

// settled reports whether all neighbours have told what they know or had their time.
func (t *sessions) settled(now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	running := now.Sub(t.started)
	if running > settleTime {
		return true
	}
	for _, s := range t.all {
		switch {
		case s.up && (s.told || !s.marks && now.Sub(s.since) > silentTime):
		case !s.up && s.refused && running > refusalTime:
		default:
			return false
		}
	}
	return true
}
