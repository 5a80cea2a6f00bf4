package e2e

import (
	"encoding/json"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	current "github.com/containernetworking/cni/pkg/types/100"

	"github.com/twill-net/twill/pkg/nettest"
)

// conflist is a network as a runtime finds it in /etc/cni/net.d.
const conflist = `{"cniVersion": "1.1.0", "name": "twill", "plugins": [{"type": "twill"}]}`

// TestCNITool has CNI's own runtime tool run every verb, with the daemon and etcd
// up and then without them.
func TestCNITool(t *testing.T) {
	tool := filepath.Join(t.TempDir(), "cnitool")
	if out, err := exec.Command("go", "build", "-o", tool, "github.com/containernetworking/cni/cnitool").CombinedOutput(); err != nil {
		t.Fatalf("build cnitool: %v: %s", err, out)
	}
	plugin := nettest.Build(t, "./plugins/twill")
	c, ctx := newCluster(t, Options{Hosts: 2, Config: ConfigDual})
	n, other := c.Nodes[0], c.Nodes[1]
	_, err := n.Run("sh", "-c", "mkdir -p /etc/cni/net.d && cat >/etc/cni/net.d/10-twill.conflist <<'EOT'\n"+conflist+"\nEOT")
	must(t, err)
	pod, err := n.NewPodNS("tool")
	must(t, err)
	run := func(verb string) (string, error) {
		return n.Run("env", "CNI_PATH="+filepath.Dir(plugin), "NETCONFPATH=/etc/cni/net.d", tool, verb, "twill", pod.Path)
	}
	before, err := n.dumpKernel()
	must(t, err)
	for _, verb := range []string{"add", "status"} { // too early
		out, err := run(verb)
		if err == nil || !containsAll(out+err.Error(), []string{"twill.json", "netctl status"}) {
			t.Errorf("%s before the daemon: %v: %s", verb, err, out)
		}
	}
	_, err = run("del")
	must(t, err)
	n.settled(t, before)

	must(t, c.Start(ctx))
	must(t, c.WaitPeers(ctx))
	far, err := other.AddPod("far")
	must(t, err)
	cycle := func() {
		t.Helper()
		_, err := run("status")
		must(t, err)
		before, err := n.dumpKernel()
		must(t, err)
		out, err := run("add")
		must(t, err)
		var r current.Result
		if err := json.Unmarshal([]byte(out), &r); err != nil || len(r.IPs) != 2 || r.CNIVersion != "1.1.0" {
			t.Fatalf("add prints %v: %s", err, out)
		}
		for _, verb := range []string{"check", "gc", "check", "status"} {
			if out, err := run(verb); verb != "gc" || err != nil {
				if err != nil {
					t.Errorf("%s: %v: %s", verb, err, out)
				}
				continue
			}
			must(t, n.awaitCollected())
			// cnitool knows of no attachment that is to stay, and deletes all.
			if _, err := pod.Run("ip", "link", "show", "eth0"); err == nil {
				t.Error("gc of all left eth0 in the pod")
			}
			_, err = run("add")
			must(t, err)
		}
		must(t, (&Pod{NS: pod, Node: n}).Ping(far.IPv4, 2, 56))
		must(t, (&Pod{NS: pod, Node: n}).Ping(far.IPv6, 2, 56))
		for range 2 {
			_, err = run("del")
			must(t, err)
		}
		must(t, n.awaitCollected())
		if out, err := run("check"); err == nil || !strings.Contains(out+err.Error(), "twill") {
			t.Errorf("check after del: %v: %s", err, out)
		}
		n.settled(t, before)
	}
	first, err := n.AddPod("first") // makes the bridge
	must(t, err)
	must(t, first.Delete())
	cycle()
	must(t, n.Daemon.Kill9())
	must(t, c.Etcd.Stop())
	cycle()
	must(t, c.Etcd.Start(ctx))
}
