package overlay

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Config is flannel's network configuration, validated: the JSON under
// <prefix>/config in etcd, or net-conf.json. The zero value of a Pool is a family
// that is off.
type Config struct {
	V4, V6         Pool
	EnableNFTables bool
	Backend        BackendConfig
}

// Pool returns the pool of a family.
func (c Config) Pool(f Family) Pool {
	if f == IPv4 {
		return c.V4
	}
	return c.V6
}

// Underlay reports whether outer packets of a family are sent.
func (c Config) Underlay(f Family) bool {
	if c.Backend.Type == "wireguard" {
		switch c.Backend.WireGuard.Mode {
		case "ipv4":
			return f == IPv4
		case "ipv6":
			return f == IPv6
		}
	}
	return c.Pool(f).Enabled()
}

// Networks returns the cluster's pod networks, IPv4 first.
func (c Config) Networks() []netip.Prefix {
	return Subnets{V4: c.V4.Network, V6: c.V6.Network}.All()
}

// Tool is the firewall interface the configuration asks for.
func (c Config) Tool() Tool {
	if c.EnableNFTables {
		return Nftables
	}
	return Iptables
}

// Equal reports whether the two say the same.
func (c Config) Equal(o Config) bool { return reflect.DeepEqual(c, o) }

// Check says why a node may not hold n under this configuration, or nil.
func (c Config) Check(n Subnets) error {
	if err := c.V4.Check(n.V4); err != nil {
		return err
	}
	return c.V6.Check(n.V6)
}

// BackendConfig is the Backend object: Type, and the settings of that type. Those
// of the other types have no meaning.
type BackendConfig struct {
	Type      string
	VXLAN     VXLANConfig
	UDPPort   uint16 // udp
	WireGuard WireGuardConfig
	IPIP      IPIPConfig
	IPsec     IPsecConfig
	Extension ExtensionConfig
	Tencent   TencentConfig
	BGP       BGPConfig
}

// VXLANConfig holds the settings of backend vxlan.
type VXLANConfig struct {
	VNI  uint32 // 1..16777215, default 1
	Port uint16 // UDP port; the stored 0 is the kernel's default, 8472
	MTU  int    // of the underlay, bytes; 0: the uplink's own
	// GBP sends the packet's security group along. Learning lets the kernel
	// learn FDB entries from traffic. DirectRouting sends to peers on the same
	// link without encapsulation.
	GBP, Learning, DirectRouting bool
}

// WireGuardConfig holds the settings of backend wireguard.
type WireGuardConfig struct {
	ListenPort, ListenPortV6 uint16 // default 51820, 51821
	MTU                      int
	PSK                      string
	PersistentKeepalive      time.Duration
	Mode                     string // separate, auto, ipv4, ipv6
}

// IPIPConfig holds the settings of backend ipip.
type IPIPConfig struct{ DirectRouting bool }

// IPsecConfig holds the settings of backend ipsec.
type IPsecConfig struct {
	UDPEncap    bool
	ESPProposal string
	PSK         string
}

// ExtensionConfig holds the commands of backend extension.
type ExtensionConfig struct {
	PreStartup, PostStartup, SubnetAdd, SubnetRemove string
}

// TencentConfig holds the settings of backend tencent-vpc.
type TencentConfig struct{ AccessKeyID, AccessKeySecret string }

// DefaultVXLANPort is where the kernel's VXLAN driver sends by default; flannel
// leaves it so unless Port is given. (IANA's port is 4789.)
const DefaultVXLANPort = 8472

// ParseConfig reads flannel's network configuration. Keys match without regard to
// case, as in flannel. Warnings name the keys nobody knows. An error names the
// key, its value and the rule it breaks.
func ParseConfig(data []byte) (c Config, warnings []string, err error) {
	top, err := object("", data)
	if err != nil {
		return Config{}, nil, err
	}
	v4, v6 := true, false
	top.get("EnableIPv4", &v4, "must be true or false")
	top.get("EnableIPv6", &v6, "must be true or false")
	top.get("EnableNFTables", &c.EnableNFTables, "must be true or false")
	c.V4 = top.pool(IPv4, v4, poolRules{"", 28, 30, 24})
	c.V6 = top.pool(IPv6, v6, poolRules{"IPv6", 124, 126, 64})
	if top.err == nil && !v4 && !v6 {
		top.err = fmt.Errorf("EnableIPv4 and EnableIPv6 are both false: one must be true")
	}
	raw := json.RawMessage(`{"Type":"udp"}`) // flannel's default in code
	top.get("Backend", &raw, "must be an object like {\"Type\": \"vxlan\"}")
	if top.err != nil {
		return Config{}, nil, top.err
	}
	backend, err := object("Backend.", raw)
	if err != nil {
		return Config{}, nil, err
	}
	c.Backend = backend.backend()
	if backend.err != nil {
		return Config{}, nil, backend.err
	}
	if err := c.checkMTU(); err != nil {
		return Config{}, nil, err
	}
	return c, append(top.unknown(), backend.unknown()...), nil
}

func (c Config) checkMTU() error {
	least, m := 0, c.Backend.VXLAN.MTU
	for _, f := range c.families() {
		overhead := vxlanOverhead(f)
		if c.Backend.Type == "wireguard" {
			overhead, m = wireguardOverhead, c.Backend.WireGuard.MTU
		}
		least = max(least, leastMTU(f)+overhead)
	}
	if m != 0 && m < least {
		return fmt.Errorf("Backend.MTU: %d: must be 0 or at least %d, or pods' packets do not fit", m, least)
	}
	return nil
}

type poolRules struct {
	prefix                 string // of the keys
	longest, longestSubnet int
	defaultSubnet          int
}

// pool reads Network, SubnetLen, SubnetMin and SubnetMax of one family.
func (k *keys) pool(f Family, enabled bool, r poolRules) Pool {
	var network, lo, hi string
	var length int
	name := func(s string) string { return r.prefix + s }
	k.get(name("Network"), &network, "must be a CIDR")
	k.get(name("SubnetLen"), &length, "must be a whole number")
	k.get(name("SubnetMin"), &lo, "must be an address")
	k.get(name("SubnetMax"), &hi, "must be an address")
	if !enabled || k.err != nil {
		return Pool{}
	}
	net, err := netip.ParsePrefix(network)
	if err != nil || FamilyOf(net.Addr()) != f || net.Addr().Is4In6() {
		return k.fail(name("Network"), network, fmt.Sprintf("must be an %s CIDR, since Enable%s is true", f, f))
	}
	net = net.Masked()
	if net.Bits() > r.longest || net.Bits() == 0 {
		return k.fail(name("Network"), network, fmt.Sprintf("prefix length must be 1..%d", r.longest))
	}
	if length == 0 {
		length = r.defaultSubnet
		if net.Bits() > r.defaultSubnet-2 {
			length = net.Bits() + 2
		}
	}
	if length < net.Bits()+2 || length > r.longestSubnet {
		return k.fail(name("SubnetLen"), length, fmt.Sprintf("must be %d..%d for network %s", net.Bits()+2, r.longestSubnet, net))
	}
	p := Pool{Network: net, SubnetLen: length}
	p.Min = k.bound(name("SubnetMin"), lo, p, nthSubnet(net, length, 1).Addr())
	last := netip.PrefixFrom(lastAddr(net), length).Masked().Addr()
	p.Max = k.bound(name("SubnetMax"), hi, p, last)
	if k.err == nil && p.Max.Less(p.Min) {
		return k.fail(name("SubnetMax"), p.Max, fmt.Sprintf("must not be below %s %s", name("SubnetMin"), p.Min))
	}
	return p
}

// bound reads SubnetMin or SubnetMax.
func (k *keys) bound(name, value string, p Pool, unset netip.Addr) netip.Addr {
	if value == "" || k.err != nil {
		return unset
	}
	a, err := netip.ParseAddr(value)
	switch {
	case err != nil:
		k.fail(name, value, "must be an address")
	case !p.Network.Contains(a):
		k.fail(name, value, fmt.Sprintf("must lie in network %s", p.Network))
	case netip.PrefixFrom(a, p.SubnetLen).Masked().Addr() != a:
		k.fail(name, value, fmt.Sprintf("must be the first address of a /%d subnet, as %s is", p.SubnetLen, netip.PrefixFrom(a, p.SubnetLen).Masked().Addr()))
	}
	return a
}

// backend reads the Backend object.
func (k *keys) backend() BackendConfig {
	const (
		boolean = "must be true or false"
		text    = "must be a string"
		port    = "must be 0..65535"
	)
	b := BackendConfig{
		UDPPort:   8285,
		VXLAN:     VXLANConfig{VNI: 1},
		WireGuard: WireGuardConfig{ListenPort: 51820, ListenPortV6: 51821, Mode: "separate"},
		IPsec:     IPsecConfig{ESPProposal: "aes128gcm16-sha256-prfsha256-ecp256"},
	}
	k.get("Type", &b.Type, text)
	b.Type = strings.ToLower(b.Type)
	switch b.Type {
	case "vxlan":
		v := &b.VXLAN
		k.number("VNI", &v.VNI, 1, 1<<24-1)
		k.get("Port", &v.Port, port)
		k.number("MTU", &v.MTU, 0, math.MaxUint16)
		k.get("GBP", &v.GBP, boolean)
		k.get("Learning", &v.Learning, boolean)
		k.get("DirectRouting", &v.DirectRouting, boolean)
		k.accept("MacPrefix", "Name") // Windows
		if v.Port == 0 {
			v.Port = DefaultVXLANPort
		}
	case "udp":
		k.port("Port", &b.UDPPort)
	case "wireguard":
		w := &b.WireGuard
		var seconds uint16
		k.port("ListenPort", &w.ListenPort)
		k.port("ListenPortV6", &w.ListenPortV6)
		k.number("MTU", &w.MTU, 0, math.MaxUint16)
		k.get("PSK", &w.PSK, text)
		k.get("PersistentKeepaliveInterval", &seconds, "must be 0..65535 seconds")
		w.PersistentKeepalive = time.Duration(seconds) * time.Second
		k.get("Mode", &w.Mode, text)
		if !slices.Contains([]string{"separate", "auto", "ipv4", "ipv6"}, w.Mode) {
			k.fail("Mode", w.Mode, "must be separate, auto, ipv4 or ipv6")
		}
		if _, err := ParseWGKey(w.PSK); w.PSK != "" && err != nil {
			k.fail("PSK", shown("PSK", nil), "must be 32 bytes in base64, as from `wg genpsk`")
		}
	case "ipip":
		k.get("DirectRouting", &b.IPIP.DirectRouting, boolean)
	case "ipsec":
		s := &b.IPsec
		k.get("UDPEncap", &s.UDPEncap, boolean)
		k.get("ESPProposal", &s.ESPProposal, text)
		k.get("PSK", &s.PSK, text)
		if len(s.PSK) < 96 {
			k.fail("PSK", shown("PSK", nil), "must have at least 96 characters")
		}
	case "extension":
		e := &b.Extension
		k.get("PreStartupCommand", &e.PreStartup, text)
		k.get("PostStartupCommand", &e.PostStartup, text)
		k.get("SubnetAddCommand", &e.SubnetAdd, text)
		k.get("SubnetRemoveCommand", &e.SubnetRemove, text)
	case "tencent-vpc":
		k.get("AccessKeyID", &b.Tencent.AccessKeyID, text)
		k.get("AccessKeySecret", &b.Tencent.AccessKeySecret, text)
	case "bgp":
		b.BGP = k.bgp()
	case "host-gw", "alloc":
	default:
		k.fail("Type", b.Type, "must be one of vxlan, host-gw, udp, bgp, wireguard, ipip, ipsec, extension, alloc, tencent-vpc")
	}
	return b
}

// keys reads a JSON object key by key. The first error stays; later calls do
// nothing.
type keys struct {
	path string // of the object: "Backend."
	raw  map[string]json.RawMessage
	err  error
	more []string // unknown keys of objects inside this one
}

func object(path string, data []byte) (*keys, error) {
	k := &keys{path: path}
	err := json.Unmarshal(data, &k.raw)
	if err == nil && k.raw != nil {
		return k, nil
	}
	what := cmp.Or(strings.TrimSuffix(path, "."), "network configuration")
	var syntax *json.SyntaxError
	if errors.As(err, &syntax) {
		return nil, fmt.Errorf("%s is not JSON: %w", what, err)
	}
	return nil, fmt.Errorf("%s: %.40s: must be a JSON object {…}", what, data)
}

// get reads the key into a variable, which keeps its value if the key is absent.
// Two spellings of one key would leave it to chance which one counts.
func (k *keys) get(name string, into any, rule string) {
	raw, ok := k.find(name)
	if !ok {
		return
	}
	maps.DeleteFunc(k.raw, func(key string, _ json.RawMessage) bool { return strings.EqualFold(key, name) })
	if k.err == nil && json.Unmarshal(raw, into) != nil {
		k.fail(name, shown(name, raw), rule)
	}
}

// find returns the value of a key as it is written.
func (k *keys) find(name string) (json.RawMessage, bool) {
	var found []string
	for key := range k.raw {
		if strings.EqualFold(key, name) {
			found = append(found, key)
		}
	}
	switch len(found) {
	case 0:
		return nil, false
	case 1:
		return k.raw[found[0]], true
	}
	slices.Sort(found)
	k.fail(name, json.RawMessage(strings.Join(found, ", ")), "must be given once, in one spelling")
	return nil, true
}

// port reads a TCP or UDP port to listen on.
func (k *keys) port(name string, into *uint16) {
	k.get(name, into, "must be 1..65535")
	if *into == 0 {
		k.fail(name, 0, "must be 1..65535")
	}
}

// shown is a value as an error may print it: not a secret.
func shown(name string, raw json.RawMessage) json.RawMessage {
	if name == "PSK" || name == "Password" || strings.HasPrefix(name, "AccessKey") {
		return json.RawMessage("(not shown)")
	}
	return raw
}

// number reads a whole number within bounds.
func (k *keys) number(name string, into any, lo, hi int) {
	var n *int
	rule := fmt.Sprintf("must be %d..%d", lo, hi)
	k.get(name, &n, rule)
	if n == nil || k.err != nil {
		return
	}
	if *n < lo || *n > hi {
		k.fail(name, *n, rule)
		return
	}
	switch v := into.(type) {
	case *int:
		*v = *n
	case *uint32:
		*v = uint32(*n)
	case *uint8:
		*v = uint8(*n)
	}
}

// accept takes keys that are known and have no meaning here.
func (k *keys) accept(names ...string) {
	for _, n := range names {
		var ignored json.RawMessage
		k.get(n, &ignored, "")
	}
}

func (k *keys) fail(name string, value any, rule string) Pool {
	switch v := value.(type) {
	case string:
		value = strconv.Quote(v)
	case json.RawMessage:
		value = string(v)
	}
	if k.err == nil {
		k.err = fmt.Errorf("%s%s: %v: %s", k.path, name, value, rule)
	}
	return Pool{}
}

// unknown names the keys nobody asked for.
func (k *keys) unknown() []string {
	out := k.more
	for _, key := range slices.Sorted(maps.Keys(k.raw)) {
		out = append(out, fmt.Sprintf("unknown key %s%s is ignored", k.path, key))
	}
	return out
}
