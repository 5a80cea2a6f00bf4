package overlay

import (
	"fmt"
	"net/netip"
)

// Bridge is the name of the bridge that the CNI plugin wires pods into.
const Bridge = "cni0"

// CheckOverlap finds the routes of others that a pod network would take traffic
// from: those inside it, and networks on a link of this host that contain it. Any
// other wider route, by a gateway or to a blackhole, does no harm: pod routes are
// more specific.
//
// Routes of pods on this node (own) are no strangers, nor are routes by a gateway to
// exactly a peer's subnet: flannel's host-gw left them, or the node's own BGP router
// has learned them. (One that stands where ours has to be is a Problem of Diff.)
func CheckOverlap(c Config, own Subnets, leases []*Lease, foreign []Route) []Problem {
	leased := make(map[netip.Prefix]bool, len(leases))
	for _, l := range leases {
		for _, f := range c.families() {
			leased[l.Subnet(f)] = true
		}
	}
	var out []Problem
	for _, r := range foreign {
		f := FamilyOf(r.Dst.Addr())
		network, ours := c.Pool(f).Network, own.Subnet(f)
		inside := network.Bits() <= r.Dst.Bits()
		switch {
		case !network.IsValid() || !network.Overlaps(r.Dst):
		case !inside && (r.Gateway.IsValid() || r.Link == ""):
		case r.Link == Bridge:
		case ours.IsValid() && ours.Overlaps(r.Dst) && ours.Bits() <= r.Dst.Bits():
		case leased[r.Dst] && (r.Gateway.IsValid() || r.NH != 0 || r.Link == ""):
		default:
			out = append(out, Problem{
				Object: "network " + network.String(),
				Reason: fmt.Sprintf("overlaps a network this host already reaches: %s", r),
				Remedy: "choose another Network in the stored configuration, or remove that route",
			})
		}
	}
	return out
}
