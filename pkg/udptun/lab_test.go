package udptun_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/udptun"
)

// pair is two namespaces joined by one veth pair.
type pair struct {
	ns    [2]*nettest.NS
	addrs [2][]netip.Addr // of eth0, IPv4 and IPv6
}

func newPair(t testing.TB) *pair {
	t.Helper()
	lab := nettest.NewT(t)
	p := &pair{}
	for i := range p.ns {
		var err error
		if p.ns[i], err = lab.NewNS(fmt.Sprintf("n%d", i+1)); err != nil {
			t.Fatal(err)
		}
	}
	p.ip(t, 0, "link add eth0 type veth peer name eth0 netns "+p.ns[1].Path)
	for i := range p.ns {
		p.sysctl(t, i, "net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0", "net.ipv6.conf.eth0.accept_dad=0")
		p.addrs[i] = []netip.Addr{addr("198.51.100.%d", i+1), addr("2001:db8::%d", i+1)}
		p.ip(t, i, fmt.Sprintf("addr add %s/24 dev eth0", p.addrs[i][0]))
		p.ip(t, i, fmt.Sprintf("addr add %s/64 dev eth0 nodad", p.addrs[i][1]))
		p.ip(t, i, "link set eth0 up")
	}
	return p
}

func addr(format string, a ...any) netip.Addr { return netip.MustParseAddr(fmt.Sprintf(format, a...)) }

func (p *pair) ip(t testing.TB, i int, args string) {
	t.Helper()
	p.run(t, i, "ip", strings.Fields(args)...)
}

func (p *pair) sysctl(t testing.TB, i int, settings ...string) {
	t.Helper()
	p.run(t, i, "sysctl", append([]string{"-qw"}, settings...)...)
}

func (p *pair) run(t testing.TB, i int, name string, args ...string) string {
	t.Helper()
	out, err := p.ns[i].Run(name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// own returns the subnets of node i: 10.5.1.0/24 and fd00:5:1::/64 of the first.
func own(i int) []netip.Prefix {
	return []netip.Prefix{netip.PrefixFrom(addr("10.5.%d.0", i+1), 24), netip.PrefixFrom(addr("fd00:5:%d::", i+1), 64)}
}

// inner returns the addresses of node i in the tunnel.
func inner(i int) []netip.Addr {
	return []netip.Addr{own(i)[0].Addr().Next(), own(i)[1].Addr().Next()}
}

const (
	device = "flannel0"
	port   = 8285
)

// addDevice makes what package kernel will make.
func (p *pair) addDevice(t testing.TB, i int) {
	t.Helper()
	p.ip(t, i, "tuntap add mode tun multi_queue vnet_hdr name "+device)
	p.configureDevice(t, i)
}

func (p *pair) configureDevice(t testing.TB, i int) {
	t.Helper()
	p.ip(t, i, "link set "+device+" mtu 1452 up")
	p.ip(t, i, fmt.Sprintf("addr add %s/32 dev %s", inner(i)[0], device))
	p.ip(t, i, fmt.Sprintf("addr add %s/128 dev %s nodad", inner(i)[1], device))
	p.ip(t, i, "route add 10.5.0.0/16 dev "+device+" src "+inner(i)[0].String())
	p.ip(t, i, "route add fd00:5::/32 dev "+device+" src "+inner(i)[1].String())
}

// peers are those of node i; via is 0 for IPv4 and 1 for IPv6 on the outside.
func (p *pair) peers(i, via int) []udptun.Peer {
	var out []udptun.Peer
	for _, s := range own(1 - i) {
		out = append(out, udptun.Peer{Subnet: s, Addr: netip.AddrPortFrom(p.addrs[1-i][via], port)})
	}
	return out
}

// start runs a child in node i until the lab ends.
func (p *pair) start(t testing.TB, i int, c child) *nettest.Process {
	t.Helper()
	proc, err := p.ns[i].Start(c.program(t))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel()
	if _, err := proc.WaitLog(ctx, "ready"); err != nil {
		t.Fatal(err)
	}
	return proc
}

func (c child) program(t testing.TB) nettest.Program {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	return nettest.Program{Path: self, Name: c.Role, Env: []string{childEnv + "=" + string(text)}}
}
