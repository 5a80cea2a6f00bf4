package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestContainerdHostPort reaches a pod by a port of its node.
func TestContainerdHostPort(t *testing.T) {
	runtimes, ctx := startRuntimes(t, 2)
	r, other := runtimes[0], runtimes[1]
	far := runPod(ctx, t, other, "far", nil)
	for _, mode := range []string{"bridged", "routed"} {
		must(t, r.InstallCNI(ctx, "--mode="+mode))
		before := used(ctx, t, r)
		web := runPod(ctx, t, r, "web", withPort(8090))
		checkHostPort(ctx, t, web, far, 8090)
		must(t, web.Remove(ctx))
		checkGone(t, r, before)
	}
}

// checkHostPort asks a node's port from the node itself, also by its loopback address,
// from the other host, and from pods of both.
func checkHostPort(ctx context.Context, t *testing.T, web, far *CRIPod, port uint16) {
	t.Helper()
	ask := func(from *Node, at netip.AddrPort) {
		t.Helper()
		out, err := from.Run("timeout", "10", "busybox", "wget", "-q", "-O", "-", "http://"+at.String()+"/")
		must(t, err)
		if strings.TrimSpace(out) != web.Name {
			t.Errorf("%s answers %q to %s, want %q", at, out, from.Name, web.Name)
		}
	}
	node := web.runtime.Node
	ask(node, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port))
	for _, a := range []netip.Addr{node.IPv4, node.IPv6} {
		at := netip.AddrPortFrom(a, port)
		ask(node, at)
		ask(far.runtime.Node, at)
		checkGet(ctx, t, far, at, web.Name)
		checkGet(ctx, t, web, at, web.Name)
	}
}

// TestContainerdBandwidth limits a pod by the annotations that Kubernetes has for
// it: what goes to the pod on the host's end of its link, what it sends on a link
// that it must pass.
func TestContainerdBandwidth(t *testing.T) {
	runtimes, ctx := startRuntimes(t, 1)
	r := runtimes[0]
	before := used(ctx, t, r)
	p := runPod(ctx, t, r, "slow", slow)
	checkLimits(t, r.Node)
	must(t, p.Remove(ctx))
	checkGone(t, r, before)
	if _, err := r.RunSandbox(ctx, "bad", annotated("kubernetes.io/ingress-bandwidth", "much")); err == nil {
		t.Error("containerd takes any bandwidth")
	}
}

// slow asks for limits as Kubernetes does.
func slow(c *cri.PodSandboxConfig) {
	c.Annotations["kubernetes.io/ingress-bandwidth"] = "10M"
	c.Annotations["kubernetes.io/egress-bandwidth"] = "5M"
}

// checkLimits fails unless there are token buckets for what slow asks for.
func checkLimits(t *testing.T, n *Node) {
	t.Helper()
	out := n.shell(t, "tc qdisc show")
	for _, rate := range []string{"10Mbit", "5Mbit"} {
		if !regexp.MustCompile(`(?m)^qdisc tbf .* rate ` + rate).MatchString(out) {
			t.Errorf("nothing on %s limits a pod to %s:\n%s", n.Name, rate, out)
		}
	}
}

// TestContainerdAddress gives a pod the addresses that its annotation asks for, and
// refuses those that another has or that are of another node.
func TestContainerdAddress(t *testing.T) {
	runtimes, ctx := startRuntimes(t, 1)
	r := runtimes[0]
	before := used(ctx, t, r)
	first := runPod(ctx, t, r, "first", nil)
	v4, v6 := first.IPv4.As4(), first.IPv6.As16()
	v4[3], v6[15] = 99, 99
	want := []netip.Addr{netip.AddrFrom4(v4), netip.AddrFrom16(v6)}
	const addresses = "twill.net/addresses"
	p := runPod(ctx, t, r, "asks", annotated(addresses, fmt.Sprintf("%s,%s", want[0], want[1])))
	if p.IPv4 != want[0] || p.IPv6 != want[1] {
		t.Errorf("the pod has %v, want %v", p.Addrs(), want)
	}
	checkTalk(ctx, t, first, p)
	for _, ask := range []string{want[0].String(), "198.18.0.9", "everything"} {
		if _, err := r.RunSandbox(ctx, "asks-"+ask, annotated(addresses, ask)); err == nil || !strings.Contains(err.Error(), ask) {
			t.Errorf("a pod that asks for %s gets %v", ask, err)
		}
	}
	must(t, p.Remove(ctx))
	must(t, first.Remove(ctx))
	checkGone(t, r, before)
}

// TestContainerdChain puts Debian's plugins behind Twill's, as people have them
// behind flannel's.
func TestContainerdChain(t *testing.T) {
	runtimes, ctx := startRuntimes(t, 2)
	r := runtimes[0]
	must(t, r.SetNetwork(ctx, `{"cniVersion": "1.0.0", "name": "cbr0", "plugins": [
		{"type": "twill"},
		{"type": "portmap", "capabilities": {"portMappings": true}},
		{"type": "bandwidth", "capabilities": {"bandwidth": true}},
		{"type": "tuning", "sysctl": {"net.core.somaxconn": "500"}}]}`))
	before := used(ctx, t, r)
	far := runPod(ctx, t, runtimes[1], "far", nil)
	p := runPod(ctx, t, r, "p", func(c *cri.PodSandboxConfig) {
		withPort(8090)(c)
		slow(c)
	})
	checkTalk(ctx, t, far, p)
	checkTalk(ctx, t, p, far)
	checkHostPort(ctx, t, p, far, 8090)
	if out, err := p.Exec(ctx, "cat", "/proc/sys/net/core/somaxconn"); err != nil || out != "500\n" {
		t.Errorf("somaxconn in the pod is %q, %v", out, err)
	}
	checkLimits(t, r.Node)
	must(t, p.Remove(ctx))
	checkGone(t, r, before)
}
