package e2e

import (
	"errors"
	"os/exec"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// cleanup runs twilld --cleanup on the node.
func (n *Node) cleanup(t *testing.T) (out string, code int, stderr string) {
	t.Helper()
	path, err := nettest.BuildProgram("./daemon/cmd/twilld")
	must(t, err)
	out, err = n.Run(path, "--cleanup")
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return out, exit.ExitCode(), err.Error()
	}
	must(t, err)
	return out, 0, ""
}

// wholeDump prints all there is in a host's kernel, Twill's and flannel's too, but
// what changes by itself.
const wholeDump = `set -e
for i in $(seq 50); do [ -n "$(ip -6 -o addr show tentative)" ] || break; sleep 0.1; done
ip -d link | sed -e 's/[a-z_]*timer *[0-9.]*//g'
ip -d addr | sed -e 's/[a-z_]*timer *[0-9.]*//g'
for f in -4 -6; do ip $f route show table all; ip $f rule; ip $f neigh show nud permanent; ip $f nexthop; done
bridge fdb
for s in iptables-save ip6tables-save; do for t in nat filter; do $s -t $t | sed -e '/^#/d' -e 's/ \[[0-9:]*\]$//'; done; done
nft list ruleset | sed -e 's/packets [0-9]* bytes [0-9]*//'
ls -A /run/flannel /run/twill
`

// TestCleanup starts twilld with two peers on a host that holds all kinds of
// foreign objects, ends it and cleans up: the host is as it was.
func TestCleanup(t *testing.T) {
	for _, tool := range []overlay.Tool{overlay.Iptables, overlay.Nftables} {
		t.Run(string(tool), func(t *testing.T) {
			config := ConfigDual
			if tool == overlay.Nftables {
				config = with(config, `"EnableNFTables": true`)
			}
			c, ctx := newCluster(t, Options{Hosts: 3, Config: config})
			n := c.Nodes[0]
			n.shell(t, foreignSetup)
			// Switches, not objects: Twill leaves forwarding on, and IPv6 then
			// makes the kernel join groups on every link.
			n.shell(t, "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding")
			before := n.shell(t, wholeDump)
			must(t, c.Start(ctx))
			must(t, c.WaitPeers(ctx))
			state := newObserver(t, n).look(t)

			running := n.shell(t, wholeDump)
			if out, code, stderr := n.cleanup(t); code != 1 || !strings.Contains(stderr, "another twilld runs") {
				t.Errorf("cleanup beside a daemon exits with %d: %s%s", code, out, stderr)
			}
			if now := n.shell(t, wholeDump); now != running {
				t.Errorf("the refused cleanup changed something: %s", firstDifference(running, now))
			}
			must(t, n.Daemon.Term())
			checkCleanup(t, n, state)
			if now := n.shell(t, wholeDump); now != before {
				t.Errorf("not as before Twill: %s", firstDifference(before, now))
			}
		})
	}
}

// checkCleanup cleans up, twice, and checks that what is printed is all there was.
func checkCleanup(t *testing.T, n *Node, was overlay.State) {
	t.Helper()
	out, code, stderr := n.cleanup(t)
	if code != 0 {
		t.Fatalf("cleanup exits with %d: %s", code, stderr)
	}
	t.Logf("cleanup printed:\n%s", out)
	plan, _ := overlay.Diff(was, overlay.State{})
	for _, op := range plan {
		if !strings.Contains(out, op.String()+"\n") {
			t.Errorf("not printed: %s", op)
		}
	}
	if len(plan) == 0 {
		t.Error("there was nothing to clean up")
	}
	for _, file := range []string{"subnet.env", "twill.json"} {
		if !strings.Contains(out, "file delete /run/flannel/"+file) {
			t.Errorf("%s is not printed", file)
		}
	}
	if out, code, stderr := n.cleanup(t); code != 0 || out != "nothing of Twill's is in the kernel\n" {
		t.Errorf("second cleanup exits with %d: %s%s", code, out, stderr)
	}
}

// TestCleanupOfAdopted cleans up after a Twill that took over from flannel:
// flannel's things are Twill's then, and the pod's wiring is neither's.
func TestCleanupOfAdopted(t *testing.T) {
	c, ctx := newCluster(t, Options{Hosts: 2, Config: ConfigDual})
	f, _ := startBesideFlannel(ctx, t, c, true, false)
	f.shell(t, foreignSetup)
	foreign := f.shell(t, foreignDump)
	must(t, f.Start())
	must(t, f.WaitReady(ctx))
	must(t, f.WaitInSync(ctx))
	state := newObserver(t, f.Node).look(t)
	must(t, f.Daemon.Term())
	checkCleanup(t, f.Node, state)
	left := f.shell(t, wholeDump)
	for _, bad := range []string{"flannel.1", "flannel-v6.1", "TWILL", "FLANNEL", "proto 84", "alias twill", "table ip twill", "twill.json", "subnet.env"} {
		if strings.Contains(left, bad) {
			t.Errorf("%q is left:\n%s", bad, left)
		}
	}
	if now := f.shell(t, foreignDump); now != foreign {
		t.Errorf("what is not Twill's has changed: %s", firstDifference(foreign, now))
	}
	if !strings.Contains(left, "10.5.177.0/24 dev cni0") {
		t.Errorf("the pods' bridge has gone:\n%s", left)
	}
}
