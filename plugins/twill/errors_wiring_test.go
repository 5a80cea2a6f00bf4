//go:build linux && amd64

package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"

	"github.com/twill-net/twill/pkg/pod"
)

// mapsPort asks for a host port.
func mapsPort(c call, hostIP string) call {
	m := map[string]any{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": hostIP}
	return c.with("runtimeConfig", map[string]any{"portMappings": []any{m}})
}

// wiringErrors are those of links, routes and the firewall.
func wiringErrors() []failure {
	with := func(key string, value any) func(*host, *namespace) call {
		return func(h *host, p *namespace) call { return addPod(h, p).with(key, value) }
	}
	limit := func(rates map[string]any) func(*host, *namespace) call {
		return with("runtimeConfig", map[string]any{"bandwidth": rates})
	}
	bridge := func(addr string) func(*host, *namespace) error {
		return func(h *host, _ *namespace) error { bridgeWith(h, addr); return nil }
	}
	without := func(firewall string) func(*host, *namespace) call {
		return func(h *host, p *namespace) call {
			c := mapsPort(addPod(h, p), "").with("firewall", firewall)
			c.env = append(c.env, "PATH="+h.dir)
			return c
		}
	}
	return []failure{
		{
			name: "cni0 is no bridge", code: pod.ErrBridge, call: after(addPod, vethAsBridge),
			words: []string{"link cni0 is a veth, not a bridge: rename or delete it, or set another \"bridge\" in the network configuration"},
		},
		{
			name: "somebody else's cni0", code: pod.ErrBridge, call: after(addPod, bridge("192.0.2.1/24")),
			words: []string{`"cni0" already has an IP address different from this node's`, "192.0.2.1/24", "[198.18.0.0/16 fd00:18::/48]", "rename it, or set another"},
		},
		{
			name: "somebody else's cni0, IPv6", code: pod.ErrBridge, call: after(addPod, bridge("fd00:7::1/64")),
			words: []string{"it has fd00:7::1/64", "rename it"},
		},
		{
			name: "bridge full", code: pod.ErrBridge, call: after(addPod, fullBridge),
			words: []string{"bridge cni0 has 1,023 ports, and the kernel allows no more", `"mode": "routed"`, "fewer pods on this node"},
		},
		{
			// The last step of all that can fail, with everything made.
			name: "route that the kernel refuses", code: types.ErrIOFailure,
			call:  with("routes", []any{map[string]any{"dst": "203.0.113.0/24", "gw": "192.0.2.1"}}),
			words: []string{"add route 203.0.113.0/24 via 192.0.2.1 dev eth0: network is unreachable"},
		},
		{
			name: "sysctl that the kernel has not", code: types.ErrIOFailure, call: with("sysctl", map[string]any{"net.core.no_such": "1"}),
			words: []string{"set sysctl net/core/no_such to 1", "no such file"},
		},
		{
			name: "sysctl's value", code: types.ErrIOFailure, call: with("sysctl", map[string]any{"net.core.somaxconn": "many"}),
			words: []string{"set sysctl net/core/somaxconn to many", "invalid argument"},
		},
		{
			name: "rate too low", code: types.ErrInvalidNetworkConfig, call: limit(map[string]any{"ingressRate": 8, "ingressBurst": 8}),
			words: []string{"ingressRate is 8 bit/s: must be at least ", "MTU, 1450 bytes"},
		},
		{
			name: "host port taken", code: pod.ErrTaken,
			call: func(h *host, p *namespace) call {
				other := mapsPort(add("first", newNamespace(h.t)), "")
				other.env = toolPath()
				h.attach(other)
				c := mapsPort(addPod(h, p), "")
				c.env = append(c.env, toolPath()...)
				return c
			},
			words: []string{"host port 8080/tcp", "container first interface eth0", "use another port, or remove that pod first"},
		},
		{
			name: "host port of a family that the pod has not", code: types.ErrInvalidNetworkConfig,
			call: func(h *host, p *namespace) call {
				one := dualStack
				one.Subnets = dualStack.Subnets[:1]
				h.handoff(one)
				return mapsPort(addPod(h, p), "fd00:51::1")
			},
			words: []string{"host port [fd00:51::1]:8080/tcp: the pod has no IPv6 address: give a hostIP of a family that it has, or none"},
		},
		{
			name: "nft missing", code: types.ErrIOFailure, call: without("nftables"),
			words: []string{"open the host ports of " + thisPod, "find nft: ", "install the nftables package"},
		},
		{
			name: "iptables missing", code: types.ErrIOFailure, call: without("iptables"),
			words: []string{"open the host ports of " + thisPod, "find iptables", "install the iptables package"},
		},
		{
			name: "not as ADD left it", code: pod.ErrDiffers,
			call: func(h *host, p *namespace) call {
				c := addPod(h, p)
				out := h.must(c)
				if err := p.nl.LinkDel(p.link("eth0")); err != nil {
					h.t.Fatal(err)
				}
				c.verb = "CHECK"
				return c.with("prevResult", prev(h.t, out))
			},
			words: []string{thisPod + " is not as ADD left it: the pod's link eth0 is missing; the host's link veth", "delete the pod to have it wired anew"},
		},
	}
}

func vethAsBridge(h *host, _ *namespace) error {
	return h.nl.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "cni0"}, PeerName: "peer"})
}

// toolPath is where nft and iptables are.
func toolPath() []string { return []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"} }

// fullBridge has a link on each of the bridge's 1,023 ports.
func fullBridge(h *host, _ *namespace) error {
	bridgeWith(h, "198.18.1.1/24")
	master := h.link("cni0").Attrs().Index
	for i := range 1023 {
		attrs := netlink.LinkAttrs{Name: fmt.Sprint("port", i), MasterIndex: master}
		if err := h.nl.LinkAdd(&netlink.Ifb{LinkAttrs: attrs}); err != nil {
			return err
		}
	}
	return nil
}

// attached is the verb after an ADD of the same pod, and something else.
func attached(verb string, do func(h *host, p *namespace) error) func(*host, *namespace) call {
	return func(h *host, p *namespace) call {
		h.t.Helper()
		c := addPod(h, p)
		h.must(c)
		if err := do(h, p); err != nil {
			h.t.Fatal(err)
		}
		c.verb = verb
		return c
	}
}

// collect is GC of a network that has no pods any more.
func collect(c call) call {
	c.verb, c.id, c.netns = "GC", "", ""
	return c.with("cni.dev/valid-attachments", []any{})
}

// instead puts a directory that is not empty in place of the pod's file.
func instead(name ...string) func(*host, *namespace) error {
	return func(h *host, _ *namespace) error {
		path := filepath.Join(append([]string{h.conf["dataDir"].(string)}, name...)...)
		return errors.Join(os.Remove(path), os.MkdirAll(filepath.Join(path, "x"), 0o755))
	}
}

// delErrors are those of DEL and GC.
func delErrors() []failure {
	record := []string{".twill", "attachments", "cbr0", "c:eth0"}
	gc := func(do func(*host, *namespace) error) func(*host, *namespace) call {
		return func(h *host, p *namespace) call { return collect(attached("DEL", do)(h, p)) }
	}
	return []failure{
		{
			name: "DEL, record not readable", code: types.ErrIOFailure, call: attached("DEL", instead(record...)),
			words: []string{"detach container c interface eth0: open record of the attachment: ", "c:eth0: is a directory"},
		},
		{
			name: "GC, record not readable", code: types.ErrIOFailure, call: gc(instead(record...)),
			words: []string{"remove what dead containers left: ", "open record of the attachment: ", "c:eth0: is a directory"},
		},
		{
			name: "DEL, nft missing", code: types.ErrIOFailure,
			call: func(h *host, p *namespace) call {
				c := mapsPort(add("c", p), "").with("firewall", "nftables")
				c.env = toolPath()
				h.must(c)
				c.verb, c.env = "DEL", []string{"PATH=" + h.dir}
				return c
			},
			words: []string{"remove the host ports of container c interface eth0: ", "find nft: ", "install the nftables package"},
		},
	}
}

// statusErrors are those of STATUS alone: 50, no pod can be attached; 51, pods that run
// are not reached from everywhere.
func statusErrors() []failure {
	status := func(*host, *namespace) call { return call{verb: "STATUS"} }
	const away, limited = types.ErrPluginNotAvailable, types.ErrLimitedConnectivity
	return []failure{
		{
			name: "STATUS, no hand-off", code: away, call: after(status, noHandoffFile),
			words: []string{"twill.json is missing: twilld has not finished its first pass on this node", "netctl status"},
		},
		{
			name: "STATUS, hand-off broken", code: away, call: after(status, handoffSays("{")),
			words: []string{"read hand-off ", "twill.json: unexpected end of JSON input"},
		},
		{
			name: "STATUS, the daemon knows a reason", code: away,
			call: after(status, func(h *host, _ *namespace) error {
				daemonOf(h, func() error { return errors.New("a change failed: add route 10.5.2.0/24: no buffer space") })
				return nil
			}),
			words: []string{"twilld: a change failed: add route 10.5.2.0/24: no buffer space; see `netctl status`"},
		},
		{
			name: "STATUS, addresses exhausted", code: away, call: after(status, exhaust),
			words: []string{"no free address in 198.18.1.0/30: 1 in use, reserved by the files in ", "remove pods, or call GC"},
		},
		{
			name: "STATUS, cni0 is no bridge", code: away, call: after(status, vethAsBridge),
			words: []string{"link cni0 is a veth, not a bridge: rename or delete it"},
		},
		{
			name: "STATUS, somebody else's cni0", code: away,
			call:  after(status, func(h *host, _ *namespace) error { bridgeWith(h, "192.0.2.1/24"); return nil }),
			words: []string{"it has 192.0.2.1/24", "rename it"},
		},
		{
			name: "STATUS, pods of a former subnet", code: limited,
			call: after(status, func(h *host, p *namespace) error {
				h.attach(add("c", p))
				moved := dualStack
				moved.Subnets = []netip.Prefix{netip.MustParsePrefix("198.18.2.0/24")}
				h.handoff(moved)
				return nil
			}),
			words: []string{"bridge cni0 still has 198.18.1.1/24, of a subnet that this node had before", "from this node alone; delete them"},
		},
	}
}
