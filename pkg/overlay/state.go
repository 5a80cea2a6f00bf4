package overlay

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Protocol is the rtnetlink protocol number (rtm_protocol, nh_protocol) of every
// route and nexthop that belongs to Twill. It is how a daemon without memory
// knows its own.
const Protocol = 84

// Alias is the ifalias of every link that belongs to Twill.
const Alias = "twill"

// MAC is an Ethernet address. An array, unlike net.HardwareAddr, compares with ==.
type MAC [6]byte

func (m MAC) String() string {
	const hex = "0123456789abcdef"
	b := make([]byte, 0, 17)
	for i, x := range m {
		if i > 0 {
			b = append(b, ':')
		}
		b = append(b, hex[x>>4], hex[x&15])
	}
	return string(b)
}

func (m MAC) number() uint64 {
	return uint64(binary.BigEndian.Uint32(m[:]))<<16 | uint64(binary.BigEndian.Uint16(m[4:]))
}

// MarshalText makes a MAC a string in JSON.
func (m MAC) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText is the inverse of MarshalText.
func (m *MAC) UnmarshalText(text []byte) error {
	if string(text) == (MAC{}).String() {
		*m = MAC{}
		return nil
	}
	var err error
	*m, err = ParseMAC(string(text))
	return err
}

// State is the part of a node's network configuration that Twill owns: either
// what is wanted (Desired) or what the kernel has (kernel.Observe). Each slice is
// sorted by its object's key (Normalize), so that two States are compared in
// one walk.
type State struct {
	Links    []Link
	Addrs    []Addr
	Nexthops []Nexthop
	Routes   []Route
	Neighs   []Neigh
	FDB      []FDB
	Sysctls  []Sysctl
	Chains   []Chain
	WGPeers  []WGPeer

	// Foreign holds the routes of others whose destination overlaps the pod
	// networks. Only Observe fills it; Diff never changes one of them.
	Foreign []Route

	// KeepPeers are the WireGuard links of a former backend. A peer that has moved on
	// is not taken off them: it may not know yet that we have, too.
	KeepPeers []string

	// Outside is what programs of user space carry. Observe and Diff leave it
	// alone: the daemon hands each part over whole.
	Outside Outside
}

// Outside is what the node needs beside its kernel. A nil part is not wanted.
type Outside struct {
	UDP       *UDP
	BGP       *BGP
	Extension *Extension
}

// Link is a network device.
type Link struct {
	Name  string
	Alias string // "twill" if the link is Twill's; empty: flannel's or a stranger's
	Up    bool
	MTU   int
	Kind  Kind
	MAC   MAC // of a VXLAN device
	VXLAN VXLAN
	IPIP  IPIP
	WG    WireGuard
}

// Kind is the type of a link, in the kernel's words.
type Kind string

// The kinds of our links. A TUN is made by the program that reads it; with WG set
// that is a user-space WireGuard, else the UDP tunnel.
const (
	KindVXLAN     Kind = "vxlan"
	KindTUN       Kind = "tun"
	KindWireGuard Kind = "wireguard"
	KindIPIP      Kind = "ipip"
)

// IPIP holds the parameters of an IPIP device (RFC 2003).
type IPIP struct {
	Local  netip.Addr
	Parent string // underlay device
}

// VXLAN holds the parameters of a VXLAN device (ip-link(8), RFC 7348).
type VXLAN struct {
	VNI      uint32
	Port     uint16     // UDP destination port
	Local    netip.Addr // outer source address
	Parent   string     // underlay device
	GBP      bool       // group policy extension
	Learning bool
}

// Addr is an address on one of our links.
type Addr struct {
	Link   string
	Prefix netip.Prefix // the address itself, not masked
}

// Nexthop is a nexthop object (ip-nexthop(8)): one per peer and family, so that
// the kernel need not search all gateways of a device for each route. It leads to
// Gateway on Link, or into Link as it is, or to one of a Group of others, chosen
// by a hash of the flow.
type Nexthop struct {
	ID      uint32
	Gateway netip.Addr
	Link    string
	OnLink  bool
	Family  Family // of one that is a Link alone; else 0
	Group   string // ids in ascending order: "1442840577/1442840578"
}

// Route is a route of the main table. It leads to a nexthop object (NH), or to
// Gateway on Link, or nowhere (Blackhole).
type Route struct {
	Dst       netip.Prefix
	Metric    uint32 // IPv6 routes: 1024 unless said otherwise
	NH        uint32
	Gateway   netip.Addr
	Link      string
	OnLink    bool
	Blackhole bool
	Protocol  uint8
}

// Neigh is a permanent ARP or NDP entry on one of our links.
type Neigh struct {
	Link string
	IP   netip.Addr
	MAC  MAC
}

// FDB is a permanent VXLAN forwarding entry: frames for MAC go to Dst.
type FDB struct {
	Link string
	MAC  MAC
	Dst  netip.Addr
}

// Sysctl is a file below /proc/sys, its name written with slashes. If When is set,
// the value is only written over that old value.
type Sysctl struct {
	Key, Value, When string
}

func (s Sysctl) satisfiedBy(value string) bool {
	return value == s.Value || s.When != "" && value != s.When
}

// Tool names the kernel interface that holds a Chain.
type Tool string

// The two firewall interfaces. Iptables stands for ip6tables too.
const (
	Iptables Tool = "iptables"
	Nftables Tool = "nftables"
)

// Iptables as one of its flavours, where it matters which. What is wanted is never
// in these, so what is ours in the flavour that a node does not use goes.
const (
	IptablesNft    Tool = "iptables-nft"
	IptablesLegacy Tool = "iptables-legacy"
)

// Chain is a chain of firewall rules with the jump (iptables) or hook (nftables)
// that sends packets to it.
type Chain struct {
	Tool   Tool
	Family Family
	Table  string // iptables: nat, filter; nftables: twill
	Name   string
	Hook   string // POSTROUTING or FORWARD
	// Rules are in the tool's own words, without the comment that carries the
	// hash. Observe leaves them empty: a rule is known by its Hash alone.
	Rules []string
	// Hash stands for all the rules in order. Observe computes it from the
	// hashes in the rules' comments; it is empty if the jump is missing.
	Hash string
}

// Family is an IP version.
type Family uint8

// The two families.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

func (f Family) String() string { return fmt.Sprintf("IPv%d", uint8(f)) }

// FamilyOf returns the family of a.
func FamilyOf(a netip.Addr) Family {
	if a.Is4() {
		return IPv4
	}
	return IPv6
}

// Normalize sorts every slice of s by key, which Diff relies on.
func (s *State) Normalize() {
	sortUnlessSorted(s.Links, Link.compare)
	sortUnlessSorted(s.Addrs, Addr.compare)
	sortUnlessSorted(s.Nexthops, Nexthop.compare)
	sortUnlessSorted(s.Routes, Route.compare)
	sortUnlessSorted(s.Neighs, Neigh.compare)
	sortUnlessSorted(s.FDB, FDB.compare)
	sortUnlessSorted(s.Sysctls, Sysctl.compare)
	sortUnlessSorted(s.Chains, Chain.compare)
	sortUnlessSorted(s.WGPeers, WGPeer.compare)
	sortUnlessSorted(s.Foreign, Route.compare)
}

func sortUnlessSorted[T any](s []T, compare func(a, b T) int) {
	if !slices.IsSortedFunc(s, compare) {
		slices.SortFunc(s, compare)
	}
}

// The compare methods order objects by key: the part that names the object, so
// that two objects with the same key are the same thing in two conditions.

func (a Link) compare(b Link) int { return strings.Compare(a.Name, b.Name) }

func (a Addr) compare(b Addr) int {
	return cmp.Or(strings.Compare(a.Link, b.Link), a.Prefix.Addr().Compare(b.Prefix.Addr()), cmp.Compare(a.Prefix.Bits(), b.Prefix.Bits()))
}

func (a Nexthop) compare(b Nexthop) int { return cmp.Compare(a.ID, b.ID) }

func (a Route) compare(b Route) int {
	if c := a.Dst.Addr().Compare(b.Dst.Addr()); c != 0 {
		return c
	}
	return cmp.Or(cmp.Compare(a.Dst.Bits(), b.Dst.Bits()), cmp.Compare(a.Metric, b.Metric))
}

func (a Neigh) compare(b Neigh) int {
	if c := a.IP.Compare(b.IP); c != 0 {
		return c
	}
	return strings.Compare(a.Link, b.Link)
}

func (a FDB) compare(b FDB) int {
	if x, y := a.MAC.number(), b.MAC.number(); x != y { // the hot spot of Normalize
		return cmp.Compare(x, y)
	}
	return strings.Compare(a.Link, b.Link)
}

func (a Sysctl) compare(b Sysctl) int { return strings.Compare(a.Key, b.Key) }

func (a Chain) compare(b Chain) int {
	return cmp.Or(cmp.Compare(a.Tool, b.Tool), cmp.Compare(a.Family, b.Family), strings.Compare(a.Table, b.Table), strings.Compare(a.Name, b.Name))
}

// The String methods print an object as the ip(8) tool and its relatives do.

func (a Link) String() string {
	s := fmt.Sprintf("link %s mtu %d", a.Name, a.MTU)
	switch a.Kind {
	case KindTUN, KindWireGuard:
		s += " " + string(a.Kind)
	case KindIPIP:
		s += fmt.Sprintf(" ipip local %s dev %s", a.IPIP.Local, a.IPIP.Parent)
	case KindVXLAN:
		s += " address " + a.MAC.String()
	}
	if a.WG.Port != 0 {
		s += fmt.Sprintf(" listen-port %d public-key %s", a.WG.Port, a.WG.Key.Public())
	}
	if v := a.VXLAN; v.VNI != 0 {
		s += fmt.Sprintf(" vxlan id %d dev %s local %s dstport %d", v.VNI, v.Parent, v.Local, v.Port)
		if !v.Learning {
			s += " nolearning"
		}
		if v.GBP {
			s += " gbp"
		}
	}
	if a.Alias != "" {
		s += " alias " + a.Alias
	}
	if a.Up {
		return s + " up"
	}
	return s + " down"
}

func (a Addr) String() string { return fmt.Sprintf("addr %s dev %s", a.Prefix, a.Link) }

func (a Nexthop) String() string {
	switch {
	case a.Group != "":
		return fmt.Sprintf("nexthop id %d group %s", a.ID, a.Group)
	case !a.Gateway.IsValid():
		return fmt.Sprintf("nexthop id %d dev %s %s", a.ID, a.Link, a.Family)
	}
	return fmt.Sprintf("nexthop id %d via %s dev %s%s", a.ID, a.Gateway, a.Link, onlink(a.OnLink))
}

func (a Route) String() string {
	s := "route "
	if a.Blackhole {
		s += "blackhole "
	}
	s += a.Dst.String()
	switch {
	case a.NH != 0:
		s += fmt.Sprintf(" nhid %d", a.NH)
	case a.Gateway.IsValid():
		s += fmt.Sprintf(" via %s dev %s%s", a.Gateway, a.Link, onlink(a.OnLink))
	case a.Link != "":
		s += " dev " + a.Link
	}
	s += fmt.Sprintf(" proto %d", a.Protocol)
	if a.Metric != defaultMetric(a.Dst) {
		s += fmt.Sprintf(" metric %d", a.Metric)
	}
	return s
}

func onlink(on bool) string {
	if on {
		return " onlink"
	}
	return ""
}

func (a Neigh) String() string {
	return fmt.Sprintf("neigh %s lladdr %s dev %s nud permanent", a.IP, a.MAC, a.Link)
}

func (a FDB) String() string {
	return fmt.Sprintf("fdb %s dst %s dev %s self permanent", a.MAC, a.Dst, a.Link)
}

func (s Sysctl) String() string { return fmt.Sprintf("sysctl %s=%s", s.Key, s.Value) }

func (a Chain) String() string {
	return fmt.Sprintf("chain %s table %s %s %s hook %s hash %s", cmp.Or(a.Name, "(all)"), a.Table, a.Tool, a.Family, a.Hook, cmp.Or(a.Hash, "none"))
}

// defaultMetric is the priority the kernel gives a route that names none: 0 for
// IPv4, 1024 (IP6_RT_PRIO_USER) for IPv6.
func defaultMetric(dst netip.Prefix) uint32 {
	if dst.Addr().Is4() {
		return 0
	}
	return 1024
}

// HasLink reports whether s has a link of that name.
func (s *State) HasLink(name string) bool {
	return slices.ContainsFunc(s.Links, func(l Link) bool { return l.Name == name })
}
