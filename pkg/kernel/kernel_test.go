package kernel

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// TestSecondPlanIsEmpty builds worlds of all forms from nothing and takes them
// away again. (reconcile fails if a second plan would do anything.)
func TestSecondPlanIsEmpty(t *testing.T) {
	forms := map[string]func(*world){
		"dual":      func(*world) {},
		"IPv4":      func(w *world) { w.families = w.families[:1] },
		"IPv6":      func(w *world) { w.families = w.families[1:] },
		"plain":     func(w *world) { w.nexthops = false },
		"direct":    func(w *world) { w.direct = 2 },
		"dir plain": func(w *world) { w.direct, w.nexthops = 2, false },
		"blackhole": func(w *world) { w.blackhole = true },
		"gbp":       func(w *world) { w.gbp, w.learning = true, true },
		"addresses": func(w *world) { w.extraAddresses = true },
		"udp":       func(w *world) { w.tunnelled = 3 },
		"udp plain": func(w *world) { w.tunnelled, w.nexthops = 3, false },
		"wireguard": func(w *world) { w.encrypted, w.moved = 3, 2 },
		"wg plain":  func(w *world) { w.encrypted, w.nexthops = 3, false },
		"groups":    func(w *world) { w.grouped = 4 },
	}
	for name, form := range forms {
		t.Run(name, func(t *testing.T) {
			inHost(t, func(k *Kernel) {
				if !k.HasNexthops() {
					t.Fatal("this kernel has nexthop objects")
				}
				w := dualWorld(3)
				form(&w)
				var d dataPlane
				defer d.stop(world{})
				d.reconcile(t, k, w)
				reconcile(t, k, overlay.State{})
				if got := observe(t, k); len(got.WGPeers)+len(got.Links)+len(got.Addrs)+len(got.Nexthops)+len(got.Routes)+len(got.Neighs)+len(got.FDB) > 0 {
					t.Errorf("left behind: %+v", got)
				}
			})
		})
	}
}

// TestDesired is the same for what overlay.Desired says, with its firewall rules.
func TestDesired(t *testing.T) {
	for _, nft := range []bool{false, true} {
		t.Run(fmt.Sprintf("nftables %t", nft), func(t *testing.T) {
			inNode(t, func(k *Kernel) {
				config, _, err := overlay.ParseConfig(fmt.Appendf(nil, `{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:5::/48",
					"EnableNFTables": %t, "Backend": {"Type": "vxlan"}}`, nft))
				if err != nil {
					t.Fatal(err)
				}
				subnets, err := overlay.ParseKey("10.5.1.0-24&fd00:5:0:1::-64")
				if err != nil {
					t.Fatal(err)
				}
				ifaces, err := k.Interfaces(context.Background(), nil)
				if err != nil {
					t.Fatal(err)
				}
				uplink, err := overlay.ChooseUplink(ifaces, overlay.UplinkRules{Names: []string{"eth0"}, IPv4: true, IPv6: true})
				if err != nil {
					t.Fatal(err)
				}
				want, problems := overlay.Desired(&overlay.Snapshot{Config: config}, overlay.Self{
					Subnets: subnets, Uplink: uplink, PublicIP: uplink.V4, PublicV6: uplink.V6,
					MAC: overlay.MAC{0x0e, 1}, MACv6: overlay.MAC{0x0e, 2},
					Options: overlay.Options{IPMasq: true, ForwardRules: true, BlackholeRoute: true, Nexthops: true},
				})
				if len(problems) > 0 || len(want.Chains) == 0 {
					t.Fatalf("problems: %v; %d chains", problems, len(want.Chains))
				}
				scope := Scope{Networks: config.Networks(), Uplink: uplink.Name}
				for _, s := range want.Sysctls {
					scope.Sysctls = append(scope.Sysctls, s.Key)
				}
				ctx := context.Background()
				for pass := range 2 {
					have, err := k.Observe(ctx, scope)
					if err != nil {
						t.Fatal(err)
					}
					p, _ := overlay.Diff(have, want)
					if (pass == 0) != (len(p) > 0) {
						t.Fatalf("plan %d:\n%s", pass, p)
					}
					if f := k.Apply(ctx, p); len(f) > 0 {
						t.Fatal(f)
					}
				}
			})
		})
	}
}

// TestChanges goes from one world to one that differs in a single respect and
// back, and checks which operations that takes.
func TestChanges(t *testing.T) {
	tests := []struct {
		name   string
		change func(*world)
		want   map[string]int
	}{
		{"mtu", func(w *world) { w.mtu = 1300 }, map[string]int{"overlay.Link change": 2}},
		{"local", func(w *world) { w.host = 2 }, map[string]int{"overlay.Link change": 2}},
		{"parent", func(w *world) { w.parent = 1 }, map[string]int{"overlay.Link change": 2}},
		{"learning", func(w *world) { w.learning = true }, map[string]int{"overlay.Link change": 2}},
		{"mac", func(w *world) { w.mac = 9 }, map[string]int{"overlay.Link change": 2, "overlay.Neigh add": 6}},
		{"port", func(w *world) { w.port = 4789 }, map[string]int{
			"overlay.Link change": 2, "overlay.Addr add": 2, "overlay.Nexthop add": 6, "overlay.Neigh add": 6, "overlay.FDB add": 6, "overlay.Route add": 6,
		}},
		{"gbp", func(w *world) { w.gbp = true }, map[string]int{
			"overlay.Link change": 2, "overlay.Addr add": 2, "overlay.Nexthop add": 6, "overlay.Neigh add": 6, "overlay.FDB add": 6, "overlay.Route add": 6,
		}},
		{"moved", func(w *world) { w.moved = 2 }, map[string]int{"overlay.Neigh change": 2, "overlay.FDB add": 2, "overlay.FDB delete": 2}},
		{"direct", func(w *world) { w.direct = 2 }, map[string]int{"overlay.Nexthop change": 2, "overlay.Neigh delete": 2, "overlay.FDB delete": 2}},
		{"plain", func(w *world) { w.nexthops = false }, map[string]int{"overlay.Route change": 6, "overlay.Nexthop delete": 6}},
		{"forward", func(w *world) { w.forward = "0" }, map[string]int{"overlay.Sysctl change": 1}},
		{"addresses", func(w *world) { w.extraAddresses = true }, map[string]int{"overlay.Addr add": 2}},
		{"blackhole", func(w *world) { w.blackhole = true }, map[string]int{"overlay.Route add": 2}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			inNode(t, func(k *Kernel) {
				w := dualWorld(3)
				before := w.state()
				test.change(&w)
				reconcile(t, k, before)
				index := sh(t, "cat /sys/class/net/*/ifindex >/dev/null; ip -o link show flannel.1 | cut -d: -f1")
				if got := kinds(reconcile(t, k, w.state())); !reflect.DeepEqual(got, test.want) {
					t.Errorf("did %v, want %v", got, test.want)
				}
				if now := sh(t, "ip -o link show flannel.1 | cut -d: -f1"); (now != index) != (test.name == "port" || test.name == "gbp") {
					t.Errorf("index of flannel.1 was %s and is %s: made anew or not?", index, now)
				}
				reconcile(t, k, before)
			})
		})
	}
}

// TestDrift does to each kind of object what operators and other programs do; it
// must be seen and repaired.
func TestDrift(t *testing.T) {
	tests := map[string]string{
		"link deleted":        "ip link del flannel.1",
		"link down":           "ip link set flannel.1 down",
		"link down and up":    "ip link set flannel-v6.1 down; ip link set flannel-v6.1 up",
		"mtu":                 "ip link set flannel.1 mtu 1280",
		"mac":                 "ip link set flannel.1 address 0e:99:00:00:00:01",
		"learning":            "ip link set flannel.1 type vxlan id 1 learning",
		"address deleted":     "ip addr del 10.0.0.0/32 dev flannel.1",
		"address added":       "ip addr add 10.0.0.77/24 dev flannel.1",
		"IPv6 address":        "ip addr del fd00:5::/128 dev flannel-v6.1",
		"route deleted":       "ip route del 10.0.2.0/24",
		"IPv6 route deleted":  "ip -6 route del fd00:5:2::/64",
		"route replaced":      "ip route replace 10.0.2.0/24 dev flannel.1 proto static",
		"route blackholed":    "ip route replace blackhole 10.0.2.0/24 proto 84",
		"IPv6 blackholed":     "ip -6 route replace blackhole fd00:5:2::/64 metric 1024 proto 84",
		"routes flushed":      "for n in 1 2 3; do ip route del 10.0.$n.0/24; ip -6 route del fd00:5:$n::/64; done",
		"route added":         "ip route add 10.99.0.0/24 via 10.99.0.0 dev flannel.1 onlink; ip -6 route add fd00:5:99::/64 dev flannel-v6.1",
		"second metric":       "ip route add 10.0.2.0/24 via 10.0.9.0 dev flannel.1 onlink proto boot metric 7",
		"nexthop deleted":     "ip nexthop del id $((4 << 24 | 2))",
		"nexthop changed":     "ip nexthop replace id $((6 << 24 | 2)) via fd00:5:77:: dev flannel-v6.1 onlink proto 84",
		"nexthops flushed":    "ip nexthop flush proto 84",
		"neighbour deleted":   "ip neigh del 10.0.2.0 dev flannel.1",
		"neighbour changed":   "ip neigh replace fd00:5:2:: lladdr 0a:99:00:00:00:01 dev flannel-v6.1 nud permanent",
		"neighbour not stays": "ip neigh replace 10.0.2.0 lladdr 0a:04:00:00:00:02 dev flannel.1 nud reachable",
		"neighbour added":     "ip neigh add 10.0.99.0 lladdr 0a:99:00:00:00:01 dev flannel.1 nud permanent",
		"neighbours flushed":  "ip neigh flush dev flannel.1 nud permanent",
		"fdb deleted":         "bridge fdb del 0a:04:00:00:00:02 dev flannel.1",
		"fdb changed":         "bridge fdb replace 0a:04:00:00:00:02 dev flannel.1 dst 198.51.100.99",
		"fdb other port":      "bridge fdb replace 0a:04:00:00:00:02 dev flannel.1 dst 198.18.0.2 port 99",
		"fdb added":           "bridge fdb add 0a:99:00:00:00:02 dev flannel.1 dst 198.51.100.99",
		"sysctl":              "echo 0 > /proc/sys/net/ipv4/ip_forward",
		"alias":               "ip link set flannel.1 alias ''",
	}
	for name, script := range tests {
		t.Run(name, func(t *testing.T) {
			inNode(t, func(k *Kernel) {
				want := dualWorld(3).state()
				reconcile(t, k, want)
				sh(t, script)
				if p := reconcile(t, k, want); len(p) == 0 {
					t.Errorf("not seen: %s", script)
				}
			})
		})
	}
}

// TestForeign shows that strangers' objects are neither seen as ours nor touched.
func TestForeign(t *testing.T) {
	const dump = `ip -o link; ip -d -o link show vx9; ip -o -4 addr; ip route; ip -6 route; ip route show table 77; ip nexthop; ip neigh show nud permanent; bridge fdb show`
	inNode(t, func(k *Kernel) {
		sh(t, `
			ip link add cni0 type bridge
			ip link set cni0 up
			ip addr add 10.0.0.1/24 dev cni0
			ip link add vx9 type vxlan id 9 dev eth0 local 198.51.100.1 dstport 9999
			ip link set vx9 up
			ip neigh add 10.0.0.55 lladdr 0a:99:00:00:00:01 dev cni0 nud permanent
			bridge fdb add 0a:99:00:00:00:02 dev vx9 dst 198.51.100.99
			ip nexthop add id 5 via 198.51.100.9 dev eth0
			ip route add default via 198.51.100.9
			ip route add 10.200.0.0/24 nhid 5 proto bird
			ip route add 10.0.2.0/24 via 198.51.100.9 metric 5
			ip route add 10.0.2.0/24 via 198.51.100.9 table 77 proto 84
			ip route add unreachable 10.201.0.0/24
			ip route add 192.0.2.0/24 via 198.51.100.9`)
		before := sh(t, dump)
		reconcile(t, k, dualWorld(3).state())
		var foreign []string
		for _, r := range observe(t, k).Foreign {
			foreign = append(foreign, r.String())
		}
		want := []string{
			"route 10.0.0.0/24 dev cni0 proto 2", "route 10.0.2.0/24 via 198.51.100.9 dev eth0 proto 3 metric 5",
			"route 10.200.0.0/24 nhid 5 proto 12", "route 10.201.0.0/24 proto 3",
		}
		if !slices.Equal(foreign, want) {
			t.Errorf("foreign: %q, want %q", foreign, want)
		}
		reconcile(t, k, overlay.State{})
		if after := sh(t, dump); after != before {
			t.Errorf("before:\n%s\nafter:\n%s", before, after)
		}
	})
}

// TestNothingStolen adds what a stranger took between Observe and Apply.
func TestNothingStolen(t *testing.T) {
	inNode(t, func(k *Kernel) {
		w := dualWorld(3)
		reconcile(t, k, world{families: w.families, nexthops: true, forward: "1", vni: 1, port: 8472, mtu: 1430, mac: 1, host: 1}.state())
		sh(t, `
			ip nexthop add id $((4 << 24 | 1)) blackhole
			ip route add 10.0.2.0/24 via 198.51.100.9
			ip -6 route add fd00:5:2::/64 via 2001:db8:0::9`)
		want := w.state()
		p, _ := overlay.Diff(overlay.State{Links: want.Links, Addrs: want.Addrs, Sysctls: want.Sysctls}, want)
		failures := k.Apply(context.Background(), p)
		var got []string
		for _, f := range failures {
			got = append(got, f.Op.Object.String())
			if !errors.Is(f, unix.EEXIST) && f.Op.Object.String() != "route 10.0.1.0/24 nhid 67108865 proto 84" {
				t.Error(f)
			}
		}
		wantFailed := []string{"nexthop id 67108865 via 10.0.1.0 dev flannel.1 onlink", "route 10.0.2.0/24 nhid 67108866 proto 84", "route fd00:5:2::/64 nhid 100663298 proto 84"}
		if !slices.Equal(got, wantFailed) {
			t.Errorf("failed: %q\nwant: %q", got, wantFailed)
		}
		if out := sh(t, "ip route show 10.0.2.0/24; ip -6 route show fd00:5:2::/64; ip nexthop show id $((4 << 24 | 1))"); strings.Count(out, "via") != 2 || strings.Contains(out, "proto 84") || !strings.Contains(out, "blackhole") {
			t.Errorf("stolen: %s", out)
		}
		stranger := overlay.Link{Name: "flannel.1"}
		failures = k.Apply(context.Background(), overlay.Plan{{Verb: overlay.Delete, Object: stranger, Before: stranger}})
		if len(failures) != 1 || !errors.Is(failures[0], errNotOurs) {
			t.Errorf("deletion of a link without alias: %v", failures)
		}
	})
}

// TestFailuresAreAttributed puts operations that fail between many that do not.
func TestFailuresAreAttributed(t *testing.T) {
	inNode(t, func(k *Kernel) {
		w := dualWorld(1500) // several batches
		want := w.state()
		p := plan(t, k, want)
		bad := func(id uint32) overlay.Op {
			return overlay.Op{Verb: overlay.Add, Object: overlay.Route{Dst: subnet(overlay.IPv4, int(id)), NH: id, Protocol: overlay.Protocol}}
		}
		expected := []overlay.Op{
			{Verb: overlay.Add, Object: overlay.Neigh{Link: "absent", IP: netip.MustParseAddr("10.9.9.9")}},
			bad(30001), bad(30002), bad(30003),
		}
		p = slices.Concat(p[:4], expected[:1], p[4:1000], expected[1:2], p[1000:9000], expected[2:3], p[9000:], expected[3:])
		failures := k.Apply(context.Background(), p)
		if len(failures) != len(expected) {
			t.Fatalf("%d failures: %v", len(failures), failures)
		}
		for i, f := range failures {
			if f.Op != expected[i] {
				t.Errorf("failure %d is of %s, want %s", i, f.Op, expected[i])
			}
		}
		if text := failures[1].Error(); !strings.Contains(text, "route add 10.117.49.0/24 nhid 30001") || !strings.Contains(text, "Nexthop id does not exist") {
			t.Errorf("the kernel's explanation is missing: %s", text)
		}
		if left := plan(t, k, want); len(left) > 0 {
			t.Errorf("others failed too: %d left, the first %s", len(left), left[0])
		}
	})
}

// TestDeleteAbsent deletes everything twice.
func TestDeleteAbsent(t *testing.T) {
	inNode(t, func(k *Kernel) {
		for _, linksToo := range []bool{false, true} {
			w := dualWorld(3)
			w.blackhole = true
			want := w.state()
			reconcile(t, k, want)
			have := observe(t, k)
			target := overlay.State{Links: have.Links}
			if linksToo {
				target = overlay.State{}
			}
			p, _ := overlay.Diff(have, target)
			if !linksToo {
				p = append(p, p...)
			}
			for range 2 {
				if f := k.Apply(context.Background(), p); len(f) > 0 {
					t.Fatal(f)
				}
			}
		}
	})
}

// TestRandomWalk jumps between worlds and checks after each jump that the kernel
// holds exactly the new one.
func TestRandomWalk(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	coin := func() bool { return r.IntN(2) == 0 }
	inHost(t, func(k *Kernel) {
		var d dataPlane
		defer d.stop(world{})
		for step := range 60 {
			w := world{
				nexthops: r.IntN(4) > 0, blackhole: coin(), forward: fmt.Sprint(r.IntN(2)),
				vni: uint32(1 + r.IntN(2)), port: 8472, gbp: r.IntN(4) == 0, learning: r.IntN(4) == 0,
				parent: r.IntN(2), host: 1 + r.IntN(2), mtu: 1400 + r.IntN(2), mac: byte(r.IntN(2)),
				moved: r.IntN(10), direct: r.IntN(5), extraAddresses: coin(),
				tunnelled: r.IntN(2) * r.IntN(10), encrypted: r.IntN(2) * r.IntN(15), grouped: r.IntN(2) * r.IntN(20),
			}
			if w.gbp {
				// Two devices on one port must agree on it, so that going from one
				// VNI without to another with GBP would take two passes.
				w.port = 4789
			}
			for _, f := range []overlay.Family{overlay.IPv4, overlay.IPv6} {
				if coin() {
					w.families = append(w.families, f)
				}
			}
			for p := 1; p < 20; p++ {
				if coin() {
					w.peers = append(w.peers, p)
				}
			}
			if len(w.families) == 0 {
				w.tunnelled, w.encrypted = 0, 0
			}
			want := w.state()
			d.reconcile(t, k, w)
			got := observe(t, k)
			got.Foreign = nil
			if !reflect.DeepEqual(empty(got), empty(want)) {
				t.Fatalf("step %d: the kernel holds\n%+v\nwant\n%+v", step, got, want)
			}
		}
	})
}

// empty makes nil and empty slices equal.
func empty(s overlay.State) overlay.State {
	s.Links, s.Addrs, s.Nexthops = append([]overlay.Link{}, s.Links...), append([]overlay.Addr{}, s.Addrs...), append([]overlay.Nexthop{}, s.Nexthops...)
	s.Routes, s.Neighs, s.FDB = append([]overlay.Route{}, s.Routes...), append([]overlay.Neigh{}, s.Neighs...), append([]overlay.FDB{}, s.FDB...)
	s.Sysctls, s.WGPeers, s.Chains = append([]overlay.Sysctl{}, s.Sysctls...), append([]overlay.WGPeer{}, s.WGPeers...), nil
	return s
}

func TestLeaks(t *testing.T) {
	nettest.CheckLeaks(t)
	inNode(t, func(k *Kernel) {
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error)
		started := make(chan struct{}, 100)
		go func() { done <- k.Watch(ctx, func(string) { started <- struct{}{} }) }()
		<-started
		reconcile(t, k, dualWorld(3).state())
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}
