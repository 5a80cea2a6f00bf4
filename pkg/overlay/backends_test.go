package overlay

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"
)

func backendJSON(v6 bool, backend string) string {
	if v6 {
		return `{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":` + backend + `}`
	}
	return `{"Network":"10.5.0.0/16","Backend":` + backend + `}`
}

// by makes a lease publish another backend.
func by(backend string) func(*Lease) {
	return func(l *Lease) {
		l.Backend, l.VTEP, l.VTEPv6 = backend, VTEP{}, VTEP{}
		switch i := l.PublicIP.As4()[3]; backend {
		case "wireguard":
			l.WireGuard = WireGuardNode{PublicKey: WGKey{1, i}.Public(), Port: 51820}
			l.WireGuardV6 = WireGuardNode{PublicKey: WGKey{1, i}.Public(), Port: 51821}
		case "bgp":
			l.BGP = BGPNode{ASNumber: 64512, Port: 179}
		case "extension":
			l.Data = fmt.Sprintf(`"node %d"`, i)
		}
	}
}

func reflector(id string) func(*Lease) {
	return func(l *Lease) { l.BGP.ClusterID = ip(id) }
}

// backendScenes are the scenes of every backend but vxlan, and of the ways from
// one to another.
func backendScenes() []scene {
	const (
		peersJSON = `{"Type":"bgp","ASNumber":64600,"Communities":["64600:1"],"Password":"secret","Peers":[` +
			`{"Address":"198.51.100.250","ASNumber":65000,"TTLSecurity":1,"Import":[{"Prefix":"0.0.0.0/0","MaxLen":24,"Action":"accept"}]},` +
			`{"Address":"203.0.113.9","ASNumber":65001,"Multihop":3,"Nodes":["198.51.100.1"],"Communities":["65001:7"]},` +
			`{"Address":"203.0.113.10","ASNumber":65001,"Nodes":["198.51.100.2"]},` +
			`{"Address":"2001:db8::fa","ASNumber":65000}]}`
	)
	near := func(backend string) []Lease {
		return []Lease{peerLease("10.5.2.0-24&fd00:5:0:2::-64", 2, by(backend)), peerLease("10.5.3.0-24&fd00:5:0:3::-64", 3, by(backend))}
	}
	far := func(backend string) []Lease {
		return append(near(backend), peerLease("10.5.4.0-24&fd00:5:0:4::-64", 4, by(backend), elsewhere))
	}
	former := func(backends ...string) func(*Self) {
		return func(s *Self) {
			for _, b := range backends {
				c, _, err := ParseConfig([]byte(backendJSON(false, b)))
				if err != nil {
					panic(err)
				}
				s.Former = append(s.Former, c.Backend)
			}
		}
	}
	mixed := []Lease{
		peerLease("10.5.2.0-24&fd00:5:0:2::-64", 2), peerLease("10.5.3.0-24&fd00:5:0:3::-64", 3, by("host-gw")),
		peerLease("10.5.4.0-24&fd00:5:0:4::-64", 4, by("")), peerLease("10.5.5.0-24&fd00:5:0:5::-64", 5, by("bgp")),
		peerLease("10.5.6.0-24&fd00:5:0:6::-64", 6, by("wireguard")), peerLease("10.5.7.0-24&fd00:5:0:7::-64", 7, by("host-gw"), elsewhere),
	}
	return []scene{
		{name: "host-gw", config: backendJSON(true, `{"Type":"host-gw"}`), leases: far("host-gw")},
		{name: "host-gw behind NAT", config: backendJSON(false, `{"Type":"host-gw"}`), leases: near("host-gw"), self: func(s *Self) { s.PublicIP = ip("203.0.113.200") }},
		{name: "host-gw with a small neighbour table", config: backendJSON(true, `{"Type":"host-gw"}`), leases: near("host-gw"), self: func(s *Self) { s.NeighLimit, s.NeighLimitV6 = 3, 1024 }},
		{name: "alloc", config: backendJSON(true, `{"Type":"alloc"}`), leases: far("")},
		{name: "udp", config: backendJSON(true, `{"Type":"udp"}`), leases: far("")},
		{name: "udp old kernel", config: backendJSON(true, `{"Type":"udp","Port":8286}`), leases: far(""), self: func(s *Self) { s.Nexthops = false }},
		{name: "udp small MTU", config: backendJSON(true, `{"Type":"udp"}`), self: func(s *Self) { s.Uplink.MTU = 1300 }},
		{name: "wireguard", config: backendJSON(true, `{"Type":"wireguard","PersistentKeepaliveInterval":25}`), leases: append(far("wireguard"), peerLease("10.5.9.0-24", 9, by("wireguard"), func(l *Lease) { l.WireGuard = WireGuardNode{} }))},
		{name: "wireguard one device", config: backendJSON(true, `{"Type":"wireguard","Mode":"auto","MTU":1400,"PSK":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="}`), leases: far("wireguard"), self: func(s *Self) { s.WireGuardInUserSpace = true }},
		{name: "wireguard over IPv6", config: backendJSON(true, `{"Type":"wireguard","Mode":"ipv6"}`), leases: append(near("wireguard"), peerLease("10.5.9.0-24", 9, by("wireguard")))},
		{name: "ipip", config: backendJSON(false, `{"Type":"ipip"}`), leases: far("ipip")},
		{name: "ipip direct routing", config: backendJSON(true, `{"Type":"ipip","DirectRouting":true}`), leases: far("ipip")},
		{name: "extension", config: backendJSON(false, `{"Type":"extension","SubnetAddCommand":"add"}`), leases: append(far("extension"), peerLease("10.5.9.0-24", 9, by("extension"), func(l *Lease) { l.Data = "{}" }))},
		{name: "bgp", config: backendJSON(true, `{"Type":"bgp"}`), leases: far("bgp")},
		{name: "bgp with routers", config: backendJSON(true, peersJSON), leases: near("bgp")},
		{name: "bgp node of reflectors", config: backendJSON(false, `{"Type":"bgp","NodeMesh":false}`), leases: []Lease{
			peerLease("10.5.2.0-24", 2, by("bgp"), reflector("192.0.2.1")), peerLease("10.5.3.0-24", 3, by("bgp"), reflector("192.0.2.1")), peerLease("10.5.4.0-24", 4, by("bgp")),
		}},
		{name: "bgp reflector", config: backendJSON(false, `{"Type":"bgp","NodeMesh":false}`), self: func(s *Self) { s.BGP.ClusterID = ip("192.0.2.1") }, leases: []Lease{
			peerLease("10.5.2.0-24", 2, by("bgp"), reflector("192.0.2.1")), peerLease("10.5.3.0-24", 3, by("bgp"), reflector("192.0.2.2")), peerLease("10.5.4.0-24", 4, by("bgp")),
		}},
		{name: "bgp learned", config: backendJSON(true, peersJSON), leases: append(far("bgp"), peerLease("10.5.8.0-24", 8)), self: learned},
		{name: "bgp learned old kernel", config: backendJSON(true, peersJSON), leases: far("bgp"), self: func(s *Self) { learned(s); s.Nexthops = false }},
		{name: "bgp by an external router", config: backendJSON(true, `{"Type":"bgp"}`), leases: far("bgp"), self: func(s *Self) { s.BGP.External = true }},
		{name: "mixed without devices", config: backendJSON(true, `{"Type":"host-gw"}`), leases: mixed},
		{name: "mixed and all accepted", config: backendJSON(true, `{"Type":"host-gw"}`), leases: mixed, self: former(`{"Type":"vxlan"}`, `{"Type":"udp"}`, `{"Type":"bgp"}`, `{"Type":"wireguard"}`)},
		{name: "vxlan after udp", config: dualJSON, leases: mixed, self: former(`{"Type":"udp"}`)},
		{name: "vxlan of another VNI before", config: backendJSON(false, `{"Type":"vxlan","VNI":2}`), leases: []Lease{
			peerLease("10.5.2.0-24", 2), peerLease("10.5.3.0-24", 3, func(l *Lease) { l.VTEP.VNI = 2 }), peerLease("10.5.4.0-24", 4, func(l *Lease) { l.VTEP.VNI = 3 }),
		}, self: former(`{"Type":"vxlan"}`)},
	}
}

// learned is a RIB with a bit of everything.
func learned(s *Self) {
	path := func(hop, from string) BGPPath { return BGPPath{NextHop: ip(hop), From: ip(from)} }
	s.RIB = &RIB{
		Routes: []BGPRoute{
			{Prefix: pfx("0.0.0.0/0"), Paths: []BGPPath{path("198.51.100.250", "198.51.100.250")}},
			{Prefix: pfx("10.5.1.128/25"), Paths: []BGPPath{path("198.51.100.250", "198.51.100.250")}},
			{Prefix: pfx("10.5.2.0/24"), Paths: []BGPPath{path("198.51.100.2", "198.51.100.2")}},
			{Prefix: pfx("10.5.4.0/24"), Paths: []BGPPath{path("203.0.113.4", "198.51.100.2")}},
			{Prefix: pfx("10.5.8.0/24"), Paths: []BGPPath{path("198.51.100.8", "198.51.100.8")}},
			{Prefix: pfx("172.16.0.0/12"), Paths: []BGPPath{path("198.51.100.250", "198.51.100.250"), path("198.51.100.251", "198.51.100.251")}},
			{Prefix: pfx("172.32.0.0/16"), Paths: []BGPPath{path("198.51.100.250", "198.51.100.250"), path("198.51.100.251", "198.51.100.251")}},
			{Prefix: pfx("172.33.0.0/16"), Paths: []BGPPath{path("203.0.113.77", "198.51.100.250")}},
			{Prefix: pfx("198.51.100.64/26"), Paths: []BGPPath{path("198.51.100.250", "198.51.100.250")}},
			{Prefix: pfx("198.51.100.128/26"), Paths: []BGPPath{{NextHop: ip("198.51.100.250"), From: ip("198.51.100.250"), Allowed: true}}},
			{Prefix: pfx("2001:db8:77::/48"), Paths: []BGPPath{path("2001:db8::fa", "2001:db8::fa"), path("2001:db8::fb", "2001:db8::fb")}},
			{Prefix: pfx("fd00:5:0:2::/64"), Paths: []BGPPath{path("2001:db8::2", "2001:db8::2")}},
		},
		Hops: map[netip.Addr]Hop{ip("203.0.113.4"): {Gateway: ip("198.51.100.254"), Link: "eth0"}},
	}
}

// printOutside prints what user space is told.
func printOutside(o Outside) string {
	var b strings.Builder
	if u := o.UDP; u != nil {
		fmt.Fprintf(&b, "udp port %d own %v\n", u.Port, u.Own)
		for _, p := range u.Peers {
			fmt.Fprintf(&b, "    %s to %s\n", p.Subnet, p.Addr)
		}
	}
	if x := o.Extension; x != nil {
		fmt.Fprintf(&b, "extension %+v\n", *x)
	}
	if g := o.BGP; g != nil {
		fmt.Fprintf(&b, "bgp as %d router-id %s port %d cluster-id %s communities %v hold %s restart %s\n", g.ASNumber, g.RouterID, g.Port, g.ClusterID, g.Communities, g.HoldTime, g.RestartTime)
		for _, own := range g.Own {
			fmt.Fprintf(&b, "    announce %s next hop %s\n", own.Prefix, own.NextHop)
		}
		for _, n := range g.Neighbors {
			fmt.Fprintf(&b, "    neighbor %+v\n", n)
		}
	}
	return b.String()
}

// What is published is read back as it was, by every backend.
func TestPublishedAttrsOfEveryBackend(t *testing.T) {
	for _, s := range backendScenes() {
		c := config(t, s.config)
		self := Self{PublicIP: ip("198.51.100.1"), PublicV6: ip("2001:db8::1"), MAC: mac("0e:00:00:00:00:01"), MACv6: mac("0e:00:00:00:06:01"), WGKey: WGKey{7}, ExtensionData: "a \"b\""}
		self.BGP.ClusterID = ip("192.0.2.7")
		a, err := PublishedAttrs(c, self)
		if err != nil {
			t.Fatal(err)
		}
		back, err := ParseAttrs(a.Value())
		if err != nil || back != a {
			t.Errorf("%s: %s\nis read as %+v, %v\nwant %+v", s.name, a.Value(), back, err, a)
		}
	}
}

// The MTU of pods is what the smaller of the two families leaves.
func TestPodMTUOfEveryBackend(t *testing.T) {
	for _, c := range []struct {
		v6      bool
		backend string
		want    int
	}{
		{false, `{"Type":"vxlan"}`, 1450},
		{true, `{"Type":"vxlan"}`, 1430},
		{true, `{"Type":"vxlan","MTU":1400}`, 1330},
		{true, `{"Type":"host-gw"}`, 1500},
		{true, `{"Type":"bgp"}`, 1500},
		{false, `{"Type":"udp"}`, 1472},
		{true, `{"Type":"udp"}`, 1452},
		{true, `{"Type":"wireguard"}`, 1420},
		{false, `{"Type":"ipip"}`, 1480},
		{false, `{"Type":"alloc"}`, 1500},
	} {
		got, err := PodMTU(config(t, backendJSON(c.v6, c.backend)), Self{Uplink: Uplink{MTU: 1500}})
		if err != nil || got != c.want {
			t.Errorf("%s, IPv6 %t: %d, %v, want %d", c.backend, c.v6, got, err, c.want)
		}
	}
}

// What a node knows of itself goes to netctl and to the process after this one as
// JSON, and comes back as it was.
func TestSelfAsJSON(t *testing.T) {
	for _, s := range backendScenes() {
		c := config(t, s.config)
		self := Self{Subnets: subnetsOf("10.5.1.0-24"), WGKey: WGKey{7}.Clamp(), Former: []BackendConfig{c.Backend}}
		if s.self != nil {
			s.self(&self)
		}
		content, err := json.Marshal(self)
		if err != nil {
			t.Fatal(err)
		}
		var back Self
		if err := json.Unmarshal(content, &back); err != nil || !reflect.DeepEqual(back.Former, self.Former) || !reflect.DeepEqual(back.RIB, self.RIB) || back.WGKey != self.WGKey {
			t.Errorf("%s: %v\n%s", s.name, err, content)
		}
	}
}
