package kernel

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/xtables"
)

// ourRules counts Twill's rules in a flavour.
func ourRules(t *testing.T, v xtables.Flavour) int {
	t.Helper()
	return strings.Count(sh(t, fmt.Sprintf("iptables-%s-save; ip6tables-%[1]s-save", v)), "TWILL-")
}

// TestFlavourOfNode starts on nodes that use one flavour, the other, or both.
func TestFlavourOfNode(t *testing.T) {
	const rule = "iptables-FLAVOUR -A INPUT -s 203.0.113.0/24 -j ACCEPT"
	for _, v := range []struct {
		name        string
		system      xtables.Flavour // of the command iptables
		nft, legacy string          // what is done with each; FLAVOUR stands for its name
		want        xtables.Flavour
	}{
		{"nothing says so, nft", xtables.Nft, "", "", xtables.Nft},
		{"nothing says so, legacy", xtables.Legacy, "", "", xtables.Legacy},
		{"hint in legacy", xtables.Nft, rule, "iptables-FLAVOUR -t mangle -N KUBE-IPTABLES-HINT", xtables.Legacy},
		{"hint in nft", xtables.Legacy, "iptables-FLAVOUR -t mangle -N KUBE-IPTABLES-HINT", rule, xtables.Nft},
		{"hint for IPv6 alone", xtables.Nft, "", "ip6tables-FLAVOUR -t mangle -N KUBE-IPTABLES-HINT", xtables.Legacy},
		{"an older kubelet", xtables.Nft, "", "iptables-FLAVOUR -t mangle -N KUBE-KUBELET-CANARY", xtables.Legacy},
		{"kube-proxy alone", xtables.Nft, "", "iptables-FLAVOUR -t mangle -N KUBE-PROXY-CANARY", xtables.Legacy},
		{"kubelet and kube-proxy differ", xtables.Nft, "iptables-FLAVOUR -t mangle -N KUBE-PROXY-CANARY", "iptables-FLAVOUR -t mangle -N KUBE-IPTABLES-HINT", xtables.Legacy},
		{"a hint in another table is none", xtables.Nft, "", "iptables-FLAVOUR -t nat -N KUBE-IPTABLES-HINT", xtables.Nft},
		{"our rules, and more of others", xtables.Legacy, "iptables-FLAVOUR -t nat -N TWILL-POSTRTG", rule + "; " + rule, xtables.Nft},
		{"flannel's rules", xtables.Nft, "", "ip6tables-FLAVOUR -t nat -N FLANNEL-POSTRTG", xtables.Legacy},
		{"more rules", xtables.Legacy, rule + "; " + rule, rule, xtables.Nft},
		{"more rules in legacy", xtables.Nft, rule, rule + "; " + rule, xtables.Legacy},
	} {
		t.Run(v.name, func(t *testing.T) {
			fwFlavour(t, string(v.system))
			fwNamespace(t)
			sh(t, strings.ReplaceAll(v.nft, "FLAVOUR", "nft"))
			sh(t, strings.ReplaceAll(v.legacy, "FLAVOUR", "legacy"))
			f := fwOpen(t)
			if f.flavours.used != v.want {
				t.Fatalf("uses %s, want %s", f.flavours.used, v.want)
			}
			fwReconcile(t, f, fwWanted(overlay.Iptables))
			if here, there := ourRules(t, v.want), ourRules(t, v.want.Other()); here == 0 || there != 0 {
				t.Errorf("%d rules of ours in %s, %d in the other", here, v.want, there)
			}
			if v.legacy == "" && v.want == xtables.Nft {
				if made := append(xtables.LegacyTables(overlay.IPv4), xtables.LegacyTables(overlay.IPv6)...); len(made) > 0 {
					t.Errorf("legacy tables were made: %q", made)
				}
			}
			if got := (&Kernel{firewall: f}).FirewallTool(overlay.Iptables); got != v.want.Tool() {
				t.Errorf("the plugin is told %s", got)
			}
		})
	}
}

// TestOneFlavourInstalled: a node may have the commands of one flavour, with or
// without its name, or none.
func TestOneFlavourInstalled(t *testing.T) {
	for _, v := range []struct {
		name  string
		names []string
		multi string
		want  xtables.Flavour
	}{
		{"an old system", []string{"", "-restore", "-save"}, "legacy", xtables.Legacy},
		{"a new system", []string{"", "-restore", "-save"}, "nft", xtables.Nft},
		{"named alone", []string{"-legacy", "-legacy-restore", "-legacy-save"}, "legacy", xtables.Legacy},
		{"none", nil, "nft", ""},
	} {
		t.Run(v.name, func(t *testing.T) {
			fwNamespace(t)
			dir := t.TempDir()
			for _, command := range []string{"iptables", "ip6tables"} {
				for _, name := range v.names {
					if err := os.Symlink("/usr/sbin/xtables-"+v.multi+"-multi", filepath.Join(dir, command+name)); err != nil {
						t.Fatal(err)
					}
				}
			}
			path := os.Getenv("PATH")
			t.Setenv("PATH", dir)
			t.Setenv("XTABLES_LOCKFILE", filepath.Join(dir, "lock"))
			f := fwOpen(t)
			if f.flavours.used != v.want || f.flavours.both {
				t.Fatalf("uses %q, both %t; want %q", f.flavours.used, f.flavours.both, v.want)
			}
			failures := f.apply(t.Context(), fwPlan(t, f, fwWanted(overlay.Iptables)))
			t.Setenv("PATH", path)
			if v.want == "" {
				if len(failures) == 0 || !strings.Contains(failures[0].Err.Error(), "install the iptables package") {
					t.Errorf("without iptables: %v", failures)
				}
			} else if len(failures) > 0 || ourRules(t, v.want) == 0 {
				t.Errorf("nothing written: %v", failures)
			}
		})
	}
}

// TestHintComesLater starts before kubelet does. Then kubelet, or somebody who
// changes the node's flavour, leaves the hint where we are not.
func TestHintComesLater(t *testing.T) {
	for _, before := range []xtables.Flavour{xtables.Nft, xtables.Legacy} {
		t.Run("from "+string(before), func(t *testing.T) {
			fwFlavour(t, string(before))
			fwNamespace(t)
			after := before.Other()
			f := fwOpen(t)
			want := fwWanted(overlay.Iptables)
			fwReconcile(t, f, want)
			sh(t, fmt.Sprintf("iptables-%s -t mangle -N X", after)) // the table is there, and says nothing
			if plan := fwPlan(t, f, want); len(plan) > 0 {
				t.Fatalf("without a hint:\n%s", plan)
			}
			sh(t, fmt.Sprintf("iptables-%s -t mangle -N KUBE-IPTABLES-HINT; iptables-%[1]s -t nat -N FLANNEL-POSTRTG", after))
			fwReconcile(t, f, want)
			if f.flavours.used != after || ourRules(t, after) == 0 || ourRules(t, before) != 0 {
				t.Errorf("uses %s, with %d rules; %d are in %s", f.flavours.used, ourRules(t, after), ourRules(t, before), before)
			}
			if text := sh(t, fmt.Sprintf("iptables-%s-save", after)); strings.Contains(text, "FLANNEL") {
				t.Errorf("flannel's chain stays:\n%s", text)
			}
			// Healing goes on in the new one.
			sh(t, fmt.Sprintf("iptables-%s -t nat -F TWILL-POSTRTG", after))
			if plan := fwPlan(t, f, want); len(plan) != 1 {
				t.Errorf("flushed chain, got plan:\n%s", plan)
			}
			fwReconcile(t, f, want)
		})
	}
}

// TestFlannelOfOtherFlavour: flannel's chains in the flavour that is not used go when
// ours stand.
func TestFlannelOfOtherFlavour(t *testing.T) {
	fwFlavour(t, "nft")
	fwNamespace(t)
	sh(t, `iptables-nft -t mangle -N KUBE-IPTABLES-HINT
		iptables-legacy -t nat -N FLANNEL-POSTRTG
		iptables-legacy -t nat -A FLANNEL-POSTRTG -s 10.5.0.0/16 -j MASQUERADE
		iptables-legacy -t nat -A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG`)
	f := fwOpen(t)
	fwReconcile(t, f, fwWanted(overlay.Iptables))
	if text := sh(t, "iptables-legacy-save"); strings.Contains(text, "FLANNEL") {
		t.Errorf("it stays:\n%s", text)
	}
	if len(f.problems) > 0 {
		t.Errorf("told of: %v", f.problems)
	}
}

// TestBothFlavoursInUse has others' rules in both.
func TestBothFlavoursInUse(t *testing.T) {
	for _, used := range []xtables.Flavour{xtables.Nft, xtables.Legacy} {
		t.Run(string(used), func(t *testing.T) {
			fwFlavour(t, string(used))
			fwNamespace(t)
			other := used.Other()
			sh(t, fmt.Sprintf("iptables-%s -t mangle -N KUBE-IPTABLES-HINT; iptables-%[1]s -A INPUT -j ACCEPT; iptables-%[1]s -A INPUT -j ACCEPT", used))
			sh(t, fmt.Sprintf("iptables-%s -t nat -A OUTPUT -j ACCEPT", other))
			sh(t, fmt.Sprintf("ip6tables-%s -A INPUT -j ACCEPT; ip6tables-%[1]s -A INPUT -j ACCEPT", other))
			k := &Kernel{firewall: fwOpen(t)}
			fwReconcile(t, k.firewall, fwWanted(overlay.Iptables))
			problems := k.Problems()
			if len(problems) != 1 {
				t.Fatalf("got %v", problems)
			}
			for _, words := range []string{
				fmt.Sprintf("2 rules in iptables-%s, as Twill, and 3 in iptables-%s", used, other),
				fmt.Sprintf("(iptables-%s-save, ip6tables-%[1]s-save)", other), "--set iptables /usr/sbin/iptables-" + string(used),
			} {
				if !strings.Contains(problems[0].String(), words) {
					t.Errorf("%s\nwant %q", problems[0], words)
				}
			}
			// Who puts it in order is told no more. Legacy's rules are seen though
			// they send no event.
			sh(t, fmt.Sprintf("iptables-%s -t nat -F OUTPUT; ip6tables-%[1]s -F INPUT", other))
			fwReconcile(t, k.firewall, fwWanted(overlay.Iptables))
			if problems := k.Problems(); len(problems) > 0 {
				t.Errorf("still %v", problems)
			}
		})
	}
}
