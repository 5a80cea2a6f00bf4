package overlay

import (
	"encoding/binary"
	"fmt"
	"net/netip"
)

// Pool is one family's share of the network configuration: the addresses that
// node subnets are cut from.
type Pool struct {
	Network   netip.Prefix
	SubnetLen int
	Min, Max  netip.Addr // first and last subnet, by network address
	// Assigned says that nodes are given their subnets from outside, as Kubernetes
	// does: any subnet of the network is good then.
	Assigned bool
}

// Enabled reports whether the family is in use.
func (p Pool) Enabled() bool { return p.Network.IsValid() }

// Check says why a subnet is not one of the pool's, or nil.
func (p Pool) Check(s netip.Prefix) error {
	switch {
	case !p.Enabled() && !s.IsValid():
		return nil
	case !p.Enabled():
		return fmt.Errorf("subnet %s is of a family that the configuration turns off", s)
	case !s.IsValid():
		return fmt.Errorf("there is no subnet of network %s", p.Network)
	case p.Assigned:
		if s.Bits() <= p.Network.Bits() || !p.Network.Contains(s.Addr()) {
			return fmt.Errorf("subnet %s does not lie in network %s", s, p.Network)
		}
	case s.Bits() != p.SubnetLen:
		return fmt.Errorf("subnet %s has not the prefix length %d of the configuration", s, p.SubnetLen)
	case s.Addr().Less(p.Min) || p.Max.Less(s.Addr()):
		return fmt.Errorf("subnet %s is not between SubnetMin %s and SubnetMax %s", s, p.Min, p.Max)
	}
	return nil
}

// free returns up to limit subnets of the pool that overlap none of taken, which
// must be sorted. It steps over a taken prefix as a whole.
func (p *Pool) free(taken []netip.Prefix, limit int) []netip.Prefix {
	var out []netip.Prefix
	for a := p.Min; len(out) < limit && !p.Max.Less(a); {
		s := netip.PrefixFrom(a, p.SubnetLen)
		for len(taken) > 0 && lastAddr(taken[0]).Less(a) {
			taken = taken[1:]
		}
		next := s
		if len(taken) > 0 && taken[0].Overlaps(s) {
			if taken[0].Bits() < s.Bits() {
				next = taken[0]
			}
		} else {
			out = append(out, s)
		}
		a = lastAddr(next).Next()
		if !a.IsValid() { // the address space ends here
			break
		}
	}
	return out
}

// number returns the last 24 bits of a subnet's own part of its address: another
// number for each subnet of the pool, and the same one when the network becomes
// wider. ok is false for a prefix that is no subnet of the pool, and for a pool of
// more than 2^24 subnets.
func (p *Pool) number(s netip.Prefix) (n uint32, ok bool) {
	if !p.Enabled() || !p.Network.Contains(s.Addr()) || s.Bits() != p.SubnetLen || s.Bits()-p.Network.Bits() > 24 {
		return 0, false
	}
	hi, lo := halves(s.Addr())
	shift := s.Addr().BitLen() - s.Bits()
	if shift >= 64 {
		lo = hi >> (shift - 64)
	} else {
		lo = lo>>shift | hi<<(64-shift)
	}
	return uint32(lo) & 0xffffff, true
}

// lastAddr is the highest address of p.
func lastAddr(p netip.Prefix) netip.Addr {
	hi, lo := halves(p.Addr())
	host := p.Addr().BitLen() - p.Bits()
	if host >= 64 {
		lo, hi = ^uint64(0), hi|(1<<(host-64)-1)
	} else {
		lo |= 1<<host - 1
	}
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], hi)
	binary.BigEndian.PutUint64(b[8:], lo)
	a := netip.AddrFrom16(b)
	if p.Addr().Is4() {
		return a.Unmap()
	}
	return a
}

// nthSubnet returns the n-th subnet of length length in network, counted from 0.
func nthSubnet(network netip.Prefix, length, n int) netip.Prefix {
	p := netip.PrefixFrom(network.Addr(), length)
	for range n {
		p = netip.PrefixFrom(lastAddr(p).Next(), length)
	}
	return p
}

func halves(a netip.Addr) (hi, lo uint64) {
	b := a.As16()
	return binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])
}
