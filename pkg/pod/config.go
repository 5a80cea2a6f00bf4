package pod

import (
	"encoding/json"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"unicode"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/twill-net/twill/pkg/ipam"
)

// Config is the network configuration the runtime hands over (CNI specification,
// section 1), checked and with its defaults filled in.
type Config struct {
	CNIVersion string
	Name       string

	HandoffFile    string
	DataDir        string // of the reservations
	Bridge         string
	DefaultGateway bool // else pods have routes to the cluster's networks only
	MTU            int  // 0: the hand-off's
	Hairpin        bool
	Promisc        bool
	Routes         []*types.Route // beside the ones Twill sets, replacing those of the same destination
	DNS            types.DNS

	PrevResult *types100.Result // nil if the runtime gave none
	Valid      []ipam.Owner     // GC: the attachments that stay
	ValidGiven bool             // GC: the runtime did say which
}

// fields are the keys of a network configuration, not yet decoded.
type fields map[string]json.RawMessage

// ParseConfig reads what the runtime writes to the plugin's standard input.
func ParseConfig(stdin []byte) (*Config, error) {
	c, f, err := parseBasics(stdin)
	if err != nil {
		return nil, err
	}
	c.HandoffFile, c.DefaultGateway, c.Hairpin = DefaultHandoff, true, true
	const yesNo = "must be true or false"
	for _, get := range []func() error{
		func() error { return f.path("handoffFile", &c.HandoffFile) },
		func() error { return decode(f, "isDefaultGateway", yesNo, &c.DefaultGateway) },
		func() error { return decode(f, "hairpinMode", yesNo, &c.Hairpin) },
		func() error { return decode(f, "promiscMode", yesNo, &c.Promisc) },
		func() error { return f.mtu(&c.MTU) },
		func() error { return f.routes(&c.Routes) },
		func() error {
			return decode(f, "dns", "must be an object of nameservers, domain, search and options", &c.DNS)
		},
		func() error { return f.prevResult(c) },
		func() error { return f.attachments(c) },
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
	c := &Config{CNIVersion: "0.1.0", DataDir: "/var/lib/cni/networks", Bridge: "cni0"}
	const text = "must be a text"
	for _, get := range []func() error{
		func() error { return decode(f, "cniVersion", text, &c.CNIVersion) },
		func() error { return decode(f, "name", text, &c.Name) },
		func() error { return f.path("dataDir", &c.DataDir) },
		func() error { return f.link("bridge", &c.Bridge) },
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
