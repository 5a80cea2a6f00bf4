//go:build guest

package kernel

import (
	"fmt"
	"log/slog"
	"net/netip"
	"testing"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// TestGuest brings two hosts to what the backends ipip and wireguard want, with the
// kernel's own devices, and sends packets. It is built with the tag guest and runs
// in the guest of e2e/guest.sh, for not every kernel has them.
func TestGuest(t *testing.T) {
	for _, c := range []struct{ name, config, device string }{
		{"ipip", `{"Network":"10.5.0.0/16","Backend":{"Type":"ipip"}}`, overlay.IPIPLink},
		{"wireguard", `{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"wireguard","PSK":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="}}`, overlay.WireGuardLink},
		{"wireguard, one device", `{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"wireguard","Mode":"ipv6"}}`, overlay.WireGuardLink},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg, _, err := overlay.ParseConfig([]byte(c.config))
			if err != nil {
				t.Fatal(err)
			}
			hosts, err := nettest.NewT(t).NewHosts(2)
			if err != nil {
				t.Fatal(err)
			}
			g := &guest{t: t, snap: &overlay.Snapshot{Revision: 1, Config: cfg}}
			for i, h := range hosts {
				g.add(h, i)
			}
			for i := range hosts {
				g.reconcile(i)
			}
			for _, f := range []overlay.Family{overlay.IPv4, overlay.IPv6} {
				if cfg.Pool(f).Enabled() {
					g.ping(0, f)
				}
			}
			// Somebody deletes the device, and moves the peer's traffic elsewhere.
			g.run(0, "ip", "link", "delete", c.device)
			g.reconcile(0)
			g.ping(0, overlay.IPv4)
			g.run(1, "ip", "link", "set", c.device, "mtu", "1300", "down")
			g.reconcile(1)
			// A WireGuard device that was down has forgotten its sessions, and its peer
			// has not.
			want, _ := overlay.Desired(g.snap, g.self[1])
			err = g.hosts[1].Do(func() error { return g.kernel[1].Handshake(t.Context(), want.WGPeers) })
			if err != nil {
				t.Error(err)
			}
			g.ping(0, overlay.IPv4)
			g.remove(0)
		})
	}
}

type guest struct {
	t      *testing.T
	snap   *overlay.Snapshot
	hosts  []*nettest.Host
	kernel []*Kernel
	self   []overlay.Self
}

// add makes a node of a host.
func (g *guest) add(h *nettest.Host, i int) {
	self := overlay.Self{
		Subnets: overlay.Subnets{V4: netip.MustParsePrefix(fmt.Sprintf("10.5.%d.0/24", i+1))},
		Uplink: overlay.Uplink{
			Name: "eth0", MTU: 1500, V4: h.IPv4, V6: h.IPv6,
			OnLink: []netip.Prefix{netip.PrefixFrom(h.IPv4, 24).Masked(), netip.PrefixFrom(h.IPv6, 64).Masked()},
		},
		PublicIP: h.IPv4, PublicV6: h.IPv6, WGKey: overlay.WGKey{0, byte(i + 1)}.Clamp(),
		Options: overlay.Options{Nexthops: true},
	}
	if g.snap.Config.V6.Enabled() {
		self.V6 = netip.MustParsePrefix(fmt.Sprintf("fd00:5:0:%d::/64", i+1))
	}
	var k *Kernel
	err := h.Do(func() (err error) {
		k, err = Open(Options{Log: slog.New(slog.DiscardHandler)})
		return err
	})
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { k.Close() })
	if g.snap.Config.Backend.Type == "wireguard" && !k.HasWireGuard() {
		g.t.Fatal("the guest's kernel has WireGuard, and it is not seen")
	}
	attrs, err := overlay.PublishedAttrs(g.snap.Config, self)
	if err != nil {
		g.t.Fatal(err)
	}
	g.hosts, g.kernel, g.self = append(g.hosts, h), append(g.kernel, k), append(g.self, self)
	g.snap.Leases = append(g.snap.Leases, &overlay.Lease{Subnets: self.Subnets, Attrs: attrs, Created: int64(i + 1), Grant: 1})
}

// reconcile does a pass; the second plan is empty.
func (g *guest) reconcile(i int) {
	g.t.Helper()
	want, problems := overlay.Desired(g.snap, g.self[i])
	if len(problems) > 0 {
		g.t.Fatal(problems)
	}
	if n := g.apply(i, want); n == 0 {
		g.t.Fatal("there was nothing to do")
	}
	if g.apply(i, want) != 0 {
		g.t.Fatal("the second plan is not empty")
	}
}

func (g *guest) apply(i int, want overlay.State) (changes int) {
	g.t.Helper()
	err := g.hosts[i].Do(func() error {
		have, err := g.kernel[i].Observe(g.t.Context(), ScopeOf(g.snap.Config, want, g.self[i].Uplink))
		if err != nil {
			return err
		}
		plan, problems := overlay.Diff(have, want)
		g.t.Logf("%s:\n%s", g.hosts[i].Name, plan)
		changes = len(plan)
		for _, f := range g.kernel[i].Apply(g.t.Context(), plan) {
			return f
		}
		if len(problems) > 0 {
			return fmt.Errorf("%v", problems)
		}
		return nil
	})
	if err != nil {
		g.t.Fatal(err)
	}
	return changes
}

// ping sends full packets from node i's overlay address to the other's.
func (g *guest) ping(i int, f overlay.Family) {
	g.t.Helper()
	mtu, err := overlay.PodMTU(g.snap.Config, g.self[0])
	if err != nil {
		g.t.Fatal(err)
	}
	headers := map[overlay.Family]int{overlay.IPv4: 28, overlay.IPv6: 48}[f]
	from, to := g.self[i].Subnet(f).Addr(), g.self[1-i].Subnet(f).Addr()
	g.run(i, "ping", "-n", "-c", "3", "-i", "0.3", "-W", "10", "-M", "do", "-s", fmt.Sprint(mtu-headers), "-I", from.String(), to.String())
}

func (g *guest) run(i int, args ...string) {
	g.t.Helper()
	out, err := g.hosts[i].Run(args[0], args[1:]...)
	g.t.Logf("%s# %v\n%s", g.hosts[i].Name, args, out)
	if err != nil {
		g.t.Fatal(err)
	}
}

// remove takes everything away again.
func (g *guest) remove(i int) {
	if g.apply(i, overlay.State{}) == 0 {
		g.t.Fatal("nothing was there")
	}
	if n := g.apply(i, overlay.State{}); n != 0 {
		g.t.Fatalf("%d things are left", n)
	}
}
