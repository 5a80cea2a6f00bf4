package ipam

import (
	"fmt"
	"iter"
	"net/netip"
)

// addrRange is the addresses of a subnet that pods may have: all but the network
// address, the gateway (the first address after it) and, in IPv4, the broadcast
// address. The last address of an IPv6 subnet is an address like any other.
type addrRange struct {
	first, last netip.Addr
	gateway     netip.Addr
}

func rangeOf(subnet netip.Prefix) (addrRange, error) {
	if !subnet.IsValid() || subnet != subnet.Masked() {
		return addrRange{}, fmt.Errorf("allocate from %s: not the network address of a subnet", subnet)
	}
	if subnet.Bits() > subnet.Addr().BitLen()-2 {
		return addrRange{}, fmt.Errorf("allocate from %s: too small, must be /%d or wider", subnet, subnet.Addr().BitLen()-2)
	}
	last := lastAddr(subnet)
	if last.Is4() {
		last = last.Prev()
	}
	gw := Gateway(subnet)
	return addrRange{first: gw, last: last, gateway: gw}, nil
}

// Gateway returns the address of subnet that the node keeps for itself: the first.
func Gateway(subnet netip.Prefix) netip.Addr { return subnet.Masked().Addr().Next() }

func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// after yields every address once, starting behind prev and ending with it. A
// prev from elsewhere starts at the beginning.
func (r addrRange) after(prev netip.Addr) iter.Seq[netip.Addr] {
	start := r.first
	if r.contains(prev) {
		start = r.next(prev)
	}
	return func(yield func(netip.Addr) bool) {
		a := start
		for {
			if a != r.gateway && !yield(a) {
				return
			}
			if a = r.next(a); a == start {
				return
			}
		}
	}
}

func (r addrRange) next(a netip.Addr) netip.Addr {
	if a == r.last {
		return r.first
	}
	return a.Next()
}

func (r addrRange) contains(a netip.Addr) bool {
	return a.BitLen() == r.first.BitLen() && a.Compare(r.first) >= 0 && a.Compare(r.last) <= 0
}
