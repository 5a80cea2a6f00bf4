package overlay

import (
	"fmt"
	"net/netip"
)

// Snapshot is everything the store says at one revision, complete and immutable.
type Snapshot struct {
	Revision int64
	Config   Config
	// Leases are sorted by Subnets.Compare. A Lease is never changed once it is
	// in a Snapshot: one that changed is another pointer.
	Leases []*Lease
	// Taken are subnets that no lease names and that are not free.
	Taken []Subnets
	// Node is what a store that knows nodes by name says of this one.
	Node NodeFacts
	// Problems names what the store holds and the Snapshot does not: keys that
	// do not parse, a new config that was refused.
	Problems []Problem
}

// NodeFacts is what the Kubernetes API says of this node, beside its lease.
type NodeFacts struct {
	Missing bool // there is no such node
	// PublicIP and PublicIPv6 were set by the operator and go before what the
	// node finds out itself; zero: not set.
	PublicIP, PublicIPv6 netip.Addr
	// Unavailable asks for Announce: the node is not known to have a network.
	Unavailable bool
}

// Problem is something wrong that stops one object and nothing else.
type Problem struct {
	Object string `json:"object"` // what is concerned: "lease 10.5.1.0-24", "link flannel.1"
	Reason string `json:"reason"`
	Remedy string `json:"remedy,omitempty"` // what the operator can do about it
}

func (p Problem) String() string {
	if p.Remedy == "" {
		return fmt.Sprintf("%s: %s", p.Object, p.Reason)
	}
	return fmt.Sprintf("%s: %s (%s)", p.Object, p.Reason, p.Remedy)
}

// Lease returns the lease of exactly these subnets, or nil.
func (s *Snapshot) Lease(n Subnets) *Lease {
	for _, l := range s.Leases {
		if l.Subnets == n {
			return l
		}
	}
	return nil
}

// Subnets is the pod subnet of one node, with its IPv6 twin in dual stack. It is
// the name of a lease.
type Subnets struct {
	V4, V6 netip.Prefix
}

// Overlaps reports whether the two share an address in either family.
func (n Subnets) Overlaps(o Subnets) bool {
	return n.V4.IsValid() && o.V4.IsValid() && n.V4.Overlaps(o.V4) ||
		n.V6.IsValid() && o.V6.IsValid() && n.V6.Overlaps(o.V6)
}

// Compare orders by IPv4 subnet, then IPv6 subnet.
func (n Subnets) Compare(o Subnets) int {
	if c := comparePrefix(n.V4, o.V4); c != 0 {
		return c
	}
	return comparePrefix(n.V6, o.V6)
}

func comparePrefix(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}

// All returns the subnets that are set, IPv4 first.
func (n Subnets) All() []netip.Prefix {
	var out []netip.Prefix
	for _, p := range []netip.Prefix{n.V4, n.V6} {
		if p.IsValid() {
			out = append(out, p)
		}
	}
	return out
}
