package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// TestFarPeers has peers that are not on the link, among some that are. Backends
// that need the link say so; nobody else suffers.
func TestFarPeers(t *testing.T) {
	far := overlay.Subnets{V4: netip.MustParsePrefix("10.5.222.0/24"), V6: netip.MustParsePrefix("fd00:5:0:222::/64")}
	for _, x := range []struct {
		backend, lease string
		route          []string // to the far peer's pods, if there is one
	}{
		{"host-gw", `{"PublicIP": "203.0.113.9", "PublicIPv6": "2001:db8:9::9", "BackendType": "host-gw"}`, nil},
		{"bgp", `{"PublicIP": "203.0.113.9", "PublicIPv6": "2001:db8:9::9", "BackendType": "bgp", "BackendData": {"ASNumber": 64512, "Port": 179}}`, nil},
		{
			"vxlan with direct routing",
			`{"PublicIP": "203.0.113.9", "PublicIPv6": "2001:db8:9::9", "BackendType": "vxlan", "BackendData": {"VNI": 1, "VtepMAC": "0e:2a:00:00:00:09"}, "BackendV6Data": {"VNI": 1, "VtepMAC": "0e:2a:00:00:06:09"}}`,
			[]string{"dev flannel.1", "dev flannel-v6.1"},
		},
	} {
		t.Run(x.backend, func(t *testing.T) {
			c, ctx := startCluster(t, Options{Hosts: 2, Config: dual(backendNamed(t, x.backend).config)})
			pods := onePod(t, c)
			n := c.Nodes[0]
			p := startProbes(t, pods[0], pods[1])
			must(t, putLease(ctx, c, Prefix+"/subnets/"+far.Key(), x.lease))
			must(t, n.WaitStatus(ctx, "aware of the far peer", func(s overlay.Status) bool { return s.Peers == 2 }))
			must(t, n.WaitInSync(ctx))
			for i, f := range []overlay.Family{overlay.IPv4, overlay.IPv6} {
				out := n.shell(t, fmt.Sprintf("ip -d route show %s; ip -6 -d route show %s", far.V4, far.V6))
				if x.route == nil {
					must(t, n.waitProblem(ctx, "lease "+far.Key(), f.String()+" peer", "is not on the link of eth0"))
					if strings.Contains(out, "proto 84") {
						t.Errorf("a route to a far peer: %s", out)
					}
				} else if !strings.Contains(out, x.route[i]) {
					t.Errorf("no %s route to the far peer: %s", x.route[i], out)
				}
			}
			if x.route == nil {
				out, code, err := n.Netctl("status")
				must(t, err)
				if code != 1 || !containsAll(out, []string{"problem", far.Key(), "vxlan with DirectRouting"}) && x.backend == "host-gw" {
					t.Errorf("netctl status exits with %d:\n%s", code, out)
				}
			} else {
				must(t, n.waitProblem(ctx))
				for _, f := range families(pods[1]) {
					near := subnetOf(pods[1], f)
					if out := n.shell(t, fmt.Sprintf("ip -%d -d route show %s", map[overlay.Family]int{overlay.IPv4: 4, overlay.IPv6: 6}[f], near)); !strings.Contains(out, "dev eth0") {
						t.Errorf("the near peer is not reached directly: %s", out)
					}
				}
			}
			p.stopAfter(t, 600)
			_, err := c.Etcd.Client().Delete(ctx, Prefix+"/subnets/"+far.Key())
			must(t, err)
			must(t, n.waitProblem(ctx))
		})
	}
}

// TestUnusable has what a backend needs of its host be taken or forbidden. The
// daemon says so, and goes on as soon as that has ended.
func TestUnusable(t *testing.T) {
	const wgKey = "/run/flannel/wgkey"
	for _, x := range []struct {
		name, config string
		obstacle     func(*testing.T, *Node) (end func())
		words        []string
	}{
		{"udp port taken", `{"Type": "udp"}`, portTaken("udp4", 8285), []string{"8285", "in use"}},
		{"BGP port taken", `{"Type": "bgp"}`, portTaken("tcp4", 179), []string{"179", "in use by another program", "--bgp-router", "Backend.Port"}},
		{"WireGuard port taken", `{"Type": "wireguard"}`, portTaken("udp4", 51820), []string{"51820", "in use"}},
		{"TUN not permitted for udp", `{"Type": "udp"}`, noTUN, []string{"/dev/net/tun", "CAP_NET_ADMIN"}},
		{"TUN not permitted for wireguard", `{"Type": "wireguard"}`, noTUN, []string{"/dev/net/tun", "CAP_NET_ADMIN"}},
		{
			"WireGuard key is garbage", `{"Type": "wireguard"}`,
			func(t *testing.T, n *Node) func() {
				n.shell(t, "echo garbage > "+wgKey)
				return func() { n.shell(t, "rm "+wgKey) }
			},
			[]string{wgKey, "WireGuard key"},
		},
		{
			"WireGuard key is for everybody to read", `{"Type": "wireguard"}`,
			func(t *testing.T, n *Node) func() {
				n.shell(t, "wg genkey > "+wgKey+"; chmod 644 "+wgKey)
				return func() { n.shell(t, "chmod 600 "+wgKey) }
			},
			nil,
		},
		{
			"a stranger's flannel0", `{"Type": "udp"}`,
			func(t *testing.T, n *Node) func() {
				n.shell(t, "ip link add flannel0 type veth peer name other0")
				return func() { n.shell(t, "ip link del flannel0") }
			},
			[]string{"flannel0"},
		},
	} {
		t.Run(x.name, func(t *testing.T) {
			c, ctx := newCluster(t, Options{Hosts: 2, Config: dual(x.config)})
			n, other := c.Nodes[0], c.Nodes[1]
			must(t, other.Start())
			must(t, other.WaitReady(ctx))
			end := x.obstacle(t, n)
			must(t, n.Start())
			if x.words != nil {
				n.toldWhy(t, x.words...)
			}
			end()
			must(t, n.WaitReady(ctx))
			must(t, c.WaitPeers(ctx))
			pods := onePod(t, c)
			for _, f := range families(pods[0]) {
				must(t, Eventually(ctx, func() bool { return pods[0].Ping(pods[1].Addr(f), 1, 56) == nil }))
				must(t, pods[1].Ping(pods[0].Addr(f), 2, 1000))
			}
			for _, n := range c.Nodes {
				must(t, n.waitProblem(ctx))
			}
		})
	}
}

// toldWhy waits until netctl status says words, as a problem, a failure or the
// reason for not being ready, and exits with 1.
func (n *Node) toldWhy(t *testing.T, words ...string) {
	t.Helper()
	var out string
	var code int
	if Eventually(t.Context(), func() bool {
		var err error
		out, code, err = n.Netctl("status")
		return err == nil && code == 1 && containsAll(out, words)
	}) != nil {
		log, _ := n.Daemon.Output()
		t.Fatalf("netctl status on %s exits with %d, without %q:\n%s\n%s", n.Name, code, words, out, log)
	}
	t.Logf("netctl status\n%s", out)
}

// portTaken has another program listen on a port of all the host's addresses.
func portTaken(network string, port int) func(*testing.T, *Node) func() {
	kind := map[string]string{"udp4": "SOCK_DGRAM", "tcp4": "SOCK_STREAM"}[network]
	script := fmt.Sprintf(`import socket, time
for f, a in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
    s = socket.socket(f, socket.%s)
    if f == socket.AF_INET6: s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    s.bind((a, %d))
    if socket.%[1]s == socket.SOCK_STREAM: s.listen()
    globals()["keep%%d" %% f] = s
print("taken", flush=True)
time.sleep(1000)`, kind, port)
	return func(t *testing.T, n *Node) func() {
		p, err := n.Host.Start(nettest.Program{Path: "python3", Args: []string{"-c", script}, Name: "squatter"})
		must(t, err)
		_, err = p.WaitLog(t.Context(), "taken")
		must(t, err)
		return func() { must(t, p.Kill9()) }
	}
}

// noTUN takes the TUN device's file away, as containers do.
func noTUN(t *testing.T, n *Node) func() {
	n.shell(t, "mount --bind /dev/null /dev/net/tun")
	return func() { n.shell(t, "umount /dev/net/tun") }
}

// TestBadBGPFlags has twilld refuse flags that make no sense.
func TestBadBGPFlags(t *testing.T) {
	c, _ := newCluster(t, Options{Hosts: 1, Config: dual(`{"Type": "bgp"}`)})
	n := c.Nodes[0]
	for _, x := range []struct {
		args  []string
		words []string
	}{
		{[]string{"--bgp-route-reflector"}, []string{"--bgp-route-reflector", "needs --bgp-cluster-id"}},
		{[]string{"--bgp-cluster-id=192.0.2.1"}, []string{"--bgp-cluster-id", "--bgp-route-reflector"}},
		{[]string{"--bgp-route-reflector", "--bgp-cluster-id=7"}, []string{"--bgp-cluster-id", "192.0.2.1"}},
		{[]string{"--bgp-as-number=4294967296"}, []string{"--bgp-as-number", "4294967296", "1..4294967295"}},
		{[]string{"--bgp-router=quagga"}, []string{"--bgp-router", "quagga", "bird or frr"}},
		{[]string{"--bgp-router-templates=/nowhere"}, []string{"--bgp-router"}},
	} {
		t.Run(strings.Join(x.args, " "), func(t *testing.T) {
			must(t, n.Start(x.args...))
			n.exited(t, 2, x.words...)
		})
	}
}
