package netctl

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/overlay"
)

const (
	testPSK      = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
	testPassword = "open sesame"
)

var testKey = overlay.WGKey{7}

// by returns the lease of node n as it publishes a backend.
func by(t *testing.T, backend string, n byte, also ...func(*overlay.Lease)) *overlay.Lease {
	t.Helper()
	l := lease(t, fmt.Sprintf("10.5.%d.0-24", n), n)
	l.Backend = backend
	if backend != "vxlan" {
		l.VTEP = overlay.VTEP{}
	}
	switch backend {
	case "wireguard":
		l.WireGuard = overlay.WireGuardNode{PublicKey: overlay.WGKey{1, n}.Public(), Port: 51820}
	case "bgp":
		l.BGP = overlay.BGPNode{ASNumber: 64512, Port: 179}
	case "extension":
		l.Data = fmt.Sprintf(`"node %d"`, n)
	}
	for _, f := range also {
		f(l)
	}
	return l
}

func elsewhere(l *overlay.Lease) {
	b := l.PublicIP.As4()
	l.PublicIP = netip.AddrFrom4([4]byte{203, 0, 113, b[3]})
}

func backendConfig(t *testing.T, backend string) overlay.Config {
	t.Helper()
	c, _, err := overlay.ParseConfig([]byte(`{"Network":"10.5.0.0/16","Backend":` + backend + `}`))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// scene is a cluster whose backend is not vxlan alone. This node is 1.
type scene struct {
	name, backend string
	leases        []*overlay.Lease
	self          func(*overlay.Self)
	broken        func(*testing.T, *world) // after all was well
	code          int                      // of netctl leases
}

// world puts the scene in place of the usual cluster.
func (s scene) world(t *testing.T) *world {
	w := newWorld(t)
	cfg := backendConfig(t, s.backend)
	self := &w.self.Self
	own := lease(t, "10.5.1.0-24", 1)
	self.Subnets, self.WGKey = own.Subnets, testKey
	if s.self != nil {
		s.self(self)
	}
	attrs, err := overlay.PublishedAttrs(cfg, *self)
	if err != nil {
		t.Fatal(err)
	}
	own.Attrs = attrs
	w.snap.Config, w.self.Config = cfg, cfg
	w.snap.Leases = append([]*overlay.Lease{own}, s.leases...)
	w.status.Lease, w.status.Subnets, w.status.Networks = own.Key(), own.All(), cfg.Networks()
	w.status.PublicIPv6, w.status.Backend, w.status.Peers = netip.Addr{}, cfg.Backend.Type, len(s.leases)
	if w.status.PodMTU, err = overlay.PodMTU(cfg, *self); err != nil {
		t.Fatal(err)
	}
	w.settle(t)
	if s.broken != nil {
		s.broken(t, w)
		w.have.Normalize()
	}
	return w
}

func near(t *testing.T, backend string) []*overlay.Lease {
	return []*overlay.Lease{by(t, backend, 2), by(t, backend, 3)}
}

func scenes(t *testing.T) []scene {
	former := func(backends ...string) func(*overlay.Self) {
		return func(s *overlay.Self) {
			for _, b := range backends {
				s.Former = append(s.Former, backendConfig(t, b).Backend)
			}
		}
	}
	reflector := func(l *overlay.Lease) {
		l.BGP = overlay.BGPNode{ASNumber: 64513, Port: 1179, ClusterID: netip.MustParseAddr("192.0.2.1")}
	}
	bgpLeases := []*overlay.Lease{by(t, "bgp", 2, reflector), by(t, "bgp", 3), by(t, "bgp", 4, elsewhere), by(t, "host-gw", 5)}
	bgp := `{"Type":"bgp","Password":"` + testPassword + `"}`
	wireguard := `{"Type":"wireguard","PSK":"` + testPSK + `","PersistentKeepaliveInterval":25}`
	external := func(s *overlay.Self) { s.BGP.External = true }
	return []scene{
		{name: "host-gw", backend: `{"Type":"host-gw"}`, leases: append(near(t, "host-gw"), by(t, "host-gw", 4, elsewhere)), code: exitDiffers},
		{name: "udp", backend: `{"Type":"udp"}`, leases: append(near(t, ""), by(t, "", 4, elsewhere))},
		{name: "udp-sabotaged", backend: `{"Type":"udp","Port":8286}`, leases: near(t, ""), code: exitDiffers, broken: func(_ *testing.T, w *world) {
			w.have.Routes = without(w.have.Routes, func(r overlay.Route) bool { return r.Dst.Bits() == 16 || r.Dst == w.snap.Leases[1].V4 })
			w.have.Links[0].Up = false
		}},
		{name: "alloc", backend: `{"Type":"alloc"}`, leases: near(t, "")},
		{name: "extension", backend: `{"Type":"extension","SubnetAddCommand":"add"}`, leases: near(t, "extension")},
		{name: "ipip", backend: `{"Type":"ipip","DirectRouting":true}`, leases: append(near(t, "ipip"), by(t, "ipip", 4, elsewhere))},
		{name: "wireguard", backend: wireguard, leases: append(near(t, "wireguard"), by(t, "wireguard", 4, func(l *overlay.Lease) { l.WireGuard.Port = 0 }))},
		{name: "wireguard-sabotaged", backend: wireguard, leases: append(near(t, "wireguard"), by(t, "wireguard", 4), by(t, "wireguard", 5), by(t, "wireguard", 6)), code: exitDiffers, broken: sabotageWireGuard},
		{name: "wireguard-mute", backend: wireguard, leases: near(t, "wireguard"), self: func(s *overlay.Self) { s.WireGuardInUserSpace = true }, code: exitDiffers, broken: func(_ *testing.T, w *world) {
			w.have.Links[0].WG, w.have.WGPeers = overlay.WireGuard{}, nil
		}},
		{name: "bgp", backend: bgp, leases: bgpLeases, self: learn, code: exitDiffers},
		{name: "bgp-sabotaged", backend: bgp, leases: bgpLeases, self: learn, code: exitDiffers, broken: sabotageGroup},
		{name: "bgp-external", backend: `{"Type":"bgp"}`, leases: near(t, "bgp"), self: external, code: exitDiffers, broken: func(_ *testing.T, w *world) {
			w.have.Foreign = append(w.have.Foreign, overlay.Route{Dst: w.snap.Leases[1].V4, Gateway: w.snap.Leases[1].PublicIP, Link: "eth0", Protocol: 12})
		}},
		{name: "mixed", backend: `{"Type":"host-gw"}`, code: exitDiffers, self: former(`{"Type":"vxlan"}`, `{"Type":"udp","Port":8286}`, `{"Type":"ipip"}`), leases: []*overlay.Lease{
			by(t, "vxlan", 2), by(t, "", 3), by(t, "host-gw", 4), by(t, "wireguard", 5), by(t, "vxlan", 6),
			by(t, "", 7, func(l *overlay.Lease) { l.Err = errors.New("value is not a lease") }),
		}},
		{name: "alone", backend: `{"Type":"vxlan"}`, leases: []*overlay.Lease{by(t, "", 2)}, code: exitDiffers},
		{name: "udp-no-store", backend: `{"Type":"udp"}`, leases: near(t, ""), code: exitUnknown, broken: func(_ *testing.T, w *world) { w.storeErr = errors.New("connection refused") }},
		{name: "bgp-no-store", backend: bgp, leases: bgpLeases, self: learn, code: exitUnknown, broken: func(_ *testing.T, w *world) { w.storeErr = errors.New("connection refused") }},
		{name: "wireguard-no-store", backend: wireguard, leases: near(t, "wireguard"), code: exitUnknown, broken: func(_ *testing.T, w *world) { w.storeErr = errors.New("connection refused") }},
		{name: "wireguard-no-daemon", backend: wireguard, leases: near(t, "wireguard"), code: exitUnknown, broken: func(_ *testing.T, w *world) { w.daemonAway = true }},
	}
}

// learn is what a speaker knows: peers, and what lies beyond the routers.
func learn(s *overlay.Self) {
	route := func(prefix string, hops ...string) overlay.BGPRoute {
		r := overlay.BGPRoute{Prefix: netip.MustParsePrefix(prefix)}
		for _, h := range hops {
			r.Paths = append(r.Paths, overlay.BGPPath{NextHop: netip.MustParseAddr(h), From: netip.MustParseAddr(h)})
		}
		return r
	}
	s.RIB = &overlay.RIB{Routes: []overlay.BGPRoute{
		route("0.0.0.0/0", "198.51.100.250"), route("10.5.2.0/24", "198.51.100.2"), route("10.5.4.0/24", "198.51.100.250", "198.51.100.251"),
		route("172.16.0.0/12", "198.51.100.250", "198.51.100.251"),
	}}
	s.RIB.Routes[1].Paths[0].Stale = true
}

func sabotageWireGuard(t *testing.T, w *world) {
	at := func(n byte) *overlay.WGPeer {
		for i := range w.have.WGPeers {
			if w.have.WGPeers[i].PublicKey == (overlay.WGKey{1, n}).Public() {
				return &w.have.WGPeers[i]
			}
		}
		t.Fatalf("node %d has no peer", n)
		return nil
	}
	at(3).Endpoint = netip.MustParseAddrPort("203.0.113.9:51820")
	at(4).PSK = overlay.WGKey{9}
	at(5).AllowedIPs, at(5).Keepalive = "", 0
	gone := at(2).PublicKey
	w.have.WGPeers = without(w.have.WGPeers, func(p overlay.WGPeer) bool { return p.PublicKey == gone })
	w.have.WGPeers = append(w.have.WGPeers, overlay.WGPeer{Link: overlay.WireGuardLink, PublicKey: overlay.WGKey{1, 99}.Public(), AllowedIPs: "10.5.99.0/24"})
	w.have.Routes = append(w.have.Routes, overlay.Route{Dst: netip.MustParsePrefix("10.5.99.0/24"), Link: overlay.WireGuardLink, Protocol: overlay.Protocol})
	w.have.Links[0].WG.Key = overlay.WGKey{8}
}

// sabotageGroup does what the kernel does when somebody deletes a nexthop object:
// it leaves its groups.
func sabotageGroup(t *testing.T, w *world) {
	gone := netip.MustParseAddr("198.51.100.251")
	var id, left string
	for _, n := range w.have.Nexthops {
		if n.Gateway == gone {
			id = fmt.Sprint(n.ID)
		}
	}
	for i, n := range w.have.Nexthops {
		if n.Group == "" {
			continue
		}
		for _, m := range strings.Split(n.Group, "/") {
			if m != id {
				left = m
			}
		}
		w.have.Nexthops[i].Group = left
	}
	if id == "" || left == "" {
		t.Fatal("there is no group to sabotage")
	}
	w.have.Nexthops = without(w.have.Nexthops, func(n overlay.Nexthop) bool { return n.Gateway == gone })
}

// TestBackends shows all there is to see of each scene.
func TestBackends(t *testing.T) {
	for _, s := range scenes(t) {
		t.Run(s.name, func(t *testing.T) {
			w := s.world(t)
			var all strings.Builder
			for _, args := range []string{"leases", "routes", "status", "diff"} {
				if w.daemonAway {
					args += " --etcd-endpoints http://198.51.100.250:2379"
				}
				stdout, stderr, code := w.netctl(t, strings.Fields(args)...)
				if args == "leases" && code != s.code {
					t.Errorf("exit code %d, want %d", code, s.code)
				}
				fmt.Fprintf(&all, "$ netctl %s\n%s[exit %d]\n%s\n", args, stdout, code, stderr)
			}
			golden(t, "backend-"+s.name, all.String())
		})
	}
}

// TestBackendsJSON: what programs read of each kind of path.
func TestBackendsJSON(t *testing.T) {
	var all strings.Builder
	for _, s := range scenes(t) {
		if s.name != "bgp" && s.name != "wireguard" && s.name != "udp" && s.name != "mixed" {
			continue
		}
		for _, command := range []string{"leases", "routes"} {
			stdout, _, _ := s.world(t).netctl(t, command, "-o", "json")
			fmt.Fprintf(&all, "%s\n$ netctl %s -o json\n%s\n", s.name, command, stdout)
		}
	}
	golden(t, "backends-json", all.String())
}

// TestSecrets: no command prints a private key, a preshared one or a password.
func TestSecrets(t *testing.T) {
	secrets := []string{testKey.String(), testPSK, testPassword, overlay.WGKey{8}.String(), overlay.WGKey{9}.String()}
	for _, s := range scenes(t) {
		for _, command := range []string{"leases", "routes", "status", "diff"} {
			for _, format := range []string{"table", "json"} {
				stdout, stderr, _ := s.world(t).netctl(t, command, "-o", format)
				if format == "json" && stdout != "" && !json.Valid([]byte(stdout)) {
					t.Errorf("%s: netctl %s -o json: not JSON", s.name, command)
				}
				for _, secret := range secrets {
					if strings.Contains(stdout+stderr, secret) {
						t.Errorf("%s: netctl %s -o %s prints %s", s.name, command, format, secret)
					}
				}
			}
		}
	}
}

// TestDriftOfSecret: a change of a secret, which no object prints, is still told.
func TestDriftOfSecret(t *testing.T) {
	w := newWorld(t)
	peer := overlay.WGPeer{Link: overlay.WireGuardLink, PSK: overlay.WGKey{9}, AllowedIPs: "10.5.2.0/24"}.String()
	w.drift = []overlay.Drift{{Time: w.now, Kind: "wgpeer", What: strings.TrimPrefix(peer, "wgpeer "), Before: peer, After: peer, Why: "timer"}}
	if out, _, code := w.netctl(t, "drift"); code != exitDiffers || !strings.Contains(out, "the same with another secret  restored") {
		t.Errorf("exit code %d:\n%s", code, out)
	}
}

// TestHolder: of several WireGuard peers the longest match gets the packet.
func TestHolder(t *testing.T) {
	wide := overlay.WGPeer{Link: "a", PublicKey: overlay.WGKey{1}, AllowedIPs: "0.0.0.0/0,10.5.0.0/16,::/0"}
	exact := overlay.WGPeer{Link: "a", PublicKey: overlay.WGKey{2}, AllowedIPs: "10.5.2.0/24"}
	s := index(overlay.State{WGPeers: []overlay.WGPeer{wide, exact}})
	for _, tt := range []struct {
		link, dst string
		want      overlay.WGPeer
	}{
		{"a", "10.5.2.0/24", exact},
		{"a", "10.5.2.128/25", exact},
		{"a", "10.5.3.0/24", wide},
		{"a", "fd00::/64", wide},
		{"b", "10.5.2.0/24", overlay.WGPeer{}},
	} {
		if got := s.holder(tt.link, netip.MustParsePrefix(tt.dst)); got != tt.want {
			t.Errorf("%s on %s goes to %s", tt.dst, tt.link, got)
		}
	}
}
