package daemon

import (
	"flag"
	"fmt"
	"io"
	"strings"

	"github.com/twill-net/twill/pkg/pod"
)

// flags holds the raw flag values before validation.
type flags struct {
	set *flag.FlagSet
	c   Config

	endpoints                      string
	iface, ifaceRegex, ifaceSkip   list
	canReach, publicIP, publicIPv6 string
	renewMargin                    int
	healthIP                       string
	healthPort, resync, verbosity  int
	noRandomFully                  bool
	logLevel, logFormat            string
	asNumber                       uint64
	reflector                      bool
	clusterID                      string
}

// list is a flag that may be given several times.
type list []string

func (l *list) String() string { return strings.Join(*l, ",") }

func (l *list) Set(s string) error {
	for _, x := range strings.Split(s, ",") {
		if x != "" {
			*l = append(*l, x)
		}
	}
	return nil
}

// regexes is a list whose elements may hold commas.
type regexes struct{ *list }

func (r regexes) Set(s string) error {
	*r.list = append(*r.list, s)
	return nil
}

func newFlags() *flags {
	f := &flags{set: flag.NewFlagSet("twilld", flag.ContinueOnError)}
	s, c := f.set, &f.c
	s.SetOutput(io.Discard) // a wrong flag is one line, and not a page of help
	s.Usage = func() {}

	s.StringVar(&f.endpoints, "etcd-endpoints", "http://127.0.0.1:4001,http://127.0.0.1:2379", "etcd `URLs`, separated by commas")
	s.StringVar(&c.Etcd.Prefix, "etcd-prefix", "/coreos.com/network", "where in etcd the network lives: `key` prefix")
	s.StringVar(&c.Etcd.CAFile, "etcd-cafile", "", "`file` with the CA that signed etcd's certificate")
	s.StringVar(&c.Etcd.CertFile, "etcd-certfile", "", "`file` with the client certificate")
	s.StringVar(&c.Etcd.KeyFile, "etcd-keyfile", "", "`file` with the client certificate's key")
	s.StringVar(&c.Etcd.Username, "etcd-username", "", "etcd user `name`")
	s.StringVar(&c.Etcd.Password, "etcd-password", "", "etcd `password`; better in FLANNELD_ETCD_PASSWORD")

	s.BoolVar(&c.Kubernetes, "kube-subnet-mgr", false, "keep leases in the Kubernetes API: each Node's podCIDRs and annotations; NODE_NAME, or POD_NAME and POD_NAMESPACE, in the environment say which Node this is")
	s.StringVar(&c.Kube.APIURL, "kube-api-url", "", "`URL` of the Kubernetes API; goes before that of --kubeconfig-file")
	s.StringVar(&c.Kube.Kubeconfig, "kubeconfig-file", "", "kubeconfig `file`; without it and --kube-api-url, twilld uses its pod's service account")
	s.StringVar(&c.Kube.AnnotationPrefix, "kube-annotation-prefix", "flannel.alpha.coreos.com", "`prefix` of the annotations")
	s.StringVar(&c.Kube.NetConfig, "net-config-path", "/etc/kube-flannel/net-conf.json", "`file` with the network configuration; followed while twilld runs")
	s.BoolVar(&c.Kube.SetNetworkUnavailable, "set-node-network-unavailable", true, "set the Node's condition NetworkUnavailable to False once packets find their way")
	s.BoolVar(&c.Kube.Allocate, "kube-allocate-subnets", false, "take free subnets for a Node that has no podCIDRs; every twilld of the cluster must agree, and kube-controller-manager must not allocate")

	s.Var(&f.iface, "iface", "uplink: interface `name` or address; repeat for second choices")
	s.Var(regexes{&f.ifaceRegex}, "iface-regex", "uplink: `expression` over interface names and addresses; repeatable, after all --iface")
	s.StringVar(&f.canReach, "iface-can-reach", "", "uplink: the interface that routes to this `address`")
	s.Var(&f.ifaceSkip, "iface-skip", "shell `pattern` of names that --iface-regex and the default route never choose, beside docker*, cni*, veth* and the like")
	s.StringVar(&f.publicIP, "public-ip", "", "IPv4 `address` peers send to, if it is not the uplink's")
	s.StringVar(&f.publicIPv6, "public-ipv6", "", "IPv6 `address` peers send to, if it is not the uplink's")

	s.StringVar(&c.SubnetFile, "subnet-file", "/run/flannel/subnet.env", "`file` for the node's subnet; twill.json for the CNI plugin is written beside it")
	s.StringVar(&c.Socket, "socket", "", "`path` of the local API for netctl (default twilld.sock beside --subnet-file)")
	s.StringVar(&c.CNIDataDir, "cni-data-dir", pod.DefaultDataDir, "`directory` with the addresses of this node's pods, as dataDir in the CNI configuration")
	s.IntVar(&f.renewMargin, "subnet-lease-renew-margin", 60, "renew the lease at the latest this many `minutes` before it ends, 1..1439")

	s.BoolVar(&c.IPMasq, "ip-masq", false, "masquerade traffic that leaves the pod network")
	s.BoolVar(&f.noRandomFully, "ip-masq-fully-random-disable", false, "masquerade without fully random source ports")
	s.BoolVar(&c.ForwardRules, "iptables-forward-rules", true, "accept forwarded pod traffic in the filter table")
	s.IntVar(&f.resync, "iptables-resync", 5, "flannel's resync `seconds`; Twill is woken by changes and reads everything again every 30 s or this long, whichever is longer")
	s.BoolVar(&c.Blackhole, "ip-blackhole-route", false, "drop packets to pods of this node that do not exist")

	s.Uint64Var(&f.asNumber, "bgp-as-number", 0, "this node's AS `number`, if it is not the configuration's")
	s.BoolVar(&f.reflector, "bgp-route-reflector", false, "this node reflects routes (RFC 4456)")
	s.StringVar(&f.clusterID, "bgp-cluster-id", "", "cluster `id` of a route reflector, like 192.0.2.1")
	s.StringVar(&c.Router.Kind, "bgp-router", "", "`router` that speaks BGP in twilld's place, configured by it: bird or frr")
	s.StringVar(&c.Router.Config, "bgp-router-config", "", "`file` to write that router's configuration to")
	s.StringVar(&c.Router.Templates, "bgp-router-templates", "", "`directory` with templates that override the built-in ones: bird.conf.tmpl, frr.conf.tmpl")
	s.StringVar(&c.WireGuardKey, "wireguard-key-file", "/run/flannel/wgkey", "`file` with this node's private key of backend wireguard; made if absent")

	s.StringVar(&f.healthIP, "healthz-ip", "0.0.0.0", "`address` of /healthz, /readyz and /metrics")
	s.IntVar(&f.healthPort, "healthz-port", 0, "`port` of /healthz, /readyz and /metrics; 0 is off")
	s.StringVar(&f.logLevel, "log-level", "info", "`level`: debug, info, warn or error")
	s.StringVar(&f.logFormat, "log-format", "text", "`format`: text or json")
	s.BoolVar(&c.Cleanup, "cleanup", false, "remove everything of Twill's from this node's network, print it, and exit")
	s.BoolVar(&c.HandBack, "hand-back", false, "leave this node to flannel, which runs on it again: remove Twill's rules, and no packet is lost")
	s.BoolVar(&c.Version, "version", false, "print the version and exit")

	f.flannelOnly()
	return f
}

// flannelOnly declares the flags that a flannel command line may hold and that
// mean nothing here, so that it starts unchanged.
func (f *flags) flannelOnly() {
	s := f.set
	var text string
	s.IntVar(&f.verbosity, "v", 0, "")
	s.StringVar(&text, "vmodule", "", "")
	s.StringVar(&text, "log_backtrace_at", "", "")
}

func (f *flags) usage(w io.Writer) {
	fmt.Fprint(w, `twilld gives this node its share of the cluster's pod network.

It leases a subnet in etcd or the Kubernetes API, publishes how this node is reached, and programs the
kernel so that packets find every other node's pods. Stopping it stops no packet.

Example:
  twilld --etcd-endpoints=http://127.0.0.1:2379 --ip-masq
  NODE_NAME=node1 twilld --kube-subnet-mgr --kubeconfig-file=/etc/twill/kubeconfig --ip-masq
  twilld --cleanup
  twilld install-cni --help

Flags (each also as FLANNELD_NAME_IN_CAPITALS in the environment):
`)
	f.set.VisitAll(func(fl *flag.Flag) {
		arg, usage := flag.UnquoteUsage(fl)
		if usage == "" {
			return
		}
		if fl.DefValue != "" && fl.DefValue != "false" && fl.DefValue != "0" {
			usage += fmt.Sprintf(" (default %s)", fl.DefValue)
		}
		fmt.Fprintf(w, "  %s\n        %s\n", strings.TrimSpace("--"+fl.Name+" "+arg), usage)
	})
	fmt.Fprint(w, `
klog's flags are understood; -v=1 and above logs in detail.
`)
}
