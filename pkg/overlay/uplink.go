package overlay

import (
	"cmp"
	"fmt"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strings"
)

// Iface is what the kernel says of one network interface: the facts the choice
// of the uplink is made from.
type Iface struct {
	Name         string
	Index        int
	MTU          int
	MAC          MAC
	Up, Loopback bool
	Addrs        []IfaceAddr
	// Metric of the default route that leaves by this interface, per family;
	// nil: none.
	Default4, Default6 *uint32
	// Reaches lists those of the asked-for addresses whose route leaves here.
	Reaches []netip.Addr
}

// IfaceAddr is an address of an interface with its prefix length.
type IfaceAddr struct {
	Prefix netip.Prefix
	// Unstable addresses do not identify a node: secondary, deprecated,
	// tentative, temporary (RFC 8981), or with a lifetime that has ended.
	Unstable bool
}

// Uplink is the interface that carries the outer packets.
type Uplink struct {
	Name   string
	Index  int
	MTU    int
	MAC    MAC
	V4, V6 netip.Addr     // the node's own address per family, on this interface
	OnLink []netip.Prefix // networks that need no gateway: for direct routing
	Why    string         // which rule chose it, for the operator
}

func (u *Uplink) addr(f Family) netip.Addr {
	if f == IPv4 {
		return u.V4
	}
	return u.V6
}

// UplinkRules say how to choose the uplink. The first rule that finds an
// interface wins: each Names, each Patterns, CanReach, the default route.
type UplinkRules struct {
	Names    []string // interface name or one of its addresses
	Patterns []string // regular expressions over name and addresses
	CanReach netip.Addr
	Skip     []string // shell patterns of names never chosen by Patterns or default route
	IPv4     bool     // an IPv4 address is needed
	IPv6     bool     // an IPv6 address is needed
}

// DefaultSkip are the interfaces that no node is reached by: containers', bridges'
// and overlays' own.
func DefaultSkip() []string {
	return []string{"lo", "docker*", "cni*", "veth*", "flannel*", "cali*", "br-*", "virbr*", "lxc*", "lxd*", "podman*", "kube-ipvs*", "nodelocaldns*", "dummy*", "tunl*"}
}

// ChooseUplink picks the uplink by the rules, or says why each candidate was
// refused.
func ChooseUplink(ifaces []Iface, r UplinkRules) (Uplink, error) {
	var refused []string
	try := func(why string, match func(Iface) bool, order func(a, b Iface) int) (Uplink, bool) {
		found := slices.DeleteFunc(slices.Clone(ifaces), func(i Iface) bool { return !match(i) })
		if order != nil {
			slices.SortStableFunc(found, order)
		}
		for _, i := range found {
			u, err := r.usable(i)
			if err == nil {
				u.Why = why
				return u, true
			}
			refused = append(refused, fmt.Sprintf("%s (%s): %v", i.Name, why, err))
		}
		if len(found) == 0 {
			refused = append(refused, why+": no such interface")
		}
		return Uplink{}, false
	}
	for _, name := range r.Names {
		if u, ok := try("--iface="+name, func(i Iface) bool { return i.named(name) }, nil); ok {
			return u, nil
		}
	}
	for _, pattern := range r.Patterns {
		re, err := regexp.Compile(pattern)
		if err != nil {
			return Uplink{}, fmt.Errorf("--iface-regex=%s: not a regular expression: %w", pattern, err)
		}
		if u, ok := try("--iface-regex="+pattern, func(i Iface) bool { return !r.skipped(i) && i.matches(re) }, nil); ok {
			return u, nil
		}
	}
	if r.CanReach.IsValid() {
		if u, ok := try("--iface-can-reach="+r.CanReach.String(), func(i Iface) bool { return slices.Contains(i.Reaches, r.CanReach) }, nil); ok {
			return u, nil
		}
	}
	if len(r.Names)+len(r.Patterns) == 0 && !r.CanReach.IsValid() {
		if u, ok := try("default route", func(i Iface) bool { return !r.skipped(i) && i.metric() != nil },
			func(a, b Iface) int { return cmp.Compare(*a.metric(), *b.metric()) }); ok {
			return u, nil
		}
	}
	return Uplink{}, fmt.Errorf("no usable interface: %s; name one with --iface", strings.Join(refused, "; "))
}

// metric is that of the default route, IPv4's if there is one.
func (i Iface) metric() *uint32 { return cmp.Or(i.Default4, i.Default6) }

func (i Iface) named(name string) bool {
	a, err := netip.ParseAddr(name)
	if err != nil {
		return i.Name == name
	}
	return slices.ContainsFunc(i.Addrs, func(x IfaceAddr) bool { return x.Prefix.Addr() == a })
}

func (i Iface) matches(re *regexp.Regexp) bool {
	return re.MatchString(i.Name) || slices.ContainsFunc(i.Addrs, func(x IfaceAddr) bool { return re.MatchString(x.Prefix.Addr().String()) })
}

func (r UplinkRules) skipped(i Iface) bool {
	return i.Loopback || slices.ContainsFunc(r.Skip, func(p string) bool { ok, _ := path.Match(p, i.Name); return ok })
}

// usable returns i as an Uplink if it is up and has an address of each family
// that is needed.
func (r UplinkRules) usable(i Iface) (Uplink, error) {
	u := Uplink{Name: i.Name, Index: i.Index, MTU: i.MTU, MAC: i.MAC}
	if !i.Up {
		return u, fmt.Errorf("is down")
	}
	u.V4, u.V6 = r.address(i, IPv4), r.address(i, IPv6)
	if r.IPv4 && !u.V4.IsValid() {
		return u, fmt.Errorf("has no usable IPv4 address")
	}
	if r.IPv6 && !u.V6.IsValid() {
		return u, fmt.Errorf("has no usable global IPv6 address")
	}
	for _, a := range i.Addrs {
		if p := a.Prefix.Masked(); !p.IsSingleIP() && !p.Addr().IsLinkLocalUnicast() && !slices.Contains(u.OnLink, p) {
			u.OnLink = append(u.OnLink, p)
		}
	}
	return u, nil
}

// address returns the address by which the node is known in a family: the first
// that --iface names, out of several on the interface, else the interface's own.
func (r UplinkRules) address(i Iface, f Family) netip.Addr {
	for _, name := range r.Names {
		if a, err := netip.ParseAddr(name); err == nil && FamilyOf(a) == f && a.IsGlobalUnicast() && i.named(name) {
			return a
		}
	}
	return i.address(f)
}

// address returns the interface's address in a family. A single
// host address (/32, /128) beside a real one is a virtual IP that moves between
// nodes (keepalived), never the node's own.
func (i Iface) address(f Family) netip.Addr {
	var fallback netip.Addr
	for _, a := range i.Addrs {
		ip := a.Prefix.Addr()
		if FamilyOf(ip) != f || !ip.IsGlobalUnicast() || a.Unstable {
			continue
		}
		if !a.Prefix.IsSingleIP() {
			return ip
		}
		if !fallback.IsValid() {
			fallback = ip
		}
	}
	return fallback
}
