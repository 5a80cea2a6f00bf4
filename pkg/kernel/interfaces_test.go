package kernel

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

func TestInterfaces(t *testing.T) {
	inNode(t, func(k *Kernel) {
		sh(t, `
			ip link set eth0 mtu 1400 address 0a:0b:0c:00:00:01
			ip addr add 198.51.100.200/32 dev eth0
			ip addr add 198.18.5.77/24 dev eth0 preferred_lft 0
			ip -6 addr add 2001:db8:0::dead/64 dev eth0 preferred_lft 0
			ip route add default via 198.51.100.9
			ip route add default via 203.0.113.9 metric 50
			ip -6 route add default via 2001:db8:1::9 metric 77
			ip route add 192.0.2.0/24 via 203.0.113.9
			ip route add unreachable 192.0.2.128/25`)
		reach := []netip.Addr{
			netip.MustParseAddr("8.8.8.8"), netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8:0::5"),
			netip.MustParseAddr("192.0.2.200"), netip.MustParseAddr("127.0.0.1"),
		}
		ifaces, err := k.Interfaces(context.Background(), reach)
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]string{}
		for _, i := range ifaces {
			var w []string
			for _, a := range i.Addrs {
				if !a.Prefix.Addr().IsLinkLocalUnicast() {
					w = append(w, fmt.Sprintf("%s %t", a.Prefix, a.Unstable))
				}
			}
			metric := func(m *uint32) string {
				if m == nil {
					return "none"
				}
				return fmt.Sprint(*m)
			}
			got[i.Name] = fmt.Sprintf("%d up %t lo %t [%s] %s %s %v", i.MTU, i.Up, i.Loopback, strings.Join(w, ", "), metric(i.Default4), metric(i.Default6), i.Reaches)
			if i.Name == "eth0" && i.MAC.String() != "0a:0b:0c:00:00:01" {
				t.Errorf("MAC %s", i.MAC)
			}
		}
		want := map[string]string{
			"lo": "65536 up true lo true [127.0.0.1/8 false, ::1/128 false] none none [127.0.0.1]",
			"eth0": "1400 up true lo false [198.51.100.1/24 false, 198.51.100.200/32 false, 198.18.5.77/24 true, 198.51.100.2/24 true, " +
				"2001:db8::dead/64 true, 2001:db8::2/64 false, 2001:db8::1/64 false] 0 none [8.8.8.8 2001:db8::5]",
			"eth1": "1500 up true lo false [203.0.113.1/24 false, 203.0.113.2/24 true, 2001:db8:1::2/64 false, 2001:db8:1::1/64 false] 50 77 [192.0.2.1]",
		}
		for name, w := range want {
			if got[name] != w {
				t.Errorf("%s:\n%s, want\n%s", name, got[name], w)
			}
		}
	})
}
