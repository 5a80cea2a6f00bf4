package kernel

import (
	"net/netip"
	"slices"

	"github.com/twill-net/twill/pkg/overlay"
)

// ScopeOf returns what must be looked at to compare the kernel with want.
func ScopeOf(c overlay.Config, want overlay.State, uplink overlay.Uplink) Scope {
	s := Scope{Networks: c.Networks(), Uplink: uplink.Name, Places: map[netip.Prefix]bool{}}
	for _, x := range want.Sysctls {
		s.Sysctls = append(s.Sysctls, x.Key)
	}
	for _, r := range want.Routes {
		inside := func(n netip.Prefix) bool { return n.Bits() <= r.Dst.Bits() && n.Overlaps(r.Dst) }
		if !slices.ContainsFunc(s.Networks, inside) {
			s.Places[r.Dst] = true
		}
	}
	return s
}
