package overlay

import (
	"fmt"
	"net/netip"
	"testing"
)

// cluster makes a Snapshot of n peers in a pool wide enough, and our Self in it.
func cluster(t testing.TB, n int, dual bool) (*Snapshot, Self) {
	json := `{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}`
	if dual {
		json = `{"Network":"10.0.0.0/8","EnableIPv6":true,"IPv6Network":"fd00:5::/40","Backend":{"Type":"vxlan"}}`
	}
	snap := &Snapshot{Revision: 1, Config: config(t, json)}
	for i := range n + 1 {
		key := fmt.Sprintf("10.%d.%d.0-24", (i+1)>>8, (i+1)&255)
		if dual {
			key += fmt.Sprintf("&fd00:5:0:%x::-64", i+1)
		}
		l := &Lease{Subnets: subnetsOf(key), Created: int64(i + 1), Grant: 1}
		hw := DeriveMAC(Uplink{MAC: MAC{2, 0, byte(i >> 16), byte(i >> 8), byte(i), 1}}, "flannel.1")
		l.Backend, l.PublicIP, l.VTEP = "vxlan", netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)}), VTEP{1, hw}
		if dual {
			l.PublicIPv6, l.VTEPv6 = ip(fmt.Sprintf("2001:db8::%x", i+1)), VTEP{1, hw}
		}
		snap.Leases = append(snap.Leases, l)
	}
	own := snap.Leases[n/2]
	return snap, Self{
		Subnets: own.Subnets, PublicIP: own.PublicIP, PublicV6: own.PublicIPv6, MAC: own.VTEP.MAC, MACv6: own.VTEPv6.MAC,
		Uplink:  Uplink{Name: "eth0", MTU: 1500, V4: own.PublicIP, V6: own.PublicIPv6, OnLink: []netip.Prefix{pfx("198.18.0.0/15")}},
		Options: Options{IPMasq: true, ForwardRules: true, Nexthops: true},
	}
}

func TestClusterOfTenThousand(t *testing.T) {
	snap, self := cluster(t, 10000, true)
	state, problems := Desired(snap, self)
	if len(problems) > 0 || len(state.Routes) != 20000 || len(state.Nexthops) != 20000 || len(state.Neighs) != 20000 || len(state.FDB) != 20000 {
		t.Errorf("%d routes, %d nexthops, %d neighbours, %d FDB entries, problems %.3q", len(state.Routes), len(state.Nexthops), len(state.Neighs), len(state.FDB), problems)
	}
}

func BenchmarkDesired10000(b *testing.B) {
	for _, dual := range []bool{false, true} {
		b.Run(fmt.Sprintf("dual=%t", dual), func(b *testing.B) {
			snap, self := cluster(b, 10000, dual)
			b.ReportAllocs()
			for b.Loop() {
				if _, problems := Desired(snap, self); len(problems) > 0 {
					b.Fatal(problems[0])
				}
			}
		})
	}
}

func BenchmarkDiff10000(b *testing.B) {
	snap, self := cluster(b, 10001, false)
	want, _ := Desired(snap, self)
	less := &Snapshot{Config: snap.Config, Leases: append(snap.Leases[:2000:2000], snap.Leases[2001:]...)}
	have, _ := Desired(less, self)
	for _, c := range []struct {
		name string
		have State
		ops  int
	}{{"equal", want, 0}, {"one more peer", have, 4}, {"from nothing", State{}, 4 * 10001}} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if plan, _ := Diff(c.have, want); len(plan) < c.ops {
					b.Fatalf("%d changes", len(plan))
				}
			}
		})
	}
}

// BenchmarkOneMorePeer10000 is all that the pure core does for one new lease.
func BenchmarkOneMorePeer10000(b *testing.B) {
	snap, self := cluster(b, 10001, false)
	less := &Snapshot{Config: snap.Config, Leases: append(snap.Leases[:2000:2000], snap.Leases[2001:]...)}
	have, _ := Desired(less, self)
	b.ReportAllocs()
	for b.Loop() {
		want, _ := Desired(snap, self)
		if plan, _ := Diff(have, want); len(plan) != 4 {
			b.Fatal(plan)
		}
	}
}
