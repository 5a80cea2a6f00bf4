package ipam

import (
	"fmt"
	"net/netip"
)

// Range is a stretch of one subnet that pods may have, as in host-local's
// configuration. The network address, the broadcast address of IPv4 and the
// gateway are never a pod's, even if they lie inside. The last address of an IPv6
// subnet is an address like any other.
type Range struct {
	Subnet  netip.Prefix
	First   netip.Addr // zero: the first of the subnet
	Last    netip.Addr // zero: the last of the subnet
	Gateway netip.Addr // zero: the first of the subnet
	// Exclude is not chosen automatically, but can be requested. What lies outside
	// the range does no harm, so one list serves every node.
	Exclude []netip.Prefix
}

func (r Range) String() string {
	if !r.First.IsValid() && !r.Last.IsValid() {
		return r.Subnet.String()
	}
	end := func(a netip.Addr) string {
		if !a.IsValid() {
			return ""
		}
		return a.String()
	}
	return end(r.First) + "-" + end(r.Last) + " of " + r.Subnet.String()
}

// RangeError says which range cannot be used, why, and what to write instead.
type RangeError struct {
	Range  Range
	Reason string
}

func (e *RangeError) Error() string { return fmt.Sprintf("range %s: %s", e.Range, e.Reason) }

// Validate reports as a *RangeError what Allocate would refuse in sets.
func Validate(sets [][]Range) error {
	_, err := compile(sets)
	return err
}

// Gateway returns the address of subnet that the node keeps for itself: the first.
func Gateway(subnet netip.Prefix) netip.Addr { return subnet.Masked().Addr().Next() }

// complete fills in what r leaves to the subnet, and refuses what makes no sense.
func (r Range) complete() (Range, error) {
	if reason := badSubnet(r.Subnet); reason != "" {
		return r, &RangeError{r, reason}
	}
	full := r
	for _, field := range []struct {
		name string
		addr *netip.Addr
		def  netip.Addr
	}{
		{"first address", &full.First, Gateway(r.Subnet)},
		{"last address", &full.Last, lastUsable(r.Subnet)},
		{"gateway", &full.Gateway, Gateway(r.Subnet)},
	} {
		*field.addr = field.addr.Unmap()
		if !field.addr.IsValid() {
			*field.addr = field.def
		}
		if !r.Subnet.Contains(*field.addr) {
			return r, &RangeError{r, fmt.Sprintf("%s %s is not in subnet %s: give one that is, or none", field.name, *field.addr, r.Subnet)}
		}
	}
	if full.First.Compare(full.Last) > 0 {
		return r, &RangeError{r, fmt.Sprintf("first address %s is behind last address %s: exchange them", full.First, full.Last)}
	}
	for _, p := range r.Exclude {
		if p.Addr().Is4In6() {
			return r, &RangeError{r, fmt.Sprintf("exclusion %s is IPv4 written as IPv6: write it as IPv4", p)}
		}
		if !p.IsValid() || p != p.Masked() {
			return r, &RangeError{r, fmt.Sprintf("exclusion %s is not the network address of a prefix: write %s", p, p.Masked())}
		}
	}
	return full, nil
}

func badSubnet(p netip.Prefix) (reason string) {
	switch bits := p.Addr().BitLen() - 2; {
	case !p.IsValid():
		return "no subnet: give one such as 10.244.1.0/24"
	case p.Addr().Is4In6():
		return "an IPv4 subnet written as IPv6: write it as IPv4"
	case p != p.Masked():
		return fmt.Sprintf("subnet %s is not the network address of a subnet: write %s", p, p.Masked())
	case p.Bits() > bits:
		return fmt.Sprintf("subnet %s is too small: it must be /%d or wider", p, bits)
	}
	return ""
}

// contains includes gateway and exclusions. r is complete.
func (r Range) contains(a netip.Addr) bool {
	return a.BitLen() == r.First.BitLen() && a.Zone() == "" && a.Compare(r.First) >= 0 && a.Compare(r.Last) <= 0
}

func (r Range) overlaps(q Range) bool {
	return r.contains(q.First) || q.contains(r.First)
}

// lastUsable returns the last address of p that a host can have.
func lastUsable(p netip.Prefix) netip.Addr {
	if p.Addr().Is4() {
		return Last(p).Prev()
	}
	return Last(p)
}

// Last returns the last address of a prefix.
func Last(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
