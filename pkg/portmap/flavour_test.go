package portmap

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/xtables"
)

// held counts the lines of ours in each flavour.
func (n *node) held(v xtables.Flavour) int {
	n.t.Helper()
	return strings.Count(n.sh(n.host, "iptables-"+string(v)+"-save; ip6tables-"+string(v)+"-save"), "twill:")
}

// The daemon says which flavour the node uses; that of the command iptables does not
// matter, whichever it is.
func TestNamedFlavour(t *testing.T) {
	for _, v := range []xtables.Flavour{xtables.Nft, xtables.Legacy} {
		t.Run(string(v), func(t *testing.T) {
			n := newNode(t, flavour{"iptables-" + string(v.Other()), v.Tool()})
			e := n.fake(1, tcp(8080, 80))
			n.must(func() error { return n.dir.Add(context.Background(), e) })
			if n.held(v) == 0 || n.held(v.Other()) != 0 {
				t.Fatalf("%d in %s, %d in the other", n.held(v), v, n.held(v.Other()))
			}
			n.checks(e, nil)
			if did := n.sync(nil); len(did) > 0 {
				t.Errorf("repaired: %v", did)
			}

			// Who knows of no flavour, as a DEL without the hand-off, goes on with it.
			unaware := NewDir(n.dir.path, overlay.Iptables)
			second := n.fake(2, tcp(8081, 80))
			n.must(func() error { return unaware.Add(context.Background(), second) })
			n.must(func() error { return unaware.Remove(context.Background(), second.Attachment) })
			if n.held(v) == 0 || n.held(v.Other()) != 0 {
				t.Fatalf("after the other's: %d in %s, %d in the other", n.held(v), v, n.held(v.Other()))
			}

			// The node changes to the other.
			n.dir = NewDir(n.dir.path, v.Other().Tool())
			if did := n.sync(nil); len(did) != 1 || !strings.Contains(did[0], "the rules of iptables-"+string(v)+" are replaced") {
				t.Errorf("repaired: %v", did)
			}
			if n.held(v) != 0 || n.held(v.Other()) == 0 {
				t.Errorf("moved: %d in %s, %d in the other", n.held(v), v, n.held(v.Other()))
			}
			n.checks(e, nil)
			n.must(func() error { return n.dir.Cleanup(context.Background()) })
			if left := n.ours(); left != "" {
				t.Errorf("left: %s", left)
			}
		})
	}
}

// TestCleanupMakesNoTable: legacy tables cost each packet time, even when empty.
func TestCleanupMakesNoTable(t *testing.T) {
	n := newNode(t, flavour{"iptables-nft", overlay.IptablesNft})
	e := n.fake(1, tcp(8080, 80))
	n.must(func() error { return n.dir.Add(context.Background(), e) })
	n.must(func() error { return n.dir.Cleanup(context.Background()) })
	n.must(func() error {
		for _, f := range families() {
			if made := xtables.LegacyTables(f); len(made) > 0 {
				t.Errorf("%s: made %v", f, made)
			}
		}
		return nil
	})
}

// TestFlavourMissing: a system may name its commands without their flavour, and then
// they must be of the right one.
func TestFlavourMissing(t *testing.T) {
	n := newNode(t, flavour{"iptables-nft", overlay.IptablesNft})
	dir := t.TempDir()
	for _, command := range []string{"iptables", "iptables-restore", "ip6tables", "ip6tables-restore"} {
		if err := os.Symlink("/usr/sbin/xtables-nft-multi", filepath.Join(dir, command)); err != nil {
			t.Fatal(err)
		}
	}
	path := os.Getenv("PATH")
	e := n.fake(1, tcp(8080, 80))
	t.Setenv("PATH", dir)
	err := n.add(e)
	t.Setenv("PATH", path)
	if err != nil || n.held(xtables.Nft) == 0 {
		t.Errorf("by the plain name: %v, %d rules", err, n.held(xtables.Nft))
	}
	n.must(func() error { return n.dir.Remove(context.Background(), e.Attachment) })

	n.dir = NewDir(n.dir.path, overlay.IptablesLegacy)
	t.Setenv("PATH", dir)
	err = n.add(e)
	t.Setenv("PATH", path)
	if err == nil || !strings.Contains(err.Error(), "it is of flavour nft, but the node's rules are in the other, legacy: install iptables-legacy") {
		t.Error(err)
	}
	n.clean()
}
