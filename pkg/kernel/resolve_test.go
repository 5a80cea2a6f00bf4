package kernel

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"testing"

	"github.com/twill-net/twill/pkg/overlay"
)

func TestResolve(t *testing.T) {
	hop := func(gateway, link string) overlay.Hop {
		h := overlay.Hop{Link: link}
		if gateway != "" {
			h.Gateway = netip.MustParseAddr(gateway)
		}
		return h
	}
	want := map[string]overlay.Hop{
		"198.51.100.9":    hop("", "eth0"), // on the link
		"2001:db8:0::9":   hop("", "eth0"),
		"203.0.113.9":     hop("", "eth1"),
		"172.16.1.1":      hop("198.51.100.9", "eth0"),
		"2001:db8:16::1":  hop("2001:db8:1::9", "eth1"),
		"172.17.1.1":      hop("2001:db8:0::9", "eth0"), // RFC 8950
		"172.18.1.1":      hop("203.0.113.9", "eth1"),   // by a nexthop object of somebody's
		"172.19.1.1":      hop("203.0.113.7", "eth1"),   // several ways of which one is alive
		"198.51.100.1":    {},                           // our own
		"2001:db8:1::1":   {},
		"127.0.0.1":       {},
		"10.0.1.1":        {}, // a pod behind flannel0
		"fd00:5:1::1":     {},
		"10.0.2.1":        {}, // behind flannel.1
		"fd00:5:2::1":     {},
		"172.20.1.1":      {}, // a stranger's route into flannel0
		"fd00:20::1":      {},
		"172.21.1.1":      {}, // by a route of ours
		"2001:db8:21::1":  {},
		"172.22.1.1":      {}, // unreachable, prohibit, blackhole
		"172.23.1.1":      {},
		"172.24.1.1":      {},
		"2001:db8:22::1":  {},
		"2001:db8:24::1":  {},
		"192.0.2.1":       {}, // no route at all
		"2001:db8:99::99": {},
	}
	inHost(t, func(k *Kernel) {
		var d dataPlane
		defer d.stop(world{})
		w := dualWorld(2)
		w.tunnelled = 2
		d.reconcile(t, k, w)
		sh(t, `
			ip route add 172.16.0.0/16 via 198.51.100.9
			ip -6 route add 2001:db8:16::/48 via 2001:db8:1::9
			ip route add 172.17.0.0/16 via inet6 2001:db8:0::9 dev eth0
			ip nexthop add id 5 via 203.0.113.9 dev eth1
			ip route add 172.18.0.0/16 nhid 5
			ip link add eth2 type veth peer name far2
			ip link set eth2 up
			ip link set far2 up
			ip addr add 192.0.3.1/24 dev eth2
			ip route add 172.19.0.0/16 nexthop via 192.0.3.9 dev eth2 nexthop via 203.0.113.7 dev eth1
			ip link set eth2 down
			ip route add 172.20.0.0/16 dev flannel0
			ip -6 route add fd00:20::/32 dev flannel0
			ip route add 172.21.0.0/16 via 198.51.100.9 proto 84
			ip -6 route add 2001:db8:21::/48 via 2001:db8:0::9 proto 84
			ip route add unreachable 172.22.0.0/16
			ip route add prohibit 172.23.0.0/16
			ip route add blackhole 172.24.0.0/16
			ip -6 route add unreachable 2001:db8:22::/48
			ip -6 route add blackhole 2001:db8:24::/48`)
		var addrs []netip.Addr
		expected := map[netip.Addr]overlay.Hop{}
		for s, h := range want {
			a := netip.MustParseAddr(s)
			addrs = append(addrs, a)
			if h.Link != "" {
				expected[a] = h
			}
		}
		for i := range 3 * resolveBatch {
			a := netip.MustParseAddr(fmt.Sprintf("172.16.%d.%d", 100+i/250, i%250))
			addrs = append(addrs, a)
			expected[a] = hop("198.51.100.9", "eth0")
		}
		got, err := k.Resolve(context.Background(), addrs)
		if err != nil {
			t.Fatal(err)
		}
		if !maps.Equal(got, expected) {
			for a := range maps.Keys(got) {
				if got[a] != expected[a] {
					t.Errorf("%s: %v, want %v", a, got[a], expected[a])
				}
			}
			for a := range maps.Keys(expected) {
				if _, ok := got[a]; !ok {
					t.Errorf("%s: none, want %v", a, expected[a])
				}
			}
		}
		if got, err := k.Resolve(context.Background(), nil); err != nil || len(got) > 0 {
			t.Errorf("of nothing: %v, %v", got, err)
		}
		// The socket is in order afterwards.
		sh(t, "ip route del 172.21.0.0/16; ip -6 route del 2001:db8:21::/48; ip route del 172.20.0.0/16; ip -6 route del fd00:20::/32")
		if left := plan(t, k, w.state()); len(left) > 0 {
			t.Errorf("differences:\n%s", left)
		}
	})
}
