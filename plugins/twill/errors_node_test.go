//go:build linux && amd64

package main

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"

	"github.com/twill-net/twill/pkg/pod"
)

const (
	tooFew   = "198.18.1.0/30" // one pod
	thisPod  = "pod default/web (container c interface eth0)"
	podsName = "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web"
)

// check is CHECK with a result that need not be of anything.
func check(_ *host, p *namespace) call {
	return call{verb: "CHECK", id: "c"}.on(p).with("prevResult", emptyResult())
}

func addPod(_ *host, p *namespace) call {
	c := add("c", p)
	c.env = []string{podsName}
	return c
}

// after does something to the node and returns the call.
func after(c func(*host, *namespace) call, do func(h *host, p *namespace) error) func(*host, *namespace) call {
	return func(h *host, p *namespace) call {
		h.t.Helper()
		if err := do(h, p); err != nil {
			h.t.Fatal(err)
		}
		return c(h, p)
	}
}

func (h *host) handoffFile() string { return h.conf["handoffFile"].(string) }

func handoffSays(text string) func(*host, *namespace) error {
	return func(h *host, _ *namespace) error { return h.write(h.handoffFile(), text) }
}

// blockHandoff has a directory where the file should be.
func blockHandoff(h *host, _ *namespace) error {
	return errors.Join(os.Remove(h.handoffFile()), os.Mkdir(h.handoffFile(), 0o755))
}

func noHandoffFile(h *host, _ *namespace) error { return os.Remove(h.handoffFile()) }

// nodeErrors are those of the pod's namespace and of the daemon's file.
func nodeErrors() []failure {
	netns := func(path func(*host) string) func(*host, *namespace) call {
		return func(h *host, p *namespace) call {
			c := check(h, p)
			c.netns = path(h)
			return c
		}
	}
	const both = "ADD CHECK"
	return []failure{
		{
			name: "namespace missing", verbs: both, code: types.ErrUnknownContainer,
			call:  netns(func(*host) string { return "/run/netns/gone" }),
			words: []string{"CNI_NETNS /run/netns/gone does not exist", "let the runtime make a new sandbox"},
		},
		{
			name: "namespace is a file", verbs: both, code: types.ErrInvalidNetNS, call: netns((*host).handoffFile),
			words: []string{"CNI_NETNS ", "twill.json is not a network namespace", "must"},
		},
		{
			name: "namespace below a file", verbs: both, code: types.ErrInvalidNetNS,
			call:  netns(func(h *host) string { return h.handoffFile() + "/x" }),
			words: []string{"CNI_NETNS ", "twill.json/x", "not a directory", "must be the path of a network namespace"},
		},
		{
			name: "namespace is the host's", verbs: both, code: types.ErrInvalidNetNS,
			call:  netns(func(h *host) string { return h.path() }),
			words: []string{"CNI_NETNS ", "is the host's own network namespace", "needs no plugin"},
		},
		{
			name: "no hand-off", verbs: both, code: types.ErrTryAgainLater, call: after(check, noHandoffFile),
			words: []string{"twill.json is missing", "twilld has not finished its first pass on this node", "netctl status"},
		},
		{
			name: "no hand-off, the daemon says why", verbs: both, code: types.ErrTryAgainLater,
			call: after(check, func(h *host, _ *namespace) error {
				daemonOf(h, func() error { return errors.New("waiting for a lease: etcd is away") })
				return noHandoffFile(h, nil)
			}),
			words: []string{"twill.json is missing", "twilld: waiting for a lease: etcd is away", "netctl status"},
		},
		{
			name: "hand-off of the future", verbs: both, code: types.ErrDecodingFailure, call: after(check, handoffSays(`{"version":2}`)),
			words: []string{"read hand-off ", "twill.json: version 2: this release of Twill knows version 1 only", "of one release"},
		},
		{
			name: "hand-off broken", verbs: both, code: types.ErrDecodingFailure, call: after(check, handoffSays(`{"version":`)),
			words: []string{"read hand-off ", "twill.json: unexpected end of JSON input", "twilld writes it anew when it starts"},
		},
		{
			name: "hand-off without subnet", verbs: both, code: types.ErrDecodingFailure, call: after(check, handoffSays(`{"version":1,"mtu":1450}`)),
			words: []string{"read hand-off ", "twill.json: subnets: empty, must hold this node's subnet"},
		},
		{
			name: "hand-off not readable", verbs: both, code: types.ErrIOFailure, call: after(check, blockHandoff),
			words: []string{"read hand-off: ", "twill.json: is a directory"},
		},
		{
			name: "route of a family that the node has not", verbs: "ADD CHECK STATUS", code: types.ErrInvalidNetworkConfig,
			call: func(h *host, p *namespace) call {
				one := dualStack
				one.Subnets = dualStack.Subnets[:1]
				h.handoff(one)
				return check(h, p).with("routes", []any{map[string]any{"dst": "2001:db8::/32"}})
			},
			words: []string{"network configuration: routes: 2001:db8::/32: this node has no subnet of that family", "remove"},
		},
	}
}

// attachErrors are those of records, names and addresses.
func attachErrors() []failure {
	return []failure{
		{
			name: "data directory is a file", code: types.ErrIOFailure,
			call:  func(h *host, p *namespace) call { return addPod(h, p).with("dataDir", h.handoffFile()) },
			words: []string{"attach " + thisPod, "write down the attachment: mkdir ", "twill.json: not a directory"},
		},
		{
			name: "attached already", code: types.ErrInvalidEnvironmentVariables,
			call:  after(addPod, func(h *host, p *namespace) error { h.attach(add("c", p)); return nil }),
			words: []string{"CNI_CONTAINERID, CNI_IFNAME: " + thisPod + " is attached already, by link veth", "must call DEL before it calls ADD again"},
		},
		{
			name: "link of that name is another's", code: types.ErrTryAgainLater,
			call: after(addPod, func(h *host, p *namespace) error {
				name := hostLink(h.t, h.attach(add("c", p)))
				h.must(del("c", p))
				attrs := netlink.LinkAttrs{Name: name}
				err := h.nl.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "peer"})
				return errors.Join(err, h.nl.LinkSetAlias(h.link(name), "the other's"))
			}),
			words: []string{"link veth", ", which " + thisPod + " would get, belongs to \"the other's\"", "with a new sandbox"},
		},
		{
			name: "name taken in the pod", code: types.ErrInvalidEnvironmentVariables,
			call: after(addPod, func(_ *host, p *namespace) error {
				return p.nl.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}})
			}),
			words: []string{"CNI_IFNAME: the network namespace /proc/", "has a link eth0 already; use another name, or call DEL"},
		},
		{
			name: "lo", code: types.ErrInvalidEnvironmentVariables,
			call:  func(h *host, p *namespace) call { c := add("c", p); c.ifname = "lo"; return c },
			words: []string{"CNI_IFNAME: ", "has a link lo already"},
		},
		{
			name: "addresses exhausted", code: types.ErrTryAgainLater, call: after(addPod, exhaust),
			words: []string{"no free address in 198.18.1.0/30: 1 in use, reserved by the files in ", "/networks/cbr0", "remove pods, or call GC"},
		},
		{
			name: "address taken", code: pod.ErrTaken,
			call: func(h *host, p *namespace) call {
				h.attach(add("first", newNamespace(h.t)))
				return addPod(h, p).with("runtimeConfig", map[string]any{"ips": []any{"198.18.1.2"}})
			},
			words: []string{"requested address 198.18.1.2 is in use by first/eth0, says ", "/networks/cbr0/198.18.1.2", "request another, or none; or remove that pod first"},
		},
		{
			name: "address is the gateway", code: types.ErrInvalidNetworkConfig,
			call: func(h *host, p *namespace) call {
				return addPod(h, p).with("runtimeConfig", map[string]any{"ips": []any{"198.18.1.1"}})
			},
			words: []string{"requested address 198.18.1.1: it is the gateway: request another of 198.18.1.0/24; fd00:18:0:1::/64, or none"},
		},
		{
			name: "ranges overlap", code: types.ErrInvalidNetworkConfig,
			call: func(h *host, p *namespace) call {
				twice := []any{map[string]any{"subnet": "198.18.1.0/25"}}
				return addPod(h, p).with("ipam", map[string]any{"ranges": []any{twice, twice}})
			},
			words: []string{"network configuration: range 198.18.1.0-198.18.1.127 of 198.18.1.0/24: overlaps with range ", "every address must be in one range only"},
		},
		{
			name: "reservations not to be made", code: types.ErrIOFailure,
			call: after(addPod, func(h *host, _ *namespace) error {
				return h.write(filepath.Join(h.conf["dataDir"].(string), "cbr0"), "")
			}),
			words: []string{"reserve an address for " + thisPod, "/networks/cbr0: not a directory"},
		},
	}
}

func exhaust(h *host, _ *namespace) error {
	small := dualStack
	small.Subnets = []netip.Prefix{netip.MustParsePrefix(tooFew)}
	h.handoff(small)
	h.attach(add("only", newNamespace(h.t)))
	return nil
}

// flannelErrors are those of a configuration of flannel's plugin.
func flannelErrors() []failure {
	flannel := func(env string, edit func(h *host, c call) call) func(*host, *namespace) call {
		return func(h *host, p *namespace) call {
			if err := h.write(h.file("run/subnet.env"), env); err != nil {
				h.t.Fatal(err)
			}
			return edit(h, h.asFlannel(check(h, p)))
		}
	}
	same := func(_ *host, c call) call { return c }
	delegate := func(key string, value any) func(*host, call) call {
		return func(_ *host, c call) call { return c.with("delegate", map[string]any{key: value}) }
	}
	const every, bad = "ADD CHECK STATUS", types.ErrInvalidNetworkConfig
	return []failure{
		{
			name: "flannel: bad value", verbs: "ADD CHECK STATUS DEL GC", code: bad,
			call:  flannel(subnetEnv, func(_ *host, c call) call { return c.with("delegate", 7) }),
			words: []string{"flannel's network configuration: delegate: ", "must be an object"},
		},
		{
			name: "flannel: relative path", verbs: "ADD CHECK STATUS DEL GC", code: bad,
			call:  flannel(subnetEnv, func(_ *host, c call) call { return c.with("subnetFile", "subnet.env") }),
			words: []string{"flannel's network configuration", `subnetFile: "subnet.env": must be an absolute path`},
		},
		{
			name: "flannel: delegate.name", verbs: every, code: bad, call: flannel(subnetEnv, delegate("name", "x")),
			words: []string{"delegate.name: must not be given, it is made from the rest: remove it"},
		},
		{
			name: "flannel: another delegate", verbs: every, code: bad, call: flannel(subnetEnv, delegate("type", "macvlan")),
			words: []string{`delegate.type: "macvlan": must be "bridge" or "ptp", or left out`, "keep flannel's own binary"},
		},
		{
			name: "flannel: delegate's value", verbs: every, code: bad, call: flannel(subnetEnv, delegate("hairpinMode", "yes")),
			words: []string{"flannel's network configuration: delegate", "hairpinMode: ", "must be true or false"},
		},
		{
			name: "flannel: subnet.env missing", verbs: "ADD CHECK", code: types.ErrTryAgainLater,
			call:  func(h *host, p *namespace) call { return h.asFlannel(check(h, p)) },
			words: []string{"subnet.env: no such file", "the daemon has not written it yet", "netctl status"},
		},
		{
			name: "flannel: subnet.env missing, STATUS", code: types.ErrPluginNotAvailable,
			call:  func(h *host, _ *namespace) call { return h.asFlannel(call{verb: "STATUS"}) },
			words: []string{"subnet.env: no such file", "the daemon has not written it yet", "netctl status"},
		},
		{
			name: "flannel: subnet.env broken", verbs: "ADD CHECK", code: types.ErrDecodingFailure, call: flannel("FLANNEL_MTU=big\n", same),
			words: []string{"subnet.env: line 1: FLANNEL_MTU: \"big\": must be a whole number from 68 to 65535", "the daemon writes the file anew when it starts"},
		},
		{
			name: "flannel: subnet.env not readable", verbs: "ADD CHECK", code: types.ErrIOFailure,
			call:  flannel(subnetEnv, func(h *host, c call) call { return c.with("subnetFile", h.dir) }),
			words: []string{"read subnet file", "is a directory"},
		},
		{
			name: "flannel: subnet.env broken, STATUS", verbs: "STATUS", code: types.ErrPluginNotAvailable, call: flannel("FLANNEL_MTU=big\n", same),
			words: []string{"subnet.env: line 1: FLANNEL_MTU: \"big\": must be", "the daemon writes the file anew when it starts"},
		},
		{
			name: "flannel: scratch file names no network", verbs: "DEL", code: bad,
			call: flannel(subnetEnv, func(h *host, c call) call {
				if err := h.write(h.file("scratch/c"), `{"name":"a/b"}`); err != nil {
					h.t.Fatal(err)
				}
				return c
			}),
			words: []string{`network configuration: name: "a/b": must name the network, and can be a file's name`},
		},
		{
			name: "flannel: scratch directory is a file", code: types.ErrIOFailure,
			call: flannel(subnetEnv, func(h *host, c call) call {
				c.verb, c.env = "ADD", []string{podsName}
				return c.with("dataDir", h.handoffFile())
			}),
			words: []string{"attach " + thisPod, "write scratch file of container c: ", "twill.json: not a directory"},
		},
		{
			name: "flannel: scratch file not readable", code: types.ErrIOFailure,
			call: flannel(subnetEnv, func(h *host, c call) call {
				if err := os.MkdirAll(h.file("scratch/c"), 0o755); err != nil {
					h.t.Fatal(err)
				}
				c.verb = "DEL"
				return c
			}),
			words: []string{"read what flannel's plugin kept of the container", "scratch/c: is a directory"},
		},
	}
}
