package kubernetes

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestUp puts Twill on a cluster with IPv4 alone, vxlan and kube-proxy with iptables.
func TestUp(t *testing.T) {
	c := Start(t, Options{ProxyMode: "iptables"})
	traffic := checkTraffic(t, c)
	must(t, traffic.Masquerade(c.context()))
	checkMarks(t, c)
	c.PrintUsage(10 * time.Second)
}

// TestUpDualStack has both families, bgp, and kube-proxy and Twill with nftables. Then the
// backend becomes host-gw, live.
func TestUpDualStack(t *testing.T) {
	netConf := func(backend string) string {
		return strings.TrimSuffix(DualStack.NetConf(backend), "}") + `, "EnableNFTables": true}`
	}
	c := Start(t, Options{Stack: DualStack, NetConf: netConf("bgp")})
	traffic := checkTraffic(t, c)
	must(t, traffic.Masquerade(c.context()))
	checkMarks(t, c)

	must(t, c.SetNetConf(netConf("host-gw")))
	start := time.Now()
	for _, n := range c.Nodes {
		must(t, Eventually(c.context(), func() error {
			kind, err := c.Kubectl("get", "node", n.Name, `--output=jsonpath={.metadata.annotations.flannel\.alpha\.coreos\.com/backend-type}`)
			if err == nil && kind != "host-gw" {
				err = fmt.Errorf("node %s has the backend %s", n.Name, kind)
			}
			return err
		}))
	}
	c.Mark("all nodes have the backend host-gw, %.0f s after the ConfigMap", time.Since(start).Seconds())
	again := &Traffic{Cluster: c, Pods: traffic.Pods}
	must(t, again.Check(c.context()))
	c.Mark("%d questions asked", again.Asks)
}

// TestUpIPv6 has IPv6 alone: no host has an IPv4 address.
func TestUpIPv6(t *testing.T) {
	c := Start(t, Options{Stack: IPv6, Nodes: 2})
	traffic := checkTraffic(t, c)
	must(t, traffic.Masquerade(c.context()))
}

// checkTraffic starts pods and CoreDNS and asks all ways between them.
func checkTraffic(t *testing.T, c *Cluster) *Traffic {
	t.Helper()
	ctx := c.context()
	must(t, c.Apply(c.WebManifest()))
	must(t, c.StartCoreDNS(ctx))
	pods, err := c.WaitPodsRunning(ctx, "default", "app=web", len(c.Nodes))
	must(t, err)
	c.Mark("pods run, CoreDNS answers")
	traffic := &Traffic{Cluster: c, Pods: pods}
	must(t, traffic.Check(ctx))
	must(t, traffic.Tools())
	c.Mark("%d questions asked: pods, Services, names, hostPorts, NodePorts, kubectl logs and exec", traffic.Asks)
	return traffic
}

// checkMarks: kube-proxy marks packets with the bits 0x4000 and 0x8000, so no rule of
// Twill's may set them. That it leaves alone what has them, the questions have shown:
// NodePorts depend on it.
func checkMarks(t *testing.T, c *Cluster) {
	t.Helper()
	for _, n := range c.Nodes {
		state, err := n.State()
		must(t, err)
		ours := 0
		for _, rule := range state {
			if !strings.Contains(rule, "twill:") {
				continue
			}
			ours++
			if set := setsMark.FindStringSubmatch(rule); set != nil {
				bits, err := strconv.ParseUint(set[1], 0, 32)
				must(t, err)
				if bits&0xc000 != 0 {
					t.Errorf("%s: rule sets kube-proxy's mark: %s", n.Name, rule)
				}
			}
		}
		if ours == 0 {
			t.Errorf("%s has no rule of Twill's", n.Name)
		}
	}
}

// setsMark finds the bits that a rule sets in a packet's mark, in nft's and in iptables'
// words; with iptables the mask, which is what it may change.
var setsMark = regexp.MustCompile(`(?:mark set [a-z |]*|--set-x?mark 0x[0-9a-f]+/|--or-mark )(0x[0-9a-f]+)`)
