// Package e2e runs Twill as a whole: real daemons, plugin and netctl on several
// hosts of a lab, around a real etcd. Tests, demo and benchmarks are made of it.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	current "github.com/containernetworking/cni/pkg/types/100"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// Prefix is where the cluster's network lives in etcd: flannel's default.
const Prefix = "/coreos.com/network"

// The pod networks of ConfigIPv4 and ConfigDual.
var (
	PodNetwork   = netip.MustParsePrefix("10.5.0.0/16")
	PodNetworkV6 = netip.MustParsePrefix("fd00:5::/48")
)

// Network configurations as an operator would store them.
const (
	ConfigIPv4 = `{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "Port": 4789}}`
	ConfigDual = `{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:5::/48", "Backend": {"Type": "vxlan", "Port": 4789}}`
)

// Options of a Cluster.
type Options struct {
	Hosts  int
	Config string // stored in etcd; empty: none
	Etcd   nettest.EtcdOptions
	// Store is where leases are kept: etcd, or "kubernetes". There, each node has the
	// podCIDRs 10.5.<n>.0/24 and fd00:5:0:<n>::/64.
	Store string
	Args  []string // for every twilld, beside the store and --ip-masq
}

// Cluster is an etcd and hosts with Twill's programs in their PATH.
type Cluster struct {
	Lab   *nettest.Lab
	Etcd  *nettest.Etcd
	Kube  *KubeStore // nil unless it is the store
	Nodes []*Node
	opts  Options
}

// Node is a host that runs twilld.
type Node struct {
	*nettest.Host
	Daemon  *nettest.Process // nil before Start
	cluster *Cluster
}

// Pod is a namespace that the CNI plugin has wired.
type Pod struct {
	*nettest.NS
	Node   *Node
	ID     string // container id
	IPv4   netip.Addr
	IPv6   netip.Addr // invalid unless dual stack
	Result *current.Result
}

// New makes the hosts and the etcd in lab and stores the configuration. It starts
// no twilld.
func New(ctx context.Context, lab *nettest.Lab, opts Options) (*Cluster, error) {
	c := &Cluster{Lab: lab, opts: opts}
	dir := ""
	for _, p := range []string{"./daemon/cmd/twilld", "./daemon/cmd/netctl", "./plugins/twill"} {
		path, err := nettest.BuildProgram(p)
		if err != nil {
			return nil, err
		}
		dir = filepath.Dir(path)
	}
	if err := lab.Setenv("PATH", dir+":"+os.Getenv("PATH")); err != nil {
		return nil, err
	}
	hosts, err := lab.NewHosts(opts.Hosts)
	if err != nil {
		return nil, err
	}
	for _, h := range hosts {
		c.Nodes = append(c.Nodes, &Node{Host: h, cluster: c})
	}
	if opts.Store == "kubernetes" {
		err = c.startKube(ctx)
	} else {
		c.Etcd, err = lab.StartEtcd(opts.Etcd)
	}
	if err != nil {
		return nil, err
	}
	if opts.Config == "" {
		return c, nil
	}
	return c, c.Configure(ctx, opts.Config)
}

// Configure stores a network configuration.
func (c *Cluster) Configure(ctx context.Context, config string) error {
	if c.Kube != nil {
		return c.configureKube(config)
	}
	_, err := c.Etcd.Client().Put(ctx, Prefix+"/config", config)
	return err
}

// Start starts twilld on every node and waits until all are ready.
func (c *Cluster) Start(ctx context.Context) error {
	for _, n := range c.Nodes {
		if err := n.Start(); err != nil {
			return err
		}
	}
	if c.opts.Etcd.Auth { // for netctl, which takes no password from twilld
		if err := c.Lab.Setenv("FLANNELD_ETCD_PASSWORD", nettest.EtcdUserPassword); err != nil {
			return err
		}
	}
	for _, n := range c.Nodes {
		if err := n.WaitReady(ctx); err != nil {
			return err
		}
	}
	return nil
}

// StoreArgs are the flags that lead twilld and netctl to the cluster's etcd.
func (c *Cluster) StoreArgs() []string {
	args := []string{"--etcd-endpoints=" + strings.Join(c.Etcd.Endpoints(), ",")}
	if p := c.Etcd.PKI; p != nil {
		args = append(args, "--etcd-cafile="+p.CA)
		if c.opts.Etcd.ClientAuth {
			args = append(args, "--etcd-certfile="+p.ClientCert, "--etcd-keyfile="+p.ClientKey)
		}
	}
	if c.opts.Etcd.Auth {
		args = append(args, "--etcd-username="+nettest.EtcdUser, "--etcd-password="+nettest.EtcdUserPassword)
	}
	return args
}

func (n *Node) storeArgs() []string {
	if n.cluster.Kube != nil {
		return n.kubeArgs()
	}
	return n.cluster.StoreArgs()
}

// Start starts twilld with the cluster's flags and more.
func (n *Node) Start(more ...string) error {
	args := append(n.storeArgs(), "--ip-masq", "--healthz-ip=127.0.0.1", fmt.Sprintf("--healthz-port=%d", healthPort))
	return n.StartWith(append(append(args, n.cluster.opts.Args...), more...)...)
}

// StartWith starts twilld with these flags alone.
func (n *Node) StartWith(args ...string) error {
	path, err := nettest.BuildProgram("./daemon/cmd/twilld")
	if err != nil {
		return err
	}
	n.Daemon, err = n.Host.Start(nettest.Program{Path: path, Args: args, Env: []string{"NODE_NAME=" + n.Name}, Name: "twilld"})
	return err
}

// Status asks the daemon for its status.
func (n *Node) Status() (overlay.Status, error) {
	var s overlay.Status
	out, err := n.Run("netctl", "status", "-o", "json")
	// An unready daemon makes netctl exit 1, with the status all the same.
	if jsonErr := json.Unmarshal([]byte(out), &s); jsonErr != nil {
		return s, errors.Join(err, jsonErr)
	}
	return s, nil
}

// WaitReady waits until the daemon says that pods can be connected.
func (n *Node) WaitReady(ctx context.Context) error {
	return n.WaitStatus(ctx, "ready", func(s overlay.Status) bool { return s.Ready })
}

// WaitStatus waits for a condition of the daemon's status.
func (n *Node) WaitStatus(ctx context.Context, what string, ok func(overlay.Status) bool) error {
	var last overlay.Status
	var lastErr error
	err := Eventually(ctx, func() bool {
		last, lastErr = n.Status()
		return lastErr == nil && ok(last)
	})
	if err != nil {
		return fmt.Errorf("twilld on %s is not %s: %w: ready %t: %s; %v", n.Name, what, err, last.Ready, last.Reason, lastErr)
	}
	return nil
}

// WaitPeers waits until every node routes to n-1 others.
func (c *Cluster) WaitPeers(ctx context.Context) error {
	for _, n := range c.Nodes {
		err := n.WaitStatus(ctx, "done with its peers", func(s overlay.Status) bool {
			return s.Ready && s.Peers == len(c.Nodes)-1
		})
		if err == nil {
			err = n.WaitInSync(ctx)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// WaitInSync waits until kernel and store agree on the node: netctl diff is empty.
func (n *Node) WaitInSync(ctx context.Context) error {
	var out string
	var err error
	if Eventually(ctx, func() bool { out, err = n.Run("netctl", "diff"); return err == nil }) != nil {
		return fmt.Errorf("%s is not in sync: %w: %s", n.Name, err, out)
	}
	return nil
}

// Eventually waits until ok, 30 s at most.
func Eventually(ctx context.Context, ok func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for !ok() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
	return nil
}

// NetConf is a Twill network configuration for the CNI plugin.
const NetConf = `{"cniVersion": "1.1.0", "name": "twill", "type": "twill"}`

// AddPod makes a pod and has the CNI plugin wire it.
func (n *Node) AddPod(name string) (*Pod, error) { return n.AddPodWith(name, NetConf) }

// AddPodWith makes a pod by another network configuration.
func (n *Node) AddPodWith(name, netconf string) (*Pod, error) {
	ns, err := n.NewPodNS(name)
	if err != nil {
		return nil, err
	}
	p := &Pod{NS: ns, Node: n, ID: n.Name + "-" + name}
	out, err := p.CNI("ADD", netconf)
	if err != nil {
		return nil, err
	}
	p.Result = &current.Result{}
	if err := json.Unmarshal(out, p.Result); err != nil {
		return nil, fmt.Errorf("read result of ADD: %w: %s", err, out)
	}
	for _, ip := range p.Result.IPs {
		a, _ := netip.AddrFromSlice(ip.Address.IP)
		if a = a.Unmap(); a.Is4() {
			p.IPv4 = a
		} else {
			p.IPv6 = a
		}
	}
	return p, nil
}

// Delete has the plugin unwire the pod.
//
// The daemon deletes the pod's links a moment after DEL has returned. Delete waits for
// that, because most tests look at the kernel next.
func (p *Pod) Delete() error {
	if _, err := p.CNI("DEL", NetConf); err != nil {
		return err
	}
	return p.Node.awaitCollected()
}

// awaitCollected waits until no link of a pod that was detached is left.
func (n *Node) awaitCollected() error {
	for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		out, err := n.Run("ip", "-o", "link", "show", "group", doomedGroup)
		if err != nil || out == "" {
			return err
		}
		if time.Since(begin) > 20*time.Second {
			return fmt.Errorf("%s: links of detached pods are not deleted: %s", n.Name, out)
		}
	}
}

// doomedGroup is the link group of links that wait for the daemon to delete them.
const doomedGroup = "21591"

// CNI runs the plugin as a runtime does.
func (p *Pod) CNI(command, netconf string) ([]byte, error) {
	cmd := p.Node.Command(context.Background(), "twill")
	cmd.Env = append(cmd.Env, "CNI_COMMAND="+command, "CNI_CONTAINERID="+p.ID, "CNI_NETNS="+p.Path, "CNI_IFNAME=eth0", "CNI_PATH="+os.Getenv("PATH"))
	cmd.Stdin = strings.NewReader(netconf)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.Bytes(), fmt.Errorf("CNI %s of %s: %w: %s%s", command, p.Name, err, stdout.String(), stderr.String())
	}
	return stdout.Bytes(), nil
}

// Addr returns the pod's address of a family.
func (p *Pod) Addr(f overlay.Family) netip.Addr {
	if f == overlay.IPv4 {
		return p.IPv4
	}
	return p.IPv6
}

// Ping sends count packets with this much payload, 0.1 s apart, not to be
// fragmented, and fails unless all are answered.
func (p *Pod) Ping(to netip.Addr, count, payload int) error {
	_, err := p.Run("ping", "-n", "-q", "-c", fmt.Sprint(count), "-i", "0.1", "-W", "2", "-M", "do", "-s", fmt.Sprint(payload), to.String())
	return err
}

// Netctl runs netctl on the node and returns its output and exit code.
func (n *Node) Netctl(args ...string) (string, int, error) {
	out, err := n.Run("netctl", args...)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return out, exit.ExitCode(), nil
	}
	return out, 0, err
}

const healthPort = 8081

// Get asks the daemon's health port and returns the answer and its HTTP status.
func (n *Node) Get(path string) (string, int, error) {
	transport := &http.Transport{DialContext: n.DialContext, DisableKeepAlives: true}
	r, err := (&http.Client{Transport: transport, Timeout: 5 * time.Second}).Get(fmt.Sprintf("http://127.0.0.1:%d%s", healthPort, path))
	if err != nil {
		return "", 0, err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return string(b), r.StatusCode, err
}

// Metric returns the value of a metric without labels.
func (n *Node) Metric(name string) (float64, error) {
	out, _, err := n.Get("/metrics")
	if err != nil {
		return 0, err
	}
	for _, line := range strings.Split(out, "\n") {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			return strconv.ParseFloat(value, 64)
		}
	}
	return 0, fmt.Errorf("metric %s of %s is not there", name, n.Name)
}
