package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/overlay"
)

// drift damages each kind of object that the backend owns, as TestHeal does.
func (s *trial) drift(t *testing.T) {
	h := &healing{ctx: s.ctx, node: s.Nodes[0], pods: s.pods}
	if s.name == "wireguard" {
		h.also = s.sessionsHeal
	}
	h.observer = newObserver(t, h.node)
	h.good = h.observer.look(t)
	h.foreign = h.node.shell(t, foreignDump)
	for _, d := range s.damage(h) {
		t.Run(d.name, func(t *testing.T) { h.heal(t, d) })
	}
	t.Run("cable pulled", func(t *testing.T) { s.cablePulled(t, h) })
	t.Run("uplink down and up", func(t *testing.T) { s.uplinkDown(t, h) })
}

// damage is done to every object of the backend.
func (s *trial) damage(h *healing) []damage {
	var all []damage
	for _, f := range []overlay.Family{overlay.IPv4, overlay.IPv6} {
		link := nexthopOf(h.good, h.peerRoute(f)).Link
		if slices.ContainsFunc(h.good.Neighs, func(n overlay.Neigh) bool { return n.Link == link }) {
			all = append(all, h.peerDamage(f, link)...)
		} else {
			all = append(all, h.routeDamage(f)...)
		}
	}
	for _, link := range h.good.Links {
		all = append(all, h.linkDamage(link.Name)...)
		addr := addrOn(h.good, link.Name)
		all = append(all, damage{
			name: "address of " + link.Name + " removed", command: fmt.Sprintf("ip addr del %s dev %s", addr, link.Name),
			kind: "addr", what: addr, before: "absent", after: addr,
		})
	}
	for _, r := range h.good.Routes {
		if r.NH == 0 && r.Protocol == overlay.Protocol {
			all = append(all, damage{
				name: r.String() + " deleted", command: "ip " + strings.Replace(r.String(), "route ", "route del ", 1),
				kind: "route", what: r.Dst.String(), before: "absent", after: r.Dst.String(),
			})
		}
	}
	return append(all, s.wireguardDamage(h)...)
}

// wireguardDamage is done with wg(8).
func (s *trial) wireguardDamage(h *healing) []damage {
	if s.name != "wireguard" {
		return nil
	}
	var all []damage
	for _, link := range s.links {
		all = append(all, damage{
			name:    "peer of " + link + " removed",
			command: fmt.Sprintf("k=$(wg show %s peers | head -1); wg set %[1]s peer $k remove", link),
			kind:    "wgpeer", what: link, before: "absent", after: "endpoint",
		}, damage{
			name:    "peer of " + link + " without its subnet",
			command: fmt.Sprintf("k=$(wg show %s peers | head -1); wg set %[1]s peer $k allowed-ips 198.18.0.0/24", link),
			kind:    "wgpeer", what: link, before: "198.18.0.0/24", after: "endpoint",
		}, damage{
			name:    "a stranger among the peers of " + link,
			command: fmt.Sprintf("wg set %s peer $(wg genkey | wg pubkey) allowed-ips 10.5.99.0/24", link),
			kind:    "wgpeer", what: link, before: "10.5.99.0/24", after: "absent",
		}, damage{
			name:    link + " with another port",
			command: fmt.Sprintf("wg set %s listen-port 9999", link),
			kind:    "link", what: link, before: "listen-port 9999", after: " up",
		})
	}
	return all
}

// sessionsHeal has the healed node be reached by one that heard nothing of it. When
// nobody can see any more that a device was down, it is for the node to speak first.
func (s *trial) sessionsHeal(t *testing.T, d damage) {
	s.sessions(t, s.Nodes[0])
	from, to := s.pods[2], s.pods[0]
	if strings.HasSuffix(d.name, "set down and up") {
		from, to = to, from
	}
	for _, f := range families(from) {
		must(t, from.Ping(to.Addr(f), 2, 56))
	}
}

// cablePulled has the uplink lose its carrier for a while: the kernel throws the
// nexthop objects on it away.
func (s *trial) cablePulled(t *testing.T, h *healing) {
	must(t, h.node.Cut())
	must(t, Eventually(s.ctx, func() bool { return strings.Contains(h.node.shell(t, "ip link show eth0"), "NO-CARRIER") }))
	if err := s.pods[1].Ping(s.pods[0].IPv4, 1, 56); err == nil {
		t.Error("the cable is not cut")
	}
	must(t, h.node.Restore())
	s.recovered(t, h)
}

// uplinkDown does what an operator or a network manager does to an interface.
func (s *trial) uplinkDown(t *testing.T, h *healing) {
	h.node.shell(t, fmt.Sprintf(`set -e
		ip link set eth0 down; sleep 0.3; ip link set eth0 up
		ip addr replace %s/64 dev eth0 nodad
		ip route replace default via 198.51.100.1; ip -6 route replace default via 2001:db8:51::1`, h.node.IPv6))
	s.recovered(t, h)
}

// recovered waits until the kernel is as it was and pods reach each other.
func (s *trial) recovered(t *testing.T, h *healing) {
	t.Helper()
	h.observer.waitFor(t, h.good)
	must(t, h.node.WaitInSync(s.ctx))
	for _, f := range families(s.pods[0]) {
		must(t, s.eventuallyPings(s.pods[0], s.pods[1].Addr(f)))
		must(t, s.eventuallyPings(s.pods[2], s.pods[0].Addr(f)))
	}
	for _, n := range s.Nodes {
		must(t, n.waitProblem(s.ctx))
	}
}
