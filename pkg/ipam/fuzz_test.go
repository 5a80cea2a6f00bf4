package ipam

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func FuzzReservation(f *testing.F) {
	for _, s := range []string{"", "\r\n", "abc\r\neth0", "abc", "abc\neth0", " abc \r\n eth0 \r\n", "a\r\nb\r\nc"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		o, ok := parse(b)
		if ok != (o.ContainerID != "") || !ok && o != (Owner{}) {
			t.Errorf("%q: owner %q, %t", b, o, ok)
		}
		if !ok || strings.Contains(o.ContainerID, "\r\n") {
			return
		}
		if again, ok := parse(format(o)); !ok || again != o {
			t.Errorf("%q: %q written and read gives %q", b, o, again)
		}
	})
}

// The round robin starts somewhere in the ranges, whatever its file says.
func FuzzLast(f *testing.F) {
	for _, s := range []string{"", "198.18.1.9", " 198.18.1.254\n", "::ffff:198.18.1.9", "fe80::1%eth0", "198.18.1", "198.18.1.255", "junk"} {
		f.Add([]byte(s))
	}
	sets, err := compile(onlyV4)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		n := 0
		for a := range sets[0].after(parseLast(b)) {
			if n++; !sets[0].chooses(a) {
				t.Errorf("%q: %s", b, a)
			}
		}
		if n != 253 {
			t.Errorf("%q: %d addresses", b, n)
		}
	})
}

func FuzzName(f *testing.F) {
	for _, s := range []string{"198.18.1.9", "fd00::1", "FD00::1", "::ffff:198.18.1.9", "fe80::1%eth0", "..", "lock"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if a, ok := parseName(name); ok && (a.String() != name || strings.ContainsAny(name, "/%")) {
			t.Errorf("%q is the file of %s", name, a)
		}
	})
}

func FuzzSticky(f *testing.F) {
	for _, s := range []string{"", "\n", "default/a/eth0\n198.18.1.2\nfd00::1\n", "default/a/eth0\n198.18.1.2", "default/a", "\n\n\n198.18.1.2\n", "a\nfe80::1%eth0\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		key, addrs := parseSticky(b)
		again, addrs2 := parseSticky(formatSticky(key, addrs))
		if again != key || !slices.Equal(addrs, addrs2) {
			t.Errorf("%q: %q %v written and read gives %q %v", b, key, addrs, again, addrs2)
		}
		// Cut short, it says less, but nothing else.
		for i := range b {
			k, as := parseSticky(b[:i])
			if k != "" && k != key || len(as) > len(addrs) || !slices.Equal(as, addrs[:len(as)]) {
				t.Errorf("%q: %q %v", b[:i], k, as)
			}
		}
	})
}

// Whatever the ranges are: no address twice, none that a pod must not have.
func FuzzRanges(f *testing.F) {
	f.Add(byte(29), byte(0), byte(7), byte(1), byte(4), byte(31), byte(5))
	f.Add(byte(24), byte(10), byte(20), byte(15), byte(12), byte(30), byte(255))
	f.Fuzz(func(t *testing.T, bits, first, last, gateway, excluded, excludedBits, start byte) {
		addr := func(b byte) netip.Addr { return netip.AddrFrom4([4]byte{198, 18, 1, b}) }
		r := Range{
			Subnet: netip.PrefixFrom(addr(0), 24+int(bits%9)), First: addr(first), Last: addr(last), Gateway: addr(gateway),
			Exclude: []netip.Prefix{netip.PrefixFrom(addr(excluded), 24+int(excludedBits%9))},
		}
		sets, err := compile([][]Range{{r}})
		if err != nil {
			return
		}
		var got []netip.Addr
		for a := range sets[0].after(addr(start)) {
			got = append(got, a)
		}
		var want []netip.Addr
		for i := range 256 {
			a := addr(start + 1 + byte(i))
			usable := r.Subnet.Contains(a) && a.Compare(r.First) >= 0 && a.Compare(r.Last) <= 0 && a != r.Gateway &&
				a != r.Subnet.Addr() && a != Last(r.Subnet) && !r.Exclude[0].Contains(a)
			if usable {
				want = append(want, a)
			}
		}
		if !r.Subnet.Contains(addr(start)) || addr(start).Compare(r.First) < 0 || addr(start).Compare(r.Last) > 0 {
			slices.SortFunc(want, netip.Addr.Compare)
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%+v from %d: %v, want %v", r, start, got, want)
		}
	})
}
