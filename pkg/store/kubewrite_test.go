package store

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/twill-net/twill/pkg/overlay"
)

// ours are a Node's annotations of the prefix, as one text.
func ours(n *corev1.Node) string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(n.Annotations)) {
		if rest, ok := strings.CutPrefix(name, prefix); ok {
			out = append(out, rest+"="+n.Annotations[name])
		}
	}
	return strings.Join(out, " ")
}

// TestKubeAnnotations compares what is written with what flannel writes, byte for
// byte, for one backend after the other.
func TestKubeAnnotations(t *testing.T) {
	r := newKubeRig(t)
	r.addNode(t, bareNode("n1", "10.5.1.0/24", "fd00:5:0:1::/64"))
	k := r.open(t)
	r.configure(t, `{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}`)
	f := follow(t, k)
	lease := named(f.wait(t, "a lease", func(s *overlay.Snapshot) bool { return len(s.Leases) == 1 }), "n1")
	key := strings.Repeat("A", 43) + "="
	for _, c := range []struct{ value, want string }{
		{
			`{"PublicIP":"198.51.100.11","PublicIPv6":"2001:db8:51::11","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:2a:00:00:00:01"},"BackendV6Data":{"VNI":1,"VtepMAC":"0e:2a:00:00:00:02"}}`,
			`backend-data={"VNI":1,"VtepMAC":"0e:2a:00:00:00:01"} backend-type=vxlan backend-v6-data={"VNI":1,"VtepMAC":"0e:2a:00:00:00:02"} kube-subnet-manager=true public-ip=198.51.100.11 public-ipv6=2001:db8:51::11`,
		},
		{
			`{"PublicIP":"198.51.100.11","PublicIPv6":null,"BackendType":"host-gw"}`,
			`backend-data=null backend-type=host-gw kube-subnet-manager=true public-ip=198.51.100.11`,
		},
		{
			`{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8:51::11","BackendType":"vxlan","BackendV6Data":{"VNI":1,"VtepMAC":"0e:2a:00:00:00:02"}}`,
			`backend-type=vxlan backend-v6-data={"VNI":1,"VtepMAC":"0e:2a:00:00:00:02"} kube-subnet-manager=true public-ipv6=2001:db8:51::11`,
		},
		{
			`{"PublicIP":"198.51.100.11","PublicIPv6":"2001:db8:51::11","BackendType":"wireguard","BackendData":{"PublicKey":"` + key + `"}}`,
			`backend-data={"PublicKey":"` + key + `"} backend-type=wireguard backend-v6-data=null kube-subnet-manager=true public-ip=198.51.100.11 public-ipv6=2001:db8:51::11`,
		},
		{
			`{"PublicIP":"198.51.100.11","PublicIPv6":null}`, // udp
			`backend-data=null backend-type= kube-subnet-manager=true public-ip=198.51.100.11`,
		},
		{
			`{"PublicIP":"198.51.100.11","PublicIPv6":null,"BackendType":"extension","BackendData":"some text"}`,
			`backend-data="some text" backend-type=extension kube-subnet-manager=true public-ip=198.51.100.11`,
		},
	} {
		attrs, err := overlay.ParseAttrs([]byte(c.value))
		check(t, err)
		step := overlay.Step{Act: overlay.Update, Lease: *lease}
		step.Lease.Attrs = attrs
		done, err := k.Do(t.Context(), step)
		check(t, err)
		if got := ours(r.getNode(t, "n1")); !done || got != c.want {
			t.Errorf("done %v\n got %s\nwant %s", done, got, c.want)
		}
		f.wait(t, attrs.Backend, func(s *overlay.Snapshot) bool { l := named(s, "n1"); return l.Attrs == attrs && l.Err == nil })
	}
}

// TestKubeAnnounce sets the condition, over flannel's as well, and leaves the
// kubelet's alone.
func TestKubeAnnounce(t *testing.T) {
	r := newKubeRig(t)
	n := r.addNode(t, flannelNode(1))
	n.Status.Conditions = []corev1.NodeCondition{
		{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady"},
		{Type: corev1.NodeNetworkUnavailable, Status: corev1.ConditionTrue, Reason: "NoRouteCreated"},
	}
	_, err := r.Admin.CoreV1().Nodes().UpdateStatus(t.Context(), n, metav1.UpdateOptions{})
	check(t, err)
	k := r.open(t)
	f := follow(t, k)
	s := f.wait(t, "an unavailable network", func(s *overlay.Snapshot) bool { return s.Node.Unavailable })
	if r.read(t, func(c *KubeConfig) { c.SetNetworkUnavailable = false }).Node.Unavailable {
		t.Error("the condition is looked after without --set-node-network-unavailable")
	}
	done, err := k.Do(t.Context(), overlay.Step{Act: overlay.Announce, Lease: *named(s, "n1")})
	if !done || err != nil {
		t.Errorf("done %v, %v", done, err)
	}
	f.wait(t, "a network", func(s *overlay.Snapshot) bool { return !s.Node.Unavailable })
	var got []string
	for _, c := range r.getNode(t, "n1").Status.Conditions {
		got = append(got, fmt.Sprintf("%s=%s %s", c.Type, c.Status, c.Reason))
	}
	if text := strings.Join(got, ", "); text != "Ready=True KubeletReady, NetworkUnavailable=False TwillIsUp" {
		t.Errorf("conditions: %s", text)
	}
}

// TestKubeWrong asks for writes that make no sense.
func TestKubeWrong(t *testing.T) {
	r := newKubeRig(t)
	r.addNode(t, bareNode("n1", "10.5.1.0/24"))
	k := r.open(t)
	for act, want := range map[overlay.Act]string{overlay.Remove: "kubectl delete node n1", overlay.Create: "--kube-allocate-subnets"} {
		if _, err := k.Do(t.Context(), overlay.Step{Act: act, Lease: overlay.Lease{Node: "n1"}}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", act, err, want)
		}
	}
	if _, err := k.Do(t.Context(), overlay.Step{Act: overlay.Update, Lease: overlay.Lease{Node: "n2"}}); err == nil {
		t.Error("a write to another Node")
	}
	r.removeNode(t, "n1")
	if done, err := k.Do(t.Context(), overlay.Step{Act: overlay.Update, Lease: overlay.Lease{Node: "n1"}}); done || err != nil {
		t.Errorf("a Node that is gone: done %v, %v", done, err)
	}
}

// TestKubeAllocate has many nodes without podCIDRs take subnets at the same moment,
// beside nodes that have some.
func TestKubeAllocate(t *testing.T) {
	const nodes = 64
	r := newKubeRig(t)
	r.configure(t, `{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}`)
	r.addNode(t, bareNode("before", "10.5.1.0/24", "fd00:5:0:1::/64"))
	for i := range nodes {
		r.addNode(t, bareNode(fmt.Sprint("a", i)))
	}
	var wg sync.WaitGroup
	for i := range nodes {
		name := fmt.Sprint("a", i)
		k := r.open(t, func(c *KubeConfig) { c.NodeName, c.Allocate = name, true })
		wg.Go(func() { allocate(t, k, name) })
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	all, err := r.Admin.CoreV1().Nodes().List(t.Context(), metav1.ListOptions{})
	check(t, err)
	seen := map[string]string{}
	for _, n := range all.Items {
		if len(n.Spec.PodCIDRs) != 2 || n.Spec.PodCIDR != n.Spec.PodCIDRs[0] {
			t.Errorf("%s has podCIDR %s, podCIDRs %v", n.Name, n.Spec.PodCIDR, n.Spec.PodCIDRs)
		}
		for _, c := range n.Spec.PodCIDRs {
			if seen[c] != "" {
				t.Errorf("%s is of %s and %s", c, seen[c], n.Name)
			}
			seen[c] = n.Name
		}
	}
	claims, err := r.Admin.CoordinationV1().Leases("twill-system").List(t.Context(), metav1.ListOptions{LabelSelector: claimLabel})
	check(t, err)
	for _, c := range claims.Items {
		subnet, holder := c.Annotations[claimSubnetName], *c.Spec.HolderIdentity
		if seen[subnet] != holder || c.OwnerReferences[0].Name != holder || c.OwnerReferences[0].Kind != "Node" {
			t.Errorf("claim %s of %s, the subnet is of %s", c.Name, holder, seen[subnet])
		}
	}
	if len(claims.Items) != 2*nodes {
		t.Errorf("%d claims, want two of each of %d nodes", len(claims.Items), nodes)
	}
}

// allocate does what the daemon's keeper does until the node has a lease.
func allocate(t *testing.T, k *Kube, name string) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	claim := overlay.NodeClaim{Node: name, Allocate: true}
	races := 0
	var failed error
	err := k.Watch(ctx, func(s *overlay.Snapshot) {
		if named(s, name) != nil {
			cancel()
			return
		}
		step, err := claim.Next(s.Config, s, rand.IntN)
		if err == nil {
			claim.Prefer = step.Lease.Subnets
			var done bool
			if done, err = k.Do(ctx, step); !done {
				races++
			}
		}
		if err != nil {
			failed = err
			cancel()
		}
	})
	if failed != nil || ctx.Err() == nil {
		t.Errorf("%s: %v, %v", name, failed, err)
	}
	t.Logf("%s lost %d races", name, races)
}

// TestKubeReclaim starts again after a claim of which the Node never heard.
func TestKubeReclaim(t *testing.T) {
	r := newKubeRig(t)
	r.addNode(t, bareNode("n1"))
	k := r.open(t, func(c *KubeConfig) { c.Allocate = true })
	subnets := func(s string) overlay.Subnets { return overlay.Subnets{V4: netip.MustParsePrefix(s)} }
	node := r.getNode(t, "n1")
	for _, s := range []string{"10.5.3.0/24", "10.5.4.0/24"} {
		done, err := k.claimSubnet(t.Context(), node, subnets(s).V4)
		if !done || err != nil {
			t.Fatal(done, err)
		}
	}
	other := node.DeepCopy()
	other.Name, other.UID = "n2", "another"
	if done, err := k.claimSubnet(t.Context(), other, subnets("10.5.3.0/24").V4); done || err != nil {
		t.Errorf("a subnet of another node: done %v, %v", done, err)
	}
	done, err := k.Do(t.Context(), overlay.Step{Act: overlay.Create, Lease: overlay.Lease{Node: "n1", Subnets: subnets("10.5.3.0/24")}})
	if !done || err != nil {
		t.Fatal(done, err)
	}
	if got := r.getNode(t, "n1").Spec.PodCIDRs; len(got) != 1 || got[0] != "10.5.3.0/24" {
		t.Errorf("podCIDRs %v", got)
	}
	claims, err := r.Admin.CoordinationV1().Leases("twill-system").List(t.Context(), metav1.ListOptions{})
	check(t, err)
	if len(claims.Items) != 1 || claims.Items[0].Name != "subnet-10.5.3.0-24" {
		t.Errorf("claims %v, want that of 10.5.3.0/24 alone", claims.Items)
	}
}
