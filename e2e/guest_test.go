//go:build guest

package e2e

import (
	"fmt"
	"testing"

	"github.com/twill-net/twill/pkg/overlay"
)

// TestKernelBackends runs the backends that this machine's kernel may lack: IPIP,
// and WireGuard in the kernel. It is built with the tag guest and run in the guest
// of e2e/guest.sh, whose kernel has both.
func TestKernelBackends(t *testing.T) {
	v4 := func(backend string) string {
		return fmt.Sprintf(`{"Network": %q, "Backend": %s}`, PodNetwork, backend)
	}
	for _, x := range []struct {
		backend
		network string
		device  string // what `ip -d link` says of it
	}{
		{backend{name: "ipip", kernel: true, overhead: [2]int{20, 20}, links: []string{"flannel.ipip"}}, v4(`{"Type": "ipip"}`), "ipip"},
		{
			backend{name: "wireguard in the kernel", kernel: true, overhead: [2]int{80, 80}, links: []string{"flannel-wg", "flannel-wg-v6"}},
			dual(`{"Type": "wireguard", "PSK": "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="}`), "wireguard",
		},
	} {
		t.Run(x.name, func(t *testing.T) {
			c, ctx := newCluster(t, Options{Hosts: 3, Config: x.network})
			must(t, c.Start(ctx))
			must(t, c.WaitPeers(ctx))
			s := &trial{Cluster: c, backend: x.backend, ctx: ctx, pods: onePod(t, c)}
			for _, n := range c.Nodes {
				n.shell(t, forwardDrop)
				for _, link := range x.links {
					n.shell(t, fmt.Sprintf("ip -d link show %s | grep -w %s", link, x.device))
				}
			}
			from, to := s.pods[0], s.pods[1]
			for _, f := range families(from) {
				for _, peer := range s.pods[1:] {
					must(t, from.Ping(peer.Addr(f), 3, s.podMTU(1500)-headers(f)))
				}
				if from.Ping(to.Addr(f), 1, s.podMTU(1500)-headers(f)+1) == nil {
					t.Errorf("%s: a packet larger than the MTU got through", f)
				}
			}
			t.Run("restart", func(t *testing.T) {
				must(t, c.Nodes[1].Daemon.Kill9())
				for _, f := range families(from) {
					must(t, from.Ping(to.Addr(f), 5, 56))
				}
				must(t, c.Nodes[1].Daemon.Start())
				must(t, c.Nodes[1].WaitReady(ctx))
				must(t, c.Nodes[1].WaitInSync(ctx))
				s.undisturbed(t)
			})
			t.Run("drift", func(t *testing.T) {
				for _, link := range x.links {
					c.Nodes[0].shell(t, "ip link delete "+link)
					must(t, c.Nodes[0].WaitInSync(ctx))
				}
				for _, f := range families(from) {
					must(t, s.eventuallyPings(from, to.Addr(f)))
				}
			})
			t.Run("another uplink MTU", func(t *testing.T) {
				c.Nodes[0].shell(t, "ip link set eth0 mtu 1400")
				must(t, c.Nodes[0].WaitStatus(ctx, "at the new MTU", func(st overlay.Status) bool { return st.PodMTU == s.podMTU(1400) && st.Ready }))
				must(t, c.Nodes[0].WaitInSync(ctx))
			})
		})
	}
}

// headers is what ping's payload leaves to IP and ICMP.
func headers(f overlay.Family) int {
	if f == overlay.IPv4 {
		return 28
	}
	return 48
}
