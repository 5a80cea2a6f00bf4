package kernel

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netns"

	"github.com/twill-net/twill/pkg/overlay"
)

// fwNamespace puts the test into a network namespace of its own, which ends with
// the test's thread.
func fwNamespace(t testing.TB) {
	t.Helper()
	runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
}

// fwFlavour makes iptables in PATH one of the given flavour, with a lock that no
// other program on the machine takes.
func fwFlavour(t testing.TB, flavour string) {
	t.Helper()
	dir := t.TempDir()
	for _, command := range []string{"iptables", "ip6tables"} {
		for _, suffix := range []string{"", "-save", "-restore"} {
			if err := os.Symlink("/usr/sbin/xtables-"+flavour+"-multi", filepath.Join(dir, command+suffix)); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	t.Setenv("XTABLES_LOCKFILE", filepath.Join(dir, "lock"))
}

// sh runs commands in the namespace of the calling thread.
func sh(t testing.TB, script string) string {
	t.Helper()
	out, err := exec.Command("sh", "-ec", script).CombinedOutput()
	if err != nil {
		t.Fatalf("%s\n%v\n%s", script, err, out)
	}
	return string(out)
}

func fwOpen(t testing.TB) *firewall {
	t.Helper()
	f, err := newFirewall(Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.close() })
	return f
}

// fwChain makes a wanted chain.
func fwChain(tool overlay.Tool, family overlay.Family, name string, rules ...string) overlay.Chain {
	c := overlay.Chain{Tool: tool, Family: family, Table: "nat", Name: name, Hook: "POSTROUTING", Rules: rules}
	if name == overlay.ForwardChain {
		c.Table, c.Hook = "filter", "FORWARD"
	}
	if tool == overlay.Nftables {
		c.Table = overlay.NftTable
	}
	var hashes []string
	for _, r := range rules {
		hashes = append(hashes, overlay.RuleHash(r))
	}
	c.Hash = overlay.ChainHash(hashes)
	return c
}

// fwWanted is what the overlay wants, in both families.
func fwWanted(tool overlay.Tool) []overlay.Chain {
	var out []overlay.Chain
	for _, v := range []struct {
		family        overlay.Family
		nft           string
		pods, cluster string
		multicast     string
	}{
		{overlay.IPv4, "ip", "10.5.1.0/24", "10.5.0.0/16", "224.0.0.0/4"},
		{overlay.IPv6, "ip6", "fd00:5:0:1::/64", "fd00:5::/48", "ff00::/8"},
	} {
		words := strings.NewReplacer("PODS", v.pods, "CLUSTER", v.cluster, "MULTICAST", v.multicast, "IP", v.nft)
		post := []string{
			"-m mark --mark 0x4000/0x4000 -j RETURN",
			"-s PODS -d CLUSTER -j RETURN",
			"! -s CLUSTER -d PODS -j RETURN",
			"-s CLUSTER ! -d MULTICAST -j MASQUERADE --random-fully",
		}
		forward := []string{"-s CLUSTER -j ACCEPT", "-d CLUSTER -j ACCEPT"}
		if tool == overlay.Nftables {
			post = []string{
				"meta mark & 0x4000 == 0x4000 return",
				"IP saddr PODS IP daddr CLUSTER return",
				"IP saddr != CLUSTER IP daddr PODS return",
				"IP saddr CLUSTER IP daddr != MULTICAST masquerade fully-random",
			}
			forward = []string{"IP saddr CLUSTER accept", "IP daddr CLUSTER accept"}
		}
		for i := range post {
			post[i] = words.Replace(post[i])
		}
		for i := range forward {
			forward[i] = words.Replace(forward[i])
		}
		out = append(out, fwChain(tool, v.family, overlay.PostroutingChain, post...), fwChain(tool, v.family, overlay.ForwardChain, forward...))
	}
	return out
}

func fwPlan(t testing.TB, f *firewall, want []overlay.Chain) overlay.Plan {
	t.Helper()
	have, err := f.observe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	h, w := overlay.State{Chains: have}, overlay.State{Chains: slices.Clone(want)}
	h.Normalize()
	w.Normalize()
	plan, problems := overlay.Diff(h, w)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	return plan
}

// fwReconcile makes the firewall hold want, and fails unless one apply does it.
func fwReconcile(t testing.TB, f *firewall, want []overlay.Chain) {
	t.Helper()
	for _, failure := range f.apply(t.Context(), fwPlan(t, f, want)) {
		t.Fatalf("%s: %v", failure.Op, failure.Err)
	}
	if plan := fwPlan(t, f, want); len(plan) > 0 {
		t.Fatalf("second plan is not empty:\n%s\n%s", plan, sh(t, "iptables-save; ip6tables-save; nft list ruleset"))
	}
}

// fwForeign are rules of others, and fwSnapshot everything that is installed.
const fwForeign = `
for i in iptables ip6tables; do
	$i -t nat -N KUBE-POSTROUTING
	$i -t nat -A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
	$i -t nat -A POSTROUTING -p udp --dport 53 -m comment --comment "it's \"quoted\"" -j RETURN
	$i -A FORWARD -p tcp -m conntrack --ctstate INVALID -j DROP
	$i -P FORWARD DROP
done
nft add table inet foreign
nft add chain inet foreign post '{ type nat hook postrouting priority 90; }'
nft add rule inet foreign post ip saddr 192.0.2.0/24 return comment '"foreign"'`

func fwSnapshot(t testing.TB) string {
	t.Helper()
	text := sh(t, "iptables-save; ip6tables-save; nft list table inet foreign; nft list tables")
	return regexp.MustCompile(`(?m)^#.*\n`).ReplaceAllString(text, "")
}

// fwKind is one way in which the chains can be installed.
type fwKind struct {
	name, flavour string
	tool          overlay.Tool
	sabotage      map[string]string
}

func fwKinds() []fwKind {
	ipt := map[string]string{
		"chain flushed":             "IPT -t nat -F TWILL-POSTRTG",
		"forward chain flushed":     "IPT -F TWILL-FWD",
		"jump deleted":              "IPT -t nat -D POSTROUTING -m comment --comment twill:jump -j TWILL-POSTRTG",
		"rule deleted":              "IPT -t nat -D TWILL-POSTRTG 2",
		"rule inserted":             "IPT -t nat -I TWILL-POSTRTG 2 -p tcp -j ACCEPT",
		"rule with a wrong comment": "IPT -t nat -R TWILL-POSTRTG 1 -m comment --comment twill:0000 -p udp --dport 53 -j RETURN",
		"table flushed":             "IPT -t nat -F",
		"table emptied":             "IPT -t nat -F; IPT -t nat -X",
		"jump duplicated":           "IPT -t nat -A POSTROUTING -m comment --comment twill:jump -j TWILL-POSTRTG",
		"second jump, not ours":     "IPT -t nat -I POSTROUTING -p tcp -j TWILL-POSTRTG",
		"jump narrowed":             "IPT -F FORWARD; IPT -A FORWARD -p tcp -m comment --comment twill:jump -j TWILL-FWD",
		"jump made a goto":          "IPT -F FORWARD; IPT -A FORWARD -m comment --comment twill:jump -g TWILL-FWD",
	}
	mixed := map[string]string{
		"table deleted":                 "nft delete table NFT nat",
		"rule iptables does not know":   "nft add rule NFT nat TWILL-POSTRTG tcp dport '{ 80, 90 }' ct count over 3 drop",
		"rule that iptables cannot say": "nft add set NFT nat s '{ type mark; }'; nft add rule NFT nat TWILL-POSTRTG meta mark @s drop",
	}
	for name, script := range ipt {
		mixed[name] = script
	}
	nft := map[string]string{
		"chain flushed":        "nft flush chain NFT twill TWILL-POSTRTG",
		"rule deleted":         "nft delete rule NFT twill TWILL-POSTRTG handle $(nft -a list chain NFT twill TWILL-POSTRTG | sed -n 's/.*masquerade.*handle //p')",
		"rule inserted":        "nft insert rule NFT twill TWILL-FWD drop",
		"rule, another's":      "nft add rule NFT twill TWILL-FWD drop comment '\"twilly\"'",
		"table flushed":        "nft flush table NFT twill",
		"table deleted":        "nft delete table NFT twill",
		"chain deleted":        "nft delete chain NFT twill TWILL-FWD",
		"chain unhooked":       "nft delete chain NFT twill TWILL-FWD; nft add chain NFT twill TWILL-FWD",
		"chain hooked earlier": "nft delete chain NFT twill TWILL-POSTRTG; nft add chain NFT twill TWILL-POSTRTG '{ type nat hook postrouting priority 90; }'",
		"policy drop":          "nft add chain NFT twill TWILL-FWD '{ policy drop; }'",
		"chain added":          "nft add chain NFT twill extra '{ type filter hook forward priority 5; }'",
	}
	return []fwKind{
		{"iptables-nft", "nft", overlay.Iptables, mixed},
		{"iptables-legacy", "legacy", overlay.Iptables, ipt},
		{"nftables", "nft", overlay.Nftables, nft},
	}
}

// TestFirewallSabotage breaks the installed chains in every way and sees watch
// ring, observe notice and one apply repair.
func TestFirewallSabotage(t *testing.T) {
	for _, kind := range fwKinds() {
		t.Run(kind.name, func(t *testing.T) {
			fwFlavour(t, kind.flavour)
			fwNamespace(t)
			f := fwOpen(t)
			want := fwWanted(kind.tool)
			fwReconcile(t, f, want)
			for name, script := range kind.sabotage {
				for _, words := range []*strings.Replacer{
					strings.NewReplacer("IPT", "iptables", "NFT", "ip"),
					strings.NewReplacer("IPT", "ip6tables", "NFT", "ip6"),
				} {
					rings, stop := fwWatch(t)
					script := words.Replace(script)
					sh(t, script)
					select {
					case <-rings:
					case <-time.After(20 * time.Second):
						t.Errorf("%s: %s: watch did not ring", name, script)
					}
					stop()
					if plan := fwPlan(t, f, want); len(plan) == 0 {
						t.Errorf("%s: %s: not noticed", name, script)
					}
					fwReconcile(t, f, want)
				}
			}
		})
	}
}

// fwWatch watches from a firewall of its own, past the ring of the beginning.
func fwWatch(t *testing.T) (rings <-chan string, stop func()) {
	t.Helper()
	w := fwOpen(t)
	bell := make(chan string, 1)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		done <- w.watch(ctx, func(reason string) {
			select {
			case bell <- reason:
			default:
			}
		})
	}()
	<-bell
	return bell, func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		w.close()
	}
}

// TestFirewallForeign installs, changes and removes our chains beside those of
// others, which stay byte for byte.
func TestFirewallForeign(t *testing.T) {
	for _, kind := range fwKinds() {
		t.Run(kind.name, func(t *testing.T) {
			fwFlavour(t, kind.flavour)
			fwNamespace(t)
			sh(t, fwForeign)
			before := fwSnapshot(t)
			f := fwOpen(t)
			fwReconcile(t, f, nil)
			want := fwWanted(kind.tool)
			fwReconcile(t, f, want)
			if during := fwSnapshot(t); during == before {
				t.Fatal("nothing was installed")
			}
			if kind.tool == overlay.Iptables {
				post := strings.Split(strings.TrimSpace(sh(t, "iptables -t nat -S POSTROUTING")), "\n")
				if last := post[len(post)-1]; !strings.Contains(last, "twill:jump") {
					t.Errorf("the jump is not the last rule: %q", post)
				}
				sh(t, "iptables -t nat -A POSTROUTING -m comment --comment twill:jump -j TWILL-POSTRTG") // both must go
			}
			fwReconcile(t, f, want[1:])
			fwReconcile(t, f, nil)
			if after := fwSnapshot(t); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
			var deletions []overlay.Op
			for _, c := range want {
				deletions = append(deletions, overlay.Op{Verb: overlay.Delete, Object: c, Before: c})
			}
			for _, failure := range f.apply(t.Context(), deletions) {
				t.Errorf("delete what is absent: %s: %v", failure.Op, failure.Err)
			}
			if after := fwSnapshot(t); after != before {
				t.Errorf("deleting what is absent changed something:\n%s", after)
			}
		})
	}
}

const fwFlannel = `
for i in iptables ip6tables; do
	$i -t nat -N FLANNEL-POSTRTG
	$i -t nat -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
	$i -t nat -A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
	$i -N FLANNEL-FWD
	$i -A FLANNEL-FWD -m comment --comment "flanneld forward" -j ACCEPT
	$i -A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
done
nft add table ip flannel-ipv4
nft add chain ip flannel-ipv4 postrtg '{ type nat hook postrouting priority srcnat; }'
nft add rule ip flannel-ipv4 postrtg masquerade
nft add table ip6 flannel-ipv6`

// TestFirewallFlannel takes a node over from flannel.
func TestFirewallFlannel(t *testing.T) {
	for _, kind := range fwKinds() {
		t.Run(kind.name, func(t *testing.T) {
			fwFlavour(t, kind.flavour)
			fwNamespace(t)
			sh(t, fwForeign)
			before := fwSnapshot(t)
			sh(t, fwFlannel)
			f := fwOpen(t)
			plan := fwPlan(t, f, nil)
			if len(plan) != 6 {
				t.Errorf("want 6 deletions, got:\n%s", plan)
			}
			fwReconcile(t, f, fwWanted(kind.tool))
			if text := sh(t, "iptables-save; ip6tables-save; nft list tables"); strings.Contains(strings.ToLower(text), "flannel") {
				t.Errorf("flannel is still there:\n%s", text)
			}
			fwReconcile(t, f, nil)
			if after := fwSnapshot(t); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
		})
	}
}

// TestFirewallKeepsOld sees that a chain whose replacement fails stays, and that
// the other family is served nevertheless.
func TestFirewallKeepsOld(t *testing.T) {
	for _, kind := range fwKinds() {
		t.Run(kind.name, func(t *testing.T) {
			fwFlavour(t, kind.flavour)
			fwNamespace(t)
			sh(t, fwFlannel)
			f := fwOpen(t)
			want := fwWanted(kind.tool)
			want[0].Rules = append(want[0].Rules, "no rule at all")
			want[0].Hash = "changed"
			plan := fwPlan(t, f, want)
			old := slices.IndexFunc(plan, func(op overlay.Op) bool { return op.Verb == overlay.Delete })
			failures := f.apply(t.Context(), plan[:old])
			failures = append(failures, f.apply(t.Context(), plan[old:])...)
			for _, failure := range failures {
				if c := failure.Op.Object.(overlay.Chain); c.Family != overlay.IPv4 {
					t.Errorf("IPv6 failed too: %s: %v", failure.Op, failure.Err)
				}
			}
			if len(failures) == 0 {
				t.Error("a bad rule was taken")
			}
			text := sh(t, "iptables-save; nft list tables")
			for _, old := range []string{":FLANNEL-POSTRTG", "-j FLANNEL-POSTRTG", "table ip flannel-ipv4"} {
				if !strings.Contains(text, old) {
					t.Errorf("%s is gone:\n%s", old, text)
				}
			}
			if text := sh(t, "ip6tables-save; nft list tables | grep ip6 || true"); strings.Contains(strings.ToLower(text), "flannel") {
				t.Errorf("IPv6 was not cleaned:\n%s", text)
			}
		})
	}
}

// TestFirewallMissingTools runs on a node that has neither iptables nor nft.
func TestFirewallMissingTools(t *testing.T) {
	fwNamespace(t)
	t.Setenv("PATH", t.TempDir())
	f := fwOpen(t)
	if have, err := f.observe(t.Context()); err != nil || len(have) != 0 {
		t.Errorf("observe: %v, %v", have, err)
	}
	for _, tool := range []overlay.Tool{overlay.Iptables, overlay.Nftables} {
		want := fwWanted(tool)
		failures := f.apply(t.Context(), fwPlan(t, f, want))
		if len(failures) != len(want) {
			t.Errorf("want %d failures, got %v", len(want), failures)
		}
		for _, failure := range failures {
			if !strings.Contains(failure.Err.Error(), "install the "+string(tool)+" package") {
				t.Errorf("error names no remedy: %v", failure.Err)
			}
		}
		if f.hasRandomFully(overlay.IPv4, tool) {
			t.Errorf("%s is missing but can do random-fully", tool)
		}
	}
}

func BenchmarkFirewallObserve(b *testing.B) {
	for _, kind := range fwKinds() {
		for _, cached := range []bool{false, true} {
			name := kind.name + "/cold"
			if cached {
				name = kind.name + "/cached"
			}
			b.Run(name, func(b *testing.B) {
				fwFlavour(b, kind.flavour)
				fwNamespace(b)
				f := fwOpen(b)
				fwReconcile(b, f, fwWanted(kind.tool))
				for b.Loop() {
					f.cached = f.cached && cached
					if _, err := f.observe(b.Context()); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
