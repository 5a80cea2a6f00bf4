package speaker

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/osrg/gobgp/v4/api"

	"github.com/twill-net/twill/pkg/overlay"
)

// Status says how the sessions are, what they told and what they were told.
func (s *Speaker) Status() overlay.BGPStatus {
	st := overlay.BGPStatus{Speaker: "gobgp", Settled: s.Settled()}
	b, srv := s.want.Load(), s.peers.server()
	if b == nil || srv == nil {
		return st
	}
	st.ASNumber, st.RouterID, st.ClusterID = b.ASNumber, b.RouterID, b.ClusterID
	st.Announced = slices.Clone(b.Own)
	if rib := s.Routes(); rib != nil {
		st.Received = rib.Routes
	}
	counted := map[netip.Addr]*api.Peer{}
	// It fails when the server is being stopped: what it counted is gone then.
	err := srv.ListPeer(context.Background(), &api.ListPeerRequest{EnableAdvertised: true}, func(p *api.Peer) {
		if a, err := netip.ParseAddr(p.GetState().GetNeighborAddress()); err == nil {
			counted[a] = p
		}
	})
	if err != nil {
		s.opts.Log.Debug("BGP counters cannot be read", "error", err)
	}
	st.Sessions = s.peers.list(counted, time.Now())
	return st
}

// list returns the sessions sorted by address, with what the server counted.
func (t *sessions) list(counted map[netip.Addr]*api.Peer, now time.Time) []overlay.BGPSession {
	counters := signatureCounters()
	t.mu.Lock()
	defer t.mu.Unlock()
	counters = since(counters, t.dropped)
	var out []overlay.BGPSession
	for a, s := range t.all {
		x := overlay.BGPSession{Neighbor: s.neighbor, State: "idle", Since: s.since, Flaps: s.flaps, Accepted: s.accepted}
		if p := counted[a]; p != nil {
			x.State = strings.ToLower(strings.TrimPrefix(p.GetState().GetSessionState().String(), "SESSION_STATE_"))
			x.MessagesIn = p.GetState().GetMessages().GetReceived().GetTotal()
			x.MessagesOut = p.GetState().GetMessages().GetSent().GetTotal()
			for _, f := range p.AfiSafis {
				x.Received += f.GetState().GetReceived()
				x.Announced += f.GetState().GetAdvertised()
			}
		}
		if s.up && x.State == "established" {
			x.Uptime = now.Sub(s.since)
		} else {
			x.Error = s.reason(now).text(s.neighbor, counters)
		}
		x.Neighbor.Password = ""
		out = append(out, x)
	}
	slices.SortFunc(out, func(x, y overlay.BGPSession) int { return x.Neighbor.Address.Compare(y.Neighbor.Address) })
	return out
}
