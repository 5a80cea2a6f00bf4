package pod

import (
	"testing"

	"github.com/twill-net/twill/pkg/overlay"
)

// The flavour of iptables is the daemon's to choose, whether or not the
// configuration says that it shall be iptables.
func TestLeavesFirewall(t *testing.T) {
	for _, v := range []struct {
		configured, handed overlay.Tool
		want               bool
	}{
		{"", overlay.Nftables, true},
		{"", overlay.IptablesLegacy, true},
		{overlay.Iptables, overlay.IptablesLegacy, true},
		{overlay.Iptables, overlay.IptablesNft, true},
		{overlay.Iptables, overlay.Nftables, false},
		{overlay.Iptables, "", false},
		{overlay.Nftables, overlay.IptablesNft, false},
	} {
		c := Config{Firewall: v.configured}
		if got := c.leavesFirewall(Handoff{Firewall: v.handed}); got != v.want {
			t.Errorf("configured %q, handed over %q: %t", v.configured, v.handed, got)
		}
	}
}
