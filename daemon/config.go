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
	"path/filepath"
	"strings"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/store"
)

// Config is what the flags and environment say, validated.
type Config struct {
	Etcd       store.EtcdConfig
	Uplink     overlay.UplinkRules // without the families, which the network configuration sets
	PublicIP   netip.Addr          // override; zero: the uplink's
	PublicIPv6 netip.Addr

	SubnetFile string // subnet.env
	Socket     string // local API
	HealthAddr string // host:port; empty: off

	IPMasq       bool
	RandomFully  bool
	ForwardRules bool
	Blackhole    bool

	RenewMargin time.Duration // renew at the latest this long before the lease ends
	Resync      time.Duration // between two checks that no event asked for
	LogLevel    slog.Level
	LogJSON     bool

	Cleanup bool // remove what is ours and exit
	Version bool // print the version and exit
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
	f := newFlags(stderr)
	if err := f.set.Parse(args); err != nil {
		return Config{}, err
	}
	if f.set.NArg() > 0 {
		return Config{}, fmt.Errorf("argument %q is not a flag; see twilld --help", f.set.Arg(0))
	}
	if err := f.fromEnv(getenv); err != nil {
		return Config{}, err
	}
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

// config validates the flags.
func (f *flags) config() (Config, error) {
	c := f.c
	if f.kubeSubnetMgr {
		return c, errors.New("--kube-subnet-mgr: this version of Twill keeps leases in etcd alone; remove the flag and give --etcd-endpoints")
	}
	var errs []error
	bad := func(name string, value any, rule string) {
		errs = append(errs, fmt.Errorf("--%s: %v: %s", name, value, rule))
	}
	c.Etcd.Endpoints = strings.Split(f.endpoints, ",")
	c.Etcd.TTL = leaseTTL
	c.Uplink = overlay.UplinkRules{Names: f.iface, Patterns: f.ifaceRegex, Skip: append(overlay.DefaultSkip(), f.ifaceSkip...)}
	address := func(name, value string, v6 bool) (a netip.Addr) {
		if value == "" {
			return a
		}
		a, err := netip.ParseAddr(value)
		if err != nil || name != "iface-can-reach" && a.Is6() != v6 {
			bad(name, value, map[bool]string{false: "must be an IPv4 address", true: "must be an IPv6 address"}[v6])
		}
		return a
	}
	c.PublicIP = address("public-ip", f.publicIP, false)
	c.PublicIPv6 = address("public-ipv6", f.publicIPv6, true)
	c.Uplink.CanReach = address("iface-can-reach", f.canReach, false)
	if f.renewMargin < 1 || f.renewMargin > 1439 {
		bad("subnet-lease-renew-margin", f.renewMargin, "must be 1..1439 minutes")
	}
	c.RenewMargin = time.Duration(f.renewMargin) * time.Minute
	if f.healthPort < 0 || f.healthPort > 65535 {
		bad("healthz-port", f.healthPort, "must be 0..65535")
	}
	ip, err := netip.ParseAddr(f.healthIP)
	if err != nil {
		bad("healthz-ip", f.healthIP, "must be an address")
	}
	if f.healthPort > 0 && err == nil {
		c.HealthAddr = netip.AddrPortFrom(ip, uint16(f.healthPort)).String()
	}
	if f.resync < 1 {
		bad("iptables-resync", f.resync, "must be at least 1 second")
	}
	c.Resync = max(time.Duration(f.resync)*time.Second, minResync)
	if err := c.LogLevel.UnmarshalText([]byte(f.logLevel)); err != nil {
		bad("log-level", f.logLevel, "must be debug, info, warn or error")
	}
	if f.verbosity > 0 {
		c.LogLevel = slog.LevelDebug
	}
	if f.logFormat != "text" && f.logFormat != "json" {
		bad("log-format", f.logFormat, "must be text or json")
	}
	c.LogJSON = f.logFormat == "json"
	c.RandomFully = !f.noRandomFully
	if c.Socket == "" {
		c.Socket = filepath.Join(filepath.Dir(c.SubnetFile), "twilld.sock")
	}
	return c, errors.Join(errs...)
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
