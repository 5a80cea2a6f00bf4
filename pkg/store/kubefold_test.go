package store

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/twill-net/twill/pkg/overlay"
)

// kubeFoldOf folds Nodes, as the node self sees them.
func kubeFoldOf(t testing.TB, self, config string, nodes ...*corev1.Node) *kubeFold {
	t.Helper()
	file := filepath.Join(t.TempDir(), "net-conf.json")
	check(t, os.WriteFile(file, []byte(config), 0o644))
	f := newKubeFold(prefix, KubeConfig{NetConfig: file})
	f.claimed, f.self = &claims{}, self
	f.readConfig()
	for _, n := range nodes {
		f.put(n)
	}
	return f
}

// born sets the second in which a Node was made.
func born(second int64, n *corev1.Node) *corev1.Node {
	n.CreationTimestamp = metav1.NewTime(time.Unix(second, 0))
	return n
}

func with(n *corev1.Node, cidrs ...string) *corev1.Node {
	n.Spec.PodCIDR, n.Spec.PodCIDRs = cidrs[0], cidrs
	return n
}

// nodesOf names the nodes that have a lease.
func nodesOf(s *overlay.Snapshot) string {
	var out []string
	for _, l := range s.Leases {
		out = append(out, l.Node)
	}
	return strings.Join(out, " ")
}

// TestKubeDuplicates has two nodes with the same podCIDR, and some with overlapping
// ones: all nodes but those concerned come to the same verdict.
func TestKubeDuplicates(t *testing.T) {
	nodes := func() []*corev1.Node {
		return []*corev1.Node{
			born(20, flannelNode(1)),
			born(10, with(flannelNode(2), "10.5.1.0/24")),
			born(10, with(flannelNode(3), "10.5.1.0/24")),
			born(30, flannelNode(4)),
			born(5, with(flannelNode(5), "10.5.8.0/22")),
			born(6, with(flannelNode(6), "10.5.9.0/24")),
			born(7, with(flannelNode(7), "10.5.10.0/24")),
		}
	}
	for self, want := range map[string]string{
		"n4": "n2 n4 n5", "elsewhere": "n2 n4 n5", "n2": "n2 n4 n5",
		"n1": "n1 n4 n5", "n3": "n3 n4 n5", "n6": "n2 n4 n6", // its own stays
	} {
		s := kubeFoldOf(t, self, goodConfig, nodes()...).snapshot()
		if got := nodesOf(s); got != want {
			t.Errorf("%s sees %s, want %s", self, got, want)
		}
		if len(s.Problems) != 4 {
			t.Errorf("%s: problems %v", self, s.Problems)
		}
	}
	p := kubeFoldOf(t, "n4", goodConfig, nodes()...).snapshot().Problems[0].String()
	for _, w := range []string{"node n1:", "10.5.1.0/24", "of node n2, which is older", "kubectl delete node n1"} {
		if !strings.Contains(p, w) {
			t.Errorf("problem %s, want %q", p, w)
		}
	}
}

// TestKubePodCIDRs reads podCIDRs of all kinds.
func TestKubePodCIDRs(t *testing.T) {
	const dual = `{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}`
	for _, c := range []struct {
		config string
		node   *corev1.Node
		lease  string // key
		taken  string
		says   []string // of the problem
	}{
		{config: dual, node: with(flannelNode(2), "10.5.2.0/24", "fd00:5:0:2::/64"), lease: "10.5.2.0-24&fd00:5:0:2::-64"},
		{config: dual, node: with(flannelNode(2), "fd00:5:0:2::/64", "10.5.2.0/24"), lease: "10.5.2.0-24&fd00:5:0:2::-64"},
		{config: goodConfig, node: with(flannelNode(2), "fd00:5:0:2::/64", "10.5.2.0/24"), lease: "10.5.2.0-24"},
		{config: goodConfig, node: with(flannelNode(2), "fd00:5:0:2::/64")},
		{config: dual, node: with(flannelNode(2), "fd00:5:0:2::/64"), lease: "fd00:5:0:2::-64"},
		{config: goodConfig, node: &corev1.Node{ObjectMeta: flannelNode(2).ObjectMeta, Spec: corev1.NodeSpec{PodCIDR: "10.5.2.0/25"}}, lease: "10.5.2.0-25"},
		{config: goodConfig, node: bareNode("n2", "10.5.2.0/24"), taken: "10.5.2.0-24"},
		{config: goodConfig, node: bareNode("n2")},
		{config: goodConfig, node: with(flannelNode(2), "10.9.2.0/24"), says: []string{"node n2:", "10.9.2.0/24", "10.5.0.0/16", "--cluster-cidr"}},
		{config: goodConfig, node: with(flannelNode(2), "10.0.0.0/8"), says: []string{"node n2:", "10.0.0.0/8", "10.5.0.0/16"}},
		{config: goodConfig, node: with(flannelNode(2), "10.5.2.0/24", "10.5.3.0/24"), says: []string{"node n2:", "two IPv4 subnets"}},
		{config: goodConfig, node: with(flannelNode(2), "rubbish"), says: []string{"node n2:", `"rubbish" is not a subnet`}},
		{config: goodConfig, node: with(flannelNode(2), "10.5.2.1/24"), says: []string{"node n2:", "10.5.2.1/24"}},
	} {
		s := kubeFoldOf(t, "elsewhere", c.config, c.node).snapshot()
		var lease, taken string
		for _, l := range s.Leases {
			lease += l.Key()
		}
		for _, n := range s.Taken {
			taken += n.Key()
		}
		problems := fmt.Sprint(s.Problems)
		if lease != c.lease || taken != c.taken || len(s.Problems) > 0 != (c.says != nil) {
			t.Errorf("podCIDRs %v: lease %q, taken %q, problems %s", c.node.Spec, lease, taken, problems)
		}
		for _, w := range c.says {
			if !strings.Contains(problems, w) {
				t.Errorf("podCIDRs %v: problem %s, want %q", c.node.Spec, problems, w)
			}
		}
	}
	// What is wrong with the node's own podCIDR, NodeClaim says.
	s := kubeFoldOf(t, "n2", goodConfig, with(bareNode("n2"), "10.9.2.0/24")).snapshot()
	_, err := overlay.NodeClaim{Node: "n2"}.Next(s.Config, s, nil)
	if nodesOf(s) != "n2" || err == nil || !strings.Contains(err.Error(), "10.9.2.0/24") {
		t.Errorf("leases %s, error %v", nodesOf(s), err)
	}
}

// TestKubeGarbage reads annotations that are not flannel's.
func TestKubeGarbage(t *testing.T) {
	for name, c := range map[string]struct{ value, want string }{
		"public-ip":    {"256.1.1.1", prefix + "public-ip"},
		"backend-data": {"{", prefix + "backend-data"},
		"backend-type": {"", ""},
	} {
		n := flannelNode(2)
		n.Annotations[prefix+name] = c.value
		l := named(kubeFoldOf(t, "n1", goodConfig, n).snapshot(), "n2")
		if l == nil || (l.Err == nil) != (c.want == "") || l.Err != nil && !strings.Contains(l.Err.Error(), c.want) {
			t.Errorf("%s=%q: %+v", name, c.value, l)
		}
	}
	n := flannelNode(2)
	delete(n.Annotations, prefix+"public-ip")
	l := named(kubeFoldOf(t, "n1", goodConfig, n).snapshot(), "n2")
	if l.Err == nil || l.Err.Error() != "annotations: they have neither "+prefix+"public-ip nor "+prefix+"public-ipv6" {
		t.Errorf("no address: %v", l.Err)
	}
	own := flannelNode(2)
	own.Annotations[prefix+"public-ip-overwrite"] = "no address"
	own.Annotations[prefix+"node-public-ip"] = "203.0.113.8"
	s := kubeFoldOf(t, "n2", goodConfig, own).snapshot()
	if len(s.Problems) != 1 || !strings.Contains(s.Problems[0].String(), prefix+"public-ip-overwrite") || s.Node.PublicIP.String() != "203.0.113.8" {
		t.Errorf("problems %v, node %+v", s.Problems, s.Node)
	}
}
