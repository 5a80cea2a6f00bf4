package daemon

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/twill-net/twill/pkg/kernel"
	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/wgtun"
)

// node finds out what this node is: its uplink, addresses and VTEPs. It follows
// the uplink's changes; the VTEPs stay for the life of the process.
type node struct {
	*Daemon
	self    overlay.Self
	known   bool
	problem string // why the uplink as it was is still used

	// What lease and kernel said at the start: a VTEP that both agree on is kept.
	leased overlay.Attrs
	links  []overlay.Link
}

// identify looks at the interfaces. Once the node is known, an uplink that is
// gone for a while changes nothing.
func (n *node) identify(ctx context.Context, snap *overlay.Snapshot) error {
	cfg := snap.Config
	rules := n.cfg.Uplink
	rules.IPv4, rules.IPv6 = cfg.Underlay(overlay.IPv4), cfg.Underlay(overlay.IPv6)
	var targets []netip.Addr
	if rules.CanReach.IsValid() {
		targets = append(targets, rules.CanReach)
	}
	ifaces, err := n.kernel.Interfaces(ctx, targets)
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	uplink, err := overlay.ChooseUplink(ifaces, rules)
	if err != nil {
		if n.known {
			if n.problem != err.Error() {
				n.log.Warn("uplink is not usable, keeping what was known of it", "uplink", n.self.Uplink.Name, "error", err)
			}
			n.problem = err.Error()
			return nil
		}
		return err
	}
	n.problem = ""
	if old := n.self.Uplink; n.known && (old.Name != uplink.Name || old.V4 != uplink.V4 || old.V6 != uplink.V6 || old.MTU != uplink.MTU) {
		n.log.Info("uplink changed", "old", old.Name, "oldIPv4", old.V4, "oldIPv6", old.V6, "oldMTU", old.MTU, "new", uplink.Name, "IPv4", uplink.V4, "IPv6", uplink.V6, "MTU", uplink.MTU)
	}
	n.self.Uplink = uplink
	n.self.PublicIP = firstValid(snap.Node.PublicIP, n.cfg.PublicIP, uplink.V4)
	n.self.PublicV6 = firstValid(snap.Node.PublicIPv6, n.cfg.PublicIPv6, uplink.V6)
	if n.known {
		return nil
	}
	return n.meet(ctx, snap, ifaces)
}

// firstValid returns the first address that is one.
func firstValid(addrs ...netip.Addr) netip.Addr {
	for _, a := range addrs {
		if a.IsValid() {
			return a
		}
	}
	return netip.Addr{}
}

// meet does what is done once: it looks at the kernel before anything is
// written, refuses a pod network that this host already uses and devices of
// others in the place of ours, and takes over the VTEPs that the host and its
// lease agree on.
func (n *node) meet(ctx context.Context, snap *overlay.Snapshot, ifaces []overlay.Iface) error {
	cfg, leases := snap.Config, snap.Leases
	have, err := n.kernel.Observe(ctx, kernel.Scope{Networks: cfg.Networks(), Uplink: n.self.Uplink.Name})
	if err != nil {
		return fmt.Errorf("read the kernel's state: %w", err)
	}
	own := formerSubnets(n.cfg.SubnetFile)
	var lease overlay.Lease
	if l := n.ownLease(leases); l != nil {
		lease, own = *l, l.Subnets
	}
	problems := append(overlay.CheckLinks(cfg, have.Links, ifaces), overlay.CheckOverlap(cfg, own, leases, have.Foreign)...)
	if len(problems) > 0 {
		return fmt.Errorf("%s", problems[0])
	}
	n.leased, n.links = lease.Attrs, have.Links
	n.self.Options = overlay.Options{
		IPMasq:         n.cfg.IPMasq,
		RandomFully:    n.cfg.RandomFully && n.kernel.HasRandomFully(overlay.IPv4, cfg.Tool()),
		ForwardRules:   n.cfg.ForwardRules,
		BlackholeRoute: n.cfg.Blackhole,
		Nexthops:       n.kernel.HasNexthops(),

		NeighLimit:           neighLimit("ipv4"),
		NeighLimitV6:         neighLimit("ipv6"),
		WireGuardInUserSpace: !n.kernel.HasWireGuard(),
		BGP:                  n.cfg.BGP,
	}
	n.known = true
	n.log.Info("uplink chosen", "name", n.self.Uplink.Name, "why", n.self.Uplink.Why, "IPv4", n.self.PublicIP, "IPv6", n.self.PublicV6, "MTU", n.self.Uplink.MTU)
	return nil
}

// ownLease finds the lease the node had before this start.
func (n *node) ownLease(leases []*overlay.Lease) *overlay.Lease {
	name := n.store.Status().Node
	i := slices.IndexFunc(leases, func(l *overlay.Lease) bool {
		if n.cfg.Kubernetes {
			return l.Node == name
		}
		return l.PublicIP == n.self.PublicIP
	})
	if i < 0 {
		return nil
	}
	return leases[i]
}

// neighLimit reads how many neighbours the kernel keeps. Only the first network
// namespace can tell.
func neighLimit(family string) int {
	content, err := os.ReadFile("/proc/sys/net/" + family + "/neigh/default/gc_thresh3")
	if err != nil {
		return 0
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(content)))
	if err != nil {
		return 0
	}
	return n
}

// equip gets what a backend needs beside the uplink: it is kept for the life of
// the process.
func (n *node) equip(ctx context.Context, b overlay.BackendConfig) error {
	switch b.Type {
	case "vxlan":
		// Another VNI keeps them: peers send to the old ones for a while.
		if n.self.MAC == (overlay.MAC{}) {
			n.self.MAC = n.vtep(overlay.VXLANLink(overlay.IPv4, b.VXLAN.VNI), n.leased.VTEP.MAC)
			n.self.MACv6 = n.vtep(overlay.VXLANLink(overlay.IPv6, b.VXLAN.VNI), n.leased.VTEPv6.MAC)
		}
	case "extension":
		data, err := n.extensions.data(ctx, b.Extension)
		if err != nil {
			return err
		}
		n.self.ExtensionData = data
	case "wireguard":
		if n.self.WGKey != (overlay.WGKey{}) {
			return nil
		}
		key, err := wgtun.Key(n.cfg.WireGuardKey)
		if err != nil {
			return fmt.Errorf("the node's WireGuard key: %w", err)
		}
		n.self.WGKey = key
	}
	return nil
}

// wasWireGuard reports whether peers knew the node's WireGuard key before this start.
func (n *node) wasWireGuard() bool {
	key := n.self.WGKey.Public()
	return n.leased.WireGuard.PublicKey == key || n.leased.WireGuardV6.PublicKey == key
}

// fits refuses a new network that this host already uses.
func (n *node) fits(ctx context.Context, next overlay.Config, own overlay.Subnets, leases []*overlay.Lease) error {
	have, err := n.kernel.Observe(ctx, kernel.Scope{Networks: next.Networks(), Uplink: n.self.Uplink.Name})
	if err != nil {
		return fmt.Errorf("read the kernel's state: %w", err)
	}
	if p := overlay.CheckOverlap(next, own, leases, have.Foreign); len(p) > 0 {
		return fmt.Errorf("%s", p[0])
	}
	return nil
}

// vtep returns the MAC of a VTEP: the device's, if the lease says the same (so a
// restart, also of flannel's, changes nothing), or if the lease has moved on to
// another backend and the device is ours; else the derived one.
func (n *node) vtep(device string, leased overlay.MAC) overlay.MAC {
	i := slices.IndexFunc(n.links, func(l overlay.Link) bool { return l.Name == device })
	if i >= 0 && (n.links[i].MAC == leased || leased == (overlay.MAC{}) && n.links[i].Ours()) {
		return n.links[i].MAC
	}
	return overlay.DeriveMAC(n.self.Uplink, device)
}

// problems reports an uplink that cannot be used any more.
func (n *node) problems() []overlay.Problem {
	if n.problem == "" {
		return nil
	}
	return []overlay.Problem{{
		Object: "uplink " + n.self.Uplink.Name, Reason: n.problem,
		Remedy: "what was known of it stays in force until it is back",
	}}
}
