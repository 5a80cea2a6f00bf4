package xtables

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/overlay"
)

func TestTool(t *testing.T) {
	for v, want := range map[Flavour]overlay.Tool{"": overlay.Iptables, Nft: overlay.IptablesNft, Legacy: overlay.IptablesLegacy} {
		if got := v.Tool(); got != want || OfTool(got) != v {
			t.Errorf("%q: tool %s, back %q", v, got, OfTool(got))
		}
	}
}

// TestCommand looks for each flavour on systems that have some of the commands.
func TestCommand(t *testing.T) {
	for _, v := range []struct {
		name   string
		plain  string // the program behind iptables
		named  Flavour
		ask    Flavour
		want   string
		refuse string
	}{
		{"no flavour asked for", "xtables-nft-multi", "", "", "ip6tables", ""},
		{"named", "xtables-nft-multi", Legacy, Legacy, "ip6tables-legacy", ""},
		{"plain", "xtables-legacy-multi", "", Legacy, "ip6tables", ""},
		{"plain, of the other", "xtables-legacy-multi", "", Nft, "", "it is of flavour legacy, but the node's rules are in the other, nft: install ip6tables-nft"},
		{"only the other is named", "xtables-nft-multi", Nft, Legacy, "", "it is of flavour nft"},
		{"nothing", "", "", Nft, "", "install the iptables package"},
	} {
		t.Run(v.name, func(t *testing.T) {
			dir := t.TempDir()
			link := func(name, to string) {
				for _, suffix := range []string{"", "-restore", "-save"} {
					if err := os.Symlink("/usr/sbin/"+to, filepath.Join(dir, name+suffix)); err != nil {
						t.Fatal(err)
					}
				}
			}
			if v.plain != "" {
				link("ip6tables", v.plain)
			}
			if v.named != "" {
				link("ip6tables-"+string(v.named), "xtables-"+string(v.named)+"-multi")
			}
			t.Setenv("PATH", dir)
			got, err := v.ask.Command(overlay.IPv6)
			if got != v.want || (err == nil) != (v.refuse == "") || err != nil && !strings.Contains(err.Error(), v.refuse) {
				t.Errorf("%q, %v; want %q, %q", got, err, v.want, v.refuse)
			}
		})
	}
}
