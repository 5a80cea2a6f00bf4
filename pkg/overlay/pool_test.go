package overlay

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestPoolFree(t *testing.T) {
	v4 := config(t, v4JSON).V4
	end := config(t, `{"Network":"255.255.255.0/24","SubnetLen":26}`).V4
	small := config(t, `{"Network":"10.5.0.0/22"}`).V4
	v6 := config(t, dualJSON).V6
	for _, c := range []struct {
		pool  Pool
		taken string
		limit int
		want  string
	}{
		{v4, "[]", 2, "[10.5.1.0/24 10.5.2.0/24]"},
		{v4, "[10.5.1.0/24]", 1, "[10.5.2.0/24]"},
		{v4, "[10.0.0.0/8]", 9, "[]"},
		{v4, "[10.4.0.0/24 10.5.0.0/24 10.5.2.0/23 10.5.2.0/24 10.5.4.128/25 10.5.6.0/24]", 3, "[10.5.1.0/24 10.5.5.0/24 10.5.7.0/24]"},
		{v4, "[10.5.0.0/17 10.5.1.0/24 10.5.128.0/18 10.6.0.0/16]", 2, "[10.5.192.0/24 10.5.193.0/24]"},
		{small, "[]", 9, "[10.5.1.0/24 10.5.2.0/24 10.5.3.0/24]"},
		{small, "[10.5.1.0/30 10.5.1.4/30 10.5.3.252/30]", 9, "[10.5.2.0/24]"},
		{small, "[10.5.1.0/24 10.5.2.0/24 10.5.3.0/24]", 9, "[]"},
		{end, "[]", 9, "[255.255.255.64/26 255.255.255.128/26 255.255.255.192/26]"},
		{end, "[255.255.255.192/26]", 9, "[255.255.255.64/26 255.255.255.128/26]"},
		{v6, "[fd00:5:0:1::/64 fd00:5:0:2::/63]", 2, "[fd00:5:0:4::/64 fd00:5:0:5::/64]"},
	} {
		var taken []netip.Prefix
		for _, s := range strings.Fields(strings.Trim(c.taken, "[]")) {
			taken = append(taken, pfx(s))
		}
		if got := fmt.Sprint(c.pool.free(taken, c.limit)); got != c.want {
			t.Errorf("%s without %s: %s, want %s", c.pool.Network, c.taken, got, c.want)
		}
	}
}

// free gives what trying each subnet in turn gives.
func TestPoolFreeAgainstReference(t *testing.T) {
	p := config(t, `{"Network":"10.5.0.0/21","SubnetLen":26}`).V4
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 3))
		var taken []netip.Prefix
		for range r.IntN(30) {
			a := netip.AddrFrom4([4]byte{10, 5, byte(r.IntN(10)), byte(r.IntN(256))})
			taken = append(taken, netip.PrefixFrom(a, 22+r.IntN(8)).Masked())
		}
		slices.SortFunc(taken, comparePrefix)
		var want []netip.Prefix
		for n := range 32 {
			s := nthSubnet(p.Network, 26, n)
			if n > 0 && !slices.ContainsFunc(taken, s.Overlaps) {
				want = append(want, s)
			}
		}
		if got := p.free(taken, 100); !slices.Equal(got, want) {
			t.Fatalf("seed %d: without %s: got %s, want %s", seed, taken, got, want)
		}
	}
}

func TestPoolIndex(t *testing.T) {
	v4, v6 := config(t, v4JSON).V4, config(t, dualJSON).V6
	huge := config(t, `{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/16","IPv6SubnetLen":120}`).V6
	for _, c := range []struct {
		pool   Pool
		subnet string
		want   int64
	}{
		{v4, "10.5.0.0/24", 0x0a0500},
		{v4, "10.5.1.0/24", 0x0a0501},
		{v4, "10.5.255.0/24", 0x0a05ff},
		{v4, "10.5.2.0/25", -1},
		{v4, "10.6.0.0/24", -1},
		{v4, "fd00::/24", -1},
		{v6, "fd00:5::/64", 0},
		{v6, "fd00:5:0:ffff::/64", 65535},
		{v6, "fd00:6::/64", -1},
		{huge, "fd00::ff00/120", -1},
		{Pool{}, "10.5.1.0/24", -1},
	} {
		n, ok := c.pool.number(pfx(c.subnet))
		if got := int64(n); ok && got != c.want || !ok && c.want != -1 {
			t.Errorf("%s in %s: %d, %t, want %d", c.subnet, c.pool.Network, n, ok, c.want)
		}
	}
}

func TestLastAddr(t *testing.T) {
	for prefix, want := range map[string]string{
		"10.5.0.0/16": "10.5.255.255", "0.0.0.0/0": "255.255.255.255", "10.5.1.1/32": "10.5.1.1", "10.5.1.0/31": "10.5.1.1",
		"::/0": "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "fd00::/64": "fd00::ffff:ffff:ffff:ffff", "fd00::/63": "fd00:0:0:1:ffff:ffff:ffff:ffff", "fd00::/65": "fd00::7fff:ffff:ffff:ffff", "fd00::/128": "fd00::",
	} {
		if got := lastAddr(pfx(prefix)); got != ip(want) {
			t.Errorf("%s: %s, want %s", prefix, got, want)
		}
	}
}
