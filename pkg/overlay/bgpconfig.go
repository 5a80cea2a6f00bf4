package overlay

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// BGPConfig holds the settings of backend bgp, which are Twill's own: flannel has
// no such backend.
type BGPConfig struct {
	ASNumber uint32 // of the nodes, 1..4294967295, default 64512 (RFC 6996: private)
	Port     uint16 // TCP port of the nodes' speakers, default 179
	// NodeMesh is a session from every node to every other, the default. If false,
	// nodes speak to the route reflectors and to Peers alone.
	NodeMesh bool
	Password string // of the sessions between nodes (RFC 2385); empty: none
	HoldTime time.Duration
	// RestartTime is for how long the others keep a speaker's routes while it is
	// away (RFC 4724).
	RestartTime time.Duration
	Communities []Community // put on the nodes' own subnets
	Peers       []BGPPeer
}

// BGPPeer is a router outside the cluster.
type BGPPeer struct {
	Address     netip.Addr
	ASNumber    uint32
	Port        uint16 // default 179
	Password    string
	Multihop    uint8        // how many hops away an external peer may be; 0 or 1: on the link
	TTLSecurity uint8        // how many hops away a peer is at most, by RFC 5082; 0: not checked
	Nodes       []netip.Addr // public addresses of the nodes that speak to it; empty: all
	Import      []BGPRule    // the first rule that matches decides; none: as without rules
	Export      []BGPRule
	Communities []Community // put on what is announced to it
}

// BGPRule accepts or rejects the routes inside Prefix with a length in
// MinLen..MaxLen. A route that an import rule accepts may overlap the underlay.
type BGPRule struct {
	Prefix         netip.Prefix
	MinLen, MaxLen int
	Accept         bool
}

// Community is a BGP community (RFC 1997), written "64512:100".
type Community uint32

func (c Community) String() string { return fmt.Sprintf("%d:%d", uint32(c)>>16, uint32(c)&0xffff) }

// MarshalText makes a Community a string in JSON.
func (c Community) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText is the inverse of MarshalText.
func (c *Community) UnmarshalText(text []byte) (err error) {
	*c, err = ParseCommunity(string(text))
	return err
}

// ParseCommunity is the inverse of Community.String.
func ParseCommunity(s string) (Community, error) {
	hi, lo, ok := strings.Cut(s, ":")
	a, err1 := strconv.ParseUint(hi, 10, 16)
	b, err2 := strconv.ParseUint(lo, 10, 16)
	if !ok || err1 != nil || err2 != nil {
		return 0, fmt.Errorf("%q is not a community like 64512:100 with two numbers 0..65535", s)
	}
	return Community(a<<16 | b), nil
}

// Matches reports whether r decides on p.
func (r BGPRule) Matches(p netip.Prefix) bool {
	return r.Prefix.Contains(p.Addr()) && p.Bits() >= r.MinLen && p.Bits() <= r.MaxLen
}

// bgp reads the settings of backend bgp.
func (k *keys) bgp() BGPConfig {
	const text = "must be a string"
	b := BGPConfig{ASNumber: 64512, Port: 179, NodeMesh: true}
	hold, restart := 90, 120
	k.number("ASNumber", &b.ASNumber, 1, 1<<32-1)
	k.port("Port", &b.Port)
	k.get("NodeMesh", &b.NodeMesh, "must be true or false")
	k.get("Password", &b.Password, text)
	k.password(b.Password)
	k.number("HoldTime", &hold, 3, 65535)
	k.number("RestartTime", &restart, 1, 4095) // 12 bits in RFC 4724
	b.HoldTime, b.RestartTime = time.Duration(hold)*time.Second, time.Duration(restart)*time.Second
	b.Communities = k.communities()
	var peers []json.RawMessage
	k.get("Peers", &peers, "must be a list of objects")
	for i, raw := range peers {
		p, err := object(fmt.Sprintf("%sPeers[%d].", k.path, i), raw)
		if err != nil {
			k.err = cmp.Or(k.err, err)
			return b
		}
		b.Peers = append(b.Peers, p.bgpPeer())
		k.err = cmp.Or(k.err, p.err)
		k.more = append(k.more, p.unknown()...)
	}
	for i, p := range b.Peers {
		for _, q := range b.Peers[:i] {
			if p.Address == q.Address {
				k.fail("Peers", p.Address.String(), "must be listed once")
			}
		}
	}
	return b
}

func (k *keys) bgpPeer() BGPPeer {
	p := BGPPeer{Port: 179}
	var address string
	k.get("Address", &address, "must be an address")
	p.Address = k.address("Address", address)
	if _, ok := k.find("ASNumber"); !ok {
		k.fail("ASNumber", json.RawMessage("(absent)"), "must be 1..4294967295")
	}
	k.number("ASNumber", &p.ASNumber, 1, 1<<32-1)
	k.port("Port", &p.Port)
	k.get("Password", &p.Password, "must be a string")
	k.password(p.Password)
	k.number("Multihop", &p.Multihop, 0, 255)
	k.number("TTLSecurity", &p.TTLSecurity, 0, 254)
	if p.Multihop > 1 && p.TTLSecurity > 0 {
		k.fail("TTLSecurity", int(p.TTLSecurity), "must not be given together with Multihop; it holds the number of hops itself")
	}
	var nodes []string
	k.get("Nodes", &nodes, "must be a list of addresses")
	for _, n := range nodes {
		p.Nodes = append(p.Nodes, k.address("Nodes", n))
	}
	p.Import, p.Export = k.bgpRules("Import", p.Address), k.bgpRules("Export", p.Address)
	p.Communities = k.communities()
	return p
}

// bgpRules reads a filter: [{"Prefix": "10.0.0.0/8", "MaxLen": 24, "Action": "accept"}].
func (k *keys) bgpRules(name string, peer netip.Addr) []BGPRule {
	var raw []json.RawMessage
	k.get(name, &raw, "must be a list of objects")
	var out []BGPRule
	for i, r := range raw {
		o, err := object(fmt.Sprintf("%s%s[%d].", k.path, name, i), r)
		if err != nil {
			k.err = cmp.Or(k.err, err)
			return nil
		}
		var prefix, action string
		o.get("Prefix", &prefix, "must be a CIDR")
		p, err := netip.ParsePrefix(prefix)
		if err != nil || p != p.Masked() || FamilyOf(p.Addr()) != FamilyOf(peer) {
			o.fail("Prefix", prefix, fmt.Sprintf("must be an %s CIDR, as the peer's address is", FamilyOf(peer)))
			p = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		rule := BGPRule{Prefix: p, MinLen: p.Bits(), MaxLen: p.Addr().BitLen()}
		o.number("MinLen", &rule.MinLen, p.Bits(), p.Addr().BitLen())
		o.number("MaxLen", &rule.MaxLen, rule.MinLen, p.Addr().BitLen())
		o.get("Action", &action, "must be accept or reject")
		rule.Accept = action == "accept"
		if action != "accept" && action != "reject" {
			o.fail("Action", action, "must be accept or reject")
		}
		k.err = cmp.Or(k.err, o.err)
		k.more = append(k.more, o.unknown()...)
		out = append(out, rule)
	}
	return out
}

func (k *keys) communities() []Community {
	var raw []string
	k.get("Communities", &raw, "must be a list of strings like \"64512:100\"")
	var out []Community
	for _, s := range raw {
		c, err := ParseCommunity(s)
		if err != nil {
			k.fail("Communities", s, "must be like 64512:100, two numbers 0..65535")
		}
		out = append(out, c)
	}
	return out
}

// password refuses what TCP's MD5 option cannot take (TCP_MD5SIG_MAXKEYLEN).
func (k *keys) password(s string) {
	if len(s) > 80 {
		k.fail("Password", shown("Password", nil), "must have at most 80 characters")
	}
}

func (k *keys) address(name, value string) netip.Addr {
	a, err := netip.ParseAddr(value)
	if err != nil || !a.IsGlobalUnicast() || a.Zone() != "" || a.Is4In6() {
		k.fail(name, value, "must be an address of a router or node")
	}
	return a
}
