package e2e

import (
	"strings"
	"testing"
)

// TestIptablesFlavours starts twilld before kubelet has said which flavour of
// iptables the node uses, and has another program use the other.
func TestIptablesFlavours(t *testing.T) {
	c, ctx := newCluster(t, Options{Hosts: 1, Config: ConfigDual})
	n := c.Nodes[0]
	must(t, c.Start(ctx))
	waitFor := func(what, command, want string) {
		t.Helper()
		var last string
		err := Eventually(ctx, func() bool { last, _ = n.Run("sh", "-c", command); return strings.Contains(last, want) })
		if err != nil {
			t.Fatalf("%s: %v: want %q in\n%s", what, err, want, last)
		}
	}
	waitFor("before the hint", "cat /run/flannel/twill.json", `"firewall": "iptables-nft"`)
	// The change in nft rings; legacy's hint by itself would be found in 30 s.
	n.shell(t, "iptables-legacy -t mangle -N KUBE-IPTABLES-HINT; ip6tables-legacy -t mangle -N KUBE-IPTABLES-HINT; iptables-nft -t nat -A POSTROUTING -s 203.0.113.9 -j RETURN")
	waitFor("after the hint", "cat /run/flannel/twill.json", `"firewall": "iptables-legacy"`)
	waitFor("after the hint", "iptables-legacy-save; ip6tables-legacy-save", "TWILL-POSTRTG")
	if left := n.shell(t, "iptables-nft-save; ip6tables-nft-save"); strings.Contains(left, "TWILL") || !strings.Contains(left, "203.0.113.9") {
		t.Errorf("in the flavour that was left:\n%s", left)
	}
	waitFor("rules in both", "netctl status", "0 rules in iptables-legacy, as Twill, and 1 in iptables-nft")
	n.shell(t, "iptables-nft -t nat -D POSTROUTING -s 203.0.113.9 -j RETURN")
	if err := Eventually(ctx, func() bool {
		out, err := n.Run("netctl", "status")
		return err == nil && !strings.Contains(out, "iptables")
	}); err != nil {
		t.Errorf("the problem stays: %v", err)
	}
}
