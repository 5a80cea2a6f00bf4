package portmap

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/overlay"
)

// Whatever a stranger does to the rules, Check tells and Sync restores.
func TestStranger(t *testing.T) {
	nft := []string{
		"nft flush ruleset",
		"nft delete table ip6 " + NftTable,
		"nft flush chain ip " + NftTable + " translate",
		"nft flush map ip " + NftTable + " any-address",
		"nft delete element ip " + NftTable + " any-address '{ tcp . 8080 }'",
		"nft add element ip " + NftTable + " any-address '{ tcp . 99 : 198.18.1.9 . 99 }'",
		"nft add rule ip " + NftTable + " translate counter",
		"nft add chain ip " + NftTable + " more",
	}
	ipt := []string{
		"iptables -t nat -F",
		"ip6tables -t nat -F; ip6tables -t nat -X",
		"iptables -t nat -F; iptables -t nat -X",
		"iptables -t nat -D OUTPUT -m addrtype --dst-type LOCAL -m comment --comment twill:jump -j TWILL-HOSTPORT",
		"iptables -t nat -A POSTROUTING -j TWILL-HOSTMASQ",
		"iptables -t nat -F TWILL-HOSTPORT",
		"iptables -t nat -I TWILL-HOSTPORT -p tcp --dport 9 -j RETURN",
		"iptables -F INPUT",
		"iptables -F TWILL-LOCALNET",
	}
	eachFlavour(t, func(t *testing.T, f flavour) {
		n := newNode(t, f)
		web := n.pod(1)
		n.serve(web, 80)
		e := web.entry(tcp(8080, 80))
		e.Masquerade = e.Local
		if err := n.add(e); err != nil {
			t.Fatal(err)
		}
		deeds := ipt
		if f.tool == overlay.Nftables {
			deeds = nft
		}
		for _, deed := range deeds {
			n.checks(e, nil)
			n.sh(n.host, deed)
			n.must(func() error {
				got, err := n.dir.Check(context.Background(), e)
				if len(got) == 0 {
					t.Errorf("%s: Check finds nothing", deed)
				}
				return err
			})
			if got := n.sync(nil); len(got) == 0 {
				t.Errorf("%s: Sync finds nothing", deed)
			}
			if got := n.sync(nil); got != nil {
				t.Errorf("%s: second Sync repairs %v", deed, got)
			}
			n.answers(n.clients[0], "tcp", hostAddr+":8080", "pod1 "+clientAddr)
		}
		// Without the daemon, the next pod restores them.
		n.sh(n.host, deeds[0])
		other := n.fake(2, tcp(8081, 80))
		if err := n.add(other); err != nil {
			t.Fatal(err)
		}
		n.answers(n.clients[0], "tcp", hostAddr+":8080", "pod1 "+clientAddr)
		n.checks(e, nil)
		n.checks(other, nil)
		// Neither does a flush make DEL fail.
		n.sh(n.host, deeds[0])
		for _, x := range []Entry{e, other} {
			if err := n.remove(x); err != nil {
				t.Fatal(err)
			}
		}
		n.clean()
	})
}

func TestSyncDrops(t *testing.T) {
	eachFlavour(t, func(t *testing.T, f flavour) {
		n := newNode(t, f)
		a, b, c := n.fake(1, tcp(8081, 80)), n.fake(2, tcp(8082, 80)), n.fake(3, tcp(8083, 80))
		for _, e := range []Entry{a, b, c} {
			if err := n.add(e); err != nil {
				t.Fatal(err)
			}
		}
		n.sh(n.host, "ip link del veth1")
		// Between a pod's link and its ports going, the others' rules are right.
		n.checks(c, nil)
		got := n.sync(func(e Entry) bool { return e.Attachment != b.Attachment })
		if len(got) != 2 || !strings.Contains(strings.Join(got, ";"), "pod default/web-1: dropped") {
			t.Errorf("repaired %q", got)
		}
		rules := n.ours()
		if strings.Contains(rules, "8081") || strings.Contains(rules, "8082") || !strings.Contains(rules, "8083") {
			t.Errorf("rules:\n%s", rules)
		}
		n.sync(func(Entry) bool { return false })
		n.clean()
	})
}

// Cleanup leaves the record; Sync, or the next pod, restores what it says.
func TestCleanup(t *testing.T) {
	eachFlavour(t, func(t *testing.T, f flavour) {
		n := newNode(t, f)
		a, b := n.fake(1, tcp(8081, 80)), n.fake(2, tcp(8082, 80))
		cleanup := func() {
			t.Helper()
			n.must(func() error { return n.dir.Cleanup(context.Background()) })
			if left := n.ours(); left != "" {
				t.Errorf("left:\n%s", left)
			}
		}
		cleanup() // nothing there
		if err := n.add(a); err != nil {
			t.Fatal(err)
		}
		cleanup()
		if got := n.sync(nil); len(got) != 1 {
			t.Errorf("repaired %q", got)
		}
		cleanup()
		if err := n.add(b); err != nil {
			t.Fatal(err)
		}
		n.checks(a, nil)
		n.checks(b, nil)
		cleanup()
		for _, e := range []Entry{a, b} {
			if err := n.remove(e); err != nil {
				t.Fatal(err)
			}
		}
		n.clean()
	})
}

// A node whose configuration names the other tool has its rules once.
func TestOtherTool(t *testing.T) {
	for _, to := range []overlay.Tool{overlay.Nftables, overlay.Iptables} {
		for _, how := range []string{"Sync", "Add", "Remove"} {
			t.Run(fmt.Sprintf("%s/%s", to, how), func(t *testing.T) {
				n := newNode(t, flavours()[1])
				from := overlay.Iptables
				if to == from {
					from = overlay.Nftables
				}
				a, b := n.fake(1, tcp(8081, 80)), n.fake(2, tcp(8082, 80))
				n.dir = NewDir(n.dir.path, from)
				for _, e := range []Entry{a, b} {
					if err := n.add(e); err != nil {
						t.Fatal(err)
					}
				}
				n.dir = NewDir(n.dir.path, to)
				var err error
				switch how {
				case "Sync":
					n.sync(nil)
				case "Add":
					err = n.add(n.fake(3, tcp(8083, 80)))
				case "Remove":
					err = n.remove(b)
				}
				if err != nil {
					t.Fatal(err)
				}
				n.checks(a, nil)
				if rules, old := n.ours(), map[overlay.Tool]string{overlay.Iptables: HostPortChain, overlay.Nftables: "table ip " + NftTable}[from]; strings.Contains(rules, old) {
					t.Errorf("rules of %s remain:\n%s", from, rules)
				}
				n.sync(func(Entry) bool { return false })
				n.clean()
			})
		}
	}
}
