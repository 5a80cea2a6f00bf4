package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/twill-net/twill/pkg/overlay"
)

const annotation = "flannel.alpha.coreos.com/"

func startKubeCluster(t *testing.T, hosts int, config string) (*Cluster, context.Context) {
	t.Helper()
	return startCluster(t, Options{Hosts: hosts, Config: config, Store: "kubernetes"})
}

func (c *Cluster) kubeNode(t *testing.T, name string) *corev1.Node {
	t.Helper()
	n, err := c.Kube.Admin.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
	must(t, err)
	return n
}

// annotate sets annotations of a Node; a nil one is removed.
func (c *Cluster) annotate(t *testing.T, name string, annotations map[string]any) {
	t.Helper()
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": annotations}})
	must(t, err)
	_, err = c.Kube.Admin.CoreV1().Nodes().Patch(t.Context(), name, types.MergePatchType, patch, metav1.PatchOptions{})
	must(t, err)
}

// TestKubeReach has the Kubernetes API as the store, and all else as with etcd: each
// node has what its Node says, its pods reach all others, netctl agrees, and the Node
// is told that its network is up.
func TestKubeReach(t *testing.T) {
	c, ctx := startKubeCluster(t, 3, ConfigDual)
	pods := onePod(t, c)
	checkWire(t, c, pods, wire{port: 4789, vni: 1})
	for i, n := range c.Nodes {
		node := c.kubeNode(t, n.Name)
		if !slices.Equal(node.Spec.PodCIDRs, []string{subnetOf(pods[i], overlay.IPv4).String(), subnetOf(pods[i], overlay.IPv6).String()}) {
			t.Errorf("%s has podCIDRs %v and pods %s, %s", n.Name, node.Spec.PodCIDRs, pods[i].IPv4, pods[i].IPv6)
		}
		must(t, Eventually(ctx, func() bool {
			for _, condition := range c.kubeNode(t, n.Name).Status.Conditions {
				if condition.Type == corev1.NodeNetworkUnavailable {
					return condition.Status == corev1.ConditionFalse && condition.Reason == "TwillIsUp"
				}
			}
			return false
		}))
	}
	out, code, err := c.Nodes[0].Netctl("leases")
	must(t, err)
	for _, want := range []string{"NODE ", "h2 ", "10.5.2.0/24,fd00:5:0:2::/64", "this node", "3 leases"} {
		if code != 0 || !strings.Contains(out, want) {
			t.Errorf("netctl leases, exit code %d, lacks %q:\n%s", code, want, out)
		}
	}
	checkEgress(ctx, t, c, pods[0], overlay.IPv4)
}

// TestKubeIPv6 has no IPv4 in the pod network, which etcd cannot say.
func TestKubeIPv6(t *testing.T) {
	c, _ := startKubeCluster(t, 2, `{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:5::/48", "Backend": {"Type": "vxlan", "Port": 4789}}`)
	var pods []*Pod
	for _, n := range c.Nodes {
		p, err := n.AddPod("p1")
		must(t, err)
		pods = append(pods, p)
	}
	must(t, pods[0].Ping(pods[1].IPv6, 3, 1000))
	must(t, pods[1].Ping(pods[0].IPv6, 3, 1000))
	if pods[0].IPv4.IsValid() {
		t.Errorf("a pod has %s", pods[0].IPv4)
	}
}

// TestKubeSurvive sends probes between pods through what may happen to daemons and API.
func TestKubeSurvive(t *testing.T) {
	c, ctx := startKubeCluster(t, 2, ConfigDual)
	pods := onePod(t, c)
	for _, n := range c.Nodes {
		n.shell(t, forwardDrop)
	}
	s := &survival{Cluster: c, ctx: ctx, pods: pods, victim: c.Nodes[1]}
	for _, act := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"SIGKILL and restart", s.killed},
		{"SIGTERM and restart", s.stopped},
		{"API away", s.apiAway},
		{"peer changes while the API is away", s.changesUnseen},
		{"heartbeats and nodes that come and go", s.kubeNodes},
	} {
		t.Run(act.name, func(t *testing.T) {
			p := startProbes(t, pods[0], pods[1])
			act.run(t)
			p.stopAfter(t, 1000)
			for _, n := range c.Nodes {
				must(t, n.WaitInSync(ctx))
				if d := drifts(t, n); len(d) > 0 {
					t.Errorf("%d drifts on %s that nobody caused, the first: %+v", len(d), n.Name, d[0])
				}
			}
		})
	}
}

// apiAway stops the API. Nothing is lost, also not by a daemon that restarts
// meanwhile, and pods come and go.
func (s *survival) apiAway(t *testing.T) {
	must(t, s.Kube.Stop())
	for _, n := range s.Nodes {
		must(t, n.WaitStatus(s.ctx, "without its store", func(s overlay.Status) bool {
			return !s.Store.Connected && s.Ready && strings.Contains(s.Store.Error, "connection refused")
		}))
	}
	p, err := s.victim.AddPod("meanwhile")
	must(t, err)
	must(t, p.Ping(s.pods[0].IPv4, 3, 56))
	must(t, p.Delete())
	must(t, s.victim.Daemon.Kill9())
	must(t, s.victim.Start())
	time.Sleep(3 * time.Second)
	must(t, s.Kube.Start())
	s.waitConnected(t)
	must(t, s.victim.WaitReady(s.ctx))
}

// changesUnseen changes Nodes while the daemons cannot see it, and has the API server
// forget what it was.
func (s *survival) changesUnseen(t *testing.T) {
	for _, n := range s.Nodes {
		must(t, n.Daemon.Pause())
	}
	must(t, s.Kube.AddNode(s.ctx, "late", 77))
	s.annotate(t, "late", map[string]any{
		annotation + "kube-subnet-manager": "true", annotation + "public-ip": "203.0.113.77", annotation + "public-ipv6": "2001:db8:113::77",
		annotation + "backend-type": "vxlan", annotation + "backend-data": `{"VNI":1,"VtepMAC":"02:00:00:00:00:77"}`,
		annotation + "backend-v6-data": `{"VNI":1,"VtepMAC":"02:00:00:00:06:77"}`,
	})
	must(t, s.Kube.Stop())
	must(t, s.Kube.Start())
	for _, n := range s.Nodes {
		must(t, n.Daemon.Resume())
	}
	for _, n := range s.Nodes {
		must(t, n.WaitStatus(s.ctx, "aware of the new peer", func(s overlay.Status) bool { return s.Peers == 2 }))
		must(t, n.WaitInSync(s.ctx))
	}
	must(t, s.Kube.Admin.CoreV1().Nodes().Delete(s.ctx, "late", metav1.DeleteOptions{}))
	must(t, s.WaitPeers(s.ctx))
}

func (s *survival) kubeNodes(t *testing.T) {
	for i := range 30 {
		name := fmt.Sprint("guest", i)
		must(t, s.Kube.AddNode(s.ctx, name, 100+i))
		s.annotate(t, name, map[string]any{annotation + "kube-subnet-manager": "true", annotation + "public-ip": "203.0.113.9", annotation + "backend-type": "vxlan"})
		s.annotate(t, s.Nodes[0].Name, map[string]any{"example.com/heartbeat": fmt.Sprint(i)})
		must(t, s.Kube.Admin.CoreV1().Nodes().Delete(s.ctx, name, metav1.DeleteOptions{}))
	}
	must(t, s.WaitPeers(s.ctx))
}

// TestKubeHeal damages what leads to the peer. The whole of TestHeal does not depend
// on the store.
func TestKubeHeal(t *testing.T) {
	c, ctx := newCluster(t, Options{Hosts: 2, Config: ConfigDual, Store: "kubernetes"})
	c.Nodes[0].shell(t, foreignSetup)
	must(t, c.Start(ctx))
	must(t, c.WaitPeers(ctx))
	h := &healing{ctx: ctx, node: c.Nodes[0], pods: onePod(t, c)}
	h.observer = newObserver(t, h.node)
	h.good = h.observer.look(t)
	h.foreign = h.node.shell(t, foreignDump)
	for _, d := range h.peerDamage(overlay.IPv4, overlay.VXLANLink(overlay.IPv4, 1)) {
		t.Run(d.name, func(t *testing.T) { h.heal(t, d) })
	}
	// Somebody removes what the node has published.
	names := map[string]any{}
	before := c.kubeNode(t, c.Nodes[0].Name).Annotations
	for name := range before {
		names[name] = nil
	}
	c.annotate(t, c.Nodes[0].Name, names)
	must(t, Eventually(ctx, func() bool { return maps.Equal(c.kubeNode(t, c.Nodes[0].Name).Annotations, before) }))
	must(t, c.WaitPeers(ctx))
}

// TestKubeSwitch moves a cluster from backend to backend by another net-conf.json.
func TestKubeSwitch(t *testing.T) {
	c, ctx := startKubeCluster(t, 3, dual(backendNamed(t, "vxlan").config))
	for _, n := range c.Nodes {
		n.shell(t, forwardDrop)
	}
	s := &switching{Cluster: c, ctx: ctx, pods: onePod(t, c), rate: 1000}
	for _, name := range []string{"host-gw", "bgp", "vxlan"} {
		b := backendNamed(t, name)
		lost := s.during(t, true, func() {
			must(t, s.Configure(ctx, dual(b.config)))
			for _, n := range s.Nodes {
				must(t, n.WaitStatus(ctx, "using "+b.typ(), func(s overlay.Status) bool { return s.Ready && s.Backend == b.typ() }))
				must(t, Eventually(ctx, func() bool { return c.kubeNode(t, n.Name).Annotations[annotation+"backend-type"] == b.typ() }))
			}
			must(t, s.WaitPeers(ctx))
		})
		t.Logf("to %s: %s", name, lost)
	}
}

// TestKubeBesideFlannel has one node that is flannel's: it is known by its annotations
// alone, and knows the others by theirs.
func TestKubeBesideFlannel(t *testing.T) {
	c, ctx := startKubeCluster(t, 2, ConfigIPv4)
	h, err := c.Lab.NewHost()
	must(t, err)
	f := &flannelNode{
		Node: &Node{Host: h, cluster: c}, macs: map[overlay.Family]string{overlay.IPv4: "4e:1f:22:33:44:55"},
		subnets: overlay.Subnets{V4: netip.MustParsePrefix("10.5.3.0/24")},
	}
	must(t, c.Kube.AddNode(ctx, h.Name, 3))
	c.annotate(t, h.Name, map[string]any{
		annotation + "kube-subnet-manager": "true", annotation + "public-ip": h.IPv4.String(), annotation + "backend-type": "vxlan",
		annotation + "backend-data": `{"VNI":1,"VtepMAC":"4e:1f:22:33:44:55"}`,
	})
	f.addDevices(t)
	for i, n := range c.Nodes {
		a := c.kubeNode(t, n.Name).Annotations
		var data struct{ VtepMAC string }
		must(t, json.Unmarshal([]byte(a[annotation+"backend-data"]), &data))
		f.shell(t, fmt.Sprintf(`set -e
			ip neigh replace 10.5.%[1]d.0 lladdr %[2]s dev flannel.1 nud permanent
			bridge fdb replace %[2]s dev flannel.1 dst %[3]s self permanent
			ip route replace 10.5.%[1]d.0/24 via 10.5.%[1]d.0 dev flannel.1 onlink`, i+1, data.VtepMAC, a[annotation+"public-ip"]))
	}
	f.addPod(t)
	for _, p := range onePod(t, c) {
		must(t, p.Node.WaitStatus(ctx, "aware of flannel's node", func(s overlay.Status) bool { return s.Peers == 2 }))
		must(t, p.Node.WaitInSync(ctx))
		must(t, p.Ping(f.pod.IPv4, 3, 1000))
		must(t, f.pod.Ping(p.IPv4, 3, 1000))
	}
}
