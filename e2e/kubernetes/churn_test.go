package kubernetes

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// churnPods at once. CI has neither the processors nor the time for 200.
func churnPods() int {
	if long() {
		return 200
	}
	return 50
}

// round is how long the pods took, and what the node's processes took of the processors.
type round struct{ create, remove, cpu time.Duration }

// churn has a node's kubelet make and remove many pods at once.
func (c *Cluster) churn(t *testing.T, n *Node) round {
	t.Helper()
	ctx := minutes(t, 10)
	var r round
	cpu, began := n.cpu(t), time.Now()
	c.createPods(ctx, t, n)
	must(t, c.waitChurn(ctx, churnPods()))
	r.create = time.Since(began)
	began = time.Now()
	must(t, c.Client.CoreV1().Pods("default").DeleteCollection(ctx, meta.DeleteOptions{}, meta.ListOptions{LabelSelector: "app=churn"}))
	must(t, c.waitChurn(ctx, 0))
	r.remove, r.cpu = time.Since(began), n.cpu(t)-cpu
	t.Logf("%s: %d pods Running after %.1f s, gone after %.1f s, %.1f s of processor", n.Name, churnPods(), r.create.Seconds(), r.remove.Seconds(), r.cpu.Seconds())
	return r
}

// createPods asks for all pods at once, on this node.
func (c *Cluster) createPods(ctx context.Context, t *testing.T, n *Node) {
	t.Helper()
	var g errgroup.Group
	g.SetLimit(20)
	for i := range churnPods() {
		second, no := int64(1), false
		p := &core.Pod{
			ObjectMeta: meta.ObjectMeta{Name: fmt.Sprintf("churn-%d", i), Labels: map[string]string{"app": "churn"}},
			Spec: core.PodSpec{
				NodeName: n.Name, TerminationGracePeriodSeconds: &second, AutomountServiceAccountToken: &no, EnableServiceLinks: &no,
				Containers: []core.Container{{Name: "pause", Image: PauseImage}},
			},
		}
		g.Go(func() error {
			_, err := c.Client.CoreV1().Pods("default").Create(ctx, p, meta.CreateOptions{})
			return err
		})
	}
	must(t, g.Wait())
}

// waitChurn waits until so many pods run and there is no other. It looks less often than
// WaitPodsRunning: to list them is work, too, that the node's processes do not get.
func (c *Cluster) waitChurn(ctx context.Context, want int) error {
	for {
		list, err := c.Client.CoreV1().Pods("default").List(ctx, meta.ListOptions{LabelSelector: "app=churn", ResourceVersion: "0"})
		if err != nil {
			return err
		}
		ready := 0
		for _, p := range list.Items {
			if podReady(&p) {
				ready++
			}
		}
		if ready == want && len(list.Items) == want {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %d pods: %d of %d run: %w", want, ready, len(list.Items), ctx.Err())
		case <-time.After(time.Second):
		}
	}
}

// cpu returns what the node's processes have used, also those that ended.
func (n *Node) cpu(t testing.TB) time.Duration {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/sys/fs/cgroup/cpuacct", n.cluster.Lab.CgroupPath(n.Name), "cpuacct.usage"))
	must(t, err)
	var ns int64
	_, err = fmt.Sscan(string(b), &ns)
	must(t, err)
	return time.Duration(ns)
}

// checkLeft waits until there is nothing on the node that was not there before.
func (n *Node) checkLeft(t testing.TB, before State) {
	t.Helper()
	must(t, Eventually(minutes(t, 2), func() error {
		now, err := n.State()
		left := slices.DeleteFunc(now.Left(before), func(line string) bool {
			return strings.Contains(line, "/.twill/recorded/") // a note of the network, not of pods
		})
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("left on %s:\n%s", n.Name, strings.Join(left, "\n"))
		}
		return err
	}))
}

// useBridge takes Twill from a node and gives it Debian's bridge plugin.
func (c *Cluster) useBridge(t *testing.T, n *Node) {
	t.Helper()
	c.kubectl(t, "--namespace=twill-system", "patch", "daemonset", "twill", "--patch", fmt.Sprintf(`{"spec": {"template": {"spec": {"affinity": {
		"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
			{"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": [%q]}]}]}}}}}}}`, n.Name))
	c.kubectl(t, "--namespace=twill-system", "rollout", "status", "daemonset/twill", "--timeout=3m")
	must(t, Eventually(minutes(t, 1), func() error {
		if out, err := n.Run("pidof", "twilld"); err == nil {
			return fmt.Errorf("twilld still runs on %s: %s", n.Name, out)
		}
		return nil
	}))
	n.shell(t, "rm /etc/cni/net.d/*")
	cidrs, err := c.podCIDRs(t, n.Name)
	must(t, err)
	must(t, n.writeBridge(cidrs))
}

// TestChurn has kubelet make and remove pods at once, round after round, with Twill on
// one node and Debian's bridge plugin on another. Nothing of them is left.
func TestChurn(t *testing.T) {
	rounds, reference := 2, 1
	if long() {
		rounds, reference = 10, 2
	}
	c := Start(t, Options{Nodes: 2})
	twill, bridge := c.Nodes[0], c.Nodes[1]
	c.useBridge(t, bridge)
	c.startClients(t)
	var took, other []round
	for i := range rounds {
		took = append(took, c.churnAndCheck(t, twill))
		if i*reference%rounds < reference { // evenly among the others
			other = append(other, c.churnAndCheck(t, bridge))
		}
	}
	t.Logf("| %d pods at once, medians | rounds | all Running | all gone | processor |\n|---|---|---|---|---|\n%s%s", churnPods(),
		row("Twill", took), row("Debian's bridge and host-local", other))
}

// churnAndCheck is churn, after which nothing may be left.
func (c *Cluster) churnAndCheck(t *testing.T, n *Node) round {
	t.Helper()
	before, err := n.State()
	must(t, err)
	r := c.churn(t, n)
	n.checkLeft(t, before)
	c.checkReservations(t, n)
	return r
}

func row(cni string, rounds []round) string {
	return fmt.Sprintf("| %s | %d | %.1f s | %.1f s | %.1f s |\n", cni, len(rounds),
		median(rounds, func(r round) time.Duration { return r.create }),
		median(rounds, func(r round) time.Duration { return r.remove }),
		median(rounds, func(r round) time.Duration { return r.cpu }))
}

func median(rounds []round, of func(round) time.Duration) float64 {
	var all []float64
	for _, r := range rounds {
		all = append(all, of(r).Seconds())
	}
	slices.Sort(all)
	return all[len(all)/2]
}
