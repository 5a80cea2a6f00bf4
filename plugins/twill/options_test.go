package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/twill-net/twill/pkg/pod"
)

func TestRequestedAddresses(t *testing.T) {
	both := []any{"198.18.1.77", "fd00:18:0:1::77"}
	notes := func(v string) any {
		return map[string]any{"io.kubernetes.cri.pod-annotations": map[string]any{"twill.net/addresses": v, "twill.net/mac": "02:00:00:00:00:77"}}
	}
	for _, tt := range []struct {
		name string
		ask  func(call) call
		want string
	}{
		{"ips capability", func(c call) call { return c.with("runtimeConfig", map[string]any{"ips": both}) }, "198.18.1.77 fd00:18:0:1::77 0a:58:c6:12:01:4d"},
		{"one family", func(c call) call {
			return c.with("runtimeConfig", map[string]any{"ips": []any{"fd00:18:0:1::77/64"}})
		}, "198.18.1.2 fd00:18:0:1::77 0a:58:c6:12:01:02"},
		{"CNI_ARGS", func(c call) call {
			c.env = []string{"CNI_ARGS=IP=198.18.1.77,fd00:18:0:1::77;MAC=02:00:00:00:00:78"}
			return c
		}, "198.18.1.77 fd00:18:0:1::77 02:00:00:00:00:78"},
		{"args.cni", func(c call) call {
			return c.with("args", map[string]any{"cni": map[string]any{"ips": both, "mac": "02:00:00:00:00:79"}})
		}, "198.18.1.77 fd00:18:0:1::77 02:00:00:00:00:79"},
		{"annotations", func(c call) call { return c.with("runtimeConfig", notes("198.18.1.77, fd00:18:0:1::77")) }, "198.18.1.77 fd00:18:0:1::77 02:00:00:00:00:77"},
		{"the capability before the annotation", func(c call) call {
			run := notes("198.18.1.99").(map[string]any)
			run["ips"], run["mac"] = both, "02:00:00:00:00:80"
			return c.with("runtimeConfig", run)
		}, "198.18.1.77 fd00:18:0:1::77 02:00:00:00:00:80"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h, p := newHost(t), newNamespace(t)
			c := tt.ask(add("c1", p))
			out := h.must(c)
			res := h.result(call{}, out)
			if got := fmt.Sprint(addrOf(res, 0), " ", addrOf(res, 1), " ", p.link("eth0").Attrs().HardwareAddr); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
			mustPing(t, p, netip.MustParseAddr("198.18.1.1"), 100)
			c.verb = "CHECK"
			h.must(c.with("prevResult", prev(t, out)))
			other := newNamespace(t)
			again := tt.ask(add("c2", other))
			h.fails(again, pod.ErrTaken, "requested address", "c1/eth0")
			h.must(del("c1", p))
			h.attach(again)
		})
	}
}

func TestRanges(t *testing.T) {
	h := newHost(t)
	h.conf["ipam"] = map[string]any{
		"ranges": []any{
			[]any{
				map[string]any{"subnet": "198.18.1.0/24", "rangeStart": "198.18.1.10", "rangeEnd": "198.18.1.12"},
				map[string]any{"subnet": "198.18.1.64/30"},
			},
			[]any{map[string]any{"subnet": "fd00:18:0:1::/64", "rangeStart": "fd00:18:0:1::a"}},
		},
		"exclude": []any{"198.18.1.11", "fd00:18:0:1::b"},
	}
	var got []string
	for i := range 6 {
		res := h.attach(add(fmt.Sprint("c", i), newNamespace(t)))
		got = append(got, fmt.Sprint(&res.IPs[0].Address, " ", &res.IPs[1].Address))
	}
	want := "198.18.1.10/24 fd00:18:0:1::a/64, 198.18.1.12/24 fd00:18:0:1::c/64, 198.18.1.64/24 fd00:18:0:1::d/64, " +
		"198.18.1.65/24 fd00:18:0:1::e/64, 198.18.1.66/24 fd00:18:0:1::f/64, 198.18.1.67/24 fd00:18:0:1::10/64"
	if s := strings.Join(got, ", "); s != want {
		t.Errorf("got  %s\nwant %s", s, want)
	}
	h.fails(add("c9", newNamespace(t)), 11, "no free address")
	h.fails(call{verb: "STATUS"}, 50, "no free address")
	// More ranges may come from the runtime, and all must be this node's.
	h.attach(add("c9", newNamespace(t)).with("ipam", nil).
		with("runtimeConfig", map[string]any{"ipRanges": []any{[]any{map[string]any{"subnet": "198.18.1.128/25"}}}}))
	h.fails(add("c10", newNamespace(t)).with("ipam", map[string]any{"ranges": []any{[]any{map[string]any{"subnet": "198.18.2.0/24"}}}}), 7, "198.18.2.0/24", "not within this node's subnets")
}

func TestStickyAndCoolDown(t *testing.T) {
	h := newHost(t)
	small := dualStack
	small.Subnets = []netip.Prefix{netip.MustParsePrefix("198.18.1.0/29")} // five pods
	h.handoff(small)
	h.conf["ipam"] = map[string]any{"sticky": true}
	named := func(id, name string) call {
		c := add(id, newNamespace(t))
		c.env = []string{"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=" + name}
		return c
	}
	first := addrOf(h.attach(named("a", "db-0")), 0)
	h.must(call{verb: "DEL", id: "a"})
	for i := range 4 {
		if got := addrOf(h.attach(named(fmt.Sprint("b", i), fmt.Sprint("web-", i))), 0); got == first {
			t.Errorf("%s went to another pod while there were others", got)
		}
	}
	if got := addrOf(h.attach(named("a2", "db-0")), 0); got != first {
		t.Errorf("db-0 came back with %s, had %s", got, first)
	}

	cool := newHost(t)
	cool.handoff(small)
	cool.conf["ipam"] = map[string]any{"coolDown": "1h"}
	for i := range 5 {
		cool.attach(add(fmt.Sprint("c", i), newNamespace(t)))
	}
	cool.must(call{verb: "DEL", id: "c3"})
	cool.fails(add("d", newNamespace(t)), 11, "4 in use", "1 at rest")
	cool.conf["ipam"] = map[string]any{}
	cool.attach(add("d", newNamespace(t)))
}

func TestPodOptions(t *testing.T) {
	h, a, b := newHost(t), newNamespace(t), newNamespace(t)
	h.conf["sysctl"] = map[string]any{"net.core.somaxconn": "500", "net/ipv4/conf/IFNAME/arp_filter": "1"}
	h.conf["promisc"], h.conf["promiscMode"], h.conf["portIsolation"] = true, true, true
	h.conf["mac"] = "02:00:00:00:aa:01"
	out := h.must(add("a", a))
	rb := h.attach(add("b", b).with("mac", nil))
	for file, want := range map[string]string{"core/somaxconn": "500", "ipv4/conf/eth0/arp_filter": "1"} {
		var got []byte
		if err := a.do(func() (err error) { got, err = os.ReadFile("/proc/sys/net/" + file); return err }); err != nil || strings.TrimSpace(string(got)) != want {
			t.Errorf("%s is %s, %v", file, got, err)
		}
	}
	if got := a.link("eth0").Attrs(); got.Promisc == 0 || got.HardwareAddr.String() != "02:00:00:00:aa:01" {
		t.Errorf("eth0 %+v", got)
	}
	if h.link("cni0").Attrs().Promisc == 0 {
		t.Error("cni0 is not promiscuous")
	}
	mustPing(t, a, netip.MustParseAddr("198.18.1.1"), 100)
	if err := ping(a, addrOf(rb, 0), 100); err == nil {
		t.Error("isolated pods reach each other on the bridge")
	}
	check := call{verb: "CHECK", id: "a"}.on(a).with("prevResult", prev(t, out))
	h.must(check)
	port := h.link(hostLink(t, h.result(call{}, out)))
	err := errors.Join(h.nl.LinkSetIsolated(port, false), a.nl.SetPromiscOff(a.link("eth0")),
		a.do(func() error { return os.WriteFile("/proc/sys/net/core/somaxconn", []byte("4096"), 0o644) }))
	if err != nil {
		t.Fatal(err)
	}
	h.fails(check, pod.ErrDiffers, "has port isolation false, not true", "eth0 is not promiscuous", "sysctl net/core/somaxconn is 4096, not 500")
	bad := func(v any) call { return add("c", newNamespace(t)).with("sysctl", v) }
	h.fails(bad(map[string]any{"kernel.hostname": "x"}), 7, "kernel.hostname: must be", "below net.")
	h.fails(bad(map[string]any{"net/../kernel/hostname": "x"}), 7, "below net.")
	h.fails(bad(map[string]any{"net.core.no_such": "1"}), 5, "set sysctl net/core/no_such to 1")
	h.fails(bad(map[string]any{"net.core.somaxconn": "many"}), 5, "set sysctl net/core/somaxconn to many")
}

// A node that gets another subnet renumbers its bridge; the pods that run stay
// reached, and the rest of the old subnet is left to the node that has it now.
func TestRenumber(t *testing.T) {
	h, old, young := newHost(t), newNamespace(t), newNamespace(t)
	h.forwards()
	oldOut := h.must(add("old", old))
	ro := h.result(call{}, oldOut)
	moved := dualStack
	moved.Subnets = []netip.Prefix{netip.MustParsePrefix("198.18.2.0/24"), netip.MustParsePrefix("fd00:18:0:2::/64")}
	h.handoff(moved)
	ry := h.attach(add("young", young))
	for i := range 2 {
		mustPing(t, h.namespace, addrOf(ro, i), 100)
		mustPing(t, old, addrOf(ry, i), 1400-48)
		mustPing(t, young, addrOf(ro, i), 100)
		gw, _ := netip.AddrFromSlice(ro.IPs[i].Gateway)
		mustPing(t, old, gw.Unmap(), 100)
	}
	for _, n := range []string{"198.18.1.0/24", "fd00:18:0:1::/64"} {
		if r := h.routeTo(n); r != "" {
			t.Errorf("the host still has %s, which may be another node's now", r)
		}
	}
	h.fails(call{verb: "STATUS"}, 51, "cni0 still has 198.18.1.1/32")
	h.must(call{verb: "CHECK", id: "old"}.on(old).with("prevResult", prev(t, oldOut)))
	s := h.sweeper()
	if got := h.sweep(s); got != "" {
		t.Errorf("swept while the pod runs: %s", got)
	}
	h.must(del("old", old).with("prevResult", prev(t, oldOut)))
	if got := h.sweep(s); !strings.Contains(got, "deleted address 198.18.1.1") || !strings.Contains(got, "deleted address fd00:18:0:1::1") {
		t.Errorf("swept: %s", got)
	}
	h.must(call{verb: "STATUS"})
	mustPing(t, h.namespace, addrOf(ry, 0), 100)
}

// routeTo prints the host's route to exactly that prefix.
func (h *host) routeTo(prefix string) string {
	h.t.Helper()
	list, err := h.nl.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		h.t.Fatal(err)
	}
	for _, r := range list {
		if r.Dst != nil && r.Dst.String() == prefix {
			return r.String()
		}
	}
	return ""
}

func (h *host) sweeper() *pod.Sweeper {
	return &pod.Sweeper{DataDir: h.conf["dataDir"].(string), HandoffFile: h.conf["handoffFile"].(string)}
}

func (h *host) sweep(s *pod.Sweeper) string {
	h.t.Helper()
	var done []string
	if err := h.do(func() (err error) { done, err = s.Sweep(h.t.Context()); return err }); err != nil {
		h.t.Fatal(err)
	}
	return strings.Join(done, "\n")
}

// What nobody calls DEL for is freed; what lives stays.
func TestSweep(t *testing.T) {
	h, alive, gone, rebooted := newHost(t), newNamespace(t), newNamespace(t), newNamespace(t)
	s := h.sweeper()
	ra := h.attach(add("alive", alive))
	h.attach(add("gone", gone))
	h.attach(add("rebooted", rebooted))
	if got := h.sweep(s); got != "" {
		t.Errorf("swept: %s", got)
	}
	gone.close()
	h.awaitGone("gone", t)
	record := filepath.Join(h.conf["dataDir"].(string), ".twill", "attachments", "cbr0", "rebooted:eth0")
	b, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err := os.WriteFile(record, []byte(strings.ReplaceAll(string(b), strings.TrimSpace(string(boot)), "another")), 0o600); err != nil {
		t.Fatal(err)
	}
	got := h.sweep(s)
	for _, want := range []string{"freed [198.18.1.3 fd00:18:0:1::3] of container gone interface eth0: its network namespace is gone", "of container rebooted interface eth0: the node was started anew since"} {
		if !strings.Contains(got, want) {
			t.Errorf("swept %q, want %q", got, want)
		}
	}
	if left := fmt.Sprint(h.traces()); strings.Contains(left, "gone") || strings.Contains(left, "198.18.1.3") || strings.Contains(left, "198.18.1.4") || !strings.Contains(left, "198.18.1.2") {
		t.Errorf("left %s", left)
	}
	mustPing(t, h.namespace, addrOf(ra, 0), 100)
}

// awaitGone waits for the kernel to delete the veth of a namespace that died.
func (h *host) awaitGone(id string, t *testing.T) {
	t.Helper()
	await(t, "the veth of "+id+" to go with its namespace", func() bool {
		links, err := h.nl.LinkList()
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range links {
			if l.Attrs().Alias == "twill:"+id+"/eth0" {
				return false
			}
		}
		return true
	})
}

// CHECK looks at what a host port takes beside the rules.
func TestCheckHostPort(t *testing.T) {
	h, p := newHost(t), newNamespace(t)
	ports := map[string]any{"portMappings": []any{map[string]any{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}}}
	h.conf["firewall"], h.conf["runtimeConfig"] = "nftables", ports
	with := func(c call) call { c.env = []string{"PATH=" + os.Getenv("PATH")}; return c }
	out := h.must(with(add("c", p)))
	check := with(call{verb: "CHECK", id: "c"}.on(p).with("prevResult", prev(t, out)))
	h.must(check)
	off := func() error {
		return os.WriteFile("/proc/sys/net/ipv4/conf/cni0/route_localnet", []byte("0"), 0o644)
	}
	if err := h.do(off); err != nil {
		t.Fatal(err)
	}
	h.fails(check, pod.ErrDiffers, "sysctl net/ipv4/conf/cni0/route_localnet is 0, not 1")
	h.must(with(del("c", p)))
}
