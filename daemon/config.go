// Package daemon is twilld: it puts store, overlay and kernel together and keeps
// the node's network as the leases say.
package daemon

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/speaker/router"
	"github.com/twill-net/twill/pkg/store"
)

// Config is what the flags and environment say, validated.
type Config struct {
	// The leases are in the Kubernetes API, at Kube, or in etcd.
	Kubernetes bool
	Kube       store.KubeConfig
	Etcd       store.EtcdConfig

	Uplink     overlay.UplinkRules // without the families, which the network configuration sets
	PublicIP   netip.Addr          // override; zero: the uplink's
	PublicIPv6 netip.Addr

	BGP    overlay.BGPOptions
	Router router.Options // of an external router; Kind is empty if twilld speaks BGP itself

	WireGuardKey string // file with the node's private key

	SubnetFile string // subnet.env
	Socket     string // local API
	CNIDataDir string // reservations and records of this node's pods
	HealthAddr string // host:port; empty: off

	IPMasq       bool
	RandomFully  bool
	ForwardRules bool
	Blackhole    bool

	RenewMargin time.Duration // renew at the latest this long before the lease ends
	Resync      time.Duration // between two checks that no event asked for
	LogLevel    slog.Level
	LogJSON     bool

	Cleanup  bool // remove what is ours and exit
	HandBack bool // remove what is in flannel's way and exit
	Version  bool // print the version and exit
}

// HandoffFile is where the CNI plugin reads what it needs: beside subnet.env.
func (c Config) HandoffFile() string {
	return filepath.Join(filepath.Dir(c.SubnetFile), "twill.json")
}

// leaseTTL is flannel's: a node that is gone for a day loses its subnet.
const leaseTTL = 24 * time.Hour

// ErrHelp is returned by ParseConfig when help was asked for and printed.
var ErrHelp = flag.ErrHelp

// ParseConfig reads flannel's flags, with one dash or two, and Twill's own. Each
// may also stand in the environment as FLANNELD_ and its name in upper case with
// underscores; the command line wins.
func ParseConfig(args []string, getenv func(string) string, stderr io.Writer) (Config, error) {
	f := newFlags()
	switch err := f.set.Parse(args); {
	case errors.Is(err, ErrHelp):
		f.usage(stderr)
		return Config{}, ErrHelp
	case err != nil:
		return Config{}, fmt.Errorf("%w; see twilld --help", err)
	}
	if f.set.NArg() > 0 {
		return Config{}, fmt.Errorf("argument %q is not a flag; see twilld --help", f.set.Arg(0))
	}
	if err := f.fromEnv(getenv); err != nil {
		return Config{}, err
	}
	if file := getenv("WIREGUARD_KEY_FILE"); file != "" { // flannel's name of it
		f.c.WireGuardKey = file
	}
	f.c.Kube.NodeName = getenv("NODE_NAME")
	f.c.Kube.PodName, f.c.Kube.PodNamespace = getenv("POD_NAME"), getenv("POD_NAMESPACE")
	return f.config()
}

// fromEnv sets the flags the command line did not.
func (f *flags) fromEnv(getenv func(string) string) error {
	given := map[string]bool{}
	f.set.Visit(func(fl *flag.Flag) { given[fl.Name] = true })
	var errs []error
	f.set.VisitAll(func(fl *flag.Flag) {
		name := "FLANNELD_" + strings.ToUpper(strings.ReplaceAll(fl.Name, "-", "_"))
		value := getenv(name)
		if given[fl.Name] || value == "" {
			return
		}
		if err := f.set.Set(fl.Name, value); err != nil {
			errs = append(errs, fmt.Errorf("environment %s=%q: %w", name, value, err))
		}
	})
	return errors.Join(errs...)
}

// badFlags collects what is wrong with flag values.
type badFlags []error

func (b *badFlags) add(name string, value any, rule string) {
	*b = append(*b, fmt.Errorf("--%s: %v: %s", name, value, rule))
}

// node reads an address that peers send to, or nothing.
func (b *badFlags) node(name, value string, f overlay.Family) netip.Addr {
	if value == "" {
		return netip.Addr{}
	}
	a, err := netip.ParseAddr(value)
	usable := a.IsGlobalUnicast() || a.Is4() && a.IsLinkLocalUnicast()
	if err != nil || !usable || overlay.FamilyOf(a) != f || a.Is4In6() || a.Zone() != "" {
		b.add(name, value, fmt.Sprintf("must be an %s address that other nodes reach", f))
	}
	return a
}

// uplink validates the flags that choose the uplink.
func (f *flags) uplink(bad *badFlags) overlay.UplinkRules {
	r := overlay.UplinkRules{Names: f.iface, Patterns: f.ifaceRegex, Skip: append(overlay.DefaultSkip(), f.ifaceSkip...)}
	for _, p := range r.Patterns {
		if _, err := regexp.Compile(p); err != nil {
			bad.add("iface-regex", p, err.Error())
		}
	}
	for _, p := range r.Skip {
		if _, err := path.Match(p, ""); err != nil {
			bad.add("iface-skip", p, "must be a shell pattern like eth*")
		}
	}
	if f.canReach != "" {
		var err error
		if r.CanReach, err = netip.ParseAddr(f.canReach); err != nil {
			bad.add("iface-can-reach", f.canReach, "must be an address")
		}
	}
	return r
}

// config validates the flags.
func (f *flags) config() (Config, error) {
	c := f.c
	var bad badFlags
	c.Etcd.Endpoints = strings.Split(f.endpoints, ",")
	c.Etcd.TTL = leaseTTL
	c.Uplink = f.uplink(&bad)
	c.PublicIP = bad.node("public-ip", f.publicIP, overlay.IPv4)
	c.PublicIPv6 = bad.node("public-ipv6", f.publicIPv6, overlay.IPv6)
	if f.renewMargin < 1 || f.renewMargin > 1439 {
		bad.add("subnet-lease-renew-margin", f.renewMargin, "must be 1..1439 minutes")
	}
	c.RenewMargin = time.Duration(f.renewMargin) * time.Minute
	if f.healthPort < 0 || f.healthPort > 65535 {
		bad.add("healthz-port", f.healthPort, "must be 0..65535")
	}
	ip, err := netip.ParseAddr(f.healthIP)
	if err != nil {
		bad.add("healthz-ip", f.healthIP, "must be an address")
	}
	if f.healthPort > 0 && err == nil {
		c.HealthAddr = netip.AddrPortFrom(ip, uint16(f.healthPort)).String()
	}
	if f.resync < 1 {
		bad.add("iptables-resync", f.resync, "must be at least 1 second")
	}
	c.Resync = max(time.Duration(f.resync)*time.Second, minResync)
	if err := c.LogLevel.UnmarshalText([]byte(f.logLevel)); err != nil {
		bad.add("log-level", f.logLevel, "must be debug, info, warn or error")
	}
	if f.verbosity > 0 {
		c.LogLevel = slog.LevelDebug
	}
	if f.logFormat != "text" && f.logFormat != "json" {
		bad.add("log-format", f.logFormat, "must be text or json")
	}
	c.LogJSON = f.logFormat == "json"
	c.RandomFully = !f.noRandomFully
	f.bgp(&c, &bad)
	if c.Socket == "" {
		c.Socket = filepath.Join(filepath.Dir(c.SubnetFile), "twilld.sock")
	}
	return c, errors.Join(bad...)
}

// bgp validates the flags of backend bgp.
func (f *flags) bgp(c *Config, bad *badFlags) {
	if f.asNumber > 1<<32-1 {
		bad.add("bgp-as-number", f.asNumber, "must be 1..4294967295, or 0 for the configuration's")
	}
	c.BGP.ASNumber = uint32(f.asNumber)
	switch id, err := netip.ParseAddr(f.clusterID); {
	case f.reflector && f.clusterID == "":
		bad.add("bgp-route-reflector", true, "needs --bgp-cluster-id, the same on all reflectors that serve the same nodes, like 192.0.2.1")
	case !f.reflector && f.clusterID != "":
		bad.add("bgp-cluster-id", f.clusterID, "has a meaning only with --bgp-route-reflector")
	case f.reflector && (err != nil || !id.Is4() || id.IsUnspecified()):
		bad.add("bgp-cluster-id", f.clusterID, "must be four numbers like 192.0.2.1")
	case f.reflector:
		c.BGP.ClusterID = id
	}
	switch c.Router.Kind {
	case "":
		if c.Router.Config != "" || c.Router.Templates != "" {
			bad.add("bgp-router", `""`, "must be bird or frr if --bgp-router-config or --bgp-router-templates is given")
		}
	case "bird", "frr":
		c.BGP.External = true
	default:
		bad.add("bgp-router", c.Router.Kind, "must be bird or frr, or left out: then twilld speaks BGP itself")
	}
}

// minResync bounds how often the whole kernel state is read without a reason.
// Every change rings a bell anyway.
const minResync = 30 * time.Second

// Logger returns the log the configuration asks for.
func (c Config) Logger(w io.Writer) *slog.Logger {
	opts := &slog.HandlerOptions{Level: c.LogLevel}
	if c.LogJSON {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}
