package kubernetes

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Images that every node has.
const (
	PauseImage   = "localhost/pause:1"
	AgnhostImage = "localhost/agnhost:1" // agnhost with the commands of busybox
	CoreDNSImage = "localhost/coredns:1"
)

// Kubectl runs kubectl as an administrator beside the API server and returns its output.
func (c *Cluster) Kubectl(args ...string) (string, error) {
	kubectl := filepath.Join(c.programs, "kubectl")
	return c.ControlPlane.Run(kubectl, append([]string{"--kubeconfig", c.Kubeconfig()}, args...)...)
}

// Apply makes or changes the objects of a manifest.
func (c *Cluster) Apply(manifest string) error {
	return c.withFile(manifest, func(file string) error {
		_, err := c.Kubectl("apply", "-f", file)
		return err
	})
}

// Delete removes the objects of a manifest and waits until they are gone.
func (c *Cluster) Delete(manifest string) error {
	return c.withFile(manifest, func(file string) error {
		_, err := c.Kubectl("delete", "--ignore-not-found", "--timeout=2m", "-f", file)
		return err
	})
}

func (c *Cluster) withFile(text string, use func(file string) error) error {
	f, err := os.CreateTemp(c.disk, "*.yaml")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if _, err := f.WriteString(text); err != nil {
		return err
	}
	return use(f.Name())
}

// Exec runs a command in a pod of the namespace default by `kubectl exec`.
func (c *Cluster) Exec(pod string, command ...string) (string, error) {
	return c.Kubectl(append([]string{"exec", pod, "--"}, command...)...)
}

// WaitNodesRegistered waits until each node has its object and, unless NoPodCIDRs, its
// podCIDR.
func (c *Cluster) WaitNodesRegistered(ctx context.Context) error {
	return c.waitNodes(ctx, "registered", func(n *core.Node) bool {
		return c.opts.NoPodCIDRs || n.Spec.PodCIDR != ""
	})
}

// WaitNodesReady waits until all nodes are Ready and may run pods.
func (c *Cluster) WaitNodesReady(ctx context.Context) error {
	return c.waitNodes(ctx, "Ready", func(n *core.Node) bool {
		for _, condition := range n.Status.Conditions {
			if condition.Type == core.NodeReady && condition.Status == core.ConditionTrue {
				return len(n.Spec.Taints) == 0
			}
		}
		return false
	})
}

func (c *Cluster) waitNodes(ctx context.Context, what string, good func(*core.Node) bool) error {
	return Eventually(ctx, func() error {
		list, err := c.Client.CoreV1().Nodes().List(ctx, meta.ListOptions{})
		if err != nil {
			return err
		}
		n := 0
		for _, node := range list.Items {
			if good(&node) {
				n++
			}
		}
		if n != len(c.Nodes) {
			return fmt.Errorf("%d of %d nodes are %s", n, len(c.Nodes), what)
		}
		return nil
	})
}

// WaitPodsRunning waits until exactly n pods have these labels ("app=web") and all of them
// are Ready and not about to be deleted, and returns them, sorted by node.
func (c *Cluster) WaitPodsRunning(ctx context.Context, namespace, labels string, n int) ([]core.Pod, error) {
	var pods []core.Pod
	err := Eventually(ctx, func() error {
		list, err := c.Client.CoreV1().Pods(namespace).List(ctx, meta.ListOptions{LabelSelector: labels})
		if err != nil {
			return err
		}
		ready := 0
		for _, p := range list.Items {
			if podReady(&p) {
				ready++
			}
		}
		if ready != n || len(list.Items) != n {
			return fmt.Errorf("%d of %d pods with %s are there, %d are Ready", len(list.Items), n, labels, ready)
		}
		pods = list.Items
		return nil
	})
	sortByNode(pods)
	return pods, err
}

// WaitPodsGone waits until no pod has these labels.
func (c *Cluster) WaitPodsGone(ctx context.Context, namespace, labels string) error {
	return Eventually(ctx, func() error {
		list, err := c.Client.CoreV1().Pods(namespace).List(ctx, meta.ListOptions{LabelSelector: labels})
		if err == nil && len(list.Items) > 0 {
			err = fmt.Errorf("%d pods with %s are still there", len(list.Items), labels)
		}
		return err
	})
}

func podReady(p *core.Pod) bool {
	for _, condition := range p.Status.Conditions {
		if condition.Type == core.PodReady {
			return condition.Status == core.ConditionTrue && p.DeletionTimestamp == nil
		}
	}
	return false
}

// Eventually calls good until it returns nil. When the time is up, its last error is the
// reason.
func Eventually(ctx context.Context, good func() error) error {
	for {
		err := good()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ctx.Err(), err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}
