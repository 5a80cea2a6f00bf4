package kubernetes

import (
	"strings"
	"testing"
)

// TestInstall installs, installs again, takes Twill's objects away and puts them back
// under probes, repairs a sysctl from inside the container, uses its TUN device, and
// uninstalls: nothing of Twill's is left on the nodes.
func TestInstall(t *testing.T) {
	c := Start(t, Options{Nodes: 2})
	_, ref, err := c.Image()
	must(t, err)
	clients := c.startClients(t)
	c.checkReach(t, clients, clients)
	n := c.Nodes[0]
	if got := n.shell(t, "sysctl -qw net.ipv4.ip_forward=0; sleep 2; cat /proc/sys/net/ipv4/ip_forward"); strings.TrimSpace(got) != "1" {
		t.Errorf("forwarding was not turned on again: %s", got)
	}
	// NET_ADMIN, NET_RAW and NET_BIND_SERVICE, no new privileges, a seccomp filter.
	status := n.shell(t, "for p in /proc/[0-9]*; do if grep -qx twilld $p/comm; then cat $p/status; fi; done")
	for _, want := range []string{"CapEff:\t0000000000003400", "CapBnd:\t0000000000003400", "NoNewPrivs:\t1", "Seccomp:\t2"} {
		if !strings.Contains(status, want) {
			t.Errorf("twilld runs without %q:\n%s", want, status)
		}
	}
	out, err := c.NetctlInstall(c.NetConf(), "--image", ref)
	must(t, err)
	if !strings.Contains(out, "nothing had to be changed") {
		t.Errorf("the second run changed something:\n%s", out)
	}

	packets := c.startProbes(t, clients[0], clients[1])
	_, err = c.Netctl("uninstall", "--keep-nodes")
	must(t, err)
	_, err = c.NetctlInstall(c.NetConf(), "--image", ref)
	must(t, err)
	packets.stop(t)
	c.Mark("uninstall --keep-nodes and install: probes counted")

	must(t, c.SetNetConf(`{"Network": "10.244.0.0/16", "Backend": {"Type": "udp"}}`))
	must(t, Eventually(minutes(t, 3), func() error {
		for _, n := range c.Nodes {
			if _, err := n.Run("ip", "link", "show", "flannel0"); err != nil {
				return err
			}
		}
		return nil
	}))
	c.checkReach(t, clients, clients)
	c.Mark("backend udp in a container without privileges")

	c.kubectl(t, "delete", "daemonset", "client", "--cascade=foreground", "--timeout=3m")
	_, err = c.Netctl("uninstall")
	must(t, err)
	for _, n := range c.Nodes {
		left := n.shell(t, "ls /etc/cni/net.d /run/flannel; ls /opt/cni/bin/twill 2>/dev/null; ip -br link | grep -E 'flannel|cni0'; ip route | grep 'proto 84'; ip nexthop; iptables-save | grep -i twill; nft list tables | grep twill; true")
		for line := range strings.Lines(left) {
			if !strings.HasSuffix(strings.TrimSpace(line), ":") && strings.TrimSpace(line) != "" {
				t.Errorf("%s: left: %s", n.Name, line)
			}
		}
		notes := c.kubectl(t, "get", "node", n.Name, "--output=jsonpath={.metadata.annotations}")
		if strings.Contains(notes, "flannel") {
			t.Errorf("%s: annotations stay: %s", n.Name, notes)
		}
	}
	c.Mark("uninstalled")
	_, err = c.NetctlInstall(c.NetConf(), "--image", ref)
	must(t, err)
	clients = c.startClients(t)
	c.checkReach(t, clients, clients)
}
