package kubernetes

import (
	"crypto/x509/pkix"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	meta "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/twill-net/twill/pkg/overlay"
)

// restartKubelet ends the node's kubelet, which is started again at once.
func (n *Node) restartKubelet(t testing.TB) {
	t.Helper()
	pid, err := n.Pid("kubelet")
	must(t, err)
	n.shell(t, "kill "+pid)
}

// reregister restarts the node's kubelet until its Node is there with other podCIDRs.
// A kubelet that starts before its Node exists waits 140 s for a CSINode and then ends
// itself: it is restarted at once.
func (l *life) reregister(t *testing.T, n *Node, other []string) []string {
	t.Helper()
	n.restartKubelet(t)
	cidrs := l.waitPodCIDRs(t, n.Name, other)
	n.restartKubelet(t)
	return cidrs
}

// podCIDRs returns those of a node.
func (c *Cluster) podCIDRs(t testing.TB, node string) ([]string, error) {
	object, err := c.Client.CoreV1().Nodes().Get(t.Context(), node, meta.GetOptions{})
	if err != nil {
		return nil, err
	}
	if len(object.Spec.PodCIDRs) == 0 {
		return nil, fmt.Errorf("node %s has no podCIDR", node)
	}
	return object.Spec.PodCIDRs, nil
}

// waitPodCIDRs waits until the node is registered with other podCIDRs than these.
func (c *Cluster) waitPodCIDRs(t testing.TB, node string, other []string) []string {
	t.Helper()
	var cidrs []string
	must(t, Eventually(minutes(t, 2), func() error {
		var err error
		if cidrs, err = c.podCIDRs(t, node); err == nil && slices.Equal(cidrs, other) {
			err = fmt.Errorf("node %s still has podCIDRs %v", node, cidrs)
		}
		return err
	}))
	return cidrs
}

// registerAgain deletes a Node and has its kubelet register it again: it gets other
// podCIDRs. The pod of the old one works on, as seen from its node, until it is deleted.
func (l *life) registerAgain(t *testing.T) {
	n, peer := l.Nodes[1], l.Nodes[0]
	oldCIDRs, err := l.podCIDRs(t, n.Name)
	must(t, err)
	old := n.startStatic(t, "old")
	l.checkFromNode(t, n, old)

	l.kubectl(t, "delete", "node", n.Name)
	newCIDRs := l.reregister(t, n, oldCIDRs)
	l.Mark("%s had podCIDRs %v, has %v", n.Name, oldCIDRs, newCIDRs)
	must(t, l.WaitNodesReady(minutes(t, 3)))
	l.rolledOut(t)
	l.waitStatus(t, n, "on its new subnet", func(s overlay.Status) bool { return s.Ready && sameSubnets(s.Subnets, newCIDRs) })

	// A pod of the old subnet, which its node still reaches, and one of the new.
	l.checkFromNode(t, n, old)
	fresh := n.startStatic(t, "fresh")
	for _, a := range fresh {
		if !slices.ContainsFunc(newCIDRs, func(cidr string) bool { return netip.MustParsePrefix(cidr).Contains(a) }) {
			t.Errorf("a new pod has %s, which is of none of %v", a, newCIDRs)
		}
	}
	l.checkFromNode(t, n, old)
	l.checkFromNode(t, n, fresh)
	if out, err := l.Kubectl("get", "events", "-A", "-o", "jsonpath={.items[*].message}"); err != nil || strings.Contains(out, "already has an IP address different from") {
		t.Errorf("cni0 could not be renumbered: %v %s", err, out)
	}
	checkBridge(t, n, newCIDRs)
	checkNoRoute(t, n, oldCIDRs) // but to each of its pods
	for _, name := range []string{"old", "fresh"} {
		n.stopStatic(t, name, map[string][]netip.Addr{"old": old, "fresh": fresh}[name])
	}
	// What the DaemonSet had there keeps its address of the old subnet until then.
	l.kubectl(t, "delete", "pods", "--selector=app=client", "--field-selector=spec.nodeName="+n.Name, "--timeout=3m")
	l.whole(t)
	checkNoRoute(t, peer, oldCIDRs)
	checkNoRoute(t, n, oldCIDRs)
}

// checkNoRoute fails if the node has a route to one of these subnets.
func checkNoRoute(t *testing.T, n *Node, cidrs []string) {
	t.Helper()
	for _, p := range cidrs {
		family := "-4"
		if strings.Contains(p, ":") {
			family = "-6"
		}
		if out := n.shell(t, "ip "+family+" route show "+p); out != "" {
			t.Errorf("%s still has a route to %s, which may be another node's: %s", n.Name, p, out)
		}
	}
}

// checkFromNode fails unless the node reaches the addresses.
func (l *life) checkFromNode(t *testing.T, n *Node, addrs []netip.Addr) {
	t.Helper()
	for _, a := range addrs {
		must(t, Eventually(minutes(t, 1), func() error { return ping(n.NS, a) }))
	}
}

// checkBridge fails unless cni0 has the first address of each podCIDR. It may have that of
// a former one, to which pods that still run send.
func checkBridge(t *testing.T, n *Node, cidrs []string) {
	t.Helper()
	out := n.shell(t, "ip -o address show dev cni0 scope global | awk '{print $4}'")
	var want []string
	for _, cidr := range cidrs {
		p := netip.MustParsePrefix(cidr)
		want = append(want, netip.PrefixFrom(p.Addr().Next(), p.Bits()).String())
	}
	got := strings.Fields(out)
	for _, w := range want {
		if !slices.Contains(got, w) {
			t.Errorf("cni0 of %s has %v, want %v", n.Name, got, want)
		}
	}
}

func sameSubnets(have []netip.Prefix, want []string) bool {
	return slices.EqualFunc(have, want, func(p netip.Prefix, s string) bool { return p.String() == s })
}

// moveNode gives a node other addresses.
func (l *life) moveNode(t *testing.T) {
	n, peer := l.Nodes[1], l.Nodes[0]
	old4, old6 := n.IPv4, n.IPv6
	n.IPv4, n.IPv6 = netip.MustParseAddr("198.51.100.112"), netip.MustParseAddr("2001:db8:51::112")
	n.shell(t, fmt.Sprintf(`set -e
ip address del %[3]s/24 dev eth0
ip address del %[4]s/64 dev eth0
ip address add %[1]s/24 dev eth0
ip address add %[2]s/64 dev eth0 nodad
ip route replace default via 198.51.100.1
ip -6 route replace default via 2001:db8:51::1
echo %[1]s,%[2]s >%[5]s/etc/node-ip`, n.IPv4, n.IPv6, old4, old6, n.Disk()))
	n.restartKubelet(t)
	must(t, Eventually(minutes(t, 2), func() error {
		object, err := l.Client.CoreV1().Nodes().Get(t.Context(), n.Name, meta.GetOptions{})
		if err != nil {
			return err
		}
		for name, want := range map[string]string{"public-ip": n.IPv4.String(), "public-ipv6": n.IPv6.String()} {
			if got := object.Annotations["flannel.alpha.coreos.com/"+name]; got != want {
				return fmt.Errorf("annotation %s of %s is %s, want %s", name, n.Name, got, want)
			}
		}
		return nil
	}))
	l.whole(t)
	if out := peer.shell(t, "bridge fdb show | grep -e 'dst "+old4.String()+" ' -e 'dst "+old6.String()+" ' || true"); out != "" {
		t.Errorf("%s still sends to the old address: %s", peer.Name, out)
	}
}

// rename gives a node another name, as a changed --hostname-override does: the old Node
// stays, with the same address and MAC, until an administrator deletes it.
func (l *life) rename(t *testing.T) {
	n, peer := l.Nodes[1], l.Nodes[0]
	was, name := n.Name, "renamed"
	subject := pkix.Name{CommonName: "system:node:" + name, Organization: []string{"system:nodes"}}
	must(t, l.signUser(name, subject, name, n.IPv4.String(), n.IPv6.String()))
	n.shell(t, fmt.Sprintf(`set -e
cd %s/etc
sed -i 's#/pki/%s\.#/pki/%s.#g' kubelet.yaml kubelet.kubeconfig
echo %[3]s >name`, n.Disk(), was, name))
	n.Name = name
	l.reregister(t, n, nil)
	l.Mark("%s is a Node", name)
	must(t, Eventually(minutes(t, 3), func() error {
		s, err := l.status(n)
		if err == nil && !s.Ready {
			err = fmt.Errorf("%s is not ready: %s", name, s.Reason)
		}
		return err
	}))
	l.Mark("twilld on %s is ready", name)
	// Every node says what is wrong and what to do about it.
	for i, x := range []*Node{peer, n} {
		l.waitStatus(t, x, "aware of two Nodes with one address", func(s overlay.Status) bool {
			return slices.ContainsFunc(s.Problems, func(p overlay.Problem) bool {
				t.Logf("%s says %s", x.Name, p)
				return p.Object == "node "+was && strings.Contains(p.Reason, []string{"node " + name, "this node's address"}[i]) &&
					strings.Contains(p.Remedy, "kubectl delete node "+was)
			})
		})
	}
	l.kubectl(t, "delete", "node", was)
	// Pods that came before twilld was there under its new name have addresses of the old
	// subnet: nobody had told this node of another.
	l.kubectl(t, "delete", "pods", "--selector=app=client", "--field-selector=spec.nodeName="+name, "--timeout=3m")
	l.Mark("pods of the old subnet are gone")
	l.whole(t)
	for _, x := range []*Node{peer, n} {
		l.waitStatus(t, x, "without a problem", func(s overlay.Status) bool { return len(s.Problems) == 0 })
	}
}

// removeNode drains a node and takes it away for good: nothing on its peer leads there.
func (l *life) removeNode(t *testing.T) {
	n, peer := l.Nodes[1], l.Nodes[0]
	cidrs, err := l.podCIDRs(t, n.Name)
	must(t, err)
	l.kubectl(t, "drain", n.Name, "--ignore-daemonsets", "--force", "--timeout=2m")
	name := n.Name
	n.Name = "n2" // as the lab knows it, if it was renamed
	must(t, n.Kill())
	l.kubectl(t, "delete", "node", name)
	l.waitStatus(t, peer, "without peers", func(s overlay.Status) bool { return s.Peers == 0 && len(s.Problems) == 0 })
	must(t, Eventually(minutes(t, 1), func() error {
		out, err := peer.Run("sh", "-c", "ip route; ip -6 route; ip nexthop; ip neigh show nud permanent; ip -6 neigh show nud permanent; bridge fdb show")
		for _, cidr := range cidrs {
			prefix, _, _ := strings.Cut(cidr, "/")
			if strings.Contains(out, strings.TrimSuffix(prefix, "0")) {
				err = fmt.Errorf("%s still knows the way to %s:\n%s", peer.Name, cidr, out)
			}
		}
		for _, a := range []netip.Addr{n.IPv4, n.IPv6} {
			if strings.Contains(out, "dst "+a.String()+" ") {
				err = fmt.Errorf("%s still sends to %s:\n%s", peer.Name, a, out)
			}
		}
		return err
	}))
}
