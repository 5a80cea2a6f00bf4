//go:build linux && amd64

package main

import (
	"net/netip"

	"github.com/containernetworking/cni/pkg/types"
)

// faultErrors are those that the kernel alone brings about: no memory, a full disk.
// The message says what was being done, to which object, and what the kernel said.
func faultErrors() []failure {
	out := addFaults()
	out = append(out, otherFaults()...)
	for i := range out {
		out[i].code = types.ErrIOFailure
		out[i].name = "fault, " + out[i].name
	}
	return out
}

func addFaults() []failure {
	with := func(key string, value any) func(*host, *namespace) call {
		return func(h *host, p *namespace) call { return addPod(h, p).with(key, value) }
	}
	routed, promisc := with("mode", "routed"), with("promisc", true)
	limited := with("runtimeConfig", map[string]any{"bandwidth": map[string]any{"ingressRate": 1e7, "ingressBurst": 1e6}})
	renumbered := after(addPod, func(h *host, _ *namespace) error {
		h.attach(add("old", newNamespace(h.t)))
		moved := dualStack
		moved.Subnets = []netip.Prefix{netip.MustParsePrefix("198.18.2.0/24")}
		h.handoff(moved)
		return nil
	})
	other := func(mode string, c func(*host, *namespace) call) func(*host, *namespace) call {
		return after(c, func(h *host, _ *namespace) error {
			h.attach(add("other", newNamespace(h.t)).with("mode", mode))
			return nil
		})
	}
	const noBuffers, noSpace, noMemory = ": no buffer space available", ": no space left on device", ": cannot allocate memory"
	return []failure{
		{name: "host's namespace", at: `^openat /proc/thread-self/ns/net`, call: addPod, words: []string{"open the host's network namespace: too many open files in system"}},
		{name: "enter namespace", at: `^setns`, call: addPod, words: []string{"enter network namespace /proc/", noMemory}},
		{name: "netlink socket", at: `^socket netlink`, nth: 2, call: addPod, words: []string{"open netlink socket" + noBuffers}},
		{name: "look for host's link", at: `^sendto RTM_GETLINK veth`, call: addPod, words: []string{"look up link veth", noBuffers}},
		{name: "look for pod's link", at: `^sendto RTM_GETLINK eth0`, call: addPod, words: []string{"look up link eth0 in the pod" + noBuffers}},
		{name: "record", at: `^pwrite .*/c:eth0`, call: addPod, words: []string{"attach " + thisPod + ": write down the attachment: ", "attachments/cbr0/c:eth0" + noSpace}},
		{name: "reserve", at: `^openat .*/198.18.1.2 `, call: addPod, words: []string{"reserve an address for " + thisPod + ": reserve 198.18.1.2: open ", "too many open files in system"}},
		{name: "look up bridge", at: `^sendto RTM_GETLINK cni0`, call: addPod, words: []string{"look up bridge cni0" + noBuffers}},
		{name: "make bridge", at: `^sendto RTM_NEWLINK bridge cni0`, call: addPod, words: []string{"bridge cni0: make it" + noBuffers}},
		{name: "bridge's addresses", at: `^sendto RTM_GETADDR link`, call: addPod, words: []string{"list addresses of bridge cni0" + noBuffers}},
		{name: "bridge's alias", at: `^sendto RTM_SETLINK link \d+ alias twill$`, call: addPod, words: []string{"set up bridge cni0: set alias" + noBuffers}},
		{name: "routed pods of before", at: `^sendto RTM_NEWNEIGH`, call: other("routed", addPod), words: []string{"set up bridge cni0: add proxy neighbour fd00:18:0:1::2 dev cni0" + noBuffers}},
		{name: "bridge of others", at: `^sendto RTM_NEWNEIGH link \d+ fd00:`, call: other("bridged", routed), words: []string{"answer for the pod on bridge cni0: add proxy neighbour fd00:18:0:1::3 dev cni0" + noBuffers}},
		{name: "gateway", at: `^sendto RTM_NEWADDR link \d+ 198.18.1.1$`, call: addPod, words: []string{"add gateway to bridge cni0: add address 198.18.1.1/24 to cni0" + noBuffers}},
		{name: "renumber", at: `^sendto RTM_NEWROUTE 198.18.1.2/32`, call: renumbered, words: []string{"renumber bridge cni0: add route 198.18.1.2/32 dev cni0" + noBuffers}},
		{name: "bridge promiscuous", at: `^sendto RTM_SETLINK link \d+$`, call: with("promiscMode", true), words: []string{"set promiscuous mode of bridge cni0" + noBuffers}},
		{name: "veth", at: `^sendto RTM_NEWLINK veth`, call: addPod, words: []string{"add link veth", noBuffers}},
		{name: "port's bridge", at: `^sendto RTM_GETLINK cni0`, nth: 4, call: addPod, words: []string{"look up bridge cni0" + noBuffers}},
		{name: "host's link", at: `^sendto RTM_SETLINK link \d+ alias twill:c`, call: addPod, words: []string{"set up link veth", noBuffers}},
		{name: "hairpin", at: `^sendto RTM_SETLINK link \d+ port options`, call: addPod, words: []string{"set hairpin mode of veth", noBuffers}},
		{name: "look up pod's link", at: `^sendto RTM_GETLINK eth0`, nth: 2, call: addPod, words: []string{"look up link eth0 in the pod" + noBuffers}},
		{name: "loopback", at: `^sendto RTM_NEWLINK link 1 up`, call: addPod, words: []string{"set the pod's loopback up" + noBuffers}},
		{name: "enter namespace for sysctls", at: `^setns`, nth: 3, call: routed, words: []string{"set sysctl net/ipv6/conf/eth0/accept_dad", noMemory}},
		{name: "address", at: `^sendto RTM_NEWADDR link \d+ 198.18.1.2$`, call: addPod, words: []string{"configure eth0: add address 198.18.1.2/24 to eth0" + noBuffers}},
		{name: "promiscuous", at: `^sendto RTM_SETLINK link \d+$`, call: promisc, words: []string{"set promiscuous mode of eth0" + noBuffers}},
		{name: "up", at: `^sendto RTM_NEWLINK link \d+ up`, nth: 3, call: addPod, words: []string{"set eth0 up" + noBuffers}},
		{name: "neighbour", at: `^sendto RTM_NEWNEIGH`, call: routed, words: []string{"add neighbour 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee dev eth0" + noBuffers}},
		{name: "limit", at: `^sendto RTM_NEWQDISC`, call: limited, words: []string{"limit the bandwidth of " + thisPod + ": add tbf to veth", noBuffers}},
		{name: "bridge at the end", at: `^sendto RTM_GETLINK cni0`, nth: 5, call: addPod, words: []string{"look up bridge cni0" + noBuffers}},
		{name: "carrier", at: `^sendto RTM_GETLINK link \d+$`, call: addPod, words: []string{"set the pod's links up" + noBuffers}},
		{name: "neighbours of before", at: `^sendto RTM_DELNEIGH`, call: addPod, words: []string{"announce the pod: forget neighbour 198.18.1.2 of cni0" + noBuffers}},
		{name: "record with the addresses", at: `^pwrite .*/c:eth0`, nth: 2, call: addPod, words: []string{"attach " + thisPod + ": write down the attachment: ", noSpace}},
		{name: "record at the end", at: `^pwrite .*/c:eth0`, nth: 3, call: addPod, words: []string{"attach " + thisPod + ": write down the attachment: ", noSpace}},
		{name: "result", at: `^write standard output`, call: addPod, words: []string{"print the result: ", noSpace}},
	}
}

func otherFaults() []failure {
	nothing := func(*host, *namespace) error { return nil }
	here := attached("DEL", nothing)
	flannels := func(h *host, p *namespace) call {
		h.flannel("ADD", "c", p)
		return del("c", p).with("cniVersion", "1.0.0")
	}
	routedThere := func(h *host, p *namespace) call {
		h.attach(add("bridged", newNamespace(h.t)))
		c := addPod(h, p).with("mode", "routed")
		h.must(c)
		c.verb = "DEL"
		return c
	}
	scratched := func(h *host, p *namespace) call {
		if err := h.write(h.file("run/subnet.env"), subnetEnv); err != nil {
			h.t.Fatal(err)
		}
		c := h.asFlannel(add("c", p))
		h.must(c)
		c.verb = "DEL"
		return c
	}
	const noBuffers, eio = ": no buffer space available", ": input/output error"
	const gone = "container c interface eth0: "
	return []failure{
		{name: "DEL, link", at: `^sendto RTM_GETLINK veth`, call: here, words: []string{"look up link veth", noBuffers}},
		{name: "DEL, link's deletion", at: `^sendto RTM_DELLINK`, call: here, words: []string{"delete link veth", noBuffers}},
		{name: "DEL, host's route", at: `^sendto RTM_DELROUTE`, call: here, words: []string{"delete route 198.18.1.2/32" + noBuffers}},
		{name: "DEL, bridge's answer", at: `^sendto RTM_DELNEIGH`, call: routedThere, words: []string{"delete proxy neighbour fd00:18:0:1::3" + noBuffers}},
		{name: "DEL, reservation", at: `^unlink .*/cbr0/198.18.1.2`, call: here, words: []string{"release the addresses of " + gone + "release 198.18.1.2: remove ", eio}},
		{name: "DEL, whose address", at: `^openat .*/cbr0/198.18.1.2`, call: here, words: []string{"look up whose 198.18.1.2 is: "}},
		{name: "DEL, record", at: `^unlink .*/attachments/cbr0/c:eth0`, call: here, words: []string{"detach " + gone + "remove record of the attachment: ", "c:eth0" + eio}},
		{name: "DEL, scratch file", at: `^unlink .*/scratch/c$`, call: scratched, words: []string{"detach " + gone + "remove scratch file: ", "scratch/c" + eio}},
		{
			name: "DEL, pod's link", at: `^sendto RTM_GETLINK eth0`, words: []string{"look up link eth0 in the pod" + noBuffers},
			call: func(_ *host, p *namespace) call { return del("c", p) },
		},
		{name: "DEL, flannel's link", at: `^sendto RTM_GETLINK link \d+$`, call: flannels, words: []string{"look up the host's end of eth0" + noBuffers}},
		{name: "DEL, flannel's scratch file", at: `^openat /var/lib/cni/flannel/c$`, call: flannels, words: []string{"take back what flannel set up for container c: read scratch file: open /var/lib/cni/flannel/c: "}},
		{name: "DEL, flannel's bridge", at: `^sendto RTM_GETLINK cni0`, call: flannels, words: []string{"look up bridge cni0" + noBuffers}},
		{
			name: "STATUS, bridge", at: `^sendto RTM_GETLINK cni0`, words: []string{"look up bridge cni0" + noBuffers},
			call: func(*host, *namespace) call { return call{verb: "STATUS"} },
		},
	}
}
