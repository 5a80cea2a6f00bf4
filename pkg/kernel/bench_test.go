package kernel

import (
	"context"
	"fmt"
	"net"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/twill-net/twill/pkg/overlay"
)

const benchPeers = 10_000

// benchWorld is an IPv4 node among 10,000 peers.
func benchWorld() world {
	w := dualWorld(benchPeers)
	w.families = w.families[:1]
	return w
}

// BenchmarkApply10000 makes the nexthop, neighbour, FDB entry and route of each of
// 10,000 peers.
func BenchmarkApply10000(b *testing.B) {
	for _, watched := range []bool{false, true} {
		b.Run(fmt.Sprintf("watched=%t", watched), func(b *testing.B) {
			inNode(b, func(k *Kernel) {
				w := benchWorld()
				want := w.state()
				w.peers = nil
				ctx, cancel := context.WithCancel(context.Background())
				done, started := make(chan error, 1), make(chan string, 1)
				ring := func(reason string) {
					select {
					case started <- reason:
					default:
					}
				}
				if watched {
					go func() { done <- k.Watch(ctx, ring) }()
					<-started
				} else {
					done <- nil
				}
				for b.Loop() {
					b.StopTimer()
					reconcile(b, k, w.state())
					p := plan(b, k, want)
					runtime.GC()
					b.StartTimer()
					if f := k.Apply(ctx, p); len(f) > 0 {
						b.Fatal(f[0])
					}
				}
				if left := plan(b, k, want); len(left) > 0 {
					b.Fatalf("%d left", len(left))
				}
				cancel()
				<-done
			})
		})
	}
	b.Run("reference", func(b *testing.B) { benchReference(b, benchWorld()) })
}

// benchReference does the same as flannel: plain on-link routes, one call each.
func benchReference(b *testing.B, w world) {
	inNode(b, func(k *Kernel) {
		w.nexthops = false
		want := w.state()
		w.peers = nil
		for b.Loop() {
			b.StopTimer()
			reconcile(b, k, w.state())
			l, err := netlink.LinkByName("flannel.1")
			if err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
			for i, r := range want.Routes {
				if err := referencePeer(l.Attrs().Index, r, want.Neighs[i], want.FDB[i]); err != nil {
					b.Fatal(err)
				}
			}
		}
		b.StopTimer()
		if left := plan(b, k, want); len(left) > 0 {
			b.Fatalf("%d left, the first %s", len(left), left[0])
		}
	})
}

func referencePeer(link int, r overlay.Route, n overlay.Neigh, f overlay.FDB) error {
	err := netlink.NeighSet(&netlink.Neigh{LinkIndex: link, State: netlink.NUD_PERMANENT, IP: n.IP.AsSlice(), HardwareAddr: n.MAC[:]})
	if err != nil {
		return err
	}
	err = netlink.NeighSet(&netlink.Neigh{LinkIndex: link, State: netlink.NUD_PERMANENT, Family: 7, Flags: netlink.NTF_SELF, IP: f.Dst.AsSlice(), HardwareAddr: f.MAC[:]})
	if err != nil {
		return err
	}
	dst := &net.IPNet{IP: r.Dst.Addr().AsSlice(), Mask: net.CIDRMask(r.Dst.Bits(), r.Dst.Addr().BitLen())}
	return netlink.RouteReplace(&netlink.Route{
		LinkIndex: link, Dst: dst, Gw: r.Gateway.AsSlice(), Flags: int(netlink.FLAG_ONLINK), Protocol: overlay.Protocol,
	})
}

// BenchmarkObserve10000 reads what BenchmarkApply10000 has made.
func BenchmarkObserve10000(b *testing.B) {
	inNode(b, func(k *Kernel) {
		want := benchWorld().state()
		reconcile(b, k, want)
		b.ReportAllocs()
		for b.Loop() {
			observe(b, k)
		}
	})
}

// BenchmarkObserveVeths reads a node with 500 pods and two peers.
func BenchmarkObserveVeths(b *testing.B) {
	inNode(b, func(k *Kernel) {
		sh(b, `ip link add cni0 type bridge; ip link set cni0 up
			for i in $(seq 500); do echo "link add veth$i type veth peer name pod$i"; done | ip -batch -`)
		reconcile(b, k, dualWorld(2).state())
		b.ReportAllocs()
		for b.Loop() {
			observe(b, k)
		}
	})
}
