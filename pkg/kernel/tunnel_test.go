package kernel

import (
	"context"
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

// tunnelWorld has all kinds of objects: a peer in flannel0, one in flannel-wg, two
// behind groups, one in VXLAN.
func tunnelWorld() world {
	w := dualWorld(5)
	w.tunnelled, w.encrypted, w.grouped = 2, 3, 5
	return w
}

// TestTunnelDrift does to the new kinds of objects what operators and other
// programs do; it must be seen and repaired.
func TestTunnelDrift(t *testing.T) {
	tests := map[string]string{
		"tun down":         "ip link set flannel0 down",
		"tun mtu":          "ip link set flannel0 mtu 1300",
		"tun alias":        "ip link set flannel0 alias ''",
		"tun address":      "ip addr del 10.0.0.0/32 dev flannel0",
		"tun IPv6 address": "ip addr del fd00:5::/128 dev flannel0",
		"tun route":        "ip route del 10.0.0.0/12; ip -6 route del fd00::/12",
		"tun carrier":      "ip link set flannel0 carrier off; ip link set flannel0 carrier on",
		"wg down":          "ip link set flannel-wg down",
		"wg port":          "wg set flannel-wg listen-port 9999",
		"wg key":           "wg genkey | wg set flannel-wg private-key /dev/stdin",
		"wg peer removed":  "wg set flannel-wg peer $(wg show flannel-wg peers) remove",
		"wg peer added":    "wg set flannel-wg peer $(wg genkey | wg pubkey) allowed-ips 10.0.2.0/24",
		"wg allowed":       "wg set flannel-wg peer $(wg show flannel-wg peers) allowed-ips 10.0.2.0/25",
		"wg endpoint":      "wg set flannel-wg peer $(wg show flannel-wg peers) endpoint 198.18.9.9:9",
		"wg keepalive":     "wg set flannel-wg peer $(wg show flannel-wg peers) persistent-keepalive 9",
		"wg psk":           "wg genpsk | wg set flannel-wg peer $(wg show flannel-wg peers) preshared-key /dev/stdin",
		"group deleted":    "ip nexthop del id $((87 << 24 | 4 << 8 | 1))",
		"group shrunk":     "ip nexthop replace id $((87 << 24 | 4 << 8 | 1)) group $((86 << 24 | 4 << 8)) proto 84",
		"group weighted":   "ip nexthop replace id $((87 << 24 | 4 << 8 | 1)) group $((86 << 24 | 4 << 8))/$((86 << 24 | 4 << 8 | 1)),3 proto 84",
		"member deleted":   "ip nexthop del id $((86 << 24 | 4 << 8))",
		"members deleted":  "ip nexthop del id $((86 << 24 | 6 << 8)); ip nexthop del id $((86 << 24 | 6 << 8 | 1))",
		"member leads in":  "ip nexthop replace id $((86 << 24 | 4 << 8)) dev eth0 proto 84",
		"other gateway":    "ip nexthop replace id $((4 << 24 | 1)) via 198.51.100.9 dev eth0 proto 84",
		"other device":     "ip -6 nexthop replace id $((6 << 24 | 1)) dev eth0 proto 84",
		"uplink without":   "ip link set far0 down; while ip nexthop | grep -q eth0; do sleep 0.01; done; ip link set far0 up",
		"nexthops flushed": "ip nexthop flush proto 84",
	}
	for name, script := range tests {
		t.Run(name, func(t *testing.T) {
			inHost(t, func(k *Kernel) {
				var d dataPlane
				defer d.stop(world{})
				w := tunnelWorld()
				d.reconcile(t, k, w)
				sh(t, script)
				if p := reconcile(t, k, w.state()); len(p) == 0 {
					t.Errorf("not seen: %s", script)
				}
			})
		})
	}
}

// TestGroupForSingle swaps nexthops for groups and the other way round, which the
// kernel refuses to do: they are made anew, without their routes, and Apply says so.
func TestGroupForSingle(t *testing.T) {
	inHost(t, func(k *Kernel) {
		var d dataPlane
		defer d.stop(world{})
		w := tunnelWorld()
		d.reconcile(t, k, w)
		sh(t, `
			single=$((4 << 24 | 1)); group=$((87 << 24 | 4 << 8 | 1)); member=$((86 << 24 | 4 << 8))
			ip nexthop del id $single; ip nexthop add id $single group $member proto 84
			ip nexthop del id $group; ip nexthop add id $group via 198.51.100.9 dev eth0 proto 84
			ip route add 10.0.1.0/24 nhid $single proto 84; ip route add 10.0.3.0/24 nhid $group proto 84`)
		failed := k.Apply(context.Background(), plan(t, k, w.state()))
		if len(failed) != 2 || !errors.Is(failed[0], errRoutesLost) || !errors.Is(failed[1], errRoutesLost) {
			t.Errorf("failed: %v", failed)
		}
		if got := kinds(reconcile(t, k, w.state())); !reflect.DeepEqual(got, map[string]int{"overlay.Route add": 2}) {
			t.Errorf("then did %v", got)
		}
	})
}

// TestTunnelChanges goes from one world to one that differs in a single respect,
// under traffic to two peers, and checks which operations that takes. No packet
// may find no route.
func TestTunnelChanges(t *testing.T) {
	tests := []struct {
		name         string
		from, change func(*world)
		want         map[string]int
	}{
		{"gateway to device", func(w *world) { w.direct, w.tunnelled = 3, 4 }, func(w *world) { w.direct = 0 }, map[string]int{"overlay.Nexthop change": 4}},
		{"device to gateway", func(w *world) { w.tunnelled = 4 }, func(w *world) { w.direct = 3 }, map[string]int{"overlay.Nexthop change": 4}},
		{"device to device", func(w *world) { w.tunnelled, w.encrypted = 2, 4 }, func(w *world) { w.tunnelled = 3 }, map[string]int{
			"overlay.Nexthop change": 2, "overlay.WGPeer delete": 1,
		}},
		{"other group", func(w *world) { w.grouped, w.parent = 4, 1 }, func(w *world) { w.parent = 0 }, map[string]int{
			"overlay.Nexthop change": 2, "overlay.Nexthop delete": 2,
		}},
		{"group to gateway", func(w *world) { w.grouped = 4 }, func(w *world) { w.direct = 4 }, map[string]int{
			"overlay.Nexthop add": 6, "overlay.Route change": 6, "overlay.Nexthop delete": 8,
		}},
		{"gateway to group", func(w *world) { w.direct = 4 }, func(w *world) { w.direct, w.grouped = 0, 4 }, map[string]int{
			"overlay.Nexthop add": 8, "overlay.Route change": 6, "overlay.Nexthop delete": 6,
		}},
		{"plain", func(w *world) { w.tunnelled = 4 }, func(w *world) { w.nexthops = false }, map[string]int{
			"overlay.Route change": 6, "overlay.Nexthop delete": 6,
		}},
		{"peers", func(w *world) { w.encrypted = 4 }, func(w *world) { w.moved = 3 }, map[string]int{"overlay.WGPeer change": 2}},
		{"mtu", func(w *world) { w.tunnelled, w.encrypted = 2, 3 }, func(w *world) { w.mtu = 1400 }, map[string]int{"overlay.Link change": 4}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			inHost(t, func(k *Kernel) {
				var d dataPlane
				defer d.stop(world{})
				w := dualWorld(3)
				test.from(&w)
				d.reconcile(t, k, w)
				stop := traffic(t)
				test.change(&w)
				got := d.reconcile(t, k, w)
				if stop() == 0 {
					t.Error("no packets were sent meanwhile")
				}
				n := kinds(got)
				for _, vxlan := range []string{"overlay.Neigh add", "overlay.FDB add", "overlay.Neigh delete", "overlay.FDB delete"} {
					delete(n, vxlan)
				}
				if test.want["overlay.Link change"] == 0 { // the VXLAN device follows parent, too
					delete(n, "overlay.Link change")
				}
				if !reflect.DeepEqual(n, test.want) {
					t.Errorf("did %v, want %v:\n%s", n, test.want, got)
				}
			})
		})
	}
}

// TestTUNWithoutDataPlane asks for devices that only their programs can make.
func TestTUNWithoutDataPlane(t *testing.T) {
	inHost(t, func(k *Kernel) {
		w := tunnelWorld()
		p := plan(t, k, w.state())
		failed := k.Apply(context.Background(), p)
		if n := len(failed); n == 0 || !errors.Is(failed[0], errNoDataPlane) {
			t.Fatalf("%d failures: %v", n, failed)
		}
		for _, f := range failed {
			if s := f.Op.String(); !strings.Contains(s, "flannel0") && !strings.Contains(s, "flannel-wg") && !strings.HasPrefix(s, "route add") {
				t.Errorf("failed, too: %v", f)
			}
		}
		// A TUN without its program has neither key nor peers; nor has one whose
		// program was killed and left its socket.
		newTUN(t, overlay.WireGuardLink).Close()
		for range 2 {
			got := observe(t, k)
			i := slices.IndexFunc(got.Links, func(l overlay.Link) bool { return l.Name == overlay.WireGuardLink })
			if i < 0 || got.Links[i].Kind != overlay.KindTUN || got.Links[i].WG != (overlay.WireGuard{}) || len(got.WGPeers) > 0 {
				t.Errorf("observed %+v", got)
			}
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			_ = unix.Bind(fd, &unix.SockaddrUnix{Name: socketDir + "/" + overlay.WireGuardLink + ".sock"}) // the second is in use
			unix.Close(fd)
		}
		sh(t, "rm "+socketDir+"/flannel-wg.sock; ip link del flannel-wg")
		var d dataPlane
		defer d.stop(world{})
		d.reconcile(t, k, w)
	})
}

// TestOtherKind finds a device of another kind under our name, a stranger's and our
// own: the one stays and is a Problem, the other gives way to the data plane.
func TestOtherKind(t *testing.T) {
	inHost(t, func(k *Kernel) {
		sh(t, "ip link add flannel0 type vxlan id 7 dev eth0 dstport 4789")
		want := tunnelWorld().state()
		have := observe(t, k)
		if n := len(have.Links); n != 1 {
			t.Errorf("observed %d links: %v", n, have.Links)
		}
		if p, problems := overlay.Diff(have, want); len(p) > 0 || len(problems) == 0 {
			t.Errorf("problems %v, plan:\n%s", problems, p)
		}
		sh(t, "ip link set flannel0 alias twill")
		failed := k.Apply(context.Background(), plan(t, k, want))
		if !slices.ContainsFunc(failed, func(f Failure) bool { return f.Op.Object == want.Links[3] && errors.Is(f, errNoDataPlane) }) {
			t.Errorf("%v failed otherwise: %v", want.Links[3], failed)
		}
		var d dataPlane
		defer d.stop(world{})
		d.reconcile(t, k, tunnelWorld())
	})
}

// TestTAPIsForeign: a device for Ethernet frames is none of ours.
func TestTAPIsForeign(t *testing.T) {
	inNode(t, func(k *Kernel) {
		sh(t, "ip tuntap add flannel0 mode tap")
		if got := observe(t, k).Links; len(got) > 0 {
			t.Errorf("observed %v", got)
		}
	})
}

// TestNoLinkLocal: a TUN gives itself an IPv6 address as it comes up, unless told
// not to.
func TestNoLinkLocal(t *testing.T) {
	inHost(t, func(k *Kernel) {
		var d dataPlane
		defer d.stop(world{})
		d.reconcile(t, k, tunnelWorld())
		for _, link := range []string{overlay.UDPLink, overlay.WireGuardLink} {
			if out := sh(t, "ip -6 addr show scope link dev "+link); out != "" {
				t.Errorf("%s has %s", link, out)
			}
		}
	})
}

// TestPeerFailures puts peers that cannot be set between others that can.
func TestPeerFailures(t *testing.T) {
	inHost(t, func(k *Kernel) {
		var d dataPlane
		defer d.stop(world{})
		w := dualWorld(50)
		w.encrypted = 51
		d.start(t, w)
		p := plan(t, k, w.state())
		first := slices.IndexFunc(p, func(op overlay.Op) bool { _, is := op.Object.(overlay.WGPeer); return is })
		unreadable := overlay.Op{Verb: overlay.Add, Object: overlay.WGPeer{Link: overlay.WireGuardLink, PublicKey: overlay.WGKey{1: 9}, AllowedIPs: "10.0.0.0"}}
		absent := overlay.Op{Verb: overlay.Add, Object: overlay.WGPeer{Link: "flannel-wg-v6", PublicKey: overlay.WGKey{1: 9}}}
		gone := overlay.Op{Verb: overlay.Delete, Object: absent.Object, Before: absent.Object}
		never := overlay.Op{Verb: overlay.Delete, Object: overlay.WGPeer{Link: overlay.WireGuardLink, PublicKey: overlay.WGKey{1: 10}}}
		// The device stops at a number of seconds beyond 16 bits.
		lazy := overlay.Op{Verb: overlay.Add, Object: overlay.WGPeer{Link: overlay.WireGuardLink, PublicKey: overlay.WGKey{1: 11}, Keepalive: 100_000 * time.Second}}
		p = slices.Insert(p, first+20, unreadable, absent, gone, never, lazy)
		var failed []overlay.Op
		for _, f := range k.Apply(context.Background(), p) {
			t.Log(f)
			failed = append(failed, f.Op)
		}
		if want := []overlay.Op{unreadable, absent, lazy}; !reflect.DeepEqual(failed, want) {
			t.Errorf("failed: %v\nwant: %v", failed, want)
		}
		// wireguard-go has made the one peer before it stopped.
		if left := reconcile(t, k, w.state()); len(left) != 1 || left[0].Verb != overlay.Delete {
			t.Errorf("others failed, too:\n%s", left)
		}
	})
}

// TestHasWireGuard compares with what ip(8) can make.
func TestHasWireGuard(t *testing.T) {
	inNode(t, func(k *Kernel) {
		can := !strings.Contains(sh(t, "ip link add flannel-wg type wireguard 2>&1 || true"), "Unknown device type")
		if k.HasWireGuard() != can {
			t.Errorf("HasWireGuard: %t, ip link add: %t", k.HasWireGuard(), can)
		}
	})
}
