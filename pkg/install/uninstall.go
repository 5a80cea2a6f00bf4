package install

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// nowhere is a node selector that no node has: a DaemonSet with it keeps its template,
// from which the nodes are cleaned, and loses its pods.
const nowhere = "twill.net/nowhere"

// UninstallOptions say what Uninstall does.
type UninstallOptions struct {
	Namespace string
	KeepNodes bool // the nodes' network stays as it is
	DryRun    bool
	Force     bool          // go on where nodes could not be cleaned
	Wait      time.Duration // for each node
}

// Uninstall ends twilld on all nodes, cleans each of them, and removes Twill's objects.
// If it is interrupted it goes on from there.
func (c *Cluster) Uninstall(ctx context.Context, o UninstallOptions) (Report, error) {
	report := Report{DryRun: o.DryRun}
	if err := c.checkServer(); err != nil {
		return report, err
	}
	ds, err := c.apps.DaemonSets(o.Namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return report, c.explain("read DaemonSet "+o.Namespace+"/"+name, err)
	}
	if err == nil && !o.KeepNodes && !o.DryRun {
		if err := c.stop(ctx, ds, o.Wait); err != nil {
			return report, err
		}
		report.Nodes, err = c.cleanNodes(ctx, ds, o.Wait)
		if err != nil && !o.Force {
			return report, fmt.Errorf("%w: Twill's objects are still there: clean these nodes by running this command again, or leave them as they are with --force", err)
		}
	}
	report.Changes, err = c.deleteAll(ctx, o.Namespace, ApplyOptions{DryRun: o.DryRun}, o.Wait)
	return report, err
}

// stop takes twilld off all nodes and waits until it is.
func (c *Cluster) stop(ctx context.Context, ds *appsv1.DaemonSet, patience time.Duration) error {
	patch := fmt.Sprintf(`{"spec":{"template":{"spec":{"nodeSelector":{%q:"true"}}}}}`, nowhere)
	daemonSets := c.apps.DaemonSets(ds.Namespace)
	if _, err := daemonSets.Patch(ctx, ds.Name, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{FieldManager: FieldManager}); err != nil {
		return c.explain("take twilld off the nodes", err)
	}
	limited, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("it is not done within %s", patience))
	defer cancel()
	var left []corev1.Pod
	told := 0
	look := func() (bool, error) {
		pods, err := c.pods(limited, ds.Namespace, ds)
		if err != nil {
			return false, nil
		}
		// The pods of a node that is away end when it comes back.
		left = slices.DeleteFunc(pods, func(p corev1.Pod) bool {
			return p.DeletionTimestamp != nil && !ready(p) && len(p.Status.ContainerStatuses) == 0
		})
		if len(left) != told {
			told = len(left)
			c.Progress("twilld still runs on %d nodes", told)
		}
		return len(left) == 0, nil
	}
	return poll(limited, look, func() error {
		var nodes []string
		for _, p := range left {
			nodes = append(nodes, nodeOf(p))
		}
		return fmt.Errorf("take twilld off the nodes: it still runs on %s: are they Ready?", strings.Join(nodes, ", "))
	})
}

func ready(p corev1.Pod) bool { return waitsFor(p) == "" }

// cleanNodes removes Twill's configuration and network from every node, some at a
// time.
func (c *Cluster) cleanNodes(ctx context.Context, ds *appsv1.DaemonSet, patience time.Duration) ([]NodeState, error) {
	nodes, err := c.nodes(ctx)
	if err != nil {
		return nil, err
	}
	states := make([]NodeState, len(nodes))
	errs := make([]error, len(nodes))
	slots := make(chan struct{}, 10)
	done := make(chan int)
	for i, n := range nodes {
		go func() {
			slots <- struct{}{}
			states[i], errs[i] = c.cleanNode(ctx, ds, n.Name, patience)
			<-slots
			done <- i
		}()
	}
	for range nodes {
		i := <-done
		c.Progress("%s", states[i])
	}
	return states, errors.Join(errs...)
}

func (c *Cluster) cleanNode(ctx context.Context, ds *appsv1.DaemonSet, node string, patience time.Duration) (NodeState, error) {
	limited, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("it is not done within %s", patience))
	defer cancel()
	said, err := c.run(limited, cleanNode, ds, node)
	if err != nil {
		return NodeState{Node: node, Waits: err.Error()}, err
	}
	state := NodeState{Node: node, Ready: true}
	var stays []string
	for line := range strings.Lines(said) {
		if strings.Contains(line, " stays") {
			stays = append(stays, strings.TrimSpace(line))
		}
	}
	state.Waits = strings.Join(stays, "; ")
	return state, c.forgetNode(ctx, node, annotationPrefix(ds))
}

// forgetNode removes what twilld said of itself on a Node object, by which other nodes
// would still send to it.
func (c *Cluster) forgetNode(ctx context.Context, node, prefix string) error {
	annotations := map[string]any{}
	for _, key := range []string{"kube-subnet-manager", "backend-type", "backend-data", "backend-v6-data", "public-ip", "public-ipv6"} {
		annotations[prefix+key] = nil
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": annotations}})
	if err != nil {
		return fmt.Errorf("forget node %s: %w", node, err)
	}
	_, err = c.core.Nodes().Patch(ctx, node, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: FieldManager})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return c.explain("remove the annotations of node "+node, err)
}

// annotationPrefix is what the names of twilld's annotations begin with: flannel's rule,
// that a prefix without a slash gets one, and one with a slash a dash.
func annotationPrefix(ds *appsv1.DaemonSet) string {
	prefix := "flannel.alpha.coreos.com"
	for _, c := range ds.Spec.Template.Spec.Containers {
		flags, _ := parseFlags(c.Args)
		for _, f := range flags {
			if f.name == "kube-annotation-prefix" && f.value != "" {
				prefix = f.value
			}
		}
	}
	switch {
	case !strings.Contains(prefix, "/"):
		return prefix + "/"
	case !strings.HasSuffix(prefix, "/") && !strings.HasSuffix(prefix, "-"):
		return prefix + "-"
	}
	return prefix
}

// deleteAll removes Twill's objects, what needs others first, and waits until the
// namespace is gone: nothing could be made there meanwhile.
func (c *Cluster) deleteAll(ctx context.Context, namespace string, o ApplyOptions, patience time.Duration) ([]Change, error) {
	var changes []Change
	for _, kind := range slices.Backward(order) {
		in, object := namespace, name
		switch kind {
		case "ClusterRole", "ClusterRoleBinding":
			in = ""
		case "ConfigMap":
			object = configMapName
		case "Namespace":
			in, object = "", namespace
			ours, err := c.ownNamespace(ctx, namespace)
			if err != nil {
				return changes, err
			}
			if !ours {
				continue
			}
		}
		done, err := c.delete(ctx, kind, in, object, o)
		if err != nil {
			return changes, err
		}
		changes = append(changes, done)
		if kind == "Namespace" && !o.DryRun {
			if err := c.waitEnded(ctx, namespace, patience); err != nil {
				return changes, err
			}
		}
	}
	return changes, nil
}

// waitEnded waits until a deleted namespace is gone, and says what holds it.
func (c *Cluster) waitEnded(ctx context.Context, namespace string, patience time.Duration) error {
	limited, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("it is not done within %s", patience))
	defer cancel()
	c.Progress("namespace %s ends", namespace)
	var ns *corev1.Namespace
	look := func() (bool, error) {
		got, err := c.core.Namespaces().Get(limited, namespace, metav1.GetOptions{})
		if err == nil {
			ns = got
		}
		return apierrors.IsNotFound(err), nil
	}
	return poll(limited, look, func() error {
		err := fmt.Errorf("delete Namespace %s: it does not end", namespace)
		if ns != nil {
			for _, cond := range ns.Status.Conditions {
				if cond.Status == corev1.ConditionTrue {
					err = fmt.Errorf("%w: %s", err, cond.Message)
				}
			}
		}
		return err
	})
}

// ownNamespace reports whether a namespace was made for Twill, and holds nobody
// else's pods.
func (c *Cluster) ownNamespace(ctx context.Context, namespace string) (bool, error) {
	ns, err := c.core.Namespaces().Get(ctx, namespace, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, c.explain("read Namespace "+namespace, err)
	}
	pods, err := c.core.Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/name!=" + name})
	if err != nil {
		return false, c.explain("list pods of "+namespace, err)
	}
	return ns.Labels["app.kubernetes.io/name"] == name && len(pods.Items) == 0, nil
}
