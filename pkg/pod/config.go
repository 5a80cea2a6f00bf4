package pod

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/twill-net/twill/pkg/ipam"
	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/portmap"
)

// Config is the network configuration the runtime hands over (CNI specification,
// section 1), checked and with its defaults filled in.
type Config struct {
	CNIVersion string
	Name       string

	HandoffFile    string
	DataDir        string // of the reservations
	Mode           Mode
	Bridge         string
	DefaultGateway bool // else pods have routes to the cluster's networks only
	MTU            int  // 0: the hand-off's
	Hairpin        bool
	Isolated       bool           // pods of the bridge cannot talk to each other past the host
	Promisc        bool           // of the bridge
	PodPromisc     bool           // of the pod's link
	IPMasq         bool           // masquerade what this pod sends out of the cluster
	Routes         []*types.Route // beside the ones Twill sets, replacing those of the same destination
	DNS            types.DNS
	Firewall       overlay.Tool // for host ports and IPMasq; empty: the hand-off's
	Sysctls        []sysctl     // in the pod
	IPAM           IPAM

	// Of the single pod.
	MAC       net.HardwareAddr // nil: as the kernel chooses
	Wanted    []netip.Addr
	Ports     []portmap.Mapping
	Bandwidth *Bandwidth

	legacy *legacy // nil: the configuration is Twill's own

	PrevResult *types100.Result // nil if the runtime gave none
	Valid      []ipam.Owner     // GC: the attachments that stay
	ValidGiven bool             // GC: the runtime did say which
}

// Mode is how a pod is wired.
type Mode string

const (
	Bridged Mode = "bridged" // a port of the node's bridge
	Routed  Mode = "routed"  // a link of its own, without a bridge
)

// IPAM is how addresses are chosen.
type IPAM struct {
	Ranges   [][]ipam.Range // nil: the node's subnets whole
	Exclude  []netip.Prefix
	Sticky   bool
	CoolDown time.Duration
}

// DefaultDataDir is host-local's.
const DefaultDataDir = "/var/lib/cni/networks"

// fields are the keys of a network configuration, not yet decoded.
type fields map[string]json.RawMessage

// ParseConfig reads what the runtime writes to the plugin's standard input.
func ParseConfig(stdin []byte) (*Config, error) {
	c, f, err := parseBasics(stdin)
	if err != nil {
		return nil, err
	}
	c.DefaultGateway, c.Hairpin = true, true
	const yesNo = "must be true or false"
	for _, get := range []func() error{
		func() error { return decode(f, "isDefaultGateway", yesNo, &c.DefaultGateway) },
		func() error { return decode(f, "hairpinMode", yesNo, &c.Hairpin) },
		func() error { return decode(f, "portIsolation", yesNo, &c.Isolated) },
		func() error { return decode(f, "promiscMode", yesNo, &c.Promisc) },
		func() error { return decode(f, "promisc", yesNo, &c.PodPromisc) },
		func() error { return decode(f, "ipMasq", yesNo, &c.IPMasq) },
		func() error { return f.mode(&c.Mode) },
		func() error { return f.mtu(&c.MTU) },
		func() error { return f.sysctls(&c.Sysctls) },
		func() error { return f.ipam(c) },
		func() error { return f.routes(&c.Routes) },
		func() error {
			return decode(f, "dns", "must be an object of nameservers, domain, search and options", &c.DNS)
		},
		func() error { return f.prevResult(c) },
		func() error { return f.attachments(c) },
		func() error { return f.runtimeConfig(c) },
	} {
		if err := get(); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// parseBasics reads the keys that DEL needs, and no other: a pod must be removable
// with the very configuration that ADD refused.
func parseBasics(stdin []byte) (*Config, fields, error) {
	var f fields
	if err := json.Unmarshal(stdin, &f); err != nil {
		return nil, nil, fail(types.ErrDecodingFailure, "decode network configuration: %v", err)
	}
	// No version stands for the first one (CNI specification 0.2.0).
	c := &Config{CNIVersion: "0.1.0", HandoffFile: DefaultHandoff, DataDir: DefaultDataDir, Bridge: overlay.Bridge, Mode: Bridged}
	const text = "must be a text"
	for _, get := range []func() error{
		func() error { return decode(f, "cniVersion", text, &c.CNIVersion) },
		func() error { return decode(f, "name", text, &c.Name) },
		func() error { return f.path("handoffFile", &c.HandoffFile) },
		func() error { return f.dataDir(c) },
		func() error { return f.link("bridge", &c.Bridge) },
		func() error { return f.firewall(&c.Firewall) },
	} {
		if err := get(); err != nil {
			return nil, nil, err
		}
	}
	if c.Name == "" || c.Name == "." || c.Name == ".." || strings.ContainsRune(c.Name, '/') {
		return nil, nil, badValue("name", f["name"], "must name the network, and can be a file's name")
	}
	return c, f, nil
}

// badValue is the error for a key with a wrong value.
func badValue(key string, value json.RawMessage, rule string) error {
	const long = 200
	shown := string(value)
	if shown == "" {
		shown = "(absent)"
	}
	if len(shown) > long {
		shown = shown[:long] + "..."
	}
	return fail(types.ErrInvalidNetworkConfig, "network configuration: %s: %s: %s", key, shown, rule)
}

// decode stores the value of key in dst. A key that is absent or null leaves the
// default there.
func decode[T any](f fields, key, rule string, dst *T) error {
	raw, ok := f[key]
	if !ok || string(raw) == "null" {
		return nil
	}
	if json.Unmarshal(raw, dst) != nil {
		return badValue(key, raw, rule)
	}
	return nil
}

func (f fields) path(key string, dst *string) error {
	const rule = "must be an absolute path"
	if err := decode(f, key, rule, dst); err != nil {
		return err
	}
	if !filepath.IsAbs(*dst) {
		return badValue(key, f[key], rule)
	}
	return nil
}

// dataDir is where host-local's configuration has it, or beside the other keys.
func (f fields) dataDir(c *Config) error {
	in, err := f.within("ipam")
	if err == nil {
		err = in.path("dataDir", &c.DataDir)
	}
	if err != nil {
		return err
	}
	return f.path("dataDir", &c.DataDir)
}

// within returns the keys of an object; none if it is absent.
func (f fields) within(key string) (fields, error) {
	in := fields{}
	err := decode(f, key, "must be an object", &in)
	return in, err
}

func (f fields) mode(dst *Mode) error {
	const rule = `must be "bridged" or "routed"`
	err := decode(f, "mode", rule, dst)
	if err == nil && *dst != Bridged && *dst != Routed {
		err = badValue("mode", f["mode"], rule)
	}
	return err
}

func (f fields) firewall(dst *overlay.Tool) error {
	const rule = `must be "iptables" or "nftables"; without it the pods' host ports are where twilld has its rules`
	err := decode(f, "firewall", rule, dst)
	if err == nil && *dst != "" && *dst != overlay.Iptables && *dst != overlay.Nftables {
		err = badValue("firewall", f["firewall"], rule)
	}
	return err
}

// sysctls are those of the pod's network namespace, as the tuning plugin's. IFNAME
// stands for the pod's interface.
func (f fields) sysctls(dst *[]sysctl) error {
	const rule = `must be an object like {"net.core.somaxconn": "4096"}, of keys below net. alone`
	list := map[string]string{}
	if err := decode(f, "sysctl", rule, &list); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(list)) {
		// With slashes an interface's name may hold dots.
		path := name
		if !strings.Contains(name, "/") {
			path = strings.ReplaceAll(name, ".", "/")
		}
		key, ok := strings.CutPrefix(path, "net/")
		if !ok || !filepath.IsLocal(key) || filepath.Clean(key) != key {
			return badValue("sysctl", f["sysctl"], name+": "+rule)
		}
		*dst = append(*dst, sysctl{key, list[name]})
	}
	return nil
}

func (f fields) link(key string, dst *string) error {
	const rule = "must be a link's name: 1 to 15 characters, no blank, / or :"
	if err := decode(f, key, rule, dst); err != nil {
		return err
	}
	bad := func(r rune) bool { return r == '/' || r == ':' || unicode.IsSpace(r) || !unicode.IsPrint(r) }
	if n := *dst; n == "" || len(n) > 15 || n == "." || n == ".." || strings.ContainsFunc(n, bad) {
		return badValue(key, f[key], rule)
	}
	return nil
}

func (f fields) mtu(dst *int) error {
	rule := fmt.Sprintf("must be a whole number from 68 to %d, or 0 for the overlay's", maxMTU)
	if err := decode(f, "mtu", rule, dst); err != nil {
		return err
	}
	if *dst != 0 && (*dst < 68 || *dst > maxMTU) {
		return badValue("mtu", f["mtu"], rule)
	}
	return nil
}

func (f fields) routes(dst *[]*types.Route) error {
	const rule = "must be a list of {dst, gw, mtu, advmss, priority, table, scope}, gw of dst's family"
	if err := decode(f, "routes", rule, dst); err != nil {
		return err
	}
	for _, r := range *dst {
		if r == nil || r.Dst.IP == nil || r.GW != nil && isV4(r.GW) != isV4(r.Dst.IP) {
			return badValue("routes", f["routes"], rule)
		}
		if !r.Dst.IP.Equal(r.Dst.IP.Mask(r.Dst.Mask)) {
			return badValue("routes", f["routes"], r.Dst.String()+" has bits beyond its length")
		}
		if r.MTU < 0 || r.AdvMSS < 0 || r.Priority < 0 || r.Table != nil && *r.Table < 0 || r.Scope != nil && (*r.Scope < 0 || *r.Scope > 255) {
			return badValue("routes", f["routes"], "numbers must not be negative, scope at most 255")
		}
	}
	return nil
}

func isV4(ip net.IP) bool { return ip.To4() != nil }

// prevResult reads the result of ADD that CHECK and DEL are given back.
func (f fields) prevResult(c *Config) error {
	raw, ok := f["prevResult"]
	if !ok || string(raw) == "null" {
		return nil
	}
	rule := "must be the result of ADD in version " + c.CNIVersion
	m := fields{}
	if json.Unmarshal(raw, &m) != nil || m.holdsNull("interfaces", "ips", "routes") {
		return badValue("prevResult", raw, rule)
	}
	// A result before 1.0.0 need not say its version: it is the configuration's.
	full := raw
	if _, ok := m["cniVersion"]; !ok {
		m["cniVersion"], _ = json.Marshal(c.CNIVersion)
		full, _ = json.Marshal(m)
	}
	res, err := version.NewResult(c.CNIVersion, full)
	if err == nil {
		c.PrevResult, err = types100.NewResultFromResult(res)
	}
	if err != nil {
		return badValue("prevResult", raw, rule+": "+err.Error())
	}
	for _, ip := range c.PrevResult.IPs {
		if ip.Address.IP == nil {
			return badValue("prevResult", raw, rule+": an address is missing")
		}
	}
	return nil
}

// holdsNull reports whether one of the lists has a null for an entry, for which
// the library has no check.
func (f fields) holdsNull(keys ...string) bool {
	for _, key := range keys {
		var list []json.RawMessage
		if json.Unmarshal(f[key], &list) == nil && slices.ContainsFunc(list, func(e json.RawMessage) bool { return string(e) == "null" }) {
			return true
		}
	}
	return false
}

func (f fields) attachments(c *Config) error {
	const key, rule = "cni.dev/valid-attachments", "must be a list of {containerID, ifname}"
	var list []types.GCAttachment
	if err := decode(f, key, rule, &list); err != nil {
		return err
	}
	_, c.ValidGiven = f[key]
	for _, a := range list {
		if a.ContainerID == "" || a.IfName == "" {
			return badValue(key, f[key], rule)
		}
		c.Valid = append(c.Valid, ipam.Owner{ContainerID: a.ContainerID, IfName: a.IfName})
	}
	return nil
}
