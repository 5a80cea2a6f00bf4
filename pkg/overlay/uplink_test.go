package overlay

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

func metric(m uint32) *uint32 { return &m }

func stable(prefixes ...string) (out []IfaceAddr) {
	for _, p := range prefixes {
		out = append(out, IfaceAddr{Prefix: pfx(p)})
	}
	return out
}

func unstable(prefix string) []IfaceAddr { return []IfaceAddr{{Prefix: pfx(prefix), Unstable: true}} }

func host(change ...func([]Iface)) []Iface {
	all := []Iface{
		{Name: "lo", Index: 1, MTU: 65536, Up: true, Loopback: true, Addrs: stable("127.0.0.1/8", "198.51.100.99/32")},
		{Name: "eth0", Index: 2, MTU: 1500, MAC: mac("52:54:00:00:00:01"), Up: true, Addrs: stable("198.51.100.1/24", "2001:db8::1/64", "fe80::1/64"), Default4: metric(100), Default6: metric(1024), Reaches: []netip.Addr{ip("192.0.2.1")}},
		{Name: "eth1", Index: 3, MTU: 9000, MAC: mac("52:54:00:00:00:02"), Up: true, Addrs: stable("203.0.113.1/24", "fe80::2/64"), Default4: metric(50), Reaches: []netip.Addr{ip("192.0.2.2")}},
		{Name: "eth2", Index: 4, MTU: 1500, Addrs: stable("198.18.0.1/16"), Default4: metric(10)},
		{Name: "docker0", Index: 5, MTU: 1500, Up: true, Addrs: stable("172.17.0.1/16"), Default4: metric(1)},
	}
	for _, c := range change {
		c(all)
	}
	return all
}

func TestChooseUplink(t *testing.T) {
	onEth0 := func(addrs ...IfaceAddr) func([]Iface) { return func(all []Iface) { all[1].Addrs = addrs } }
	var b strings.Builder
	for _, c := range []struct {
		name  string
		host  []Iface
		rules UplinkRules
		want  string // interface IPv4 IPv6 MTU
	}{
		{"the default route of lowest metric", host(), UplinkRules{}, "eth1 203.0.113.1 - 9000"},
		{"dual stack wants both on one", host(), UplinkRules{IPv6: true}, "eth0 198.51.100.1 2001:db8::1 1500"},
		{"by name, though a default route is better", host(), UplinkRules{Names: []string{"eth0"}}, "eth0 198.51.100.1 2001:db8::1 1500"},
		{"by name, though skipped", host(), UplinkRules{Names: []string{"docker0"}}, "docker0 172.17.0.1 - 1500"},
		{"by address", host(), UplinkRules{Names: []string{"203.0.113.1"}}, "eth1 203.0.113.1 - 9000"},
		{"first name that is usable", host(), UplinkRules{Names: []string{"eth7", "eth2", "eth0", "eth1"}}, "eth0 198.51.100.1 2001:db8::1 1500"},
		{"names before patterns", host(), UplinkRules{Names: []string{"eth0"}, Patterns: []string{"eth1"}}, "eth0 198.51.100.1 2001:db8::1 1500"},
		{"pattern if no name fits", host(), UplinkRules{Names: []string{"eth7"}, Patterns: []string{"^eth1$"}}, "eth1 203.0.113.1 - 9000"},
		{"pattern over addresses", host(), UplinkRules{Patterns: []string{`^203\.0\.113\.`}}, "eth1 203.0.113.1 - 9000"},
		{"second pattern", host(), UplinkRules{Patterns: []string{"^wlan", "^eth[01]$"}}, "eth0 198.51.100.1 2001:db8::1 1500"},
		{"pattern passes over skipped and loopback", host(), UplinkRules{Patterns: []string{".*"}}, "eth0 198.51.100.1 2001:db8::1 1500"},
		{"patterns before can-reach", host(), UplinkRules{Patterns: []string{"eth1"}, CanReach: ip("192.0.2.1")}, "eth1 203.0.113.1 - 9000"},
		{"can-reach before the default route", host(), UplinkRules{CanReach: ip("192.0.2.1")}, "eth0 198.51.100.1 2001:db8::1 1500"},
		{"can-reach if no pattern fits", host(), UplinkRules{Patterns: []string{"^wlan"}, CanReach: ip("192.0.2.2")}, "eth1 203.0.113.1 - 9000"},
		{"IPv6 default route alone", host(func(all []Iface) { all[1].Default4, all[2].Default4 = nil, nil }), UplinkRules{IPv6: true}, "eth0 198.51.100.1 2001:db8::1 1500"},

		{"a virtual IP is not the node's", host(onEth0(stable("198.51.100.200/32", "198.51.100.1/24", "2001:db8::200/128", "2001:db8::1/64")...)), UplinkRules{Names: []string{"eth0"}, IPv6: true}, "eth0 198.51.100.1 2001:db8::1 1500"},
		{"a host address is all there is", host(onEth0(stable("198.51.100.1/32", "2001:db8::1/128")...)), UplinkRules{Names: []string{"eth0"}, IPv6: true}, "eth0 198.51.100.1 2001:db8::1 1500"},
		{"unstable addresses are passed over", host(onEth0(append(append(unstable("198.51.100.7/24"), unstable("2001:db8::7/64")...), stable("198.51.100.1/24", "2001:db8::1/64")...)...)), UplinkRules{Names: []string{"eth0"}, IPv6: true}, "eth0 198.51.100.1 2001:db8::1 1500"},
		{"the first of several", host(onEth0(stable("198.51.100.1/24", "198.51.100.2/24")...)), UplinkRules{Names: []string{"eth0"}}, "eth0 198.51.100.1 - 1500"},
		{"the named of several", host(onEth0(stable("198.51.100.1/24", "198.51.100.2/24")...)), UplinkRules{Names: []string{"198.51.100.2"}}, "eth0 198.51.100.2 - 1500"},
		{"two named of several: the first", host(onEth0(stable("198.51.100.1/24", "198.51.100.2/24", "198.51.100.3/24")...)), UplinkRules{Names: []string{"198.51.100.3", "198.51.100.2"}}, "eth0 198.51.100.3 - 1500"},
		{"one named of each family", host(onEth0(stable("198.51.100.1/24", "198.51.100.2/24", "2001:db8::1/64", "2001:db8::2/64")...)), UplinkRules{Names: []string{"198.51.100.2", "2001:db8::2"}, IPv6: true}, "eth0 198.51.100.2 2001:db8::2 1500"},
		{"a virtual IP, named", host(onEth0(stable("198.51.100.1/24", "198.51.100.200/32")...)), UplinkRules{Names: []string{"198.51.100.200"}}, "eth0 198.51.100.200 - 1500"},
		{"named by its link-local address", host(), UplinkRules{Names: []string{"fe80::1"}, IPv6: true}, "eth0 198.51.100.1 2001:db8::1 1500"},

		{"IPv6 by link-local alone", host(), UplinkRules{Names: []string{"eth1"}, IPv6: true}, ""},
		{"IPv6 by link-local alone, named by it", host(), UplinkRules{Names: []string{"fe80::2"}, IPv6: true}, ""},
		{"nothing is usable", host(func(all []Iface) { all[1].Up, all[2].Addrs = false, unstable("203.0.113.1/24") }), UplinkRules{}, ""},
		{"no default route", host(func(all []Iface) {
			for i := range all {
				all[i].Default4, all[i].Default6 = nil, nil
			}
		}), UplinkRules{}, ""},
		{"all that was asked for is refused", host(func(all []Iface) { all[0].Addrs = stable("127.0.0.1/8", "::1/128") }), UplinkRules{Names: []string{"eth7", "eth2", "lo"}, Patterns: []string{"^eth2", "^wlan"}, CanReach: ip("192.0.2.9")}, ""},
		{"no interfaces", nil, UplinkRules{Names: []string{"eth0"}}, ""},
		{"not an expression", host(), UplinkRules{Patterns: []string{"eth["}}, ""},
	} {
		c.rules.Skip, c.rules.IPv4 = DefaultSkip(), true
		u, err := ChooseUplink(c.host, c.rules)
		got := ""
		if err == nil {
			got = fmt.Sprintf("%s %s %s %d", u.Name, u.V4, u.V6, u.MTU)
			got = strings.ReplaceAll(got, "invalid IP", "-")
			fmt.Fprintf(&b, "%s: %s, %s, on link %s\n", c.name, u.Name, u.Why, u.OnLink)
		} else {
			fmt.Fprintf(&b, "%s: %v\n", c.name, err)
			if u.Name != "" || u.V4.IsValid() {
				t.Errorf("%s: half an uplink comes with the error: %+v", c.name, u)
			}
		}
		if got != c.want {
			t.Errorf("%s: got %q, want %q (%v)", c.name, got, c.want, err)
		}
	}
	golden(t, "uplink", b.String())
}

func TestUplinkOnLink(t *testing.T) {
	all := host(func(all []Iface) {
		all[1].Addrs = stable("198.51.100.1/24", "198.51.100.2/24", "198.51.100.200/32", "203.0.113.9/28", "2001:db8::1/64", "2001:db8::9/128", "fe80::1/64")
	})
	u, err := ChooseUplink(all, UplinkRules{Names: []string{"eth0"}, IPv4: true})
	if got := fmt.Sprint(u.OnLink); err != nil || got != "[198.51.100.0/24 203.0.113.0/28 2001:db8::/64]" {
		t.Errorf("%s, %v", got, err)
	}
	if u.Index != 2 || u.MAC != mac("52:54:00:00:00:01") || u.Why != "--iface=eth0" {
		t.Errorf("%+v", u)
	}
}

func TestCheckOverlap(t *testing.T) {
	dual := config(t, dualJSON)
	own := subnetsOf("10.5.1.0-24&fd00:5:0:1::-64")
	peer := peerLease("10.5.2.0-24&fd00:5:0:2::-64", 2)
	for _, c := range []struct {
		name  string
		route Route
		clash bool
	}{
		{"elsewhere", Route{Dst: pfx("10.6.0.0/16"), Link: "eth1"}, false},
		{"IPv6 elsewhere", Route{Dst: pfx("fd00:6::/48"), Link: "eth1"}, false},
		{"the network itself on a link", Route{Dst: pfx("10.5.0.0/16"), Link: "eth1", Protocol: 2}, true},
		{"the network itself by a gateway", Route{Dst: pfx("10.5.0.0/16"), Gateway: ip("198.51.100.254"), Link: "eth0"}, true},
		{"inside, on a link", Route{Dst: pfx("10.5.9.0/24"), Link: "docker0"}, true},
		{"inside, by a gateway", Route{Dst: pfx("10.5.9.0/24"), Gateway: ip("198.51.100.254"), Link: "eth0"}, true},
		{"inside, by a nexthop object", Route{Dst: pfx("10.5.9.0/24"), NH: 12}, true},
		{"inside, blackhole", Route{Dst: pfx("10.5.9.0/26"), Blackhole: true}, true},
		{"inside, one address", Route{Dst: pfx("10.5.9.9/32"), Link: "tun0"}, true},
		{"IPv6 inside", Route{Dst: pfx("fd00:5:0:9::/64"), Link: "eth1", Metric: 256}, true},
		{"wider, on a link", Route{Dst: pfx("10.0.0.0/8"), Link: "eth1"}, true},
		{"wider, by a gateway", Route{Dst: pfx("10.0.0.0/8"), Gateway: ip("198.51.100.254"), Link: "eth0"}, false},
		{"wider, by a nexthop object", Route{Dst: pfx("10.0.0.0/8"), NH: 12, Protocol: 186}, false},
		{"wider, blackhole", Route{Dst: pfx("10.0.0.0/8"), Blackhole: true}, false},
		{"IPv6 wider, on a link", Route{Dst: pfx("fd00::/16"), Link: "eth1"}, true},
		{"our pods on cni0", Route{Dst: pfx("10.5.1.0/24"), Link: "cni0", Protocol: 2}, false},
		{"somebody's pods on cni0", Route{Dst: pfx("10.5.8.0/24"), Link: "cni0", Protocol: 2}, false},
		{"our pods on another bridge", Route{Dst: pfx("10.5.1.0/24"), Link: "docker0", Protocol: 2}, false},
		{"one of our pods", Route{Dst: pfx("10.5.1.9/32"), Link: "veth0"}, false},
		{"our IPv6 pods", Route{Dst: pfx("fd00:5:0:1::/64"), Link: "cbr0"}, false},
		{"more than our pods", Route{Dst: pfx("10.5.0.0/23"), Link: "eth1"}, true},
		{"flannel's host-gw route to a peer", Route{Dst: pfx("10.5.2.0/24"), Gateway: ip("198.51.100.2"), Link: "eth0"}, false},
		{"flannel's IPv6 route to a peer", Route{Dst: pfx("fd00:5:0:2::/64"), Gateway: ip("2001:db8::2"), Link: "eth0"}, false},
		{"to a peer by another gateway, which Diff names if we want one there", Route{Dst: pfx("10.5.2.0/24"), Gateway: ip("198.51.100.3"), Link: "eth0"}, false},
	} {
		got := CheckOverlap(dual, own, []*Lease{&peer}, []Route{c.route})
		if (len(got) == 1) != c.clash {
			t.Errorf("%s: %q, want %t", c.name, got, c.clash)
		}
		for _, p := range got {
			if !strings.Contains(p.Reason, c.route.String()) || !strings.HasPrefix(p.Object, "network ") || p.Remedy == "" {
				t.Errorf("%s: %s", c.name, p)
			}
		}
	}
	if got := CheckOverlap(config(t, v4JSON), Subnets{}, nil, []Route{{Dst: pfx("fd00:5::/48"), Link: "eth1"}, {Dst: pfx("10.5.1.0/24"), Link: "eth1"}, {Dst: pfx("10.5.2.0/24"), Link: "eth1"}}); len(got) != 2 {
		t.Errorf("IPv4 alone, no lease yet: %q", got)
	}
}
