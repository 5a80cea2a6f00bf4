package daemon

import (
	"bufio"
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/pod"
)

// subnetEnv is flannel's subnet.env: what the node's subnet is, for programs that
// are not Twill's, and for twilld itself after a restart.
type subnetEnv struct {
	config  overlay.Config
	subnets overlay.Subnets
	mtu     int
	ipMasq  bool
}

// render writes flannel's lines in flannel's order. A SUBNET is written as its
// first host address: the bridge's.
func (e subnetEnv) render() []byte {
	var b bytes.Buffer
	for _, f := range []struct {
		infix           string
		network, subnet netip.Prefix
	}{{"", e.config.V4.Network, e.subnets.V4}, {"IPV6_", e.config.V6.Network, e.subnets.V6}} {
		if f.network.IsValid() {
			fmt.Fprintf(&b, "FLANNEL_%sNETWORK=%s\n", f.infix, f.network)
			fmt.Fprintf(&b, "FLANNEL_%sSUBNET=%s\n", f.infix, netip.PrefixFrom(f.subnet.Addr().Next(), f.subnet.Bits()))
		}
	}
	fmt.Fprintf(&b, "FLANNEL_MTU=%d\n", e.mtu)
	fmt.Fprintf(&b, "FLANNEL_IPMASQ=%t\n", e.ipMasq)
	return b.Bytes()
}

// parseSubnetEnv returns the subnets of a subnet.env, flannel's or ours. Lines
// that make no sense are passed over: the file is a memory, not an order.
func parseSubnetEnv(content []byte) overlay.Subnets {
	var n overlay.Subnets
	for lines := bufio.NewScanner(bytes.NewReader(content)); lines.Scan(); {
		key, value, _ := strings.Cut(strings.TrimSpace(lines.Text()), "=")
		p, err := netip.ParsePrefix(strings.Trim(value, `"'`))
		if err != nil {
			continue
		}
		switch p = p.Masked(); {
		case key == "FLANNEL_SUBNET" && p.Addr().Is4():
			n.V4 = p
		case key == "FLANNEL_IPV6_SUBNET" && p.Addr().Is6():
			n.V6 = p
		}
	}
	return n
}

// formerSubnets returns what the node had before this start, if it is known.
func formerSubnets(file string) overlay.Subnets {
	content, err := os.ReadFile(file)
	if err != nil {
		return overlay.Subnets{}
	}
	return parseSubnetEnv(content)
}

// handOff tells the CNI plugin, and whoever reads subnet.env, what pods get. The
// files are only written when they would change.
func (l *loop) handOff() error {
	mtu, err := overlay.PodMTU(l.running, l.self)
	if err != nil {
		return err
	}
	env := subnetEnv{config: l.running, subnets: l.self.Subnets, mtu: mtu, ipMasq: l.cfg.IPMasq}.render()
	if old, err := os.ReadFile(l.cfg.SubnetFile); err != nil || !bytes.Equal(old, env) {
		if err := os.MkdirAll(filepath.Dir(l.cfg.SubnetFile), 0o755); err != nil {
			return fmt.Errorf("write %s: %w", l.cfg.SubnetFile, err)
		}
		if err := pod.ReplaceFile(l.cfg.SubnetFile, env, 0o644); err != nil {
			return fmt.Errorf("write %s: %w", l.cfg.SubnetFile, err)
		}
	}
	h := pod.Handoff{Networks: l.running.Networks(), Subnets: l.self.Subnets.All(), MTU: mtu, IPMasq: l.cfg.IPMasq, Firewall: l.kernel.FirewallTool(l.running.Tool())}
	if old, err := pod.ReadHandoff(l.cfg.HandoffFile()); err == nil && old.Equal(h) {
		return nil
	}
	return pod.WriteHandoff(l.cfg.HandoffFile(), h)
}
