package kubernetes

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/twill-net/twill/pkg/nettest"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// long reports whether the tests take all the time that they are meant for: five minutes
// without the API server, ten rounds of 200 pods. Without TWILL_LONG in the environment,
// as in CI, it is less.
func long() bool { return os.Getenv("TWILL_LONG") != "" }

// minutes is a time limit of a part of a test.
func minutes(t testing.TB, n time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), n*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// shell runs a script on the node.
func (n *Node) shell(t testing.TB, script string) string {
	t.Helper()
	out, err := n.Run("sh", "-c", script)
	must(t, err)
	return out
}

// kubectl runs kubectl, which must succeed.
func (c *Cluster) kubectl(t testing.TB, args ...string) string {
	t.Helper()
	out, err := c.Kubectl(args...)
	must(t, err)
	return out
}

// namespaces returns the files of the network namespaces that containerd made for pods
// of the node.
func (n *Node) namespaces(t testing.TB) []string {
	t.Helper()
	out, err := filepath.Glob(fmt.Sprintf("/proc/%d/root/run/netns/*", n.init))
	must(t, err)
	return out
}

// netns is findNetNS for a pod that must be there.
func (c *Cluster) netns(t testing.TB, p core.Pod) *nettest.NS {
	t.Helper()
	ns, err := c.findNetNS(t, p)
	must(t, err)
	return ns
}

// findNetNS finds the network namespace of a pod by its address.
func (c *Cluster) findNetNS(t testing.TB, p core.Pod) (*nettest.NS, error) {
	t.Helper()
	want := net.ParseIP(p.Status.PodIP)
	for _, path := range c.Node(p.Spec.NodeName).namespaces(t) {
		ns := c.Lab.NSAt(p.Spec.NodeName+"-"+p.Name, path)
		found := false
		err := ns.Do(func() error {
			list, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
			for _, a := range list {
				found = found || a.IP.Equal(want)
			}
			return err
		})
		if found && err == nil {
			return ns, nil
		}
	}
	return nil, fmt.Errorf("find network namespace of pod %s: none on %s has its address %s", p.Name, p.Spec.NodeName, want)
}

// probes are 1,000 packets a second and family each way between pods of two nodes.
type probes struct {
	names []string
	all   []*nettest.Probe
}

func (c *Cluster) startProbes(t testing.TB, a, b core.Pod) *probes {
	t.Helper()
	p := &probes{}
	for _, way := range [][2]core.Pod{{a, b}, {b, a}} {
		from, to := c.netns(t, way[0]), c.netns(t, way[1])
		for _, addr := range addrs(&way[1]) {
			probe, err := nettest.StartProbe(from, to, addr)
			must(t, err)
			p.names = append(p.names, fmt.Sprintf("%s to %s by %s", way[0].Spec.NodeName, way[1].Spec.NodeName, addr))
			p.all = append(p.all, probe)
		}
	}
	return p
}

// stop ends the probes; the test fails unless all were answered.
func (p *probes) stop(t testing.TB) {
	t.Helper()
	sent := 0
	for i, probe := range p.all {
		r, err := probe.Stop()
		must(t, err)
		sent += r.Sent
		if r.Lost > 0 || r.Sent < 500 {
			t.Errorf("%s: %d of %d probes lost, %d send errors, at %.0f ms", p.names[i], r.Lost, r.Sent, r.Errors, r.LostAt)
		}
	}
	t.Logf("%d probes sent on %d ways", sent, len(p.all))
}

// checkReach fails unless each pod of one list reaches each of the other, by each of
// their addresses, within the time that caches of neighbours may need.
func (c *Cluster) checkReach(t testing.TB, from, to []core.Pod) {
	t.Helper()
	for _, f := range from {
		ns := c.netns(t, f)
		for _, p := range to {
			for _, a := range addrs(&p) {
				must(t, Eventually(minutes(t, 1), func() error { return ping(ns, a) }))
			}
		}
	}
}

func ping(ns *nettest.NS, a netip.Addr) error {
	_, err := ns.Run("ping", "-n", "-c", "1", "-W", "1", a.String())
	return err
}

// reserved returns the addresses that the node's pods have, by their files.
func (n *Node) reserved(t testing.TB) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(n.Disk(), "cni-state", "networks", "*", "*"))
	must(t, err)
	var out []string
	for _, f := range files {
		if a, err := netip.ParseAddr(filepath.Base(f)); err == nil {
			out = append(out, a.String())
		}
	}
	return out
}

// checkReservations waits until the node's address files are those of its pods that run.
func (c *Cluster) checkReservations(t testing.TB, n *Node) {
	t.Helper()
	must(t, Eventually(minutes(t, 2), func() error {
		list, err := c.Client.CoreV1().Pods("").List(t.Context(), meta.ListOptions{FieldSelector: "spec.nodeName=" + n.Name})
		if err != nil {
			return err
		}
		var want []string
		for _, p := range list.Items {
			for _, a := range addrs(&p) {
				if !p.Spec.HostNetwork {
					want = append(want, a.String())
				}
			}
		}
		have := n.reserved(t)
		slices.Sort(have)
		slices.Sort(want)
		if !slices.Equal(have, want) {
			return fmt.Errorf("reserved on %s is %v, its pods have %v", n.Name, have, want)
		}
		return nil
	}))
}

// client is a DaemonSet with a pod on every node that does nothing.
const client = `apiVersion: apps/v1
kind: DaemonSet
metadata: {name: client}
spec:
  selector: {matchLabels: {app: client}}
  template:
    metadata: {labels: {app: client}}
    spec:
      terminationGracePeriodSeconds: 1
      automountServiceAccountToken: false
      enableServiceLinks: false
      containers:
      - {name: pause, image: "` + PauseImage + `"}
`

// startClients starts the DaemonSet client and returns its pods by node.
func (c *Cluster) startClients(t testing.TB) []core.Pod {
	t.Helper()
	must(t, c.Apply(client))
	return c.clients(t)
}

// clients waits until the DaemonSet runs on every node, where the addresses that the API
// tells are those that pods have: after a reboot it tells old ones for a while.
func (c *Cluster) clients(t testing.TB) []core.Pod {
	t.Helper()
	ctx := minutes(t, 4)
	var pods []core.Pod
	must(t, Eventually(ctx, func() error {
		var err error
		if pods, err = c.WaitPodsRunning(ctx, "default", "app=client", len(c.Nodes)); err != nil {
			return err
		}
		for _, p := range pods {
			if _, err := c.findNetNS(t, p); err != nil {
				return err
			}
		}
		return nil
	}))
	return pods
}
