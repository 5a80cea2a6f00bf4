package store

import (
	"fmt"
	"net/netip"

	"github.com/twill-net/twill/pkg/overlay"
)

// addTwins names the Nodes whose address a younger one publishes, too: as a rule those of
// a node that was renamed, which stay until somebody deletes them. Packets go to both: the
// node may still have pods of both. What concerns this node's own address, overlay says.
func (f *kubeFold) addTwins(s *overlay.Snapshot) {
	at := make(map[netip.Addr]*overlay.Lease, len(s.Leases))
	for _, l := range s.Leases {
		address := l.PublicIP
		if !address.IsValid() {
			address = l.PublicIPv6
		}
		if !address.IsValid() {
			continue
		}
		a := at[address]
		if a == nil {
			at[address] = l
			continue
		}
		b := l
		if older(b, a) < 0 {
			a, b = b, a
		}
		at[address] = b
		if a.Node == f.self || b.Node == f.self {
			continue
		}
		s.Problems = append(s.Problems, overlay.Problem{
			Object: "node " + a.Node,
			Reason: fmt.Sprintf("has the address %s of node %s, which is younger", address, b.Node),
			Remedy: "if the node was renamed: kubectl delete node " + a.Node + "; else give one of the two another address",
		})
	}
}
