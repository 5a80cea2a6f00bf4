package speaker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"syscall"
	"time"

	"github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/apiutil"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"
	"github.com/osrg/gobgp/v4/pkg/server"

	"github.com/twill-net/twill/pkg/overlay"
)

// globalRIB is gobgp's name of the table that all sessions share.
const globalRIB = "global"

// Seconds.
const (
	// connectRetry is short: a cluster comes up node by node.
	connectRetry = 2
	// deferral is how long a restarted speaker waits for all neighbours to tell what
	// they know before it tells what it knows itself (RFC 4724, section 4.1). A node
	// knows but its own subnets; a reflector that spoke too soon would say that what
	// it has not heard yet is gone.
	nodeDeferral, reflectorDeferral = 1, 15
)

// peering is what a session is made from: if any of it changes, the session ends and
// a new one begins.
type peering struct {
	address, local        netip.Addr
	asNumber              uint32
	port                  uint16
	password              string
	multihop, ttlSecurity uint8
	client                bool
	passive               bool // the other end dials: see peeringOf
	clusterID             netip.Addr
	hold, restart         time.Duration
}

// awaits reports whether the other end dials. Of two nodes the one with the higher
// address does: when both do at once, gobgp can settle on another connection at
// either end, and the session is not up before the hold timer ends. A neighbour that
// does not dial for passiveTime is dialled all the same.
func awaits(n overlay.BGPNeighbor) bool {
	return n.Node && n.Local.IsValid() && n.Local.Less(n.Address)
}

func peeringOf(b overlay.BGP, n overlay.BGPNeighbor) peering {
	return peering{
		address: n.Address, local: n.Local, asNumber: n.ASNumber, port: n.Port, password: n.Password,
		multihop: n.Multihop, ttlSecurity: n.TTLSecurity, client: n.Client, clusterID: b.ClusterID,
		passive: awaits(n),
		hold:    b.HoldTime, restart: b.RestartTime,
	}
}

// announcement is a subnet of ours as the server has it.
type announcement struct {
	overlay.BGPOwn
	communities string
}

func announcements(b overlay.BGP) []announcement {
	var out []announcement
	for _, o := range b.Own {
		out = append(out, announcement{o, fmt.Sprint(b.Communities)})
	}
	return out
}

// start starts a server that listens and has no neighbour yet.
func (s *Speaker) start(ctx context.Context, b overlay.BGP) error {
	srv := server.NewBgpServer(server.LoggerOption(slog.New(&logHandler{out: s.opts.Log, peers: &s.peers}), nil))
	go srv.Serve()
	// One socket for each family that the kernel has.
	listen := []string{"0.0.0.0"}
	if _, err := os.Stat("/proc/net/if_inet6"); err == nil {
		listen = append(listen, "::")
	}
	err := srv.StartBgp(ctx, &api.StartBgpRequest{Global: &api.Global{
		Asn: b.ASNumber, RouterId: b.RouterID.String(), ListenPort: int32(b.Port), ListenAddresses: listen,
		Families:         []uint32{0, 1}, // gobgp's numbers of IPv4 and IPv6 unicast
		UseMultiplePaths: true,
	}})
	if err == nil {
		err = assignFilters(ctx, srv, b)
	}
	if err != nil {
		srv.Stop()
		return explainStart(err, b.Port)
	}
	watchCtx, cancel := context.WithCancel(context.Background())
	callbacks := server.WatchEventMessageCallbacks{
		OnBestPath:   func([]*apiutil.Path, time.Time) { s.peers.ring() },
		OnPathEor:    func(p *apiutil.Path, _ time.Time) { s.peers.told(p.PeerAddress) },
		OnPeerUpdate: func(e *apiutil.WatchEventMessage_PeerEvent, at time.Time) { s.peers.event(e, at) },
	}
	if err := srv.WatchEvent(watchCtx, callbacks, server.WatchBestPath(false), server.WatchEor(false), server.WatchPeer()); err != nil {
		cancel()
		srv.Stop()
		return fmt.Errorf("start BGP: watch server: %w", err)
	}
	s.srv, s.own, s.links, s.first = srv, nil, map[peering]overlay.BGPNeighbor{}, true
	s.filters = filters{importRules(b), exportRules(b)}
	s.settled.Store(false)
	s.peers.begin(srv, time.Now())
	done := make(chan struct{})
	s.watching = &watching{cancel, done}
	go s.watch(watchCtx, done)
	return nil
}

func explainStart(err error, port uint16) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("start BGP: TCP port %d is in use by another program (bird? bgpd?); stop it, or let it speak with --bgp-router, or set Backend.Port", port)
	case errors.Is(err, syscall.EACCES):
		return fmt.Errorf("start BGP: listening on TCP port %d is not permitted; run twilld as root or with CAP_NET_BIND_SERVICE", port)
	}
	return fmt.Errorf("start BGP: %w", err)
}

// stop ends the server. Its goroutines are gone afterwards but for gobgp's watchers,
// which end by themselves.
func (s *Speaker) stop(ctx context.Context, farewell bool) {
	if s.srv == nil {
		return
	}
	s.watching.cancel()
	<-s.watching.done
	srv := s.peers.end()
	if !farewell {
		// gobgp ends session by session and tells those that are left what the ended
		// ones had told: a reflector would withdraw the cluster's routes. So all
		// connections are cut first.
		if err := hangUp(s.want.Load()); err != nil {
			s.opts.Log.Warn("BGP sessions cannot be cut; neighbours may forget routes", "error", err)
		}
	}
	if err := srv.StopBgp(ctx, &api.StopBgpRequest{AllowGracefulRestart: !farewell}); err != nil {
		s.opts.Log.Warn("BGP server cannot be stopped", "error", err)
	}
	srv.Stop() // what StopBgp leaves: gobgp's BFD
	s.srv, s.links, s.watching = nil, nil, nil
}

// assignFilters makes the filters those of all sessions.
func assignFilters(ctx context.Context, srv *server.BgpServer, b overlay.BGP) error {
	if err := srv.SetPolicies(ctx, policies(b)); err != nil {
		return fmt.Errorf("set filters: %w", err)
	}
	for name, dir := range map[string]api.PolicyDirection{
		"import": api.PolicyDirection_POLICY_DIRECTION_IMPORT, "export": api.PolicyDirection_POLICY_DIRECTION_EXPORT,
	} {
		err := srv.SetPolicyAssignment(ctx, &api.SetPolicyAssignmentRequest{Assignment: &api.PolicyAssignment{
			Name: globalRIB, Direction: dir, Policies: []*api.Policy{{Name: name}}, DefaultAction: api.RouteAction_ROUTE_ACTION_REJECT,
		}})
		if err != nil {
			return fmt.Errorf("set %s filter: %w", name, err)
		}
	}
	return nil
}

// setFilters changes the filters and applies them to all that is known.
func (s *Speaker) setFilters(ctx context.Context, b overlay.BGP) error {
	f := filters{importRules(b), exportRules(b)}
	if reflect.DeepEqual(f, s.filters) {
		return nil
	}
	if err := s.srv.SetPolicies(ctx, policies(b)); err != nil {
		return fmt.Errorf("set BGP filters: %w", err)
	}
	// Without an address: all neighbours. It asks none of them for anything.
	if err := s.srv.ResetPeer(ctx, &api.ResetPeerRequest{Soft: true, Direction: api.ResetPeerRequest_DIRECTION_BOTH}); err != nil {
		return fmt.Errorf("apply BGP filters: %w", err)
	}
	s.filters = f
	return nil
}

func (s *Speaker) setNeighbors(ctx context.Context, b overlay.BGP) error {
	wanted := map[peering]overlay.BGPNeighbor{}
	for _, n := range b.Neighbors {
		wanted[peeringOf(b, n)] = n
	}
	var errs []error
	for p, n := range s.links {
		if _, ok := wanted[p]; ok {
			continue
		}
		s.peers.remove(p.address)
		if err := s.removeNeighbor(ctx, p); err != nil {
			errs = append(errs, fmt.Errorf("remove BGP neighbour %s (%s): %w", p.address, n.Name, err))
			continue
		}
		delete(s.links, p)
	}
	for p, n := range wanted {
		s.peers.put(n)
		if _, ok := s.links[p]; !ok {
			if err := s.srv.AddPeer(ctx, &api.AddPeerRequest{Peer: s.peer(b, p)}); err != nil {
				errs = append(errs, fmt.Errorf("add BGP neighbour %s (%s): %w", p.address, n.Name, err))
				continue
			}
		}
		s.links[p] = n
	}
	return errors.Join(errs...)
}

// removeNeighbor ends a session. gobgp forgets a password on the listening socket only
// when it is changed.
func (s *Speaker) removeNeighbor(ctx context.Context, p peering) error {
	if p.password != "" {
		open := p
		open.password = ""
		if _, err := s.srv.UpdatePeer(ctx, &api.UpdatePeerRequest{Peer: s.peer(*s.want.Load(), open)}); err != nil {
			return err
		}
	}
	return s.srv.DeletePeer(ctx, &api.DeletePeerRequest{Address: p.address.String()})
}

// peer translates a session for gobgp.
func (s *Speaker) peer(b overlay.BGP, p peering) *api.Peer {
	afi, deferral := api.Family_AFI_IP, nodeDeferral
	if p.address.Is6() {
		afi = api.Family_AFI_IP6
	}
	if b.ClusterID.IsValid() {
		deferral = reflectorDeferral
	}
	peer := &api.Peer{
		Conf: &api.PeerConf{NeighborAddress: p.address.String(), PeerAsn: p.asNumber, AuthPassword: p.password},
		Timers: &api.Timers{Config: &api.TimersConfig{
			ConnectRetry: connectRetry, HoldTime: seconds(p.hold), KeepaliveInterval: seconds(p.hold / 3), IdleHoldTimeAfterReset: connectRetry,
		}},
		Transport: &api.Transport{RemotePort: uint32(p.port)},
		GracefulRestart: &api.GracefulRestart{
			Enabled: true, RestartTime: uint32(seconds(p.restart)), DeferralTime: uint32(deferral), NotificationEnabled: true,
			// With it the first OPEN says that we may have been away and that the
			// kernel went on forwarding: it did, or holds nothing yet.
			LocalRestarting: s.first,
		},
		AfiSafis: []*api.AfiSafi{{
			MpGracefulRestart: &api.MpGracefulRestart{Config: &api.MpGracefulRestartConfig{Enabled: true}},
			Config:            &api.AfiSafiConfig{Family: &api.Family{Afi: afi, Safi: api.Family_SAFI_UNICAST}, Enabled: true},
		}},
	}
	if p.local.IsValid() {
		peer.Transport.LocalAddress = p.local.String()
	}
	peer.Transport.PassiveMode = p.passive && !s.peers.late(p.address)
	if p.client {
		peer.RouteReflector = &api.RouteReflector{RouteReflectorClient: true, RouteReflectorClusterId: p.clusterID.String()}
	}
	switch {
	case p.ttlSecurity > 0: // RFC 5082: sent with 255, each hop takes one
		peer.TtlSecurity = &api.TtlSecurity{Enabled: true, TtlMin: 256 - uint32(p.ttlSecurity)}
	case p.multihop > 1:
		peer.EbgpMultihop = &api.EbgpMultihop{Enabled: true, MultihopTtl: uint32(p.multihop)}
	}
	return peer
}

func seconds(d time.Duration) uint64 { return uint64(d / time.Second) }

// setOwn announces our subnets and withdraws those that are no longer ours.
func (s *Speaker) setOwn(b overlay.BGP) error {
	wanted := announcements(b)
	var errs []error
	has := s.own
	s.own = nil
	for _, a := range has {
		keeps := func(w announcement) bool { return w.Prefix == a.Prefix }
		if slices.ContainsFunc(wanted, keeps) {
			s.own = append(s.own, a)
			continue
		}
		p, err := ownPath(a.BGPOwn, nil)
		if err == nil {
			err = s.srv.DeletePath(apiutil.DeletePathRequest{Paths: []*apiutil.Path{p}})
		}
		if err != nil {
			s.own = append(s.own, a)
			errs = append(errs, fmt.Errorf("withdraw %s: %w", a.Prefix, err))
		}
	}
	for _, a := range wanted {
		if slices.Contains(s.own, a) {
			continue
		}
		p, err := ownPath(a.BGPOwn, b.Communities)
		if err == nil {
			_, err = s.srv.AddPath(apiutil.AddPathRequest{Paths: []*apiutil.Path{p}})
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("announce %s: %w", a.Prefix, err))
			continue
		}
		s.own = append(slices.DeleteFunc(s.own, func(o announcement) bool { return o.Prefix == a.Prefix }), a)
	}
	return errors.Join(errs...)
}

func ownPath(o overlay.BGPOwn, communities []overlay.Community) (*apiutil.Path, error) {
	nlri, err := bgp.NewIPAddrPrefix(o.Prefix)
	if err != nil {
		return nil, err
	}
	p := &apiutil.Path{Family: familyOf(o.Prefix.Addr()), Nlri: nlri, Age: time.Now().Unix()}
	p.Attrs = append(p.Attrs, bgp.NewPathAttributeOrigin(bgp.BGP_ORIGIN_ATTR_TYPE_IGP))
	if o.NextHop.Is4() {
		hop, err := bgp.NewPathAttributeNextHop(o.NextHop)
		if err != nil {
			return nil, fmt.Errorf("next hop %s: %w", o.NextHop, err)
		}
		p.Attrs = append(p.Attrs, hop)
	} else {
		hop, err := bgp.NewPathAttributeMpReachNLRI(p.Family, []bgp.PathNLRI{{NLRI: nlri}}, o.NextHop)
		if err != nil {
			return nil, fmt.Errorf("next hop %s: %w", o.NextHop, err)
		}
		p.Attrs = append(p.Attrs, hop)
	}
	if len(communities) > 0 {
		var list []uint32
		for _, c := range communities {
			list = append(list, uint32(c))
		}
		p.Attrs = append(p.Attrs, bgp.NewPathAttributeCommunities(list))
	}
	return p, nil
}
