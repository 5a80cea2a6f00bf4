package kernel

import "github.com/twill-net/twill/pkg/overlay"

// ScopeOf returns what must be looked at to compare the kernel with want.
func ScopeOf(c overlay.Config, want overlay.State, uplink overlay.Uplink) Scope {
	s := Scope{Networks: c.Networks(), Uplink: uplink.Name}
	for _, x := range want.Sysctls {
		s.Sysctls = append(s.Sysctls, x.Key)
	}
	return s
}
