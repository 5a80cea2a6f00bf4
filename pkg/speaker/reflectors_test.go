package speaker

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/overlay"
)

// TestTwoReflectors: two of one cluster, and of two clusters, which are each other's
// clients then; two nodes that speak to both. One reflector dies for good.
func TestTwoReflectors(t *testing.T) {
	for name, cluster := range map[string][2]netip.Addr{
		"one cluster":  {ip("192.0.2.1"), ip("192.0.2.1")},
		"two clusters": {ip("192.0.2.1"), ip("192.0.2.2")},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 4)
			const v4 = overlay.IPv4
			var s []*speakerProcess
			for i := range 4 {
				b := r.base(i, v4)
				for j := range 4 {
					if i == j || i >= 2 && j >= 2 {
						continue
					}
					n := r.node(i, j, v4)
					if i < 2 {
						b.ClusterID = cluster[i]
						n.Client = j >= 2 || cluster[0] != cluster[1]
					}
					b.Neighbors = append(b.Neighbors, n)
				}
				s = append(s, r.speaker(i, b))
			}
			// Of the other node both reflectors tell, of a reflector itself and the other.
			ways := func(i, j int, n int) string {
				return pods(j, v4).String() + strings.Repeat(fmt.Sprintf(" via %s", r.addr(j, v4)), n)
			}
			s[2].learns(ways(2, 0, 2), ways(2, 1, 2), ways(2, 3, 2))
			b := s[3].want
			b.Own = nil
			s[3].set(b)
			s[2].learns(ways(2, 0, 2), ways(2, 1, 2))
			// No ghost goes round between the reflectors.
			for _, reflector := range s[:2] {
				eventually(t, "withdrawal at a reflector", func() error {
					if got := reflector.report().routes(); strings.Contains(got, pods(3, v4).String()) || !strings.Contains(got, pods(2, v4).String()) {
						return fmt.Errorf("%s", got)
					}
					return nil
				})
			}
			s[3].set(r.with(b, 3, v4))
			s[2].learns(ways(2, 0, 2), ways(2, 1, 2), ways(2, 3, 2))
			if err := s[1].Kill9(); err != nil {
				t.Fatal(err)
			}
			eventually(t, "routes by the reflector that is left", func() error {
				for _, x := range s[2].report().RIB.Routes {
					if x.Prefix == pods(3, v4) && len(x.Paths) == 2 && !x.Paths[0].Stale && x.Paths[1].Stale {
						return nil
					}
				}
				return fmt.Errorf("%s", s[2].report().routes())
			})
		})
	}
}

// with gives a node its subnet back.
func (r *rig) with(b overlay.BGP, i int, f overlay.Family) overlay.BGP {
	b.Own = r.base(i, f).Own
	return b
}
