package kubernetes

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/twill-net/twill/pkg/nettest"
)

// installBridge has Debian's bridge plugin give out each node's podCIDRs, and gives all
// hosts routes to them: as little as a pod network can be.
func (c *Cluster) installBridge() error {
	for _, n := range c.Nodes {
		object, err := c.Client.CoreV1().Nodes().Get(c.context(), n.Name, meta.GetOptions{})
		if err != nil {
			return fmt.Errorf("install bridge: %w", err)
		}
		for _, cidr := range object.Spec.PodCIDRs {
			if err := c.routePods(n, cidr); err != nil {
				return fmt.Errorf("install bridge: %w", err)
			}
		}
		if err := n.writeBridge(object.Spec.PodCIDRs); err != nil {
			return fmt.Errorf("install bridge on %s: %w", n.Name, err)
		}
	}
	return nil
}

// routePods leads a node's pod addresses to it, from everywhere in the cluster.
func (c *Cluster) routePods(to *Node, cidr string) error {
	via := to.IPv4
	if netip.MustParsePrefix(cidr).Addr().Is6() {
		via = to.IPv6
	}
	hosts := []*nettest.Host{c.ControlPlane}
	for _, n := range c.Nodes {
		if n != to {
			hosts = append(hosts, n.Host)
		}
	}
	for _, h := range hosts {
		if _, err := h.Run("ip", "route", "replace", cidr, "via", via.String()); err != nil {
			return err
		}
	}
	return nil
}

func (n *Node) writeBridge(cidrs []string) error {
	type object = map[string]any
	var ranges [][]object
	var routes []object
	for _, cidr := range cidrs {
		ranges = append(ranges, []object{{"subnet": cidr}})
		routes = append(routes, object{"dst": map[bool]string{true: "::/0", false: "0.0.0.0/0"}[strings.Contains(cidr, ":")]})
		forwarding := "net.ipv4.ip_forward=1"
		if strings.Contains(cidr, ":") {
			forwarding = "net.ipv6.conf.all.forwarding=1"
		}
		if _, err := n.Host.Run("sysctl", "-qw", forwarding); err != nil {
			return err
		}
	}
	conf, err := json.Marshal(object{"cniVersion": "1.0.0", "name": "bridge", "plugins": []object{
		{
			"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
			"ipam": object{"type": "host-local", "ranges": ranges, "routes": routes},
		},
		{"type": "portmap", "capabilities": object{"portMappings": true}},
	}})
	if err != nil {
		return err
	}
	file := filepath.Join(n.dir, "cni-conf", "10-bridge.conflist")
	if err := os.WriteFile(file+".new", conf, 0o644); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

func sortByNode(pods []core.Pod) {
	slices.SortFunc(pods, func(a, b core.Pod) int { return strings.Compare(a.Spec.NodeName+a.Name, b.Spec.NodeName+b.Name) })
}
