package kubernetes

import (
	"context"
	"net/netip"
	"strings"
	"testing"

	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestNoPodCIDR has a controller manager that gives nodes no podCIDR: everybody says so,
// and with own allocation each node has a subnet of its own.
func TestNoPodCIDR(t *testing.T) {
	c := Start(t, Options{CNI: "none", NoPodCIDRs: true})
	archive, ref, err := c.Image()
	must(t, err)
	must(t, c.each(func(n *Node) error { return n.ImportImage(archive) }))

	_, err = c.NetctlInstall(c.NetConf(), "--image", ref)
	checkError(t, "netctl install", err, "no podCIDR on n1 (IPv4), n2 (IPv4), n3 (IPv4)",
		"start kube-controller-manager with --allocate-node-cidrs=true --cluster-cidr=10.244.0.0/16", "--set twill.allocateSubnets=true")
	if out, err := c.Kubectl("get", "daemonsets", "-A", "-o", "name"); err != nil || strings.TrimSpace(out) != "" {
		t.Errorf("netctl install has made objects: %s %v", out, err)
	}

	b := &bad{life: &life{Cluster: c}}
	const reason = "has no podCIDR; start kube-controller-manager with --allocate-node-cidrs and --cluster-cidr=10.244.0.0/16, or every twilld with --kube-allocate-subnets"
	_, err = c.NetctlInstall(c.NetConf(), "--image", ref, "--skip-checks", "--wait=5s")
	checkError(t, "netctl install --skip-checks", err, "wait for the rollout", "n3: ")
	b.logs(t, "twilld", "node n2 "+reason)
	must(t, c.Apply(client))
	b.says(t, "events of the kubelet", func(context.Context) (string, error) {
		return c.Kubectl("get", "events", "-A", "--field-selector=reason=FailedCreatePodSandBox")
	}, "node n1 "+reason, "node n2 "+reason, "node n3 "+reason)

	_, err = c.NetctlInstall(c.NetConf(), "--image", ref, "--set", "twill.allocateSubnets=true")
	must(t, err)
	b.pods = c.clients(t)
	c.checkReach(t, b.pods, b.pods)
	seen := map[string]string{}
	for _, n := range c.Nodes {
		object, err := c.Client.CoreV1().Nodes().Get(t.Context(), n.Name, meta.GetOptions{})
		must(t, err)
		cidr := object.Spec.PodCIDR
		if p, err := netip.ParsePrefix(cidr); err != nil || p.Bits() != 24 || !netip.MustParsePrefix(podsIPv4).Contains(p.Addr()) || seen[cidr] != "" {
			t.Errorf("%s has podCIDR %q; others have %v", n.Name, cidr, seen)
		}
		seen[cidr] = n.Name
	}
}
