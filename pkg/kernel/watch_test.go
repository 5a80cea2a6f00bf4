package kernel

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// watching starts a Watch. The function it returns makes one more change that
// must ring, waits for that, and returns what rang before.
func watching(t *testing.T, k *Kernel) (rang func() []string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	rings, done := make(chan string, 100_000), make(chan error, 1)
	go func() { done <- k.Watch(ctx, func(reason string) { rings <- reason }) }()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	n := 0
	rang = func() []string {
		t.Helper()
		n++
		// Netlink keeps the order: what happened before has been told before.
		mark := fmt.Sprintf("192.0.2.%d/32", n)
		sh(t, "ip addr add "+mark+" dev eth0")
		var out []string
		for {
			select {
			case r := <-rings:
				if strings.Contains(r, mark) {
					return out
				}
				out = append(out, r)
			case err := <-done:
				t.Fatalf("Watch ended: %v", err)
			case <-time.After(20 * time.Second):
				t.Fatalf("the change of %s did not ring", mark)
			}
		}
	}
	for !strings.Contains(<-rings, "listening begins") {
	}
	rang()
	return rang
}

// TestOwnChangesAreSilent builds, changes and removes everything while watching.
func TestOwnChangesAreSilent(t *testing.T) {
	inHost(t, func(k *Kernel) {
		var d dataPlane
		defer d.stop(world{})
		w := dualWorld(500)
		w.tunnelled, w.encrypted, w.grouped = 50, 100, 200
		changed := w
		changed.moved, changed.direct, changed.mtu, changed.host, changed.extraAddresses, changed.blackhole = 300, 100, 1350, 2, true, true
		changed.peers = changed.peers[:400]
		plain := w
		plain.nexthops = false
		fewer := w
		fewer.tunnelled, fewer.encrypted, fewer.grouped, fewer.parent = 100, 200, 210, 1
		onlyLinks := world{tunnelled: 1, encrypted: 1, families: w.families, vni: 1, port: 8472, mtu: 1400, mac: 1, host: 1, forward: "1"}
		observe(t, k)
		rang := watching(t, k)
		for i, step := range []world{w, changed, w, fewer, w, plain, w, onlyLinks} {
			d.reconcile(t, k, step)
			r := without(rang(), func(reason string) bool { return strings.HasPrefix(reason, "link flannel") })
			if len(r) > 0 {
				t.Errorf("step %d rang %d times, first for %s, last for %s", i, len(r), r[0], r[len(r)-1])
			}
		}
		k.events.mu.Lock()
		defer k.events.mu.Unlock()
		if len(k.events.echoes) > 0 {
			t.Errorf("%d echoes never came, one is %+v", len(k.events.echoes), firstKey(k.events.echoes))
		}
	})
}

func firstKey(m map[echo]int) echo {
	for k := range m {
		return k
	}
	return echo{}
}

// TestForeignChangesRing does behind our back what must be repaired.
func TestForeignChangesRing(t *testing.T) {
	tests := []struct{ script, reason string }{
		{"ip link set flannel.1 mtu 1280", "link flannel.1 changed"},
		{"ip link set flannel.1 down", "link flannel.1 changed"},
		{"ip link set flannel.1 address 0e:99:00:00:00:01", "link flannel.1 changed"},
		{"ip link set flannel.1 alias x", "link flannel.1 changed"},
		{"ip link set flannel.1 type vxlan id 1 local 198.51.100.2", "link flannel.1 changed"},
		{"ip link del flannel.1", "link flannel.1 deleted"},
		{"ip link set eth0 mtu 1400", "link eth0 changed"},
		{"ip addr del 10.0.0.0/32 dev flannel.1", "address 10.0.0.0/32 on flannel.1 deleted"},
		{"ip addr del fd00:5::/128 dev flannel-v6.1", "address fd00:5::/128 on flannel-v6.1 deleted"},
		{"ip addr add 10.0.0.9/32 dev flannel.1", "address 10.0.0.9/32 on flannel.1 added"},
		{"ip addr del 198.51.100.1/24 dev eth0", "address 198.51.100.1/24 on eth0 deleted"},
		{"ip route del 10.0.2.0/24", "route 10.0.2.0/24 proto 84 deleted"},
		{"ip -6 route del fd00:5:2::/64", "route fd00:5:2::/64 proto 84 deleted"},
		{"ip route replace 10.0.2.0/24 via 198.51.100.9 dev eth0", "route 10.0.2.0/24 proto 3 added"},
		{"ip -6 route replace fd00:5:2::/64 via 2001:db8:0::9", "route fd00:5:2::/64 proto 3 added"},
		{"ip route add 10.99.0.0/24 via 10.99.0.0 dev flannel.1 onlink", "route 10.99.0.0/24 proto 3 added"},
		{"ip route add default via 198.51.100.9", "route 0.0.0.0/0 proto 3 added"},
		{"ip nexthop del id $((4 << 24 | 2))", "nexthop 67108866"},
		{"ip nexthop replace id $((4 << 24 | 2)) via 10.0.77.0 dev flannel.1 onlink proto 84", "nexthop 67108866 via 10.0.77.0 added"},
		{"ip neigh del 10.0.2.0 dev flannel.1", "neighbour 10.0.2.0 on flannel.1 deleted"},
		{"ip neigh replace fd00:5:2:: lladdr 0a:99:00:00:00:01 dev flannel-v6.1 nud permanent", "neighbour fd00:5:2:: on flannel-v6.1 added"},
		{"ip neigh replace 10.0.2.0 lladdr 0a:04:00:00:00:02 dev flannel.1 nud reachable", "neighbour 10.0.2.0 on flannel.1"},
		{"bridge fdb del 0a:04:00:00:00:02 dev flannel.1", "fdb 0a:04:00:00:00:02 dst 198.18.0.2 on flannel.1 deleted"},
		{"bridge fdb replace 0a:04:00:00:00:02 dev flannel.1 dst 198.51.100.99", "fdb 0a:04:00:00:00:02 dst 198.51.100.99 on flannel.1 added"},
	}
	inNode(t, func(k *Kernel) {
		want := dualWorld(3).state()
		reconcile(t, k, want)
		rang := watching(t, k)
		for _, test := range tests {
			sh(t, test.script)
			if r := strings.Join(rang(), "\n"); !strings.Contains(r, test.reason) {
				t.Errorf("%s: rang for %q, not for %q", test.script, r, test.reason)
			}
			sh(t, "ip addr replace 198.51.100.1/24 dev eth0; ip link set eth0 mtu 1500; ip route del default 2>/dev/null || true; ip route del 10.0.2.0/24 proto 3 2>/dev/null || true; ip -6 route del fd00:5:2::/64 proto 3 2>/dev/null || true")
			reconcile(t, k, want)
			rang()
		}
	})
}

// TestTunnelChangesRing is the same for the devices of data planes, and for groups.
func TestTunnelChangesRing(t *testing.T) {
	tests := []struct{ script, reason string }{
		{"ip link set flannel0 mtu 1280", "link flannel0 changed"},
		{"ip link set flannel0 down", "link flannel0 changed"},
		{"ip link set flannel0 alias x", "link flannel0 changed"},
		{"ip link set flannel0 carrier off; ip link set flannel0 carrier on", "link flannel0 changed"},
		{"ip link set flannel-wg mtu 1280", "link flannel-wg changed"},
		{"ip link set flannel-wg down", "link flannel-wg changed"},
		{"ip link set far0 down; while ip nexthop | grep -q eth0; do sleep 0.01; done; ip link set far0 up", "link eth0 changed"},
		{"ip addr del 10.0.0.0/32 dev flannel0", "address 10.0.0.0/32 on flannel0 deleted"},
		{"ip addr del fd00:5::/128 dev flannel-wg", "address fd00:5::/128 on flannel-wg deleted"},
		{"ip route del 10.0.0.0/12", "route 10.0.0.0/12 proto 84 deleted"},
		{"ip route add 10.99.0.0/24 dev flannel-wg", "route 10.99.0.0/24 proto 3 added"},
		{"ip nexthop del id $((4 << 24 | 1))", "nexthop 67108865 dev flannel0 deleted"},
		{"ip nexthop replace id $((4 << 24 | 1)) dev flannel-wg proto 84", "nexthop 67108865 dev flannel-wg added"},
		{"ip nexthop del id $((87 << 24 | 4 << 8 | 1))", "nexthop 1459618817 group 1442841600/1442841601 deleted"},
		{"ip nexthop del id $((86 << 24 | 4 << 8))", "nexthop 1459618817 group 1442841601 added"},
		{"ip nexthop replace id $((87 << 24 | 6 << 8)) group $((86 << 24 | 6 << 8)) proto 84", "nexthop 1459619328 group 1442842112 added"},
		{"ip link del flannel-wg", "link flannel-wg deleted"},
		{"ip link del flannel0", "link flannel0 deleted"},
	}
	inHost(t, func(k *Kernel) {
		w := tunnelWorld()
		var d dataPlane
		defer d.stop(world{})
		d.reconcile(t, k, w)
		rang := watching(t, k)
		for _, test := range tests {
			sh(t, test.script)
			if r := strings.Join(rang(), "\n"); !strings.Contains(r, test.reason) {
				t.Errorf("%s: rang for %q, not for %q", test.script, r, test.reason)
			}
			if strings.HasPrefix(test.script, "ip link del") { // its program starts again
				d.stop(world{})
			}
			d.reconcile(t, k, w)
			rang()
		}
	})
}

// TestForeignSameAsOwn lets a stranger undo and redo right after us what we did:
// an echo must not swallow it.
func TestForeignSameAsOwn(t *testing.T) {
	inNode(t, func(k *Kernel) {
		w := dualWorld(3)
		observe(t, k)
		rang := watching(t, k)
		reconcile(t, k, w.state())
		fewer := w
		fewer.peers = w.peers[:1]
		reconcile(t, k, fewer.state())
		reconcile(t, k, w.state())
		sh(t, `bridge fdb del 0a:04:00:00:00:02 dev flannel.1
			bridge fdb add 0a:04:00:00:00:02 dev flannel.1 dst 198.18.0.2
			ip neigh del 10.0.2.0 dev flannel.1
			ip addr del fd00:5::/128 dev flannel-v6.1
			ip addr add fd00:5::/128 dev flannel-v6.1`)
		want := []string{
			"fdb 0a:04:00:00:00:02 dst 198.18.0.2 on flannel.1 deleted", "fdb 0a:04:00:00:00:02 dst 198.18.0.2 on flannel.1 added",
			"neighbour 10.0.2.0 on flannel.1 deleted", "address fd00:5::/128 on flannel-v6.1 deleted", "address fd00:5::/128 on flannel-v6.1 added",
		}
		got := strings.Join(rang(), "\n")
		for _, reason := range want {
			if !strings.Contains(got, reason) {
				t.Errorf("did not ring for %q, only for\n%s", reason, got)
			}
		}
	})
}

// TestNodeNoiseIsSilent does what a busy node does all day.
func TestNodeNoiseIsSilent(t *testing.T) {
	inNode(t, func(k *Kernel) {
		sh(t, "ip link add cni0 type bridge; ip link set cni0 up; ip addr add 10.0.0.1/24 dev cni0")
		reconcile(t, k, dualWorld(3).state())
		rang := watching(t, k)
		sh(t, `
			for i in 1 2 3; do
				ip link add veth$i type veth peer name pod$i
				ip link set veth$i master cni0 up
				ip link set pod$i up
				ip neigh replace 10.0.0.$i lladdr 0a:77:00:00:00:0$i dev cni0 nud reachable
				ip neigh replace 10.0.0.$i lladdr 0a:77:00:00:00:0$i dev cni0 nud stale
				bridge fdb add 0a:77:00:00:00:0$i dev veth$i master static
				ip route add 10.0.0.20$i/32 dev cni0
				ip route del 10.0.0.20$i/32 dev cni0
				ip route add 172.16.$i.0/24 via 198.51.100.9
				ip route replace 172.16.$i.0/24 via 198.51.100.8
				ip route add 10.20$i.0.0/24 via 198.51.100.9
				ip nexthop replace id $i via 198.51.100.9 dev eth0 proto zebra
				ip link del veth$i
			done
			ip link set eth0 promisc on
			ip link set eth0 promisc off
			ip neigh add 198.51.100.9 lladdr 0a:77:00:00:00:09 dev eth0
			ping -c 1 -W 1 -q 10.0.0.77 >/dev/null || true`)
		if r := rang(); len(r) > 0 {
			t.Errorf("rang for %s", strings.Join(r, "\n"))
		}
	})
}

// TestLostEvents fills the socket while nobody reads: the bell rings for what was
// lost, and Watch goes on.
func TestLostEvents(t *testing.T) {
	inNode(t, func(k *Kernel) {
		observe(t, k)
		ctx, cancel := context.WithCancel(context.Background())
		rings, blocked, done := make(chan string, 100_000), make(chan bool), make(chan error, 1)
		go func() {
			done <- k.Watch(ctx, func(reason string) {
				if reason == "listening begins" {
					blocked <- true
					<-blocked
				}
				rings <- reason
			})
		}()
		<-blocked // the socket listens, and nothing reads
		raw, err := k.events.file.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		err = errors.Join(raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 1) }), err)
		if err != nil {
			t.Fatal(err)
		}
		await := func(reason string) {
			t.Helper()
			for {
				select {
				case r := <-rings:
					if strings.Contains(r, reason) {
						return
					}
				case err := <-done:
					t.Fatalf("Watch ended: %v", err)
				case <-time.After(20 * time.Second):
					t.Fatalf("did not ring for %q", reason)
				}
			}
		}
		reconcile(t, k, dualWorld(300).state())
		blocked <- false
		await("more happened than could be listened to")
		sh(t, "ip link set flannel.1 mtu 1280")
		await("link flannel.1 changed")
		cancel()
		<-done
	})
}

// TestWatchEnds closes the Kernel under a Watch.
func TestWatchEnds(t *testing.T) {
	done := make(chan error, 1)
	inNode(t, func(k *Kernel) {
		started := make(chan string, 10)
		go func() { done <- k.Watch(context.Background(), func(reason string) { started <- reason }) }()
		for !strings.Contains(<-started, "listening begins") {
		}
	})
	if err := <-done; err == nil {
		t.Error("no error")
	}
}
