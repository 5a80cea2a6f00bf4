package store

import (
	"context"
	"fmt"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/twill-net/twill/pkg/overlay"
)

// realNode is a Node with all that a kubelet tells of it: about 10 KB.
func realNode(i int) *corev1.Node {
	n := flannelNode(i)
	n.Name = fmt.Sprintf("node-%05d", i)
	n.Spec.PodCIDR = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24).String()
	n.Spec.PodCIDRs = []string{n.Spec.PodCIDR}
	n.Labels = map[string]string{}
	for l := range 12 {
		n.Labels[fmt.Sprintf("topology.example.com/label-%d", l)] = n.Name
	}
	for c := range 6 {
		n.Status.Conditions = append(n.Status.Conditions, corev1.NodeCondition{
			Type: corev1.NodeConditionType(fmt.Sprintf("Condition%d", c)), Status: corev1.ConditionFalse,
			Reason: "KubeletHasSufficientMemory", Message: "kubelet has sufficient memory available", LastHeartbeatTime: metav1.Now(),
		})
	}
	for image := range 50 {
		name := fmt.Sprintf("registry.example.com/some/image/name-%d", image)
		n.Status.Images = append(n.Status.Images, corev1.ContainerImage{
			SizeBytes: int64(image) << 20,
			Names:     []string{name + "@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef", name + ":v1.2.3"},
		})
	}
	return n
}

// BenchmarkKube10000 follows a cluster of 10,000 Nodes: time to the first Snapshot,
// the memory that stays, and the time from one node's change to the Snapshot with it.
func BenchmarkKube10000(b *testing.B) {
	const nodes = 10000
	r := newKubeRig(b)
	r.configure(b, `{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}`)
	g, ctx := errgroup.WithContext(b.Context())
	g.SetLimit(16)
	for i := range nodes {
		g.Go(func() error {
			_, err := r.Admin.CoreV1().Nodes().Create(ctx, realNode(i), metav1.CreateOptions{})
			return err
		})
	}
	check(b, g.Wait())
	for b.Loop() {
		heap := heapSize()
		began := time.Now()
		k := r.open(b, func(c *KubeConfig) { c.NodeName = "node-00001" })
		f := follow(b, k)
		s := f.wait(b, "all", func(s *overlay.Snapshot) bool { return len(s.Leases) == nodes })
		b.ReportMetric(float64(time.Since(began).Milliseconds()), "ms/first")
		b.ReportMetric(float64(heapSize()-heap)/(1<<20), "MiB/kept")
		began = time.Now()
		check(b, r.Admin.CoreV1().Nodes().Delete(context.Background(), "node-00077", metav1.DeleteOptions{}))
		f.wait(b, "one less", func(s *overlay.Snapshot) bool { return len(s.Leases) == nodes-1 })
		b.ReportMetric(float64(time.Since(began).Milliseconds()), "ms/change")
		r.addNode(b, realNode(77))
		runtime.KeepAlive(s)
	}
}

// heapSize is what is in use after all that is garbage was taken away.
func heapSize() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
