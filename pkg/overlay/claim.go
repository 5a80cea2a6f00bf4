package overlay

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"maps"
	"net/netip"
	"slices"
)

// Claim is what this node wants of the store: a lease that says Attrs.
type Claim struct {
	Attrs Attrs
	// Prefer is the lease held so far, or what subnet.env remembers: taken
	// again if it is free, so that running pods keep their addresses.
	Prefer Subnets
	// Held says that Prefer was ours in this process's life: a write of it was
	// done, or there was nothing to write. The write counts, or two nodes with one
	// address might overwrite each other for ever, unseen.
	Held bool
	// Last is what Prefer said when it was last written or held: if it still says
	// so it is ours, whatever has changed on this node since.
	Last Attrs
}

// Act is what has to be written to the store.
type Act uint8

// The acts.
const (
	Hold     Act = iota // nothing: the lease is as it should be
	Create              // make Lease's key, which must not exist
	Update              // write Lease's attributes over the revision Lease.Modified
	Remove              // delete the key at the revision Lease.Modified
	Announce            // say that the node's network is up
)

func (a Act) String() string { return [...]string{"hold", "create", "update", "remove", "announce"}[a] }

// Step is one write to the store and why it is made.
type Step struct {
	Act   Act
	Lease Lease
	Why   string
}

// randomSubnets is how many free subnets a node draws from. flannel's number.
const randomSubnets = 100

// Next returns the next write that brings the store closer to the claim. leases
// are those of a complete Snapshot; each write is conditional on what was seen
// there, so a lost race only means that Next is asked again. draw returns a
// number in 0..n-1.
func (c Claim) Next(cfg Config, leases []*Lease, draw func(n int) int) (Step, error) {
	lost := losers(cfg, leases)
	if own := c.own(leases); own != nil {
		return c.keep(cfg, own, lost[own])
	}
	why := "no lease has this node's address " + c.Attrs.address().String()
	if taken := overlapping(leases, c.Prefer); taken != nil {
		why = fmt.Sprintf("the former subnet %s is taken: %s", c.Prefer.Key(), taken.holder())
	}
	n, err := cfg.pick(leases, c.Prefer, draw)
	if err != nil {
		return Step{}, err
	}
	if n == c.Prefer {
		why = "the former subnet is free"
	}
	return Step{Act: Create, Lease: Lease{Subnets: n, Attrs: c.Attrs}, Why: why}, nil
}

// keep decides on a lease that bears our address.
func (c Claim) keep(cfg Config, own, winner *Lease) (Step, error) {
	if winner != nil {
		return Step{Act: Remove, Lease: *own, Why: "it overlaps a lease with the better claim: " + winner.holder()}, nil
	}
	if err := cfg.Check(own.Subnets); err != nil {
		return Step{Act: Remove, Lease: *own, Why: err.Error()}, nil
	}
	if own.Attrs == c.Attrs {
		return Step{Act: Hold, Lease: *own}, nil
	}
	step := Step{Act: Update, Lease: *own, Why: "what this node publishes has changed"}
	step.Lease.Attrs, step.Lease.Err = c.Attrs, nil
	return step, nil
}

// own finds the node's lease: the one it holds, even if its own address has
// changed since; else one that bears its address, with its identity if there is a
// choice, the oldest of those.
//
// A lease we hold that now bears our address but another identity was written by
// somebody with the same address. Both see it, and both let the lower one have it:
// the other looks for a subnet of its own.
func (c Claim) own(leases []*Lease) *Lease {
	var best *Lease
	for _, l := range leases {
		mine := l.address().IsValid() && l.address() == c.Attrs.address()
		if l.Subnets == c.Prefer {
			if c.lastOurs(l) || mine && !(c.Held && c.defeated(l)) || c.Held && l.Err != nil {
				return l
			}
			continue
		}
		if mine && !(c.Held && c.contested(l)) && (best == nil || c.better(l, best)) {
			best = l
		}
	}
	return best
}

// contested reports whether the lease bears an identity that is not ours. That of
// another backend tells nothing: the node may have had it.
func (c Claim) contested(l *Lease) bool {
	return l.Backend == c.Attrs.Backend && l.identity() != "" && l.identity() != c.Attrs.identity()
}

func (c Claim) defeated(l *Lease) bool {
	return c.contested(l) && l.identity() < c.Attrs.identity()
}

// lastOurs reports whether the lease is ours even under another address: it is our
// address that has changed.
func (c Claim) lastOurs(l *Lease) bool {
	return c.Held && l.Attrs == c.Last || l.identity() != "" && l.identity() == c.Attrs.identity()
}

// identity tells two nodes with the same address apart: the MAC of the VTEP, or the
// public key. The other backends publish nothing of the kind.
func (a Attrs) identity() string {
	for _, mac := range []MAC{a.VTEP.MAC, a.VTEPv6.MAC} {
		if mac != (MAC{}) {
			return string(mac[:])
		}
	}
	for _, key := range []WGKey{a.WireGuard.PublicKey, a.WireGuardV6.PublicKey} {
		if key != (WGKey{}) {
			return string(key[:])
		}
	}
	return ""
}

func (c Claim) better(a, b *Lease) bool {
	if x, y := c.contested(a), c.contested(b); x != y {
		return y
	}
	return a.Created < b.Created
}

// losers maps each lease that has to give way to the one it overlaps.
func losers(cfg Config, leases []*Lease) map[*Lease]*Lease {
	return Losers(leases, cfg.compareClaims)
}

// Losers maps each lease of a Snapshot, which are in order, that has to give way to
// the one it overlaps: the best claim stands, then the next that overlaps none that
// stands, and so on. Every node comes to the same verdict, flannel's excepted.
func Losers(leases []*Lease, compare func(a, b *Lease) int) map[*Lease]*Lease {
	rivals := map[*Lease][]*Lease{}
	for _, f := range []Family{IPv4, IPv6} {
		// Prefixes are disjoint or nested; around holds those that enclose l.
		var around []*Lease
		for _, l := range ordered(leases, f) {
			for len(around) > 0 && !around[len(around)-1].Subnet(f).Overlaps(l.Subnet(f)) {
				around = around[:len(around)-1]
			}
			for _, a := range around {
				rivals[a] = append(rivals[a], l)
				rivals[l] = append(rivals[l], a)
			}
			around = append(around, l)
		}
	}
	lost := make(map[*Lease]*Lease, len(rivals))
	for _, l := range slices.SortedFunc(maps.Keys(rivals), compare) {
		for _, r := range rivals[l] {
			if compare(r, l) < 0 && lost[r] == nil {
				lost[l] = r
				break
			}
		}
	}
	return lost
}

// compareClaims puts the better of two claims first: a subnet such as the
// configuration gives before any other, or one old key 10.0.0.0-8 would drive out
// the whole cluster; then the older key; of two of one revision the lower.
func (c Config) compareClaims(a, b *Lease) int {
	if x, y := c.regular(a), c.regular(b); x != y {
		if x {
			return -1
		}
		return 1
	}
	return cmp.Or(cmp.Compare(a.Created, b.Created), a.Compare(b.Subnets))
}

// regular reports whether the subnets of a lease could be given by the
// configuration, SubnetMin and SubnetMax apart.
func (c Config) regular(l *Lease) bool {
	for _, f := range c.families() {
		p, s := c.Pool(f), l.Subnet(f)
		if s.IsValid() && (s.Bits() != p.SubnetLen || !p.Network.Contains(s.Addr())) {
			return false
		}
	}
	return true
}

// ordered returns the leases in the order of a family's subnets; those of a
// Snapshot are in that of IPv4.
func ordered(leases []*Lease, f Family) []*Lease {
	byV6 := func(a, b *Lease) int { return comparePrefix(a.V6, b.V6) }
	if f == IPv4 || slices.IsSortedFunc(leases, byV6) {
		return leases
	}
	out := slices.Clone(leases)
	slices.SortFunc(out, byV6)
	return out
}

func overlapping(leases []*Lease, n Subnets) *Lease {
	for _, l := range leases {
		if l.Overlaps(n) {
			return l
		}
	}
	return nil
}

// pick chooses a subnet of each family, each by itself: the preferred one if it
// fits and is free, else one of the first free ones, drawn as flannel does.
func (c Config) pick(leases []*Lease, prefer Subnets, draw func(n int) int) (Subnets, error) {
	var out Subnets
	for _, f := range c.families() {
		p := prefer.Subnet(f)
		pool := c.Pool(f)
		// Nobody routes a lease of all the network, so it takes nothing from it.
		taken := slices.DeleteFunc(subnets(leases, f), func(s netip.Prefix) bool { return s.Bits() <= pool.Network.Bits() })
		if pool.Check(p) != nil || slices.ContainsFunc(taken, p.Overlaps) {
			free := pool.free(taken, randomSubnets)
			if len(free) == 0 {
				return Subnets{}, fmt.Errorf("no free /%d subnet from %s to %s in %s: all are leased; widen the %s network, or delete the leases of nodes that are gone", pool.SubnetLen, pool.Min, pool.Max, pool.Network, f)
			}
			p = free[draw(len(free))]
		}
		if f == IPv4 {
			out.V4 = p
		} else {
			out.V6 = p
		}
	}
	return out, nil
}

// subnets lists the leased prefixes of a family in order.
func subnets(leases []*Lease, f Family) []netip.Prefix {
	var out []netip.Prefix
	for _, l := range leases {
		if p := l.Subnet(f); p.IsValid() {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, comparePrefix)
	return out
}

// DeriveMAC returns the VTEP MAC of a node for a device: locally administered,
// and always the same, so that neither a reboot nor a deleted device makes
// peers send to an address that is gone. The identity is the uplink's own
// Ethernet address, or its IP address if the uplink has none.
func DeriveMAC(u Uplink, device string) MAC {
	identity := u.MAC.String()
	if u.MAC == (MAC{}) {
		identity = u.V4.String() + u.V6.String()
	}
	sum := sha256.Sum256([]byte("twill vtep " + identity + " " + device))
	m := MAC(sum[:6])
	m[0] = m[0]&^1 | 2
	return m
}
