package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// newRuntimes makes a cluster, not started, whose nodes run containerd.
func newRuntimes(t *testing.T, hosts int) (*Cluster, []*Containerd, context.Context) {
	t.Helper()
	c, ctx := newCluster(t, Options{Hosts: hosts, Config: ConfigDual})
	var runtimes []*Containerd
	for _, n := range c.Nodes {
		r, err := StartContainerd(ctx, n)
		must(t, err)
		t.Cleanup(func() { must(t, r.Close()) })
		runtimes = append(runtimes, r)
	}
	return c, runtimes, ctx
}

// startRuntimes makes a cluster whose nodes run containerd with Twill's network.
func startRuntimes(t *testing.T, hosts int) ([]*Containerd, context.Context) {
	t.Helper()
	c, runtimes, ctx := newRuntimes(t, hosts)
	for _, r := range runtimes {
		must(t, r.InstallCNI(ctx))
	}
	must(t, c.Start(ctx))
	must(t, c.WaitPeers(ctx))
	return runtimes, ctx
}

// runPod is RunPod for what must succeed.
func runPod(ctx context.Context, t *testing.T, r *Containerd, name string, edit func(*cri.PodSandboxConfig)) *CRIPod {
	t.Helper()
	p, err := r.RunPod(ctx, name, edit)
	must(t, err)
	return p
}

// withPort maps a port of the node to the pod's web server.
func withPort(port int32) func(*cri.PodSandboxConfig) {
	return func(c *cri.PodSandboxConfig) {
		c.PortMappings = []*cri.PortMapping{{ContainerPort: webPort, HostPort: port}}
	}
}

// annotated gives the pod an annotation.
func annotated(key, value string) func(*cri.PodSandboxConfig) {
	return func(c *cri.PodSandboxConfig) { c.Annotations[key] = value }
}

// used dumps the node after a pod has come and gone: bridge and chains, which stay,
// are there.
func used(ctx context.Context, t *testing.T, r *Containerd) string {
	t.Helper()
	p := runPod(ctx, t, r, "first", withPort(9999))
	must(t, p.Remove(ctx))
	checkEmpty(t, r)
	var before string
	must(t, Eventually(ctx, func() bool {
		var err error
		before, err = r.Node.dumpKernel()
		must(t, err)
		return !carrierLost.MatchString(before)
	}))
	return before
}

// carrierLost is a bridge whose last port has just gone: the kernel says so within a
// second.
var carrierLost = regexp.MustCompile(`,UP> .* state UP`)

// checkGone fails unless the node is as it was, in kernel and files, and nothing is
// left of any pod.
func checkGone(t *testing.T, r *Containerd, before string) {
	t.Helper()
	r.Node.settled(t, before)
	checkEmpty(t, r)
}

// checkEmpty fails if there is a network namespace, a control group, an address
// file or a record of a pod. Between pods there are counters and locks alone.
func checkEmpty(t *testing.T, r *Containerd) {
	t.Helper()
	out, err := r.Run("find", "/run/netns", "/var/lib/cni", "-type", "f", "!", "-name", "last_reserved_ip.*", "!", "-name", "lock")
	must(t, err)
	groups, err := filepath.Glob("/sys/fs/cgroup/*" + r.cgroup + "/*/tasks")
	must(t, err)
	if out != "" || len(groups) > 0 {
		t.Errorf("left on %s: %q\n%s", r.Node.Name, groups, out)
	}
}

// checkTalk pings the other pod and asks its web server, over both families.
func checkTalk(ctx context.Context, t *testing.T, from, to *CRIPod) {
	t.Helper()
	if !to.IPv4.IsValid() || !to.IPv6.IsValid() {
		t.Fatalf("pod %s has addresses %v, want one of each family", to.Name, to.Addrs())
	}
	for _, a := range to.Addrs() {
		_, err := from.Exec(ctx, "ping", "-c", "1", "-W", "5", a.String())
		must(t, err)
		checkGet(ctx, t, from, netip.AddrPortFrom(a, webPort), to.Name)
	}
}

// checkGet has a pod ask a web server, which must be the other pod's. Debian's
// static busybox cannot do it with a timeout of its own.
func checkGet(ctx context.Context, t *testing.T, from *CRIPod, at netip.AddrPort, pod string) {
	t.Helper()
	out, err := from.Exec(ctx, "timeout", "10", "wget", "-q", "-O", "-", "http://"+at.String()+"/")
	must(t, err)
	if strings.TrimSpace(out) != pod {
		t.Errorf("%s answers %q, want %q", at, out, pod)
	}
}

// TestContainerdPods has containers on two hosts reach each other and those beside
// them, wired in both ways.
func TestContainerdPods(t *testing.T) {
	runtimes, ctx := startRuntimes(t, 2)
	for _, mode := range []string{"bridged", "routed"} {
		t.Run(mode, func(t *testing.T) {
			var before []string
			for _, r := range runtimes {
				must(t, r.InstallCNI(ctx, "--mode="+mode))
				before = append(before, used(ctx, t, r))
			}
			a, b := runPod(ctx, t, runtimes[0], "a", nil), runPod(ctx, t, runtimes[0], "b", nil)
			far := runPod(ctx, t, runtimes[1], "far", nil)
			for _, pair := range [][2]*CRIPod{{a, far}, {far, a}, {a, b}} {
				checkTalk(ctx, t, pair[0], pair[1])
			}
			out, err := runtimes[0].Run("ip", "-n", strings.TrimPrefix(a.NetNS, "/var/run/netns/"), "-4", "addr", "show", "eth0")
			must(t, err)
			if bits := map[string]string{"bridged": "/24", "routed": "/32"}[mode]; !strings.Contains(out, a.IPv4.String()+bits) {
				t.Errorf("the address of a %s pod is not a %s:\n%s", mode, bits, out)
			}
			for _, p := range []*CRIPod{a, b, far} {
				must(t, p.Remove(ctx))
			}
			for i, r := range runtimes {
				checkGone(t, r, before[i])
			}
		})
	}
}

// TestContainerdCtr has containerd's own tool run a container, without Kubernetes.
func TestContainerdCtr(t *testing.T) {
	runtimes, ctx := startRuntimes(t, 2)
	r := runtimes[0]
	before := used(ctx, t, r)
	far := runPod(ctx, t, runtimes[1], "far", nil)
	script := fmt.Sprintf("ping -c 1 -W 5 %s && ping -c 1 -W 5 %s && timeout 10 wget -q -O - http://%s:%d/", far.IPv4, far.IPv6, far.IPv4, webPort)
	out, err := r.Ctr("run", "--rm", "--cni", "--cgroup", r.cgroup+"/ctr", ImageRef, "ctr", "/bin/sh", "-c", script)
	must(t, err)
	if !strings.HasSuffix(strings.TrimSpace(out), "far") {
		t.Errorf("the container saw %q", out)
	}
	checkGone(t, r, before)
}

// TestContainerdMany makes and removes thirty pods at once; so it does with twilld
// and etcd away; and containerd is killed while they run.
func TestContainerdMany(t *testing.T) {
	runtimes, ctx := startRuntimes(t, 2)
	r := runtimes[0]
	before := used(ctx, t, r)
	far := runPod(ctx, t, runtimes[1], "far", nil)
	pods := make([]*CRIPod, 30)
	all := func(do func(i int) error) {
		t.Helper()
		var g errgroup.Group
		for i := range pods {
			g.Go(func() error { return do(i) })
		}
		must(t, g.Wait())
	}
	add := func(i int) (err error) {
		var edit func(*cri.PodSandboxConfig)
		if i%3 == 0 {
			edit = withPort(int32(9000 + i))
		}
		pods[i], err = r.RunSandbox(ctx, fmt.Sprintf("p%d", i), edit)
		return err
	}
	remove := func(i int) error { return pods[i].Remove(ctx) }
	check := func() {
		t.Helper()
		var addrs []string
		for _, p := range pods {
			addrs = append(addrs, p.IPv4.String(), p.IPv6.String())
		}
		_, err := far.Exec(ctx, "sh", "-c", "set -e; for a in "+strings.Join(addrs, " ")+"; do ping -c 1 -W 5 $a; done")
		must(t, err)
		slices.Sort(addrs)
		if n := len(slices.Compact(addrs)); n != 2*len(pods) {
			t.Errorf("%d pods have %d addresses", len(pods), n)
		}
	}
	all(add)
	check()
	all(remove)
	checkGone(t, r, before)

	must(t, r.Node.Daemon.Kill9())
	must(t, r.Node.cluster.Etcd.Stop())
	all(add)
	must(t, r.Kill9(ctx))
	check()
	web := runPod(ctx, t, r, "late", nil)
	checkTalk(ctx, t, far, web)
	must(t, web.Remove(ctx))
	all(remove)
	checkGone(t, r, before)
	must(t, r.Node.cluster.Etcd.Start(ctx))
}
