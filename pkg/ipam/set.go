package ipam

import (
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strings"
)

// set is one range set, ready to choose from. Every pod gets one address of it.
type set struct {
	index  int     // of last_reserved_ip.<index>
	ranges []Range // complete, in the order of the round robin
	spans  []span  // what may be chosen automatically, in the same order
}

// span is a run of addresses of one range, without a hole.
type span struct {
	first, last netip.Addr
	rng         int
}

// compile checks the ranges and cuts out of them what no pod may have.
func compile(sets [][]Range) ([]set, error) {
	if len(sets) == 0 {
		return nil, &RangeError{Reason: "no ranges: give one subnet at least"}
	}
	var out []set
	var all []Range
	var gateways []netip.Addr
	for i, ranges := range sets {
		if len(ranges) == 0 {
			return nil, &RangeError{Reason: fmt.Sprintf("range set %d is empty: give it a subnet, or leave it out", i)}
		}
		s := set{index: i}
		for _, r := range ranges {
			full, err := r.complete()
			if err != nil {
				return nil, err
			}
			if len(s.ranges) > 0 && full.First.BitLen() != s.ranges[0].First.BitLen() {
				return nil, &RangeError{r, fmt.Sprintf("its range set has ranges of the other address family, such as %s: put it in a set of its own", ranges[0])}
			}
			if j := slices.IndexFunc(all, full.overlaps); j >= 0 {
				return nil, &RangeError{r, fmt.Sprintf("overlaps with range %s: every address must be in one range only", all[j])}
			}
			all = append(all, full)
			gateways = append(gateways, full.Gateway)
			s.ranges = append(s.ranges, full)
		}
		out = append(out, s)
	}
	for i := range out {
		if err := out[i].cut(gateways); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// cut makes the spans. The gateways are those of all sets.
func (s *set) cut(gateways []netip.Addr) error {
	for i, r := range s.ranges {
		spans := []span{{r.First, r.Last, i}}
		barred := slices.Clone(r.Exclude)
		for _, a := range append([]netip.Addr{r.Subnet.Addr()}, gateways...) {
			barred = append(barred, netip.PrefixFrom(a, a.BitLen()))
		}
		if last := Last(r.Subnet); last.Is4() {
			barred = append(barred, netip.PrefixFrom(last, 32))
		}
		for _, p := range barred {
			spans = without(spans, p)
		}
		s.spans = append(s.spans, spans...)
	}
	if len(s.spans) == 0 {
		return &RangeError{s.ranges[0], "holds no address for a pod beside gateway and exclusions: widen it, or exclude less"}
	}
	return nil
}

// without takes the addresses of p out of spans.
func without(spans []span, p netip.Prefix) []span {
	first, last := p.Addr(), Last(p)
	var out []span
	for _, s := range spans {
		if first.BitLen() != s.first.BitLen() || last.Compare(s.first) < 0 || first.Compare(s.last) > 0 {
			out = append(out, s)
			continue
		}
		if first.Compare(s.first) > 0 {
			out = append(out, span{s.first, first.Prev(), s.rng})
		}
		if last.Compare(s.last) < 0 {
			out = append(out, span{last.Next(), s.last, s.rng})
		}
	}
	return out
}

// after yields every address of the spans once, starting behind prev. A prev from
// elsewhere starts at the beginning.
func (s set) after(prev netip.Addr) iter.Seq[netip.Addr] {
	k, from := s.behind(prev)
	return func(yield func(netip.Addr) bool) {
		n := len(s.spans)
		for i := range n + 1 {
			sp := s.spans[(k+i)%n]
			a, last := sp.first, sp.last
			if i == 0 {
				a = from
			} else if i == n {
				if from == sp.first {
					return
				}
				last = from.Prev()
			}
			for ; ; a = a.Next() {
				if !yield(a) {
					return
				}
				if a == last {
					break
				}
			}
		}
	}
}

// behind returns the first address behind prev, and its span.
func (s set) behind(prev netip.Addr) (int, netip.Addr) {
	rng := slices.IndexFunc(s.ranges, func(r Range) bool { return r.contains(prev) })
	for i, sp := range s.spans {
		if rng >= 0 && sp.rng == rng && sp.last.Compare(prev) > 0 {
			if sp.first.Compare(prev) > 0 {
				return i, sp.first
			}
			return i, prev.Next()
		}
		if rng >= 0 && sp.rng > rng {
			return i, sp.first
		}
	}
	return 0, s.spans[0].first
}

// chooses reports whether a may be chosen automatically.
func (s set) chooses(a netip.Addr) bool {
	return slices.ContainsFunc(s.spans, func(sp span) bool {
		return a.BitLen() == sp.first.BitLen() && a.Compare(sp.first) >= 0 && a.Compare(sp.last) <= 0
	})
}

// rangeFor returns the range of a.
func (s set) rangeFor(a netip.Addr) (Range, bool) {
	i := slices.IndexFunc(s.ranges, func(r Range) bool { return r.contains(a) })
	if i < 0 {
		return Range{}, false
	}
	return s.ranges[i], true
}

func (s set) address(a netip.Addr) Address {
	r, _ := s.rangeFor(a)
	return Address{Prefix: netip.PrefixFrom(a, r.Subnet.Bits()), Gateway: r.Gateway}
}

// assign says which requested address is to come from which set; the zero Addr
// stands for any. Errors are *OutOfRangeError.
func assign(sets []set, wanted []netip.Addr) ([]netip.Addr, error) {
	out := make([]netip.Addr, len(sets))
	for _, a := range wanted {
		a = a.Unmap()
		i := slices.IndexFunc(sets, func(s set) bool { _, ok := s.rangeFor(a); return ok })
		reason := unusable(sets, a)
		switch {
		case reason != "":
		case i < 0:
			reason = "it lies in none of the ranges"
		case out[i].IsValid() && out[i] != a:
			reason = fmt.Sprintf("%s is requested too, and a pod gets one address of a set", out[i])
		default:
			out[i] = a
			continue
		}
		return nil, &OutOfRangeError{Addr: a, Ranges: describe(sets...), Reason: reason}
	}
	return out, nil
}

// unusable says why no pod can have a, not even on request.
func unusable(sets []set, a netip.Addr) string {
	for _, s := range sets {
		for _, r := range s.ranges {
			switch {
			case a == r.Gateway:
				return "it is the gateway"
			case a == r.Subnet.Addr():
				return "it is the network address of " + r.Subnet.String()
			case a.Is4() && a == Last(r.Subnet):
				return "it is the broadcast address of " + r.Subnet.String()
			}
		}
	}
	return ""
}

// describe prints the ranges: those of a set separated by commas, sets by semicolons.
func describe(sets ...set) string {
	var out []string
	for _, s := range sets {
		var ranges []string
		for _, r := range s.ranges {
			if r.First == Gateway(r.Subnet) && r.Last == lastUsable(r.Subnet) {
				r.First, r.Last = netip.Addr{}, netip.Addr{}
			}
			ranges = append(ranges, r.String())
		}
		out = append(out, strings.Join(ranges, ", "))
	}
	return strings.Join(out, "; ")
}
