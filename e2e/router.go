package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// Router is a host that runs Debian's BIRD 2 or FRR with their default paths.
type Router struct {
	*nettest.Host
	procs []*nettest.Process
	show  []string // the command that a question is added to
}

// write makes a file on the host.
func write(h *nettest.Host, path, content string) error {
	_, err := h.Run("sh", "-c", `printf %s "$1" > "$2"`, "sh", content, path)
	return err
}

// StartBIRD starts BIRD on a host with a configuration.
func StartBIRD(h *nettest.Host, conf string) (*Router, error) {
	if err := write(h, "/etc/bird/bird.conf", conf); err != nil {
		return nil, err
	}
	r := &Router{Host: h, show: []string{"birdc"}}
	return r, r.startBIRD()
}

// startBIRD starts it with more flags: -R is for one that comes back, and leaves
// its routes in the kernel until the neighbours have told theirs.
func (r *Router) startBIRD(flags ...string) error {
	p, err := r.Start(nettest.Program{Path: "/usr/sbin/bird", Args: append([]string{"-f"}, flags...), Name: "bird"})
	r.procs = []*nettest.Process{p}
	return err
}

// StartFRR starts FRR's zebra and bgpd on a host with a configuration for both.
func StartFRR(h *nettest.Host, conf string) (*Router, error) {
	for path, content := range map[string]string{"/etc/frr/frr.conf": conf, "/etc/frr/vtysh.conf": "service integrated-vtysh-config\n"} {
		if err := write(h, path, content); err != nil {
			return nil, err
		}
	}
	if _, err := h.Run("chown", "-R", "frr:frr", "/etc/frr"); err != nil {
		return nil, err
	}
	r := &Router{Host: h, show: []string{"vtysh", "-c"}}
	for _, daemon := range []struct{ name, socket string }{{"zebra", "/run/frr/zserv.api"}, {"bgpd", "/run/frr/bgpd.vty"}} {
		p, err := h.Start(nettest.Program{Path: "/usr/lib/frr/" + daemon.name, Args: []string{"-A", "127.0.0.1", "--log", "stdout"}, Name: daemon.name})
		if err != nil {
			return nil, err
		}
		r.procs = append(r.procs, p)
		// bgpd needs zebra, and vtysh both.
		if _, err := h.Run("sh", "-c", "for i in $(seq 500); do [ -S "+daemon.socket+" ] && exit; sleep 0.02; done; exit 1"); err != nil {
			return nil, fmt.Errorf("%s does not open %s: %w", daemon.name, daemon.socket, err)
		}
	}
	_, err := h.Run("vtysh", "-b")
	return r, err
}

// Ask returns the answer of birdc or vtysh.
func (r *Router) Ask(question string) (string, error) {
	if r.show[0] == "birdc" {
		return r.Run("birdc", strings.Fields(question)...)
	}
	return r.Run(r.show[0], append(r.show[1:], question)...)
}

// serve makes the router answer for all addresses of prefixes; programs can use the
// first.
func (r *Router) serve(prefixes ...netip.Prefix) error {
	for _, p := range prefixes {
		_, err := r.Run("sh", "-c", fmt.Sprintf("ip addr add %s dev lo && ip route add local %s dev lo", p.Addr().Next(), p))
		if err != nil {
			return err
		}
	}
	return nil
}

// birdPeer is a neighbour of a BIRD.
type birdPeer struct {
	address  netip.Addr
	as       uint32
	password string
}

// birdConf is a router with routes of its own, which it announces, and takes in
// and programs all that it is told.
func birdConf(h *nettest.Host, as uint32, prefixes []netip.Prefix, peers []birdPeer) string {
	var b strings.Builder
	fmt.Fprintf(&b, "log stderr all;\nrouter id %s;\nprotocol device {}\n", h.IPv4)
	if slices.ContainsFunc(peers, func(p birdPeer) bool { return p.as == as }) { // next hops are looked up in it
		fmt.Fprintln(&b, `protocol direct { ipv4; ipv6; interface "eth0"; }`)
	}
	for _, f := range []overlay.Family{overlay.IPv4, overlay.IPv6} {
		fmt.Fprintf(&b, "protocol kernel kernel%d { persist; graceful restart; merge paths on; ipv%[1]d { import none; export where source = RTS_BGP; }; }\n", f)
		fmt.Fprintf(&b, "protocol static own%d { ipv%[1]d;\n", f)
		for _, p := range prefixes {
			if overlay.FamilyOf(p.Addr()) == f {
				fmt.Fprintf(&b, "\troute %s blackhole;\n", p)
			}
		}
		fmt.Fprintln(&b, "}")
	}
	for i, p := range peers {
		local, f := h.IPv4, overlay.FamilyOf(p.address)
		if f == overlay.IPv6 {
			local = h.IPv6
		}
		password := ""
		if p.password != "" {
			password = fmt.Sprintf("password %q;", p.password)
		}
		fmt.Fprintf(&b, "protocol bgp n%d {\n\tlocal %s as %d; neighbor %s as %d; %s\n", i, local, as, p.address, p.as, password)
		fmt.Fprintf(&b, "\tconnect delay time 1; connect retry time 2; error wait time 1, 2; graceful restart on; graceful restart time %d;\n", birdRestartTime)
		fmt.Fprintf(&b, "\tipv%d { import all; export where source != RTS_DEVICE; next hop self; };\n}\n", f)
	}
	return b.String()
}

// birdRestartTime is how long the others keep a BIRD's routes, in seconds.
const birdRestartTime = 12

// frrConf is the same for FRR.
func frrConf(h *nettest.Host, as uint32, prefixes []netip.Prefix, peers []birdPeer) string {
	var b strings.Builder
	fmt.Fprintf(&b, "log stdout informational\nrouter bgp %d\n bgp router-id %s\n no bgp network import-check\n no bgp ebgp-requires-policy\n no bgp default ipv4-unicast\n bgp graceful-restart\n", as, h.IPv4)
	for _, p := range peers {
		fmt.Fprintf(&b, " neighbor %s remote-as %d\n neighbor %[1]s timers connect 2\n neighbor %[1]s advertisement-interval 0\n", p.address, p.as)
		if p.password != "" {
			fmt.Fprintf(&b, " neighbor %s password %s\n", p.address, p.password)
		}
	}
	for _, f := range []overlay.Family{overlay.IPv4, overlay.IPv6} {
		fmt.Fprintf(&b, " address-family ipv%d unicast\n", f)
		for _, p := range prefixes {
			if overlay.FamilyOf(p.Addr()) == f {
				fmt.Fprintln(&b, "  network", p)
			}
		}
		for _, p := range peers {
			if overlay.FamilyOf(p.address) == f {
				fmt.Fprintf(&b, "  neighbor %s activate\n", p.address)
			}
		}
		fmt.Fprintln(&b, " exit-address-family")
	}
	return b.String()
}
