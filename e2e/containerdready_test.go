package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestContainerdNotReady has containerd say why there are no pods yet: without a
// network in its Status, which does not ask the plugin, and without twilld in the
// plugin's words. What it then keeps of such pods can be removed.
func TestContainerdNotReady(t *testing.T) {
	c, runtimes, ctx := newRuntimes(t, 1)
	r := runtimes[0]
	refused := func(name string, words ...string) {
		t.Helper()
		if _, err := r.RunSandbox(ctx, name, nil); err == nil || !containsAll(err.Error(), words) {
			t.Errorf("pod %s gets %v, want %q", name, err, words)
		}
	}
	ready := func(want bool) {
		t.Helper()
		if got, message, err := r.NetworkReady(ctx); err != nil || got != want {
			t.Errorf("NetworkReady is %t: %s, %v", got, message, err)
		}
	}
	ready(false)
	refused("no-network", "cni plugin not initialized")
	must(t, r.InstallCNI(ctx))
	ready(true)
	refused("no-twilld", "twill.json", "netctl status")
	r.checkNone(ctx, t)

	must(t, c.Start(ctx))
	before := used(ctx, t, r)
	p := runPod(ctx, t, r, "p", nil)
	// Who takes the network away takes the means to remove pods away.
	r.Node.shell(t, "rm /etc/cni/net.d/*")
	must(t, Eventually(ctx, func() bool { ready, _, err := r.NetworkReady(ctx); return err == nil && !ready }))
	if err := p.Remove(ctx); err == nil {
		t.Error("containerd removes a pod without a network, so it did not delete it")
	}
	must(t, r.InstallCNI(ctx))
	must(t, p.Remove(ctx))
	checkGone(t, r, before)
}

// checkNone removes what containerd has kept of sandboxes that it could not make, as
// kubelets do, and fails if something is left.
func (c *Containerd) checkNone(ctx context.Context, t *testing.T) {
	t.Helper()
	r, err := c.Runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	must(t, err)
	for _, s := range r.Items {
		must(t, (&CRIPod{Name: s.Metadata.Name, ID: s.Id, runtime: c}).Remove(ctx))
	}
	checkEmpty(t, c)
}

// TestContainerdVersions has pods made by every version of the specification that
// Debian's containerd reads. Of a newer one it says so only when the first pod
// comes, and has it deleted.
func TestContainerdVersions(t *testing.T) {
	runtimes, ctx := startRuntimes(t, 1)
	r := runtimes[0]
	before, installed := used(ctx, t, r), r.Node.shell(t, "cat "+networkFile)
	for _, version := range []string{"", "0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		must(t, r.SetNetwork(ctx, fmt.Sprintf(`{"cniVersion": %q, "name": "cbr0", "plugins": [{"type": "twill"}]}`, version)))
		p, err := r.RunSandbox(ctx, "v"+version, nil)
		if version == "1.1.0" {
			// So it is not the version that twilld installs.
			if err == nil || !strings.Contains(err.Error(), "unsupported CNI result version") {
				t.Errorf("containerd reads a result of version %s: %v", version, err)
			}
			continue
		}
		must(t, err)
		if len(p.Addrs()) != 2 {
			t.Errorf("by version %q a pod has addresses %v, want two", version, p.Addrs())
		}
		must(t, p.Remove(ctx))
	}
	must(t, r.SetNetwork(ctx, installed))
	checkGone(t, r, before)
}
