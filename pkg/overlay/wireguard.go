package overlay

import (
	"cmp"
	"crypto/ecdh"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// WireGuard holds the parameters of a WireGuard device.
type WireGuard struct {
	Port uint16
	Key  WGKey // private
}

// WGKey is a Curve25519 key, private or public, or a preshared key.
type WGKey [32]byte

// Clamp returns a private key as Curve25519 uses it (RFC 7748, section 5), which is
// how the kernel gives it back.
func (k WGKey) Clamp() WGKey {
	k[0] &= 248
	k[31] = k[31]&127 | 64
	return k
}

// Public returns the public key of a private one.
func (k WGKey) Public() WGKey {
	private, err := ecdh.X25519().NewPrivateKey(k[:])
	if err != nil { // any 32 bytes are one
		panic(fmt.Sprintf("read WireGuard key: %v", err))
	}
	return WGKey(private.PublicKey().Bytes())
}

func (k WGKey) String() string { return base64.StdEncoding.EncodeToString(k[:]) }

// MarshalText makes a key a string in JSON.
func (k WGKey) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText is the inverse of MarshalText.
func (k *WGKey) UnmarshalText(text []byte) (err error) {
	*k, err = ParseWGKey(string(text))
	return err
}

// ParseWGKey reads a key as wg(8) writes it.
func ParseWGKey(s string) (WGKey, error) {
	b, err := base64.StdEncoding.DecodeString(s)
	if err != nil || len(b) != len(WGKey{}) {
		return WGKey{}, fmt.Errorf("is not a WireGuard key, 32 bytes in base64 as from `wg genkey`")
	}
	return WGKey(b), nil
}

// WGPeer is a peer of a WireGuard device: packets for AllowedIPs are encrypted to
// PublicKey and sent to Endpoint.
type WGPeer struct {
	Link      string
	PublicKey WGKey
	PSK       WGKey
	Endpoint  netip.AddrPort
	Keepalive time.Duration
	// AllowedIPs are prefixes in ascending order: "10.5.1.0/24,fd00:5:0:1::/64".
	AllowedIPs string
}

func (a WGPeer) compare(b WGPeer) int {
	if c := strings.Compare(a.Link, b.Link); c != 0 {
		return c
	}
	return strings.Compare(string(a.PublicKey[:]), string(b.PublicKey[:]))
}

// WGPeer finds the peer of p's device that has p's key.
func (s *State) WGPeer(p WGPeer) (WGPeer, bool) {
	i, ok := slices.BinarySearchFunc(s.WGPeers, p, WGPeer.compare)
	if !ok {
		return WGPeer{}, false
	}
	return s.WGPeers[i], true
}

// WGPeersOf returns the peers of a device.
func (s *State) WGPeersOf(link string) (peers []WGPeer) {
	for _, p := range s.WGPeers {
		if p.Link == link {
			peers = append(peers, p)
		}
	}
	return peers
}

// KeepRoamed takes a peer's endpoint as it was set where the device has learned
// another one from the peer's packets: it is the peer that roams, and nobody else's
// doing.
func (s *State) KeepRoamed(set *State) {
	for i, p := range s.WGPeers {
		if was, ok := set.WGPeer(p); ok {
			s.WGPeers[i].Endpoint = was.Endpoint
		}
	}
}

func (a WGPeer) String() string {
	s := fmt.Sprintf("wgpeer %s dev %s", a.PublicKey, a.Link)
	if a.Endpoint.IsValid() {
		s += fmt.Sprintf(" endpoint %s", a.Endpoint)
	}
	s += " allowed-ips " + cmp.Or(a.AllowedIPs, "none")
	if a.PSK != (WGKey{}) {
		s += " preshared-key (not shown)"
	}
	if a.Keepalive != 0 {
		s += fmt.Sprintf(" persistent-keepalive %.0f", a.Keepalive.Seconds())
	}
	return s
}

// WireGuardNode is what a lease says of a node's WireGuard device.
type WireGuardNode struct {
	PublicKey WGKey
	Port      uint16 // 0: the configuration's
}

type wireGuardNodeValue struct {
	PublicKey string
	Port      uint16 `json:",omitempty"`
}

func parseWireGuardNode(field, data string) (WireGuardNode, error) {
	if data == "" {
		return WireGuardNode{}, nil
	}
	var v wireGuardNodeValue
	if err := json.Unmarshal([]byte(data), &v); err != nil {
		return WireGuardNode{}, fmt.Errorf("%s: %w", field, err)
	}
	key, err := ParseWGKey(v.PublicKey)
	if err != nil {
		return WireGuardNode{}, fmt.Errorf("%s: PublicKey %q %w", field, v.PublicKey, err)
	}
	return WireGuardNode{key, v.Port}, nil
}

// The devices of backend wireguard. The second carries IPv6 in mode separate.
const (
	WireGuardLink   = "flannel-wg"
	WireGuardLinkV6 = "flannel-wg-v6"
)

// wireguard encrypts packets to peers (wireguard.com). In mode separate each
// family has its own device and goes over the underlay of that family; in the
// others one device carries both.
type wireguard struct{ WireGuardConfig }

func (w wireguard) link(f Family) (name string, port uint16) {
	if w.Mode == "separate" && f == IPv6 {
		return WireGuardLinkV6, w.ListenPortV6
	}
	return WireGuardLink, w.ListenPort
}

func (w wireguard) attrs(c Config, self Self) Attrs {
	a := public(c, self, "wireguard")
	for _, f := range c.families() {
		_, port := w.link(f)
		n := WireGuardNode{self.WGKey.Public(), port}
		b, err := json.Marshal(wireGuardNodeValue{n.PublicKey.String(), n.Port})
		if err != nil {
			panic(fmt.Sprintf("marshal WireGuard data: %v", err))
		}
		if f == IPv4 {
			a.WireGuard, a.Data = n, string(b)
		} else {
			a.WireGuardV6, a.DataV6 = n, string(b)
		}
	}
	return a
}

// wireguardOverhead is the outer IP (at most 40), UDP (8) and WireGuard (32)
// headers; flannel leaves as much.
const wireguardOverhead = 40 + 8 + 32

func (w wireguard) mtu(self Self, _ Family) int {
	return cmp.Or(w.MTU, self.Uplink.MTU) - wireguardOverhead
}

func (w wireguard) own(d *draft) {
	kind := KindWireGuard
	if d.self.WireGuardInUserSpace {
		kind = KindTUN
	}
	made := map[string]bool{}
	for _, f := range d.families {
		name, port := w.link(f)
		if !made[name] {
			made[name] = true
			if d.former {
				d.state.KeepPeers = append(d.state.KeepPeers, name)
			}
			d.state.Links = append(d.state.Links, Link{
				Name: name, Alias: Alias, Up: true, Kind: kind, MTU: d.linkMTU(name, w, f),
				WG: WireGuard{Port: port, Key: d.self.WGKey},
			})
		}
		first := d.self.Subnet(f).Addr()
		d.state.Addrs = append(d.state.Addrs, Addr{Link: name, Prefix: netip.PrefixFrom(first, first.BitLen())})
	}
}

func (w wireguard) peer(d *draft, l *Lease, f Family) error {
	node, link, port := l.WireGuard, "", uint16(0)
	if f == IPv6 {
		node = l.WireGuardV6
	}
	link, port = w.link(f)
	switch {
	case node.PublicKey == WGKey{}:
		return fmt.Errorf("it publishes no PublicKey for %s", f)
	case node.PublicKey == d.self.WGKey.Public():
		return fmt.Errorf("it publishes this node's own PublicKey; remove the key file on one of the two and restart its daemon")
	}
	if node.Port != 0 {
		port = node.Port
	}
	endpoint, err := w.endpoint(d, l, f)
	if err != nil {
		return err
	}
	d.wgPeer(WGPeer{
		Link: link, PublicKey: node.PublicKey, PSK: w.psk(), Keepalive: w.PersistentKeepalive,
		Endpoint: netip.AddrPortFrom(endpoint, port), AllowedIPs: l.Subnet(f).String(),
	})
	d.route(l.Subnet(f), netip.Addr{}, link, false)
	return nil
}

// endpoint chooses the underlay's family by the mode.
func (w wireguard) endpoint(d *draft, l *Lease, f Family) (netip.Addr, error) {
	over := f
	switch w.Mode {
	case "ipv4":
		over = IPv4
	case "ipv6":
		over = IPv6
	case "auto":
		over = IPv4
		if !l.PublicIP.IsValid() || !d.self.PublicIP.IsValid() {
			over = IPv6
		}
	}
	if !l.Public(over).IsValid() {
		return netip.Addr{}, fmt.Errorf("mode %s needs its %s address, and it publishes none", w.Mode, over)
	}
	return l.Public(over), nil
}

func (w wireguard) psk() WGKey {
	k, _ := ParseWGKey(w.PSK) // checked by ParseConfig; empty is none
	return k
}

// wgPeer adds a peer, or another subnet to one that is there.
func (d *draft) wgPeer(p WGPeer) {
	key := p.Link + " " + string(p.PublicKey[:])
	i, ok := d.wgPeers[key]
	if !ok {
		d.wgPeers[key] = len(d.state.WGPeers)
		d.state.WGPeers = append(d.state.WGPeers, p)
		return
	}
	d.state.WGPeers[i].AllowedIPs += "," + p.AllowedIPs
}
