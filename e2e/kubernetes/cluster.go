// Package kubernetes runs real Kubernetes on one machine: a control plane and nodes with
// their own containerd, kubelet and kube-proxy, each in namespaces of its own on a switch
// that leads nowhere. Its tests put Twill on such a cluster from its image.
//
// build.sh makes the programs and images that it needs.
package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/twill-net/twill/pkg/nettest"
)

// Options of a Cluster. The zero value is three nodes with IPv4, kube-proxy with nftables
// and Twill with vxlan.
type Options struct {
	Nodes     int    // 0 is 3
	Stack     Stack  // IPv4, DualStack or IPv6
	ProxyMode string // of kube-proxy: "nftables", "iptables", "none"; empty is nftables
	// CNI is what connects pods: "twill", "bridge" (Debian's plugin with routes between
	// the nodes: the reference of measurements) or "none". Empty is twill.
	CNI     string
	Backend string // of Twill: a type, or a JSON object; empty is vxlan
	// NetConf is a whole net-conf.json in place of Stack and Backend.
	NetConf     string
	InstallArgs []string // for netctl install
	NoPodCIDRs  bool     // the controller manager gives nodes no podCIDR
	// Arguments of the control plane's programs, beside those that are always given.
	APIServerArgs, ControllerArgs []string
}

// Cluster is a control plane and nodes.
type Cluster struct {
	T            testing.TB
	Lab          *nettest.Lab
	Etcd         *nettest.Etcd
	ControlPlane *nettest.Host // 198.51.100.10
	Outside      *nettest.Host // 198.51.100.9: no part of the cluster
	APIServer    *APIServer
	Nodes        []*Node // n1 with 198.51.100.11, n2, …
	Client       kubernetes.Interface
	Config       *rest.Config // an administrator's

	opts             Options
	ca               *nettest.CA
	control          []*nettest.Process // the control plane, without etcd
	source, programs string             // directories
	disk             string             // the lab's directory on a disk
	start            time.Time
}

// findSource returns the directory of this module's source.
func findSource(t testing.TB) string {
	t.Helper()
	mod, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		t.Fatalf("find module: %v", err)
	}
	return filepath.Dir(string(mod))
}

// buildPrograms returns the folder with the programs that build.sh makes: if one is
// missing, here and now, which takes long.
func buildPrograms(t testing.TB, source string) string {
	t.Helper()
	cmd := exec.Command(filepath.Join(source, "e2e/kubernetes/build.sh"))
	cmd.Stderr = os.Stderr
	folder, err := cmd.Output()
	if err != nil {
		t.Fatalf("build Kubernetes: %v", err)
	}
	return filepath.Join(strings.TrimSpace(string(folder)), "bin")
}

// Start makes a cluster for one test, with all nodes Ready, unless CNI is "none". It is
// removed when the test ends.
func Start(t testing.TB, opts Options) *Cluster {
	t.Helper()
	if opts.Nodes == 0 {
		opts.Nodes = 3
	}
	if opts.ProxyMode == "" {
		opts.ProxyMode = "nftables"
	}
	if opts.CNI == "" {
		opts.CNI = "twill"
	}
	if opts.Backend == "" {
		opts.Backend = "vxlan"
	}
	source := findSource(t)
	programs := buildPrograms(t, source)
	c := &Cluster{T: t, opts: opts, source: source, programs: programs, start: time.Now()}
	c.Lab = nettest.NewT(t)
	t.Cleanup(func() { c.close() })
	c.Mark("%s, %d nodes, kube-proxy %s, CNI %s", opts.Stack, opts.Nodes, opts.ProxyMode, opts.CNI)
	if err := c.up(); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *Cluster) up() error {
	var err error
	if c.disk, err = c.Lab.DiskDir(); err != nil {
		return err
	}
	if c.ControlPlane, err = c.newHost("cp", 10); err != nil {
		return err
	}
	if c.Outside, err = c.newHost("out", 9); err != nil {
		return err
	}
	for i := range c.opts.Nodes {
		h, err := c.newHost(fmt.Sprintf("n%d", i+1), 11+i)
		if err != nil {
			return err
		}
		c.Nodes = append(c.Nodes, &Node{Host: h, cluster: c, programs: c.programs, dir: filepath.Join(c.disk, h.Name)})
	}
	if err := c.makePKI(); err != nil {
		return err
	}
	if err := c.startControlPlane(); err != nil {
		return err
	}
	c.Mark("control plane is ready")
	if err := c.each((*Node).install); err != nil {
		return err
	}
	if err := c.each((*Node).Start); err != nil {
		return err
	}
	if c.opts.CNI == "twill" {
		if err := c.importTwill(); err != nil {
			return err
		}
	}
	if err := c.WaitNodesRegistered(c.context()); err != nil {
		return err
	}
	c.Mark("nodes are registered, images imported")
	switch c.opts.CNI {
	case "none":
		return nil
	case "bridge":
		err = c.installBridge()
	case "twill":
		err = c.installTwill()
	default:
		err = fmt.Errorf("start cluster: unknown CNI %q: it is twill, bridge or none", c.opts.CNI)
	}
	if err == nil {
		err = c.WaitNodesReady(c.context())
	}
	if err == nil {
		c.Mark("nodes are Ready")
	}
	return err
}

// newHost makes a host that has only the stack's addresses.
func (c *Cluster) newHost(name string, n int) (*nettest.Host, error) {
	h, err := c.Lab.NewNamedHost(name, n)
	if err == nil {
		err = c.onlyStack(h)
	}
	return h, err
}

func (c *Cluster) onlyStack(h *nettest.Host) error {
	if c.opts.Stack != IPv6 {
		return nil
	}
	return h.Do(func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		addrs, err := netlink.AddrList(eth0, netlink.FAMILY_V4)
		for _, a := range addrs {
			err = errors.Join(err, netlink.AddrDel(eth0, &a))
		}
		return err
	})
}

// each calls f for all nodes at once.
func (c *Cluster) each(f func(*Node) error) error {
	errs := make([]error, len(c.Nodes))
	var wg sync.WaitGroup
	for i, n := range c.Nodes {
		wg.Go(func() { errs[i] = f(n) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Node returns the node with this name.
func (c *Cluster) Node(name string) *Node {
	for _, n := range c.Nodes {
		if n.Name == name {
			return n
		}
	}
	c.T.Fatalf("find node %q: there is none", name)
	return nil
}

// Mark prints a line of the timeline.
func (c *Cluster) Mark(format string, args ...any) {
	c.T.Helper()
	c.T.Logf("%6.1fs  %s", time.Since(c.start).Seconds(), fmt.Sprintf(format, args...))
}

// context is of one step of the way up: a real cluster on a busy machine takes its time,
// and what has not come after minutes does not come.
func (c *Cluster) context() context.Context {
	ctx, cancel := context.WithTimeout(c.T.Context(), 3*time.Minute)
	c.T.Cleanup(cancel)
	return ctx
}

// close ends the nodes, which waits until the last process of their containers has ended.
// The rest goes with the lab.
func (c *Cluster) close() {
	if c.T.Failed() {
		c.dump()
	}
	if err := c.each((*Node).stop); err != nil {
		c.T.Error(err)
	}
}
