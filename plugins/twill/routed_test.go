package main

import (
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/twill-net/twill/pkg/pod"
)

// A routed pod has addresses of full length and one route on the host, and no bridge
// is made.
func TestRouted(t *testing.T) {
	h, a, b := newHost(t), newNamespace(t), newNamespace(t)
	h.conf["mode"] = "routed"
	h.forwards()
	out := h.must(add("a", a))
	ra := h.result(call{}, out)
	rb := h.attach(add("b", b))
	if len(ra.Interfaces) != 2 || ra.Interfaces[0].Mac != "ee:ee:ee:ee:ee:ee" || ra.Interfaces[1].Sandbox != a.path() {
		t.Fatalf("interfaces %+v", ra.Interfaces)
	}
	var ips []string
	for _, ip := range ra.IPs {
		ips = append(ips, ip.Address.String()+" via "+ip.Gateway.String())
	}
	if got := strings.Join(ips, ", "); got != "198.18.1.2/32 via 169.254.1.1, fd00:18:0:1::2/128 via fe80::1" {
		t.Errorf("addresses %s", got)
	}
	if h.hasLink("cni0") {
		t.Error("there is a bridge")
	}
	for i := range 2 {
		header := []int{20, 40}[i] + 8
		mustPing(t, a, addrOf(rb, i), 1450-header) // at once, up to the full MTU
		mustPing(t, h.namespace, addrOf(ra, i), 100)
	}
	check := call{verb: "CHECK", id: "a"}.on(a).with("prevResult", prev(t, out))
	h.must(check)
	// A pod that forgot its gateway's MAC asks for it, and is answered.
	eth0 := a.link("eth0")
	for _, gw := range []string{"169.254.1.1", "fe80::1"} {
		if err := a.nl.NeighDel(&netlink.Neigh{LinkIndex: eth0.Attrs().Index, IP: netip.MustParseAddr(gw).AsSlice()}); err != nil {
			t.Fatal(err)
		}
	}
	h.fails(check, pod.ErrDiffers, "has no neighbour 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee", "has no neighbour fe80::1")
	for i := range 2 {
		mustPing(t, a, addrOf(rb, i), 100)
	}
	h.must(del("a", a))
	h.must(del("b", b))
	if err := h.nl.LinkDel(h.link("up0")); err != nil {
		t.Fatal(err)
	}
	h.clean()
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := h.nl.RouteListFiltered(family, &netlink.Route{Protocol: 84}, netlink.RT_FILTER_PROTOCOL)
		if err != nil || len(routes) > 0 {
			t.Errorf("routes left: %v, %v", routes, err)
		}
	}
}

// forwards makes a router of the host, as twilld does, with an uplink and a default
// route.
func (h *host) forwards() {
	h.t.Helper()
	up := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "up0"}}
	err := h.nl.LinkAdd(up)
	for _, text := range []string{"198.51.100.1/24", "fd00:51::1/64"} {
		a, _ := netlink.ParseAddr(text)
		err = errors.Join(err, h.nl.AddrAdd(up, a))
	}
	err = errors.Join(err, h.nl.LinkSetUp(up))
	err = errors.Join(err, h.nl.RouteAdd(&netlink.Route{Gw: netip.MustParseAddr("198.51.100.254").AsSlice()}))
	err = errors.Join(err, h.do(func() error {
		return errors.Join(os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644), os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0o644))
	}))
	if err != nil {
		h.t.Fatal(err)
	}
}

// hasLink reports whether there is a link of that name.
func (n *namespace) hasLink(name string) bool {
	_, err := n.nl.LinkByName(name)
	return err == nil
}

// A node has pods of both kinds while it changes from one to the other, in whatever
// order they came.
func TestMixedModes(t *testing.T) {
	h := newHost(t)
	h.forwards()
	results, pods, outs := map[string][]netip.Addr{}, map[string]*namespace{}, map[string][]byte{}
	for _, p := range []struct{ id, mode string }{{"r1", "routed"}, {"b1", "bridged"}, {"r2", "routed"}, {"b2", "bridged"}} {
		pods[p.id] = newNamespace(t)
		outs[p.id] = h.must(add(p.id, pods[p.id]).with("mode", p.mode))
		res := h.result(call{}, outs[p.id])
		results[p.id] = []netip.Addr{addrOf(res, 0), addrOf(res, 1)}
	}
	for from, ns := range pods {
		for to, addrs := range results {
			if from != to {
				mustPing(t, ns, addrs[0], 100)
				mustPing(t, ns, addrs[1], 100)
			}
		}
	}
	for _, id := range []string{"r1", "r2"} {
		check := call{verb: "CHECK", id: id}.on(pods[id]).with("mode", "routed").with("prevResult", prev(t, outs[id]))
		h.must(check)
		proxy := &netlink.Neigh{LinkIndex: h.link("cni0").Attrs().Index, Family: netlink.FAMILY_V6, IP: results[id][1].AsSlice(), Flags: netlink.NTF_PROXY}
		if err := h.nl.NeighDel(proxy); err != nil {
			t.Fatal(err)
		}
		h.fails(check, pod.ErrDiffers, "the bridge cni0 does not answer for "+results[id][1].String())
	}
	for id := range pods {
		h.must(call{verb: "DEL", id: id})
	}
	proxies, err := h.nl.NeighProxyList(0, netlink.FAMILY_V6)
	if err != nil || len(proxies) > 0 {
		t.Errorf("proxy entries left: %v, %v", proxies, err)
	}
}
