package daemon

import (
	"bytes"
	"errors"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
)

func env(pairs ...string) func(string) string {
	m := map[string]string{}
	for _, p := range pairs {
		k, v, _ := strings.Cut(p, "=")
		m[k] = v
	}
	return func(name string) string { return m[name] }
}

func parse(t *testing.T, getenv func(string) string, args ...string) Config {
	t.Helper()
	var out bytes.Buffer
	c, err := ParseConfig(args, getenv, &out)
	if err != nil || out.Len() > 0 {
		t.Fatalf("%q: %v; printed %q", args, err, out.String())
	}
	return c
}

func TestConfigDefaults(t *testing.T) {
	c := parse(t, env())
	want := Config{
		SubnetFile: "/run/flannel/subnet.env", Socket: "/run/flannel/twilld.sock",
		RandomFully: true, ForwardRules: true, RenewMargin: time.Hour, Resync: 30 * time.Second,
		WireGuardKey: "/run/flannel/wgkey", CNIDataDir: "/var/lib/cni/networks",
	}
	want.Etcd.Endpoints = []string{"http://127.0.0.1:4001", "http://127.0.0.1:2379"}
	want.Etcd.Prefix = "/coreos.com/network"
	want.Etcd.TTL = 24 * time.Hour
	want.Kube.AnnotationPrefix, want.Kube.NetConfig = "flannel.alpha.coreos.com", "/etc/kube-flannel/net-conf.json"
	want.Kube.SetNetworkUnavailable = true
	want.Uplink.Skip = overlay.DefaultSkip()
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got  %+v\nwant %+v", c, want)
	}
	if c.HandoffFile() != "/run/flannel/twill.json" {
		t.Errorf("hand-off %s", c.HandoffFile())
	}
}

// TestFlannelCommandLine starts as flannel's own manifests and units do.
func TestFlannelCommandLine(t *testing.T) {
	c := parse(t, env(),
		"-etcd-endpoints=https://198.51.100.5:2379,https://198.51.100.6:2379", "-etcd-prefix=/net", "-etcd-cafile=/ca", "--etcd-certfile", "/crt", "-etcd-keyfile", "/key",
		"-etcd-username=u", "-etcd-password=p", "-iface=eth1", "-iface=198.51.100.7", "--iface=eth2,eth3", "-iface-regex=^10\\.{1,2}", "-iface-can-reach=198.51.100.1",
		"-ip-masq", "--ip-masq-fully-random-disable=true", "-iptables-forward-rules=false", "-iptables-resync=60", "-ip-blackhole-route", "-public-ip=203.0.113.7", "--public-ipv6=2001:db8::7",
		"-subnet-file=/run/x/subnet.env", "-subnet-lease-renew-margin=90", "-healthz-ip=::1", "-healthz-port=8081",
		"-kube-subnet-mgr=false", "-kube-api-url=https://k", "-kubeconfig-file=/k", "-kube-annotation-prefix=x", "-net-config-path=/n", "-set-node-network-unavailable=false",
		"-v=10", "-vmodule=x=1", "-log_backtrace_at=a:1")
	for _, x := range []struct{ got, want any }{
		{c.Etcd.Endpoints, []string{"https://198.51.100.5:2379", "https://198.51.100.6:2379"}},
		{[]string{c.Etcd.Prefix, c.Etcd.CAFile, c.Etcd.CertFile, c.Etcd.KeyFile, c.Etcd.Username, c.Etcd.Password}, []string{"/net", "/ca", "/crt", "/key", "u", "p"}},
		{c.Uplink.Names, []string{"eth1", "198.51.100.7", "eth2", "eth3"}},
		{c.Uplink.Patterns, []string{`^10\.{1,2}`}},
		{c.Uplink.CanReach, netip.MustParseAddr("198.51.100.1")},
		{[]bool{c.IPMasq, c.RandomFully, c.ForwardRules, c.Blackhole}, []bool{true, false, false, true}},
		{c.Resync, time.Minute},
		{[]netip.Addr{c.PublicIP, c.PublicIPv6}, []netip.Addr{netip.MustParseAddr("203.0.113.7"), netip.MustParseAddr("2001:db8::7")}},
		{[]string{c.SubnetFile, c.HandoffFile(), c.Socket}, []string{"/run/x/subnet.env", "/run/x/twill.json", "/run/x/twilld.sock"}},
		{[]string{c.Kube.APIURL, c.Kube.Kubeconfig, c.Kube.AnnotationPrefix, c.Kube.NetConfig}, []string{"https://k", "/k", "x", "/n"}},
		{[]bool{c.Kubernetes, c.Kube.SetNetworkUnavailable, c.Kube.Allocate}, []bool{false, false, false}},
		{c.RenewMargin, 90 * time.Minute},
		{c.HealthAddr, "[::1]:8081"},
		{c.LogLevel, slog.LevelDebug},
	} {
		if !reflect.DeepEqual(x.got, x.want) {
			t.Errorf("got %v, want %v", x.got, x.want)
		}
	}
}

func TestConfigFromEnvironment(t *testing.T) {
	c := parse(t, env("FLANNELD_ETCD_ENDPOINTS=http://198.51.100.5:2379", "FLANNELD_IP_MASQ=true", "FLANNELD_IFACE=eth1,eth2", "FLANNELD_ETCD_PASSWORD=s",
		"FLANNELD_HEALTHZ_PORT=1", "FLANNELD_PUBLIC_IP=", "FLANNELD_LOG_LEVEL=warn", "FLANNELD_LOG_FORMAT=json"), "--healthz-port=2", "--iface=eth9")
	if !slices.Equal(c.Etcd.Endpoints, []string{"http://198.51.100.5:2379"}) || !c.IPMasq || c.Etcd.Password != "s" || c.PublicIP.IsValid() || c.LogLevel != slog.LevelWarn || !c.LogJSON {
		t.Errorf("environment is not taken: %+v", c)
	}
	if c.HealthAddr != "0.0.0.0:2" || !slices.Equal(c.Uplink.Names, []string{"eth9"}) {
		t.Errorf("the command line must win: %+v", c)
	}
}

func TestConfigErrors(t *testing.T) {
	for _, x := range []struct{ args, env, want string }{
		{"", "FLANNELD_KUBE_SUBNET_MGR=perhaps", `environment FLANNELD_KUBE_SUBNET_MGR="perhaps": parse error`},
		{"extra", "", `argument "extra" is not a flag; see twilld --help`},
		{"--no-such-flag", "", "flag provided but not defined: -no-such-flag; see twilld --help"},
		{"--healthz-port=x", "", `invalid value "x" for flag -healthz-port: parse error; see twilld --help`},
		{"--iface", "", "flag needs an argument: -iface; see twilld --help"},
		{"", "FLANNELD_HEALTHZ_PORT=x", `environment FLANNELD_HEALTHZ_PORT="x": parse error`},
		{"", "FLANNELD_IP_MASQ=maybe", `environment FLANNELD_IP_MASQ="maybe": parse error`},
		{"--healthz-port=-1", "", "--healthz-port: -1: must be 0..65535"},
		{"--healthz-port=65536", "", "--healthz-port: 65536: must be 0..65535"},
		{"--healthz-ip=here", "", "--healthz-ip: here: must be an address"},
		{"--subnet-lease-renew-margin=0", "", "--subnet-lease-renew-margin: 0: must be 1..1439 minutes"},
		{"--subnet-lease-renew-margin=1440", "", "--subnet-lease-renew-margin: 1440: must be 1..1439 minutes"},
		{"--iptables-resync=0", "", "--iptables-resync: 0: must be at least 1 second"},
		{"--public-ip=x", "", "--public-ip: x: must be an IPv4 address that other nodes reach"},
		{"--public-ip=2001:db8::1", "", "--public-ip: 2001:db8::1: must be an IPv4 address that other nodes reach"},
		{"--public-ip=::ffff:198.51.100.1", "", "--public-ip: ::ffff:198.51.100.1: must be an IPv4 address that other nodes reach"},
		{"--public-ip=0.0.0.0", "", "--public-ip: 0.0.0.0: must be an IPv4 address that other nodes reach"},
		{"--public-ip=127.0.0.1", "", "--public-ip: 127.0.0.1: must be an IPv4 address that other nodes reach"},
		{"--public-ip=224.0.0.1", "", "--public-ip: 224.0.0.1: must be an IPv4 address that other nodes reach"},
		{"--public-ipv6=198.51.100.1", "", "--public-ipv6: 198.51.100.1: must be an IPv6 address that other nodes reach"},
		{"--public-ipv6=fe80::1", "", "--public-ipv6: fe80::1: must be an IPv6 address that other nodes reach"},
		{"--public-ipv6=2001:db8::1%eth0", "", "--public-ipv6: 2001:db8::1%eth0: must be an IPv6 address that other nodes reach"},
		{"--iface-can-reach=gw", "", "--iface-can-reach: gw: must be an address"},
		{"--iface-regex=(", "", "--iface-regex: (: error parsing regexp: missing closing ): `(`"},
		{"--iface-skip=[", "", "--iface-skip: [: must be a shell pattern like eth*"},
		{"--log-level=loud", "", "--log-level: loud: must be debug, info, warn or error"},
		{"--log-format=xml", "", "--log-format: xml: must be text or json"},
		{"--bgp-as-number=4294967296", "", "--bgp-as-number: 4294967296: must be 1..4294967295, or 0 for the configuration's"},
		{"--bgp-as-number=-1", "", `invalid value "-1" for flag -bgp-as-number: parse error; see twilld --help`},
		{"--bgp-route-reflector", "", "--bgp-route-reflector: true: needs --bgp-cluster-id, the same on all reflectors that serve the same nodes, like 192.0.2.1"},
		{"--bgp-route-reflector --bgp-cluster-id=one", "", "--bgp-cluster-id: one: must be four numbers like 192.0.2.1"},
		{"--bgp-route-reflector --bgp-cluster-id=0.0.0.0", "", "--bgp-cluster-id: 0.0.0.0: must be four numbers like 192.0.2.1"},
		{"--bgp-cluster-id=192.0.2.1", "", "--bgp-cluster-id: 192.0.2.1: has a meaning only with --bgp-route-reflector"},
		{"--bgp-router=quagga", "", "--bgp-router: quagga: must be bird or frr, or left out: then twilld speaks BGP itself"},
		{"--bgp-router-config=/x", "", `--bgp-router: "": must be bird or frr if --bgp-router-config or --bgp-router-templates is given`},
	} {
		var out bytes.Buffer
		_, err := ParseConfig(strings.Fields(x.args), env(x.env), &out)
		if err == nil || err.Error() != x.want || out.Len() > 0 {
			t.Errorf("%s %s:\ngot  %v\nwant %s\nprinted %q", x.args, x.env, err, x.want, out.String())
		}
	}
	// Several at once are all told.
	_, err := ParseConfig([]string{"--healthz-port=-1", "--log-format=xml"}, env(), &bytes.Buffer{})
	if err == nil || strings.Count(err.Error(), "\n") != 1 {
		t.Errorf("two wrong flags: %v", err)
	}
}

func TestHelp(t *testing.T) {
	for _, arg := range []string{"-h", "--help"} {
		var out bytes.Buffer
		if _, err := ParseConfig([]string{arg}, env("FLANNELD_ETCD_PASSWORD=hidden"), &out); !errors.Is(err, ErrHelp) {
			t.Fatalf("%s: %v", arg, err)
		}
		for _, want := range []string{"--etcd-endpoints URLs", "--cleanup", "(default 60)", "FLANNELD_", "Example:"} {
			if !strings.Contains(out.String(), want) {
				t.Errorf("help lacks %q:\n%s", want, out.String())
			}
		}
		if strings.Contains(out.String(), "hidden") || strings.Contains(out.String(), "--vmodule") {
			t.Errorf("help shows too much:\n%s", out.String())
		}
	}
}

func TestLogger(t *testing.T) {
	for _, x := range []struct{ arg, want string }{
		{"--log-format=json", `"msg":"said"`},
		{"--log-format=text", "msg=said"},
		{"--log-level=error", ""},
	} {
		var out bytes.Buffer
		parse(t, env(), x.arg).Logger(&out).Info("said")
		if x.want == "" && out.Len() > 0 || !strings.Contains(out.String(), x.want) {
			t.Errorf("%s: %q", x.arg, out.String())
		}
	}
}

// TestKubernetesFlags starts as a DaemonSet does.
func TestKubernetesFlags(t *testing.T) {
	c := parse(t, env("NODE_NAME=n1", "POD_NAME=twill-x", "POD_NAMESPACE=twill-system"), "--kube-subnet-mgr", "--kube-allocate-subnets")
	if k := c.Kube; !c.Kubernetes || !k.Allocate || k.NodeName != "n1" || k.PodName != "twill-x" || k.PodNamespace != "twill-system" {
		t.Errorf("%+v", c.Kube)
	}
}
