package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// sameInKernel compares a result with the links, addresses and routes that there are.
func (h *host) sameInKernel(p *namespace, printed []byte) {
	h.t.Helper()
	var v struct{ CNIVersion string }
	if err := json.Unmarshal(printed, &v); err != nil {
		h.t.Fatal(err)
	}
	res := h.result(call{}.with("cniVersion", v.CNIVersion), printed)
	for i, got := range res.Interfaces {
		n, sandbox := h.namespace, ""
		if i == len(res.Interfaces)-1 {
			n, sandbox = p, p.path()
		}
		a := n.link(got.Name).Attrs()
		want := types100.Interface{Name: a.Name, Mac: a.HardwareAddr.String(), Sandbox: sandbox}
		if v.CNIVersion >= "1.1.0" {
			want.Mtu = a.MTU
		}
		if *got != want {
			h.t.Errorf("interface %+v, in the kernel %+v", *got, want)
		}
	}
	var addrs, routes []string
	for _, ip := range res.IPs {
		addrs = append(addrs, ip.Address.String())
		if ip.Interface == nil || *ip.Interface != len(res.Interfaces)-1 {
			h.t.Errorf("address %s is of interface %v", &ip.Address, ip.Interface)
		}
	}
	for _, r := range res.Routes {
		routes = append(routes, printRoute(&r.Dst, r.GW, r.MTU, r.AdvMSS, r.Priority))
	}
	same(h.t, "addresses", addrs, p.addresses())
	same(h.t, "routes", routes, p.routes(v.CNIVersion >= "1.1.0"))
}

func same(t testing.TB, what string, got, want []string) {
	t.Helper()
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("%s %s, in the kernel %s", what, strings.Join(got, ", "), strings.Join(want, ", "))
	}
}

// addresses are those of the pod's interface beside the kernel's own.
func (n *namespace) addresses() (out []string) {
	n.t.Helper()
	list, err := n.nl.AddrList(n.link("eth0"), netlink.FAMILY_ALL)
	if err != nil {
		n.t.Fatal(err)
	}
	for _, a := range list {
		if !a.IP.IsLinkLocalUnicast() {
			out = append(out, a.IPNet.String())
		}
	}
	return out
}

// routes are those of the pod beside the kernel's own and those that lead to the
// gateway alone.
func (n *namespace) routes(metrics bool) (out []string) {
	n.t.Helper()
	list, err := n.nl.RouteList(n.link("eth0"), netlink.FAMILY_ALL)
	if err != nil {
		n.t.Fatal(err)
	}
	const noMetric = 1024 // what IPv6 has instead of 0
	for _, r := range list {
		if r.Protocol == unix.RTPROT_KERNEL || r.Gw == nil {
			continue
		}
		if r.Priority == noMetric {
			r.Priority = 0
		}
		if !metrics {
			r.MTU, r.AdvMSS, r.Priority = 0, 0, 0
		}
		out = append(out, printRoute(r.Dst, r.Gw, r.MTU, r.AdvMSS, r.Priority))
	}
	return out
}

func printRoute(dst *net.IPNet, gw net.IP, mtu, advmss, priority int) string {
	return fmt.Sprintf("%s via %s mtu %d advmss %d metric %d", dst, gw, mtu, advmss, priority)
}

// capabilityArgs is what a runtime knows of the pod. libcni gives it to plugins
// that ask for it.
func capabilityArgs() map[string]any {
	return map[string]any{
		"portMappings": []any{map[string]any{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}},
		"bandwidth":    map[string]any{"ingressRate": 10_000_000, "ingressBurst": 1_000_000, "egressRate": 10_000_000, "egressBurst": 1_000_000},
	}
}

// Debian's plugins get along with Twill's result, and Twill with theirs.
func TestChain(t *testing.T) {
	for _, mode := range []string{"bridged", "routed"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			h, p := newHost(t), newNamespace(t)
			h.conf["mode"] = mode
			delete(h.conf, "cniVersion")
			delete(h.conf, "name")
			d := newDriver(t, h, h.conflist("1.0.0", debianPlugins(h)...))
			d.call("ADD", p)
			validate(t, "1.0.0", "result", d.printed["ADD"])
			h.chained(p, d.printed["ADD"])
			// The last of the chain, portmap 1.1.1, looks for IPv4's rules among IPv6's:
			// behind the plugin bridge, too.
			if err := d.run("CHECK", p); err != nil && !strings.HasPrefix(err.Error(), "could not check ipv6 dnat") {
				t.Errorf("CHECK: %v", err)
			}
			d.call("DEL", p)
			d.call("DEL", p)
			h.spotless(p)
			if nat := h.natRules(); strings.Contains(nat, "198.18.1.2") {
				t.Errorf("left in the firewall:\n%s", nat)
			}
			if left, err := os.ReadDir(h.file("tuning")); err == nil && len(left) > 0 {
				t.Errorf("left of tuning: %v", left)
			}
		})
	}
}

func debianPlugins(h *host) []map[string]any {
	tuning := map[string]any{"type": "tuning", "dataDir": h.file("tuning"), "sysctl": map[string]any{"net.ipv4.conf.eth0.arp_filter": "1"}}
	if h.conf["mode"] == "bridged" {
		// With it the kernel forgets a link's neighbours, and so CHECK would miss the
		// gateways of a routed pod.
		tuning["mac"] = "02:00:00:00:00:77"
	}
	return []map[string]any{
		tuning,
		{"type": "bandwidth", "capabilities": map[string]any{"bandwidth": true}},
		{"type": "portmap", "capabilities": map[string]any{"portMappings": true}, "snat": true},
	}
}

// chained wants to see what each of Debian's plugins does.
func (h *host) chained(p *namespace, printed []byte) {
	h.t.Helper()
	if got := p.link("eth0").Attrs().HardwareAddr.String(); h.conf["mode"] == "bridged" && got != "02:00:00:00:00:77" {
		h.t.Errorf("tuning set MAC %s", got)
	}
	if nat := h.natRules(); !strings.Contains(nat, "198.18.1.2:80") {
		h.t.Errorf("portmap made no rule to the pod:\n%s", nat)
	}
	links := h.result(call{}.with("cniVersion", "1.0.0"), printed).Interfaces
	queues, err := h.nl.QdiscList(h.link(links[len(links)-2].Name))
	if err != nil || !slices.ContainsFunc(queues, func(q netlink.Qdisc) bool { return q.Type() == "tbf" }) {
		h.t.Errorf("bandwidth made %v, %v", queues, err)
	}
}

func (h *host) natRules() string {
	h.t.Helper()
	var out []byte
	if err := h.do(func() (err error) { out, err = exec.Command("iptables-save", "-t", "nat").Output(); return err }); err != nil {
		h.t.Fatal(err)
	}
	return string(out)
}

// The schemas tell the versions apart.
func TestSchemas(t *testing.T) {
	const before, after = `{"cniVersion":"`, `","interfaces":[{"name":"eth0","sandbox":"/x"%s}],"ips":[{"address":"198.18.1.2/24","interface":0%s}],"routes":[{"dst":"::/0"%s}]}`
	for _, tt := range []struct{ link, ip, route, versions string }{
		{"", "", "", "1.0.0 1.1.0"},
		{"", `,"version":"4"`, "", "0.3.1 0.4.0"},
		{`,"mtu":1450,"mac":"0a:58:c6:12:01:02"`, "", "", "1.1.0"},
		{`,"mac":"0A58"`, "", "", ""},
		{"", "", `,"mtu":1400`, "1.1.0"},
		{"", "", `,"gw":"198.18.1.1","scope":0,"table":100`, "1.1.0"},
		{"", "", `,"gw":"198.18.1.1/24"`, ""},
		{`,"colour":"red"`, "", "", ""},
	} {
		var valid []string
		for _, v := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
			if schemaError(v, "result", []byte(before+v+fmt.Sprintf(after, tt.link, tt.ip, tt.route))) == nil {
				valid = append(valid, v)
			}
		}
		if got := strings.Join(valid, " "); got != tt.versions {
			t.Errorf("%+v is valid at %s", tt, got)
		}
	}
}
