package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
)

// damage is what somebody does to the kernel behind Twill's back, and what of it
// must be told.
type damage struct {
	name    string
	command string
	kind    string // of the drift, and a part of what names the object
	what    string
	before  string // parts of what was found and of what it is now
	after   string
}

// TestHeal damages each kind of object, on its own, with both firewall tools.
// Each time the kernel is as before soon after, pods reach each other, netctl
// drift tells, and nothing that is not Twill's has changed.
func TestHeal(t *testing.T) {
	for _, tool := range []overlay.Tool{overlay.Iptables, overlay.Nftables} {
		t.Run(string(tool), func(t *testing.T) {
			config := ConfigDual
			if tool == overlay.Nftables {
				config = with(config, `"EnableNFTables": true`)
			}
			c, ctx := newCluster(t, Options{Hosts: 2, Config: config})
			c.Nodes[0].shell(t, foreignSetup)
			must(t, c.Start(ctx))
			must(t, c.WaitPeers(ctx))
			// Within the pod network a stranger's route is put up with from then on.
			c.Nodes[0].shell(t, "ip route add 10.5.250.7/32 dev foreign0 proto static")
			h := &healing{ctx: ctx, node: c.Nodes[0], pods: onePod(t, c)}
			h.observer = newObserver(t, h.node)
			h.good = h.observer.look(t)
			h.foreign = h.node.shell(t, foreignDump)
			for _, d := range append(h.kernelDamage(), firewallDamage(tool)...) {
				t.Run(d.name, func(t *testing.T) { h.heal(t, d) })
			}
		})
	}
}

// healing is the cluster of TestHeal as it should be.
type healing struct {
	ctx      context.Context
	node     *Node
	pods     []*Pod
	observer *observer
	also     func(*testing.T, damage) // looks at more that must be healed
	good     overlay.State
	foreign  string
}

func (h *healing) heal(t *testing.T, d damage) {
	seen := len(drifts(t, h.node))
	began := time.Now()
	h.node.shell(t, d.command)
	var told overlay.Drift
	if Eventually(h.ctx, func() (found bool) {
		told, found = find(drifts(t, h.node)[seen:], d)
		return found
	}) != nil {
		t.Fatalf("netctl drift tells nothing of %s %s, but: %+v", d.kind, d.what, drifts(t, h.node)[seen:])
	}
	healed := h.observer.waitFor(t, h.good)
	t.Logf("noticed %d ms after the command began, seen healed within %d ms (%s)", told.Time.Sub(began).Milliseconds(), healed.Sub(began).Milliseconds(), told.Why)
	must(t, h.node.WaitInSync(h.ctx))
	if h.also != nil {
		h.also(t, d)
	}
	for _, f := range families(h.pods[0]) {
		must(t, h.pods[0].Ping(h.pods[1].Addr(f), 2, 1000))
		must(t, h.pods[1].Ping(h.pods[0].Addr(f), 1, 1000))
	}
	if told.Time.Before(began) || told.Time.After(healed) || told.Why == "" {
		t.Errorf("drift of %s tells a wrong time or no reason: %+v", d.name, told)
	}
	if now := h.node.shell(t, foreignDump); now != h.foreign {
		t.Errorf("what is not Twill's has changed: %s", firstDifference(h.foreign, now))
	}
}

// find returns the drift that tells of the damage.
func find(all []overlay.Drift, d damage) (overlay.Drift, bool) {
	for _, e := range all {
		if e.Kind == d.kind && strings.Contains(e.What, d.what) && strings.Contains(e.Before, d.before) && strings.Contains(e.After, d.after) {
			return e, true
		}
	}
	return overlay.Drift{}, false
}

// kernelDamage is done to what ip(8), bridge(8) and sysctl(8) show, for both
// families alike.
func (h *healing) kernelDamage() []damage {
	var all []damage
	for _, f := range []overlay.Family{overlay.IPv4, overlay.IPv6} {
		link := overlay.VXLANLink(f, 1)
		all = append(all, h.peerDamage(f, link)...)
		all = append(all, h.linkDamage(link)...)
		addr := addrOn(h.good, link)
		all = append(all, damage{
			name: "address of " + link + " removed", command: fmt.Sprintf("ip addr del %s dev %s", addr, link),
			kind: "addr", what: addr, before: "absent", after: addr,
		})
	}
	for _, s := range h.good.Sysctls {
		all = append(all, damage{
			name: strings.ReplaceAll(s.Key, "/", ".") + " set to 0", command: fmt.Sprintf("echo 0 > /proc/sys/%s", s.Key),
			kind: "sysctl", what: s.Key, before: s.Key + "=0", after: s.Key + "=1",
		})
	}
	return all
}

// peerDamage is done to what leads to the one peer.
func (h *healing) peerDamage(f overlay.Family, link string) []damage {
	all := h.routeDamage(f)
	var neigh overlay.Neigh
	for _, n := range h.good.Neighs {
		if n.Link == link {
			neigh = n
		}
	}
	var fdb overlay.FDB
	for _, e := range h.good.FDB {
		if e.Link == link {
			fdb = e
		}
	}
	const wrong = "02:00:00:00:bb:bb"
	return append(all, []damage{
		absent(f, "neighbour deleted", fmt.Sprintf("ip neigh del %s dev %s", neigh.IP, link), "neigh", neigh.IP.String()),
		{
			name:    fmt.Sprintf("%s neighbour changed", f),
			command: fmt.Sprintf("ip neigh replace %s lladdr %s dev %s nud permanent", neigh.IP, wrong, link),
			kind:    "neigh", what: neigh.IP.String(), before: wrong, after: neigh.MAC.String(),
		},
		absent(f, "FDB entry deleted", fmt.Sprintf("bridge fdb del %s dev %s dst %s self", fdb.MAC, link, fdb.Dst), "fdb", fdb.MAC.String()),
		{
			name:    fmt.Sprintf("%s FDB entry added", f),
			command: fmt.Sprintf("bridge fdb append %s dev %s dst %s self permanent", wrong, link, fdb.Dst),
			kind:    "fdb", what: wrong, before: wrong, after: "absent",
		},
	}...)
}

// absent is the removal of an object.
func absent(f overlay.Family, name, command, kind, what string) damage {
	return damage{name: fmt.Sprintf("%s %s", f, name), command: command, kind: kind, what: what, before: "absent", after: what}
}

// routeDamage is done to the route to a peer and its nexthop object.
func (h *healing) routeDamage(f overlay.Family) []damage {
	dst := h.peerRoute(f)
	hop := nexthopOf(h.good, dst)
	flannel := "dev " + hop.Link
	if hop.Gateway.IsValid() {
		flannel += fmt.Sprintf(" via %s onlink", hop.Gateway)
	}
	return []damage{
		absent(f, "route deleted", fmt.Sprintf("ip route del %s", dst.Dst), "route", dst.Dst.String()),
		{
			name:    fmt.Sprintf("%s route replaced by flannel's", f),
			command: fmt.Sprintf("ip route replace %s %s", dst.Dst, flannel),
			kind:    "route", what: dst.Dst.String(), before: "proto 3", after: "nhid",
		},
		absent(f, "nexthop deleted", fmt.Sprintf("ip nexthop del id %d", hop.ID), "nexthop", fmt.Sprintf("id %d", hop.ID)),
	}
}

func (h *healing) linkDamage(link string) []damage {
	const wrong = "02:00:00:00:bb:bb"
	var good overlay.Link
	for _, l := range h.good.Links {
		if l.Name == link {
			good = l
		}
	}
	deleted := damage{name: link + " deleted", command: "ip link del " + link, kind: "link", what: link, before: "absent", after: " up"}
	if good.Kind == overlay.KindTUN { // its program may have made another before the kernel is looked at
		deleted.before = ""
	}
	all := []damage{
		deleted,
		{name: link + " set down", command: "ip link set " + link + " down", kind: "link", what: link, before: " down", after: " up"},
		{name: link + " with another MTU", command: "ip link set " + link + " mtu 1400", kind: "link", what: link, before: "mtu 1400", after: fmt.Sprintf("mtu %d", good.MTU)},
	}
	if route := h.routeOn(link); route != "" { // with direct routing nothing leads there
		all = append(all, damage{
			name: link + " set down and up", command: fmt.Sprintf("ip link set %s down; ip link set %[1]s up", link),
			kind: "route", what: route, before: "absent", after: "nhid",
		})
	}
	if good.Kind == overlay.KindVXLAN {
		all = append(all, damage{
			name: link + " with another MAC", command: fmt.Sprintf("ip link set %s address %s", link, wrong),
			kind: "link", what: link, before: wrong, after: link,
		})
	}
	return all
}

// peerRoute returns one to the subnet of a peer.
func (h *healing) peerRoute(f overlay.Family) overlay.Route {
	for _, r := range h.good.Routes {
		if overlay.FamilyOf(r.Dst.Addr()) == f && r.NH != 0 {
			return r
		}
	}
	return overlay.Route{}
}

func (h *healing) routeOn(link string) string {
	for _, r := range h.good.Routes {
		if nexthopOf(h.good, r).Link == link {
			return r.Dst.String()
		}
	}
	return ""
}

func nexthopOf(s overlay.State, r overlay.Route) overlay.Nexthop {
	for _, n := range s.Nexthops {
		if n.ID == r.NH {
			return n
		}
	}
	return overlay.Nexthop{}
}

func addrOn(s overlay.State, link string) string {
	for _, a := range s.Addrs {
		if a.Link == link {
			return a.Prefix.String()
		}
	}
	return "no address on " + link
}

// firewallDamage is done to each chain of each family.
func firewallDamage(tool overlay.Tool) []damage {
	var all []damage
	for _, f := range []overlay.Family{overlay.IPv4, overlay.IPv6} {
		for _, c := range []struct{ table, chain, hook string }{
			{"nat", overlay.PostroutingChain, "POSTROUTING"}, {"filter", overlay.ForwardChain, "FORWARD"},
		} {
			for _, done := range chainCommands(tool, f, c.table, c.chain, c.hook) {
				found := map[bool]string{true: "absent", false: c.chain}[strings.HasPrefix(done.how, "deleted")]
				all = append(all, damage{
					name: fmt.Sprintf("%s %s %s", f, c.chain, done.how), command: done.command,
					kind: "chain", what: fmt.Sprintf("%s %s hook %s", tool, f, c.hook), before: found, after: c.chain,
				})
			}
		}
	}
	return all
}

// chainCommand is something that can be done to a chain.
type chainCommand struct{ how, command string }

func chainCommands(tool overlay.Tool, f overlay.Family, table, chain, hook string) []chainCommand {
	if tool == overlay.Nftables {
		family := map[overlay.Family]string{overlay.IPv4: "ip", overlay.IPv6: "ip6"}[f]
		return []chainCommand{
			{"flushed", fmt.Sprintf("nft flush chain %s twill %s", family, chain)},
			{"deleted", fmt.Sprintf("nft delete chain %s twill %s", family, chain)},
			{"deleted with its table", fmt.Sprintf("nft delete table %s twill", family)},
			{"with a rule of somebody", fmt.Sprintf("nft insert rule %s twill %s tcp dport 9 return", family, chain)},
		}
	}
	command := map[overlay.Family]string{overlay.IPv4: "iptables", overlay.IPv6: "ip6tables"}[f]
	unjump := fmt.Sprintf("%s -t %s -S %s | grep -e '-j %s' | sed 's/^-A/-D/'", command, table, hook, chain)
	// In one transaction: Twill would be between two.
	restore := "{ echo '*" + table + "'; %s; echo COMMIT; } | " + command + "-restore --noflush"
	return []chainCommand{
		{"flushed", fmt.Sprintf("%s -t %s -F %s", command, table, chain)},
		{"deleted", fmt.Sprintf(restore, fmt.Sprintf("%s; echo -F %s; echo -X %[2]s", unjump, chain))},
		{"without its jump", fmt.Sprintf(restore, unjump)},
		{"with a rule of somebody", fmt.Sprintf("%s -t %s -I %s -p tcp --dport 9 -j RETURN", command, table, chain)},
	}
}
