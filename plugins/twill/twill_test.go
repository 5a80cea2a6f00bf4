package main

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"

	"github.com/twill-net/twill/pkg/pod"
)

// hostLink returns the name of the host's end.
func hostLink(t testing.TB, r *types100.Result) string {
	t.Helper()
	if len(r.Interfaces) != 3 || r.Interfaces[1].Sandbox != "" {
		t.Fatalf("interfaces %v", r.Interfaces)
	}
	return r.Interfaces[1].Name
}

func addrOf(r *types100.Result, i int) netip.Addr {
	a, _ := netip.AddrFromSlice(r.IPs[i].Address.IP)
	return a.Unmap()
}

func TestEveryVersion(t *testing.T) {
	for _, v := range []string{"", "0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		t.Run("version "+v, func(t *testing.T) {
			t.Parallel()
			h, p := newHost(t), newNamespace(t)
			h.conf["cniVersion"] = v
			if v == "" {
				delete(h.conf, "cniVersion")
				v = "0.1.0"
			}
			out := h.must(add("c1", p))
			var got struct{ CNIVersion string }
			if err := json.Unmarshal(out, &got); err != nil || got.CNIVersion != v {
				t.Errorf("result of version %s, %v, want %s: %s", got.CNIVersion, err, v, out)
			}
			h.conf["cniVersion"] = v
			res := h.result(call{}, out)
			if addrOf(res, 0).String() != "198.18.1.2" || addrOf(res, 1).String() != "fd00:18:0:1::2" {
				t.Errorf("result %s", out)
			}
			given := func(c call) call { return c.with("prevResult", prev(t, out)) }
			if v >= "0.4.0" {
				h.must(given(call{verb: "CHECK", id: "c1"}.on(p)))
			} else {
				h.fails(given(call{verb: "CHECK", id: "c1"}.on(p)), 1, "CHECK")
			}
			if v >= "1.1.0" {
				h.must(call{verb: "STATUS"})
				h.must(call{verb: "GC"}.with("cni.dev/valid-attachments", []any{map[string]any{"containerID": "c1", "ifname": "eth0"}}))
				h.must(given(call{verb: "CHECK", id: "c1"}.on(p)))
			} else {
				h.fails(call{verb: "STATUS"}, 1, "STATUS")
				h.fails(call{verb: "GC"}, 1, "GC")
			}
			h.must(given(del("c1", p)))
			h.clean()
			if got := p.links(); got != "lo" {
				t.Errorf("left in the pod: %s", got)
			}
		})
	}
}

func TestVersionVerb(t *testing.T) {
	h := newHost(t)
	out := h.must(call{verb: "VERSION"})
	var v struct {
		CNIVersion        string
		SupportedVersions []string
	}
	if err := json.Unmarshal(out, &v); err != nil {
		t.Fatal(err)
	}
	if want := []string{"0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}; !slices.Equal(v.SupportedVersions, want) {
		t.Errorf("supports %v", v.SupportedVersions)
	}
	h.fails(add("c1", newNamespace(t)).with("cniVersion", "9.9.9"), 1)
	h.clean()
}

func TestResult(t *testing.T) {
	h, p := newHost(t), newNamespace(t)
	res := h.attach(add("c1", p).with("dns", map[string]any{"nameservers": []string{"198.18.0.10"}}).
		with("routes", []any{map[string]any{"dst": "203.0.113.0/24"}, map[string]any{"dst": "::/0", "gw": "fd00:18:0:1::9", "mtu": 1400}}))
	host := hostLink(t, res)
	br, port, inner := h.link("cni0"), h.link(host), p.link("eth0")
	for i, l := range []netlink.Link{br, port, inner} {
		got, a := res.Interfaces[i], l.Attrs()
		if got.Name != a.Name || got.Mac != a.HardwareAddr.String() || got.Mtu != a.MTU || a.MTU != 1450 {
			t.Errorf("interface %+v, in the kernel %s %s mtu %d", got, a.Name, a.HardwareAddr, a.MTU)
		}
	}
	if res.Interfaces[2].Sandbox != p.path() || res.DNS.Nameservers[0] != "198.18.0.10" {
		t.Errorf("result %+v", res)
	}
	if br.Attrs().Alias != "twill" || port.Attrs().Alias != "twill:c1/eth0" {
		t.Errorf("aliases %q, %q", br.Attrs().Alias, port.Attrs().Alias)
	}
	var ips, routes []string
	for _, ip := range res.IPs {
		ips = append(ips, fmt.Sprintf("%s via %s on %d", &ip.Address, ip.Gateway, *ip.Interface))
	}
	for _, r := range res.Routes {
		routes = append(routes, fmt.Sprintf("%s via %s mtu %d", &r.Dst, r.GW, r.MTU))
	}
	if got := strings.Join(ips, ", "); got != "198.18.1.2/24 via 198.18.1.1 on 2, fd00:18:0:1::2/64 via fd00:18:0:1::1 on 2" {
		t.Errorf("addresses %s", got)
	}
	want := "0.0.0.0/0 via 198.18.1.1 mtu 0, 203.0.113.0/24 via 198.18.1.1 mtu 0, ::/0 via fd00:18:0:1::9 mtu 1400"
	if got := strings.Join(routes, ", "); got != want {
		t.Errorf("routes %s, want %s", got, want)
	}
	// No address on the port, none still being probed in the pod.
	if list, err := h.nl.AddrList(port, netlink.FAMILY_ALL); err != nil || len(list) != 0 {
		t.Errorf("addresses of the port: %v, %v", list, err)
	}
	list, err := p.nl.AddrList(inner, netlink.FAMILY_V6)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range list {
		if a.IP.IsGlobalUnicast() && a.Flags&(0x40|0x08) != 0 { // tentative, duplicate
			t.Errorf("address %s has flags %#x", a.IPNet, a.Flags)
		}
	}
}

// Only routes to the cluster's networks: the pod's other networks lead out.
func TestNoDefaultRoute(t *testing.T) {
	h, p := newHost(t), newNamespace(t)
	out := h.must(add("c1", p).with("isDefaultGateway", false).with("mtu", 1400).with("hairpinMode", false))
	res := h.result(call{}, out)
	var dsts []string
	for _, r := range res.Routes {
		dsts = append(dsts, r.Dst.String())
	}
	if got := strings.Join(dsts, " "); got != "198.18.0.0/16 fd00:18::/48" {
		t.Errorf("routes to %s", got)
	}
	if got := p.link("eth0").Attrs().MTU; got != 1400 {
		t.Errorf("MTU %d", got)
	}
	check := call{verb: "CHECK", id: "c1"}.on(p).with("prevResult", prev(t, out))
	h.must(check.with("mtu", 1400).with("hairpinMode", false))
	h.fails(check, pod.ErrDiffers, "hairpin mode false, not true")
}

func TestSingleStack(t *testing.T) {
	for i, want := range []string{"198.18.1.2", "fd00:18:0:1::2"} {
		h, p := newHost(t), newNamespace(t)
		one := dualStack
		one.Subnets = dualStack.Subnets[i : i+1]
		h.handoff(one)
		res := h.attach(add("c1", p))
		if len(res.IPs) != 1 || addrOf(res, 0).String() != want || len(res.Routes) != 1 {
			t.Errorf("result %+v", res)
		}
		mustPing(t, p, one.Subnets[0].Addr().Next(), 1400)
		h.fails(add("c2", newNamespace(t)).with("routes", []any{map[string]any{"dst": []string{"2001:db8::/32", "203.0.113.0/24"}[i]}}), 7, "no subnet of that family")
	}
}

func TestPodsReachEachOther(t *testing.T) {
	h, a, b := newHost(t), newNamespace(t), newNamespace(t)
	ra, rb := h.attach(add("a", a)), h.attach(add("b", b))
	for i := range 2 {
		header := []int{20, 40}[i] + 8
		mustPing(t, a, addrOf(rb, i), 1450-header) // at once, up to the full MTU
		mustPing(t, b, addrOf(ra, i), 1450-header)
		gw, _ := netip.AddrFromSlice(ra.IPs[i].Gateway)
		mustPing(t, a, gw.Unmap(), 100)
		mustPing(t, h.namespace, addrOf(ra, i), 100)
		mustPing(t, a, addrOf(ra, i), 100) // lo is up
	}
	if err := ping(a, netip.MustParseAddr("198.18.1.99"), 100); err == nil {
		t.Error("nobody answers for somebody")
	}
}

// The next pod with the same address is found at once by those who remember the
// MAC of the one before.
func TestAddressReused(t *testing.T) {
	h, a, b := newHost(t), newNamespace(t), newNamespace(t)
	small := dualStack
	small.Subnets = []netip.Prefix{netip.MustParsePrefix("198.18.1.0/29"), netip.MustParsePrefix("fd00:18:0:1::/125")}
	h.handoff(small)
	h.attach(add("a", a))
	rb := h.attach(add("b", b))
	for i := range 2 {
		mustPing(t, a, addrOf(rb, i), 100)
	}
	h.must(del("b", b))
	for i := range 20 {
		id, c := fmt.Sprint("c", i), newNamespace(t)
		rc := h.attach(add(id, c))
		if addrOf(rc, 0) == addrOf(rb, 0) && addrOf(rc, 1) == addrOf(rb, 1) {
			for i := range 2 {
				mustPing(t, a, addrOf(rc, i), 100)
			}
			return
		}
		h.must(del(id, c))
	}
	t.Fatal("the address did not come round")
}

// Pods keep the gateway's MAC: it changes neither with ports nor with the bridge
// being made anew.
func TestBridgeMAC(t *testing.T) {
	h := newHost(t)
	var macs []string
	for i := range 4 {
		h.attach(add(fmt.Sprint("c", i), newNamespace(t)))
		macs = append(macs, h.link("cni0").Attrs().HardwareAddr.String())
	}
	if err := h.nl.LinkDel(h.link("cni0")); err != nil {
		t.Fatal(err)
	}
	h.attach(add("c4", newNamespace(t)))
	macs = append(macs, h.link("cni0").Attrs().HardwareAddr.String())
	if len(slices.Compact(macs)) != 1 {
		t.Errorf("MACs %v", macs)
	}
}

// Docker's containers, and some hardened nodes, have IPv6 turned off.
func TestIPv6TurnedOff(t *testing.T) {
	h, p := newHost(t), newNamespace(t)
	off := func() error {
		for _, link := range []string{"all", "default"} {
			if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+link+"/disable_ipv6", []byte("1"), 0o644); err != nil {
				return err
			}
		}
		return nil
	}
	for _, n := range []*namespace{h.namespace, p} {
		if err := n.do(off); err != nil {
			t.Fatal(err)
		}
	}
	res := h.attach(add("c1", p))
	for i := range 2 {
		gw, _ := netip.AddrFromSlice(res.IPs[i].Gateway)
		mustPing(t, p, gw.Unmap(), 100)
	}
}

func TestTwoInterfaces(t *testing.T) {
	h, p := newHost(t), newNamespace(t)
	h.attach(add("c1", p))
	second := add("c1", p).with("isDefaultGateway", false)
	second.ifname = "net1"
	// The same destinations by another link: the first has no such routes.
	h.attach(second)
	out := del("c1", p)
	out.ifname = "net1"
	h.must(out)
	if got := p.links(); got != "lo eth0" {
		t.Errorf("links %s", got)
	}
	if got := len(h.traces()); got != 4 {
		t.Errorf("traces %v", h.traces())
	}
}

func TestRouterAdvertisementsIgnored(t *testing.T) {
	h := newHost(t)
	h.attach(add("c1", newNamespace(t)))
	err := h.do(func() error {
		b, err := os.ReadFile("/proc/sys/net/ipv6/conf/cni0/accept_ra")
		if err == nil && strings.TrimSpace(string(b)) != "0" {
			err = fmt.Errorf("accept_ra is %s", b)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func TestConcurrent(t *testing.T) {
	const n = 64
	h := newHost(t)
	var pods []*namespace
	for range n {
		pods = append(pods, newNamespace(t))
	}
	results := make([]*types100.Result, n)
	each := func(f func(i int)) {
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() { f(i) })
		}
		wg.Wait()
	}
	each(func(i int) {
		out, err := h.run(add(fmt.Sprint("c", i), pods[i]))
		if err != nil {
			t.Error(err)
			return
		}
		results[i] = h.result(call{}, out)
	})
	seen := map[string]bool{}
	for _, r := range results {
		if r == nil {
			t.FailNow()
		}
		for _, ip := range r.IPs {
			seen[ip.Address.String()] = true
		}
	}
	if len(seen) != 2*n {
		t.Errorf("%d different addresses for %d pods", len(seen), n)
	}
	mustPing(t, pods[0], addrOf(results[n-1], 0), 100)
	each(func(i int) {
		if _, err := h.run(del(fmt.Sprint("c", i), pods[i])); err != nil {
			t.Error(err)
		}
	})
	h.clean()
	if br := h.link("cni0"); br.Attrs().Flags&net.FlagUp == 0 {
		t.Error("cni0 is down")
	}
}
