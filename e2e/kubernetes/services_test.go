package kubernetes

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestServices has kube-proxy and Twill use the same and different firewalls, and change
// them live: no rule of one undoes what the other does.
func TestServices(t *testing.T) {
	c := Start(t, Options{Nodes: 2})
	iptables, nftables := c.NetConf(), strings.Replace(c.NetConf(), "{", `{"EnableNFTables": true, `, 1)
	traffic := checkTraffic(t, c)
	for _, mode := range []struct {
		name, proxy, netConf, ours string
	}{
		{"kube-proxy nftables, Twill iptables", "nftables", iptables, ":TWILL-POSTRTG"},
		{"both nftables", "nftables", nftables, "table ip twill\n"},
		{"kube-proxy iptables, Twill nftables", "iptables", nftables, "table ip twill\n"},
		{"both iptables", "iptables", iptables, ":TWILL-POSTRTG"},
	} {
		t.Run(mode.name, func(t *testing.T) {
			must(t, c.each(func(n *Node) error { return n.useProxyMode(mode.proxy) }))
			must(t, c.SetNetConf(mode.netConf))
			for _, n := range c.Nodes {
				must(t, Eventually(minutes(t, 2), func() error { return n.usesFirewall(mode.proxy, mode.ours) }))
			}
			again := &Traffic{Cluster: c, Pods: traffic.Pods}
			ctx := minutes(t, 2)
			must(t, again.Check(ctx))
			must(t, again.Masquerade(ctx))
			again.checkClients(ctx, t)
			checkMarks(t, c)
			c.Mark("%s: %d questions asked", mode.name, again.Asks)
		})
	}
}

// useProxyMode changes the configuration of the node's kube-proxy, which ends when it sees
// that, starts again, and takes its rules of the other mode away.
func (n *Node) useProxyMode(mode string) error {
	file := filepath.Join(n.dir, "etc/kube-proxy.yaml")
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	other := map[string]string{"iptables": "nftables", "nftables": "iptables"}[mode]
	now := strings.Replace(string(text), "mode: "+other, "mode: "+mode, 1)
	if now == string(text) {
		return nil
	}
	return os.WriteFile(file, []byte(now), 0o644)
}

// usesFirewall says what is missing until kube-proxy and Twill both use their firewalls.
func (n *Node) usesFirewall(proxy, ours string) error {
	out, err := n.Run("sh", "-c", "iptables-save; nft list tables; nft list table ip twill || true")
	if err != nil {
		return err
	}
	has := func(words string) bool { return strings.Contains(out, words) }
	switch {
	case !has(ours) || has(":TWILL-POSTRTG") && has("table ip twill\n"):
		return fmt.Errorf("%s: Twill does not use %s alone:\n%s", n.Name, ours, out)
	case has(":TWILL-HOSTPORT") != has(":TWILL-POSTRTG") || has("table ip twill-hostport") != has("table ip twill\n"):
		return fmt.Errorf("%s: host ports do not use %s alone:\n%s", n.Name, ours, out)
	case has("KUBE-SERVICES") != (proxy == "iptables") || has("table ip kube-proxy") != (proxy == "nftables"):
		return fmt.Errorf("%s: kube-proxy does not use %s alone:\n%s", n.Name, proxy, out)
	}
	return nil
}

// checkClients checks whom a pod sees behind a Service: a pod by its own address, and what
// comes from outside to another node's port by an address of that node, for the answer has
// to go back by it. A second masquerading would make it one of the pod's node.
func (t *Traffic) checkClients(ctx context.Context, tb testing.TB) {
	tb.Helper()
	service, err := t.Client.CoreV1().Services("default").Get(ctx, "web", meta.GetOptions{})
	must(tb, err)
	web := port(netip.MustParseAddr(service.Spec.ClusterIP), 80)
	for _, from := range t.Pods {
		entry := t.Node(from.Spec.NodeName)
		theirs, err := entry.Run("ip", "-4", "-o", "addr")
		must(tb, err)
		cidrs, err := t.podCIDRs(tb, entry.Name)
		must(tb, err)
		gateway := netip.MustParsePrefix(cidrs[0]).Addr().Next().String()
		for range 10 { // of two pods, each answers
			got, err := t.AskFromPod(ctx, &from, web, AskClient)
			must(tb, err)
			// A pod that comes to itself by the Service (hairpin) sees its gateway.
			if !sameHost(got, addrs(&from)[0]) && hostOf(tb, got) != gateway {
				tb.Errorf("pod %s asks the Service as %s, want its own address %s", from.Name, got, addrs(&from)[0])
			}
			got, err = AskFromHost(ctx, t.Outside.NS, port(entry.IPv4, 30080), AskClient)
			must(tb, err)
			if !strings.Contains(theirs, " "+hostOf(tb, got)+"/") {
				tb.Errorf("outside to NodePort of %s is seen as %s, which is no address of that node:\n%s", entry.Name, got, theirs)
			}
		}
	}
}

func hostOf(t testing.TB, addr string) string {
	t.Helper()
	p, err := netip.ParseAddrPort(addr)
	must(t, err)
	return p.Addr().Unmap().String()
}
