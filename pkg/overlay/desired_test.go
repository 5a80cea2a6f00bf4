package overlay

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// scenes are the situations that the goldens, the walks between them and the
// second plan are about.
type scene struct {
	name   string
	config string
	self   func(*Self)
	leases []Lease
}

func (s scene) desired(t testing.TB) (State, []Problem) {
	t.Helper()
	cfg := config(t, s.config)
	self := Self{
		Subnets: subnetsOf("10.5.1.0-24"),
		Uplink: Uplink{
			Name: "eth0", Index: 2, MTU: 1500, MAC: mac("52:54:00:00:00:01"), V4: ip("198.51.100.1"), V6: ip("2001:db8::1"),
			OnLink: []netip.Prefix{pfx("198.51.100.0/24"), pfx("2001:db8::/64")},
		},
		PublicIP: ip("198.51.100.1"), MAC: mac("0e:00:00:00:00:01"),
		Options: Options{IPMasq: true, RandomFully: true, ForwardRules: true, Nexthops: true},
	}
	if cfg.V6.Enabled() {
		self.Subnets = subnetsOf("10.5.1.0-24&fd00:5:0:1::-64")
		self.PublicV6, self.MACv6 = ip("2001:db8::1"), mac("0e:00:00:00:06:01")
	}
	if s.self != nil {
		s.self(&self)
	}
	snap := &Snapshot{Revision: 1, Config: cfg}
	attrs, err := PublishedAttrs(cfg, self)
	if err != nil {
		t.Fatal(err)
	}
	all := append([]Lease{{Subnets: self.Subnets, Attrs: attrs, Created: 5, Grant: 1}}, s.leases...)
	for i := range all {
		snap.Leases = append(snap.Leases, &all[i])
	}
	slices.SortFunc(snap.Leases, func(a, b *Lease) int { return a.Compare(b.Subnets) })
	return Desired(snap, self)
}

// peerLease is the lease of node i: its subnets, address and VTEPs are numbered i.
func peerLease(key string, i int, change ...func(*Lease)) Lease {
	l := Lease{Subnets: subnetsOf(key), Created: int64(10 + i), Grant: 1}
	l.PublicIP, l.Backend = netip.AddrFrom4([4]byte{198, 51, 100, byte(i)}), "vxlan"
	l.VTEP = VTEP{1, MAC{0x0e, 0, 0, 0, 0, byte(i)}}
	if l.V6.IsValid() {
		l.PublicIPv6, l.VTEPv6 = ip(fmt.Sprintf("2001:db8::%x", i)), VTEP{1, MAC{0x0e, 0, 0, 0, 6, byte(i)}}
	}
	for _, c := range change {
		c(&l)
	}
	return l
}

func elsewhere(l *Lease) {
	l.PublicIP = netip.AddrFrom4([4]byte{203, 0, 113, l.PublicIP.As4()[3]})
	if l.PublicIPv6.IsValid() {
		l.PublicIPv6 = ip(strings.Replace(l.PublicIPv6.String(), "2001:db8::", "2001:db8:9::", 1))
	}
}

func inKubernetes(l *Lease) {
	l.Node, l.Grant = fmt.Sprintf("n%d", l.V4.Addr().As4()[2]), 0
}

func only6JSON(backend string) string {
	return `{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{` + backend + `}}`
}

func without4(s *Self) {
	s.Subnets.V4, s.PublicIP, s.Uplink.V4 = netip.Prefix{}, netip.Addr{}, netip.Addr{}
}

// only6 are two peers, of which the second is on another link.
func only6(backend string) []Lease {
	out := []Lease{peerLease("10.5.2.0-24&fd00:5:0:2::-64", 2), peerLease("10.5.3.0-24&fd00:5:0:3::-64", 3, elsewhere)}
	for i := range out {
		l := &out[i]
		inKubernetes(l)
		l.V4, l.PublicIP, l.VTEP = netip.Prefix{}, netip.Addr{}, VTEP{}
		if backend != "" {
			l.Backend, l.VTEPv6 = strings.TrimPrefix(backend, "udp"), VTEP{}
		}
	}
	return out
}

func vxlanJSON(settings string) string {
	return `{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan",` + settings + `}}`
}

func scenes() []scene {
	two := []Lease{peerLease("10.5.2.0-24", 2), peerLease("10.5.255.0-24", 3, elsewhere)}
	twoDual := []Lease{peerLease("10.5.2.0-24&fd00:5:0:2::-64", 2), peerLease("10.5.3.0-24&fd00:5:0:ffff::-64", 3, elsewhere)}
	return append(backendScenes(), []scene{
		{name: "alone", config: v4JSON},
		{name: "v4", config: v4JSON, leases: two},
		{name: "dual", config: dualJSON, leases: twoDual},
		{name: "dual with a v4 peer", config: dualJSON, leases: append([]Lease{peerLease("10.5.9.0-24", 9)}, twoDual...)},
		{name: "v4 with a dual peer", config: v4JSON, leases: twoDual},
		{name: "direct routing", config: vxlanJSON(`"DirectRouting":true`), leases: two},
		{name: "direct routing dual", config: strings.Replace(dualJSON, `"Port"`, `"DirectRouting":true,"Port"`, 1), leases: twoDual},
		{name: "direct routing to a peer without VTEP", config: vxlanJSON(`"DirectRouting":true`), leases: []Lease{peerLease("10.5.2.0-24", 2, func(l *Lease) { l.VTEP = VTEP{} })}},
		{name: "all settings", config: vxlanJSON(`"VNI":4096,"Port":4789,"MTU":1400,"GBP":true,"Learning":true`), leases: []Lease{peerLease("10.5.2.0-24", 2, func(l *Lease) { l.VTEP.VNI = 4096 })}},
		{name: "nftables", config: strings.Replace(dualJSON, "{", `{"EnableNFTables":true,`, 1), leases: twoDual},
		{name: "no masquerade", config: v4JSON, leases: two, self: func(s *Self) { s.IPMasq = false }},
		{name: "no firewall", config: v4JSON, leases: two, self: func(s *Self) { s.IPMasq, s.ForwardRules = false, false }},
		{name: "masquerade not random", config: strings.Replace(v4JSON, "{", `{"EnableNFTables":true,`, 1), self: func(s *Self) { s.RandomFully = false }},
		{name: "old kernel", config: dualJSON, leases: twoDual, self: func(s *Self) { s.Nexthops = false }},
		{name: "old kernel direct routing", config: vxlanJSON(`"DirectRouting":true`), leases: two, self: func(s *Self) { s.Nexthops = false }},
		{name: "blackhole", config: dualJSON, self: func(s *Self) { s.BlackholeRoute = true }},
		{name: "uplink with a dot", config: dualJSON, self: func(s *Self) { s.Uplink.Name = "bond0.100" }},
		{name: "small MTU", config: dualJSON, self: func(s *Self) { s.Uplink.MTU = 1300 }},
		{name: "node behind NAT", config: v4JSON, leases: two, self: func(s *Self) { s.PublicIP = ip("203.0.113.200") }},
		{name: "reservations", config: v4JSON, leases: []Lease{
			peerLease("10.5.2.0-24", 2, func(l *Lease) { l.Grant = 0 }),
			{Subnets: subnetsOf("10.5.3.0-24"), Attrs: Attrs{PublicIP: ip("198.51.100.3")}, Created: 3},
			{Subnets: subnetsOf("10.5.4.0-24"), Attrs: Attrs{PublicIP: ip("198.51.100.1")}, Created: 4},
		}},
		{name: "bad peers", config: v4JSON, leases: []Lease{
			peerLease("10.5.2.0-24", 2),
			peerLease("10.5.3.0-24", 3, elsewhere),
			peerLease("10.5.10.0-24", 10, func(l *Lease) { l.Backend = "ipip" }),
			peerLease("10.5.11.0-24", 11, func(l *Lease) { l.Backend = "" }),
			peerLease("10.5.12.0-24", 12, func(l *Lease) { l.VTEP = VTEP{} }),
			peerLease("10.5.13.0-24", 13, func(l *Lease) { l.VTEP.VNI = 2 }),
			peerLease("10.5.14.0-24", 1),
			peerLease("10.5.15.0-24", 15, func(l *Lease) { l.VTEP.MAC = mac("0e:00:00:00:00:01") }),
			peerLease("10.5.16.0-24", 16, func(l *Lease) { l.PublicIP, l.PublicIPv6 = netip.Addr{}, ip("2001:db8::16") }),
			{Subnets: subnetsOf("10.5.17.0-24"), Err: fmt.Errorf("value is not a lease"), Created: 17, Grant: 1},
			peerLease("10.5.18.0-24", 18, func(l *Lease) { l.PublicIP = ip("10.5.18.5") }),
			peerLease("198.51.100.128-25", 19),
			peerLease("198.51.0.0-16", 20),
			peerLease("128.0.0.0-1", 21, elsewhere),
			peerLease("10.4.0.0-15", 22),
			peerLease("10.0.0.0-8", 23, func(l *Lease) { l.Created = 1 }), // the oldest
			peerLease("203.0.112.0-20", 24),
			peerLease("172.0.0.0-8", 25),
		}},
		{name: "subnets beside the network", config: v4JSON, leases: []Lease{peerLease("10.6.2.0-24", 2), peerLease("10.4.0.0-16", 3)}},
		{name: "odd lengths", config: v4JSON, leases: []Lease{peerLease("10.5.2.0-25", 2), peerLease("10.5.4.0-23", 4), peerLease("10.5.6.0-31", 6), peerLease("10.5.0.0-24", 7)}},
		{name: "wide IPv6 pool", config: `{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/32","Backend":{"Type":"vxlan"}}`, self: func(s *Self) {
			s.Subnets = subnetsOf("10.5.1.0-24&fd00:0:0:1::-64")
		}, leases: []Lease{peerLease("10.5.2.0-24&fd00:0:ff:ffff::-64", 2), peerLease("10.5.3.0-24&fd00:0:100::-64", 3)}},
		{name: "twin MACs", config: v4JSON, leases: []Lease{
			peerLease("10.5.2.0-24", 2, func(l *Lease) { l.VTEP.MAC = mac("0e:00:00:00:00:09") }),
			peerLease("10.5.3.0-24", 3, func(l *Lease) { l.VTEP.MAC = mac("0e:00:00:00:00:09") }),
			peerLease("10.5.4.0-24", 4, func(l *Lease) { l.VTEP.MAC, l.Created = mac("0e:00:00:00:00:09"), 1 }),
		}},
		{name: "one node with two leases", config: v4JSON, leases: []Lease{peerLease("10.5.2.0-24", 2), peerLease("10.5.3.0-24", 2)}},
		{name: "overlapping leases", config: v4JSON, leases: []Lease{
			peerLease("10.5.52.0-23", 2), peerLease("10.5.52.0-24", 3), peerLease("10.5.53.0-24", 4),
			peerLease("10.5.60.0-24", 6), peerLease("10.5.60.0-24&fd00:5:0:3c::-64", 5),
			{Subnets: subnetsOf("10.5.70.0-24"), Err: fmt.Errorf("value is not a lease"), Created: 1, Grant: 1},
			peerLease("10.5.70.0-25", 7),
		}},
		{name: "own subnet overlapped", config: v4JSON, leases: []Lease{peerLease("10.5.1.0-24&fd00:5:0:2::-64", 2, func(l *Lease) { l.Created = 1 })}},
		{name: "own subnet overlapped by a younger one", config: v4JSON, leases: []Lease{peerLease("10.5.1.128-25", 2)}},
		{name: "IPv6 alone", config: only6JSON(`"Type":"vxlan","Port":4789`), self: without4, leases: only6("")},
		{name: "IPv6 alone by host-gw", config: only6JSON(`"Type":"host-gw"`), self: without4, leases: only6("host-gw")},
		{name: "IPv6 alone by udp", config: only6JSON(`"Type":"udp"`), self: without4, leases: only6("udp")},
		{name: "nodes of Kubernetes", config: v4JSON, leases: []Lease{
			peerLease("10.5.2.0-24", 2, inKubernetes),
			peerLease("10.5.3.0-24", 3, inKubernetes, func(l *Lease) { l.Err = fmt.Errorf("PublicIP: garbage") }),
			peerLease("10.5.4.0-24", 1, inKubernetes), // this one, under its former name
			peerLease("10.5.5.0-24", 5, inKubernetes, func(l *Lease) { l.Backend = "" }),
		}},
		{name: "own lease lacks IPv6", config: dualJSON, leases: twoDual, self: func(s *Self) { s.Subnets = subnetsOf("10.5.1.0-24") }},
	}...)
}

func TestDesired(t *testing.T) {
	for _, s := range scenes() {
		t.Run(s.name, func(t *testing.T) {
			state, problems := s.desired(t)
			golden(t, "desired/"+strings.ReplaceAll(s.name, " ", "-"), printProblems(problems)+printState(state)+printOutside(state.Outside))
			if !slices.IsSortedFunc(state.Routes, Route.compare) || !slices.IsSortedFunc(state.FDB, FDB.compare) || !slices.IsSortedFunc(state.Neighs, Neigh.compare) || !slices.IsSortedFunc(state.Nexthops, Nexthop.compare) {
				t.Error("not normalized")
			}
		})
	}
}

// No peer may keep another from being reached.
func TestBadPeersCostOthersNothing(t *testing.T) {
	for _, s := range scenes() {
		if s.name != "bad peers" {
			continue
		}
		with, problems := s.desired(t)
		bad := s.leases
		s.leases = s.leases[:2]
		without, _ := s.desired(t)
		if printState(with) != printState(without) {
			t.Errorf("with bad peers:\n%s\nwithout:\n%s", printState(with), printState(without))
		}
		for _, l := range bad[2:] {
			if !slices.ContainsFunc(problems, func(p Problem) bool { return p.Object == "lease "+l.Key() }) {
				t.Errorf("nothing is said about %s", l.Key())
			}
		}
	}
}

// The uplink's own address is no peer's pod either, if the uplink has no network.
func TestPeerOverOwnAddress(t *testing.T) {
	s := scene{config: v4JSON, leases: []Lease{peerLease("198.51.100.0-28", 200)}, self: func(s *Self) { s.Uplink.OnLink = nil }}
	state, problems := s.desired(t)
	if len(state.Routes) > 0 || len(problems) != 1 || !strings.Contains(problems[0].Reason, "address of node 198.51.100.1") {
		t.Errorf("%s%s", printProblems(problems), printState(state))
	}
}

func TestSnapshotLease(t *testing.T) {
	a, b := peerLease("10.5.2.0-24", 2), peerLease("10.5.2.0-24&fd00:5:0:2::-64", 3)
	snap := &Snapshot{Leases: []*Lease{&a, &b}}
	if snap.Lease(b.Subnets) != &b || snap.Lease(a.Subnets) != &a || snap.Lease(subnetsOf("10.5.3.0-24")) != nil {
		t.Error("a lease is not found by its subnets")
	}
}

// The store's own problems are handed on, and never changed.
func TestDesiredKeepsProblems(t *testing.T) {
	stored := make([]Problem, 1, 9)
	stored[0] = Problem{Object: "key x", Reason: "is no lease"}
	l := peerLease("10.5.2.0-24", 2, func(l *Lease) { l.Backend = "host-gw" })
	snap := &Snapshot{Config: config(t, v4JSON), Leases: []*Lease{&l}, Problems: stored}
	for range 2 {
		_, problems := Desired(snap, Self{Subnets: subnetsOf("10.5.1.0-24")})
		if len(problems) != 3 || problems[0] != stored[0] || stored[:2][1] != (Problem{}) {
			t.Errorf("problems %q", problems)
		}
	}
	snap.Config.Backend.Type = "ipsec"
	state, problems := Desired(snap, Self{})
	if printState(state) != "" || len(problems) != 2 || !strings.Contains(problems[1].Reason, "Backend.Type: ipsec") {
		t.Errorf("unsupported backend: %q\n%s", problems, printState(state))
	}
}

func TestPublishedAttrs(t *testing.T) {
	self := Self{PublicIP: ip("198.51.100.1"), PublicV6: ip("2001:db8::1"), MAC: mac("0e:00:00:00:00:01"), MACv6: mac("0e:00:00:00:06:01")}
	for _, c := range []struct{ config, want string }{
		{v4JSON, `{"PublicIP":"198.51.100.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:00:00:00:00:01"}}`},
		{dualJSON, `{"PublicIP":"198.51.100.1","PublicIPv6":"2001:db8::1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:00:00:00:00:01"},"BackendV6Data":{"VNI":1,"VtepMAC":"0e:00:00:00:06:01"}}`},
		{`{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan","VNI":7}}`, `{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::1","BackendType":"vxlan","BackendV6Data":{"VNI":7,"VtepMAC":"0e:00:00:00:06:01"}}`},
	} {
		a, err := PublishedAttrs(config(t, c.config), self)
		if err != nil || string(a.Value()) != c.want {
			t.Errorf("%s:\n got %s, %v\nwant %s", c.config, a.Value(), err, c.want)
		}
		if back, err := ParseAttrs(a.Value()); err != nil || back != a {
			t.Errorf("%s: what is published and read back differs, so it would be written for ever:\n%+v\n%+v", c.config, a, back)
		}
	}
	unknown := config(t, `{"Network":"10.5.0.0/16","Backend":{"Type":"tencent-vpc"}}`)
	if _, err := PublishedAttrs(unknown, self); err == nil {
		t.Error("backend tencent-vpc publishes something")
	}
	if _, err := PodMTU(unknown, self); err == nil {
		t.Error("backend tencent-vpc has an MTU")
	}
}

func TestPodMTU(t *testing.T) {
	for _, c := range []struct {
		config       string
		uplink, want int
	}{
		{v4JSON, 1500, 1450},
		{dualJSON, 1500, 1430},
		{v4JSON, 9000, 8950},
		{vxlanJSON(`"MTU":1400`), 9000, 1350},
		{v4JSON, 600, 576},
		{dualJSON, 1300, 1250},
		{strings.Replace(dualJSON, `"Port"`, `"MTU":1350,"Port"`, 1), 1500, 1280},
	} {
		got, err := PodMTU(config(t, c.config), Self{Uplink: Uplink{MTU: c.uplink}})
		if err != nil || got != c.want {
			t.Errorf("%s on %d: %d, %v, want %d", c.config, c.uplink, got, err, c.want)
		}
	}
}
