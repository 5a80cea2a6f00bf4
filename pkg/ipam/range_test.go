package ipam

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
)

func prefixes(s string) []netip.Prefix {
	var out []netip.Prefix
	for _, f := range strings.Fields(s) {
		out = append(out, netip.MustParsePrefix(f))
	}
	return out
}

func addrs(s string) []netip.Addr {
	var out []netip.Addr
	for _, f := range strings.Fields(s) {
		out = append(out, netip.MustParseAddr(f))
	}
	return out
}

// newRange reads "subnet first last gateway exclusion…", where - stands for the
// subnet's own.
func newRange(s string) Range {
	f := strings.Fields(s)
	r := Range{Subnet: netip.MustParsePrefix(f[0])}
	for i, p := range []*netip.Addr{&r.First, &r.Last, &r.Gateway} {
		if len(f) > i+1 && f[i+1] != "-" {
			*p = netip.MustParseAddr(f[i+1])
		}
	}
	if len(f) > 4 {
		r.Exclude = prefixes(strings.Join(f[4:], " "))
	}
	return r
}

// newSets makes a set of each argument, with ranges separated by commas.
func newSets(sets ...string) [][]Range {
	var out [][]Range
	for _, s := range sets {
		var ranges []Range
		for f := range strings.SplitSeq(s, ",") {
			ranges = append(ranges, newRange(f))
		}
		out = append(out, ranges)
	}
	return out
}

// What pods get, in which order.
func TestRanges(t *testing.T) {
	for _, tt := range []struct{ name, set, last, want string }{
		{"whole", "198.18.1.0/29", "", "2 3 4 5 6"},
		{"smallest", "198.18.1.0/30", "", "2"},
		{"IPv6 has no broadcast", "fd00::/125", "", "2 3 4 5 6 7"},
		{"smallest of IPv6", "fd00::/126", "", "2 3"},
		{"end of the address space", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffc/126", "", "fffe ffff"},
		{"part", "198.18.1.0/24 198.18.1.10 198.18.1.12", "", "10 11 12"},
		{"one address", "198.18.1.0/24 198.18.1.10 198.18.1.10", "198.18.1.10", "10"},
		{"from the first", "198.18.1.0/29 198.18.1.5", "", "5 6"},
		{"to the last", "198.18.1.0/29 - 198.18.1.3", "", "2 3"},
		{"network address and broadcast", "198.18.1.0/29 198.18.1.0 198.18.1.7", "", "2 3 4 5 6"},
		{"gateway inside", "198.18.1.0/29 - - 198.18.1.4", "", "1 2 3 5 6"},
		{"gateway of a neighbour", "198.18.1.0/24 198.18.1.10 198.18.1.12 198.18.1.21,198.18.1.0/24 198.18.1.20 198.18.1.22", "", "10 11 12 20 22"},
		{"exclusions", "198.18.1.0/28 - - - 198.18.1.4/30 198.18.1.9/32 203.0.113.0/24 fd00::/8", "", "2 3 8 10 11 12 13 14"},
		{"exclusions that overlap", "198.18.1.0/28 - - - 198.18.1.0/29 198.18.1.4/30 198.18.1.14/32", "", "8 9 10 11 12 13"},
		{"round", "198.18.1.0/29", "198.18.1.4", "5 6 2 3 4"},
		{"round from the end", "198.18.1.0/29", "198.18.1.6", "2 3 4 5 6"},
		{"round from the gateway", "198.18.1.0/29", "198.18.1.1", "2 3 4 5 6"},
		{"round from an exclusion", "198.18.1.0/28 - - - 198.18.1.4/30", "198.18.1.5", "8 9 10 11 12 13 14 2 3"},
		{"round from an exclusion at the end", "198.18.1.0/28 - - - 198.18.1.8/29", "198.18.1.9", "2 3 4 5 6 7"},
		{"round from elsewhere", "198.18.1.0/29", "198.18.2.4", "2 3 4 5 6"},
		{"round from the other family", "198.18.1.0/29", "fd00::4", "2 3 4 5 6"},
		{"ranges in their order", "198.18.1.0/29 198.18.1.5,203.0.113.0/30,198.18.1.0/29 - 198.18.1.3", "203.0.113.2", "2 3 5 6 2"},
		{"from one range into the next", "198.18.1.0/29,203.0.113.0/29 203.0.113.5", "198.18.1.6", "5 6 2 3 4 5 6"},
		{"from a range that is all excluded", "198.18.1.0/29,203.0.113.0/29 - - - 203.0.113.0/29", "203.0.113.3", "2 3 4 5 6"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sets, err := compile(newSets(tt.set))
			if err != nil {
				t.Fatal(err)
			}
			var last netip.Addr
			if tt.last != "" {
				last = netip.MustParseAddr(tt.last)
			}
			var got []string
			for a := range sets[0].after(last) {
				s := a.String()
				got = append(got, s[strings.LastIndexAny(s, ".:")+1:])
				if !sets[0].chooses(a) || unusable(sets, a) != "" {
					t.Errorf("%s can and cannot be chosen", a)
				}
			}
			if s := strings.Join(got, " "); s != tt.want {
				t.Errorf("pods get %s, want %s", s, tt.want)
			}
		})
	}
}

func TestBadRanges(t *testing.T) {
	for _, tt := range []struct {
		sets [][]Range
		want string
	}{
		{nil, "no ranges"},
		{[][]Range{{}}, "range set 0 is empty"},
		{[][]Range{{{}}}, "no subnet: give one"},
		{newSets("198.18.1.1/24"), "write 198.18.1.0/24"},
		{newSets("198.18.1.0/31"), "must be /30 or wider"},
		{newSets("198.18.1.0/32"), "must be /30 or wider"},
		{newSets("fd00::/127"), "must be /126 or wider"},
		{newSets("::ffff:198.18.1.0/120"), "write it as IPv4"},
		{newSets("198.18.1.0/24 198.18.2.1"), "first address 198.18.2.1 is not in subnet 198.18.1.0/24"},
		{newSets("198.18.1.0/24 - fd00::1"), "last address fd00::1 is not in subnet"},
		{newSets("198.18.1.0/24 - - 198.18.2.1"), "gateway 198.18.2.1 is not in subnet"},
		{newSets("198.18.1.0/24 198.18.1.9 198.18.1.8"), "exchange them"},
		{newSets("198.18.1.0/24 - - - 198.18.1.1/30"), "write 198.18.1.0/30"},
		{newSets("198.18.1.0/24 - - - ::ffff:198.18.1.0/126"), "write it as IPv4"},
		{newSets("198.18.1.0/24 - - - 198.18.0.0/16"), "holds no address"},
		{newSets("198.18.1.0/24 198.18.1.1 198.18.1.1"), "holds no address"},
		{newSets("198.18.1.0/24,fd00::/64"), "other address family, such as 198.18.1.0/24"},
		{newSets("198.18.1.0/24,198.18.0.0/16"), "overlaps with range"},
		{newSets("198.18.1.0/24", "198.18.1.0/24 198.18.1.9 198.18.1.9"), "overlaps with range"},
		{newSets("fd00::/64", "198.18.1.0/24", "fd00::/64 fd00::9"), "overlaps with range"},
	} {
		d := NewDir(t.TempDir(), "net")
		_, err := d.Allocate(Request{Owner: Owner{"c", "eth0"}, Sets: tt.sets})
		for _, err := range []error{err, Validate(tt.sets), d.Free(Request{Sets: tt.sets})} {
			var bad *RangeError
			if !errors.As(err, &bad) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v: %v, want a *RangeError with %q", tt.sets, err, tt.want)
			}
		}
		if got := reserved(t, d); len(got) != 0 {
			t.Errorf("%v: reserved %v", tt.sets, got)
		}
	}
}

func TestRangeString(t *testing.T) {
	for in, want := range map[string]string{
		"198.18.1.0/24":                         "198.18.1.0/24",
		"198.18.1.0/24 198.18.1.10":             "198.18.1.10- of 198.18.1.0/24",
		"198.18.1.0/24 198.18.1.10 198.18.1.12": "198.18.1.10-198.18.1.12 of 198.18.1.0/24",
	} {
		if got := newRange(in).String(); got != want {
			t.Errorf("%s prints as %s, want %s", in, got, want)
		}
	}
	sets, err := compile(newSets("198.18.1.0/24,198.18.2.0/24 198.18.2.9", "fd00::/64"))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := describe(sets...), "198.18.1.0/24, 198.18.2.9-198.18.2.254 of 198.18.2.0/24; fd00::/64"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}
