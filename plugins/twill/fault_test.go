package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"

	"github.com/twill-net/twill/pkg/pod"
)

func bridgeWith(h *host, addr string) {
	h.t.Helper()
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "cni0"}}
	a, err := netlink.ParseAddr(addr)
	if err := errors.Join(err, h.nl.LinkAdd(br), h.nl.AddrAdd(br, a), h.nl.LinkSetUp(br)); err != nil {
		h.t.Fatal(err)
	}
}

func TestAddTwice(t *testing.T) {
	h, p, other := newHost(t), newNamespace(t), newNamespace(t)
	res := h.attach(add("c1", p))
	before := fmt.Sprint(h.traces())
	again := add("c1", p)
	again.env = []string{"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web"}
	h.fails(again, types.ErrInvalidEnvironmentVariables, "pod default/web (container c1 interface eth0) is attached already", "DEL")
	h.fails(add("c1", other), types.ErrInvalidEnvironmentVariables, "is attached already")
	h.fails(add("c2", p), types.ErrInvalidEnvironmentVariables, "has a link eth0 already")
	if after := fmt.Sprint(h.traces()); after != before {
		t.Errorf("traces %s, before %s", after, before)
	}
	mustPing(t, h.namespace, addrOf(res, 0), 100)
}

// DEL gets along with whatever is gone already.
func TestDel(t *testing.T) {
	for _, tt := range []struct {
		name string
		call func(h *host, p *namespace) call
	}{
		{"namespace there", func(_ *host, p *namespace) call { return del("c1", p) }},
		{"namespace gone", func(_ *host, p *namespace) call { c := del("c1", p); p.close(); return c }},
		{"namespace not told", func(*host, *namespace) call { return call{verb: "DEL", id: "c1"} }},
		{"link gone", func(h *host, p *namespace) call {
			if err := p.nl.LinkDel(p.link("eth0")); err != nil {
				p.t.Fatal(err)
			}
			return del("c1", p)
		}},
		{"reservations gone", func(h *host, p *namespace) call {
			if err := os.RemoveAll(h.conf["dataDir"].(string)); err != nil {
				p.t.Fatal(err)
			}
			return del("c1", p)
		}},
		{"no hand-off, bridge gone", func(h *host, p *namespace) call {
			if err := errors.Join(os.Remove(h.conf["handoffFile"].(string)), h.nl.LinkDel(h.link("cni0"))); err != nil {
				p.t.Fatal(err)
			}
			return del("c1", p)
		}},
		{"bad values elsewhere", func(_ *host, p *namespace) call { return del("c1", p).with("mtu", "x").with("prevResult", []any{1}) }},
	} {
		for _, withPrev := range []bool{false, true} {
			t.Run(fmt.Sprint(tt.name, " prevResult ", withPrev), func(t *testing.T) {
				t.Parallel()
				h, p := newHost(t), newNamespace(t)
				out := h.must(add("c1", p))
				c := tt.call(h, p)
				if _, given := c.conf["prevResult"]; withPrev && !given {
					c = c.with("prevResult", prev(t, out))
				}
				for range 2 {
					h.must(c)
					h.clean()
				}
			})
		}
	}
}

func TestDelKeepsOthers(t *testing.T) {
	h, a, b := newHost(t), newNamespace(t), newNamespace(t)
	h.attach(add("a", a))
	rb := h.attach(add("b", b))
	h.must(call{verb: "DEL", id: "never-there"})
	h.must(del("a", a))
	mustPing(t, h.namespace, addrOf(rb, 0), 100)
	if got := len(h.traces()); got != 4 {
		t.Errorf("traces %v", h.traces())
	}
	// A link that is not ours does not go, though it has the name.
	if err := b.nl.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "net1"}}); err != nil {
		t.Fatal(err)
	}
	c := del("b", b)
	c.ifname = "net1"
	h.must(c)
	b.link("net1")
	h.must(call{verb: "DEL", id: "b"})
	h.clean()
}

// The runtime's patience ends at any instant of ADD. DEL finds what is there.
func TestKilledAdd(t *testing.T) {
	h := newHost(t)
	h.attach(add("warm", newNamespace(t)))
	h.must(call{verb: "DEL", id: "warm"})
	begin := time.Now()
	h.attach(add("timed", newNamespace(t)))
	took := time.Since(begin)
	h.must(call{verb: "DEL", id: "timed"})

	outcomes := map[string]int{}
	for i := range 60 {
		id, p := fmt.Sprint("k", i), newNamespace(t)
		cmd := h.command(add(id, p))
		if err := h.do(cmd.Start); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(rand.Int64N(int64(took))))
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
		switch left := h.traces(); {
		case cmd.ProcessState.Success():
			outcomes["completed"]++
		case len(left) == 0:
			outcomes["killed early"]++
		default:
			outcomes["killed half-way"]++
		}
		c := del(id, p)
		if i%2 == 0 {
			p.close()
		}
		h.must(c)
		if left := h.traces(); len(left) > 0 {
			t.Fatalf("round %d: left %v", i, left)
		}
	}
	t.Logf("%v of 60, one ADD takes %s", outcomes, took)
	if outcomes["killed half-way"] == 0 {
		t.Errorf("no ADD was caught half-way: %v", outcomes)
	}
	// And the node still works.
	res := h.attach(add("after", newNamespace(t)))
	mustPing(t, h.namespace, addrOf(res, 1), 100)
}

// CHECK names each thing that is not as ADD left it.
func TestCheck(t *testing.T) {
	set := func(f func(nl *netlink.Handle, l netlink.Link) error, n *namespace, link string) {
		n.t.Helper()
		if err := f(n.nl, n.link(link)); err != nil {
			n.t.Fatal(err)
		}
	}
	type broken struct {
		name string
		do   func(h *host, p *namespace, port string)
		want string
	}
	for _, tt := range []broken{
		{"address", func(_ *host, p *namespace, _ string) {
			set(func(nl *netlink.Handle, l netlink.Link) error {
				a, _ := netlink.ParseAddr("198.18.1.2/24")
				return nl.AddrDel(l, a)
			}, p, "eth0")
		}, "the pod's link eth0 has no address 198.18.1.2/24; the pod's link eth0 has no route 0.0.0.0/0 via 198.18.1.1"},
		{"IPv6 address", func(_ *host, p *namespace, _ string) {
			set(func(nl *netlink.Handle, l netlink.Link) error {
				a, _ := netlink.ParseAddr("fd00:18:0:1::2/64")
				return nl.AddrDel(l, a)
			}, p, "eth0")
		}, "the pod's link eth0 has no address fd00:18:0:1::2/64"},
		{"route", func(_ *host, p *namespace, _ string) {
			set(func(nl *netlink.Handle, l netlink.Link) error {
				return nl.RouteDel(&netlink.Route{Dst: &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}, LinkIndex: l.Attrs().Index, Gw: netip.MustParseAddr("fd00:18:0:1::1").AsSlice()})
			}, p, "eth0")
		}, "the pod's link eth0 has no route ::/0 via fd00:18:0:1::1"},
		{"pod's MTU", func(_ *host, p *namespace, _ string) {
			set(func(nl *netlink.Handle, l netlink.Link) error { return nl.LinkSetMTU(l, 1300) }, p, "eth0")
		}, "the pod's link eth0 has MTU 1300, not 1450"},
		{"pod's MAC", func(_ *host, p *namespace, _ string) {
			set(func(nl *netlink.Handle, l netlink.Link) error {
				return nl.LinkSetHardwareAddr(l, []byte{2, 0, 0, 0, 0, 9})
			}, p, "eth0")
		}, "the pod's link eth0 has MAC 02:00:00:00:00:09, not"},
		{"pod's link down", func(_ *host, p *namespace, _ string) {
			set((*netlink.Handle).LinkSetDown, p, "eth0")
		}, "the pod's link eth0 is down"},
		{"pod's link gone", func(_ *host, p *namespace, _ string) { set((*netlink.Handle).LinkDel, p, "eth0") }, "the pod's link eth0 is missing; the host's link veth"},
		{"port down", func(h *host, _ *namespace, port string) {
			set((*netlink.Handle).LinkSetDown, h.namespace, port)
		}, " is down"},
		{"port's MTU", func(h *host, _ *namespace, port string) {
			set(func(nl *netlink.Handle, l netlink.Link) error { return nl.LinkSetMTU(l, 1300) }, h.namespace, port)
		}, " has MTU 1300, not 1450"},
		{"no port", func(h *host, _ *namespace, port string) {
			set((*netlink.Handle).LinkSetNoMaster, h.namespace, port)
		}, " is no port of cni0"},
		{"hairpin", func(h *host, _ *namespace, port string) {
			set(func(nl *netlink.Handle, l netlink.Link) error { return nl.LinkSetHairpin(l, false) }, h.namespace, port)
		}, "has hairpin mode false, not true"},
		{"gateway", func(h *host, _ *namespace, _ string) {
			set(func(nl *netlink.Handle, l netlink.Link) error {
				a, _ := netlink.ParseAddr("198.18.1.1/24")
				return nl.AddrDel(l, a)
			}, h.namespace, "cni0")
		}, "the bridge cni0 has no gateway address 198.18.1.1"},
		{"bridge down", func(h *host, _ *namespace, _ string) {
			set((*netlink.Handle).LinkSetDown, h.namespace, "cni0")
		}, "the bridge cni0 is down"},
		{"bridge gone", func(h *host, _ *namespace, _ string) { set((*netlink.Handle).LinkDel, h.namespace, "cni0") }, "the bridge cni0 is missing"},
		{"reservation gone", func(h *host, p *namespace, _ string) {
			if err := os.Remove(h.reservations().Path(netip.MustParseAddr("198.18.1.2"))); err != nil {
				p.t.Fatal(err)
			}
		}, "198.18.1.2 is missing"},
		{"reservation of another", func(h *host, p *namespace, _ string) {
			if err := os.WriteFile(h.reservations().Path(netip.MustParseAddr("fd00:18:0:1::2")), []byte("x\r\neth0"), 0o600); err != nil {
				p.t.Fatal(err)
			}
		}, "fd00:18:0:1::2 is of x/eth0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h, p := newHost(t), newNamespace(t)
			out := h.must(add("c1", p))
			check := call{verb: "CHECK", id: "c1"}.on(p).with("prevResult", prev(t, out))
			h.must(check)
			tt.do(h, p, hostLink(t, h.result(call{}, out)))
			h.fails(check, pod.ErrDiffers, tt.want, "container c1 interface eth0 is not as ADD left it")
		})
	}
}

func TestCheckInput(t *testing.T) {
	h, p := newHost(t), newNamespace(t)
	h.attach(add("c1", p))
	h.fails(call{verb: "CHECK", id: "c1"}.on(p), 7, "prevResult: (absent)")
	h.fails(call{verb: "CHECK", id: "c1", netns: "/run/netns/gone"}.with("prevResult", map[string]any{"cniVersion": "1.1.0"}), 3)
}
