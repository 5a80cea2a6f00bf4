package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// podState is what pods leave on a host: links, routes to them, and the plugin's
// files but for locks, the round robin and the daemon's marks.
const podState = `ip -o link show type veth | grep -v ' eth0@' || true; ip -o link show type ifb
ip route show proto 84 | grep -v -e nhid -e via || true
find /var/lib/cni -type f ! -name lock ! -name 'last_reserved_ip.*' ! -path '*/recorded/*'`

// TestManyDeleted deletes 40 pods at once: the daemon collects their links.
func TestManyDeleted(t *testing.T) {
	c, ctx := startCluster(t, Options{Hosts: 1, Config: ConfigDual})
	n := c.Nodes[0]
	var pods []*Pod
	for i := range 40 {
		conf := NetConf
		if i%2 == 1 {
			conf = strings.Replace(conf, "{", `{"mode": "routed", `, 1)
		}
		p, err := n.AddPodWith(fmt.Sprint("p", i), conf)
		must(t, err)
		pods = append(pods, p)
	}
	must(t, pods[0].Ping(pods[1].IPv4, 2, 56)) // one bridged, one routed
	must(t, pods[1].Ping(pods[0].IPv6, 2, 56))
	failed := make(chan error, len(pods))
	for _, p := range pods {
		go func() {
			_, err := p.CNI("DEL", NetConf)
			failed <- err
		}()
	}
	for range pods {
		must(t, <-failed)
	}
	must(t, n.awaitCollected())
	if got := n.shell(t, podState); got != "" {
		t.Errorf("left:\n%s", got)
	}
	handed, err := n.Metric("twill_pods_handed_over_total")
	must(t, err)
	if handed != 40 {
		t.Errorf("the daemon says that it was handed %.0f pods, want 40", handed)
	}
	must(t, n.WaitInSync(ctx))
	if d := drifts(t, n); len(d) > 0 {
		t.Errorf("%d drifts that nobody caused, the first: %+v", len(d), d[0])
	}
}

// TestSweptByDaemon: nobody calls DEL for a pod whose namespace is gone, and no
// runtime calls GC. A daemon that starts frees what it left.
func TestSweptByDaemon(t *testing.T) {
	c, ctx := startCluster(t, Options{Hosts: 1, Config: ConfigDual})
	n := c.Nodes[0]
	// A namespace that nothing of the lab holds open.
	n.shell(t, "ip netns add twill-gone")
	gone := &Pod{NS: &nettest.NS{Path: "/run/netns/twill-gone"}, Node: n, ID: "gone"}
	_, err := gone.CNI("ADD", strings.Replace(NetConf, "}", `, "mode": "routed", "runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}}`, 1))
	must(t, err)
	stays, err := n.AddPod("stays")
	must(t, err)
	must(t, n.Daemon.Kill9())
	if left := n.shell(t, podState); !strings.Contains(left, "gone:eth0") {
		t.Fatalf("nothing to sweep:\n%s", left)
	}
	n.shell(t, "ip netns del twill-gone")
	must(t, n.Start())
	must(t, n.WaitReady(ctx))
	if Eventually(ctx, func() bool { return !strings.Contains(n.shell(t, podState), "gone") }) != nil {
		t.Errorf("a minute later there is still:\n%s", n.shell(t, podState))
	}
	if out := n.shell(t, "iptables-save -t nat; ls /var/lib/cni/networks/twill"); strings.Contains(out, "HOSTPORT") {
		t.Errorf("left of the pod that is gone:\n%s", out)
	}
	for _, ip := range stays.Result.IPs {
		gw, _ := netip.AddrFromSlice(ip.Gateway)
		must(t, stays.Ping(gw.Unmap(), 2, 56))
	}
}

// TestHostPortHealed: somebody flushes the firewall, and the pods' host ports come
// back with the rest.
func TestHostPortHealed(t *testing.T) {
	for _, tool := range []overlay.Tool{overlay.Iptables, overlay.Nftables} {
		t.Run(string(tool), func(t *testing.T) {
			config, flush, list := ConfigDual, "iptables -t nat -F; ip6tables -t nat -F", "iptables-save -t nat; ip6tables-save -t nat"
			if tool == overlay.Nftables {
				config, flush, list = with(config, `"EnableNFTables": true`), "nft flush ruleset", "nft list ruleset"
			}
			c, ctx := startCluster(t, Options{Hosts: 2, Config: config})
			n, other := c.Nodes[0], c.Nodes[1]
			p, err := n.AddPodWith("web", strings.Replace(NetConf, "}", `, "runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}}`, 1))
			must(t, err)
			_, err = p.Start(nettest.Program{Path: "sh", Args: []string{"-c", "while :; do echo hello | busybox nc -l -p 80; done"}, Name: "web"})
			must(t, err)
			reach := func() bool {
				out, err := other.Run("busybox", "nc", "-w", "2", n.IPv4.String(), "8080")
				return err == nil && strings.Contains(out, "hello")
			}
			if Eventually(ctx, reach) != nil {
				t.Fatalf("the host port does not lead to the pod:\n%s", n.shell(t, list))
			}
			n.shell(t, flush)
			if Eventually(ctx, reach) != nil {
				t.Errorf("the host port is not healed:\n%s", n.shell(t, list))
			}
		})
	}
}
