package install

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// NodeState is how far one node is.
type NodeState struct {
	Node  string `json:"node"`
	Ready bool   `json:"ready"`
	Waits string `json:"waits,omitempty"` // for what
}

func (n NodeState) String() string {
	if n.Ready {
		return n.Node + ": ready"
	}
	return n.Node + ": " + n.Waits
}

// waitRollout waits until every node runs the DaemonSet as it is now, and pods can be
// connected there: the pod's readiness is /readyz, asked by the node's kubelet. What a
// node waits for is told when it changes.
func (c *Cluster) waitRollout(ctx context.Context, namespace string) ([]NodeState, error) {
	var states []NodeState
	told := map[string]string{}
	look := func() (bool, error) {
		ds, err := c.apps.DaemonSets(namespace).Get(ctx, name, metav1.GetOptions{})
		var pods []corev1.Pod
		if err == nil {
			pods, err = c.pods(ctx, namespace, ds)
		}
		if err != nil {
			if passing(err) {
				return false, nil
			}
			return false, c.explain("watch the rollout", err)
		}
		states = c.rollout(ctx, ds, pods)
		for _, s := range states {
			if told[s.Node] != s.String() {
				told[s.Node] = s.String()
				c.Progress("%s", s)
			}
		}
		return rolledOut(ds), nil
	}
	waiting := func() error {
		var late []string
		for _, s := range states {
			if !s.Ready {
				late = append(late, s.String())
			}
		}
		if len(late) == 0 {
			return errors.New("wait for the rollout: the DaemonSet's status says nothing yet: see whether kube-controller-manager runs")
		}
		return fmt.Errorf("wait for the rollout: %s", strings.Join(late, "; "))
	}
	return states, poll(ctx, look, waiting)
}

func rolledOut(ds *appsv1.DaemonSet) bool {
	s := ds.Status
	return s.ObservedGeneration >= ds.Generation && s.UpdatedNumberScheduled == s.DesiredNumberScheduled && s.NumberAvailable == s.DesiredNumberScheduled
}

func (c *Cluster) pods(ctx context.Context, namespace string, ds *appsv1.DaemonSet) ([]corev1.Pod, error) {
	list, err := c.core.Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: metav1.FormatLabelSelector(ds.Spec.Selector)})
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(list.Items, func(p corev1.Pod) bool { return !metav1.IsControlledBy(&p, ds) }), nil
}

// rollout says of each node that has or awaits a pod how far it is.
func (c *Cluster) rollout(ctx context.Context, ds *appsv1.DaemonSet, pods []corev1.Pod) []NodeState {
	revision := c.revision(ctx, ds)
	byNode := map[string]NodeState{}
	for _, p := range pods {
		node := nodeOf(p)
		s := NodeState{Node: node}
		switch old := p.Labels[appsv1.ControllerRevisionHashLabelKey] != revision && revision != ""; {
		case p.DeletionTimestamp != nil:
			s.Waits = "the old pod ends"
		case old:
			s.Waits = "waits for its turn"
		default:
			s.Waits = waitsFor(p)
			s.Ready = s.Waits == ""
		}
		if was, twice := byNode[node]; !twice || was.Ready || old(was) {
			byNode[node] = s
		}
	}
	var out []NodeState
	for _, s := range byNode {
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b NodeState) int { return cmp.Compare(a.Node, b.Node) })
	return out
}

// old says that a newer pod on the same node has more to tell.
func old(s NodeState) bool { return s.Waits == "the old pod ends" }

// revision is the hash that pods of the present template carry; empty: unknown.
func (c *Cluster) revision(ctx context.Context, ds *appsv1.DaemonSet) string {
	list, err := c.apps.ControllerRevisions(ds.Namespace).List(ctx, metav1.ListOptions{LabelSelector: metav1.FormatLabelSelector(ds.Spec.Selector)})
	if err != nil {
		return ""
	}
	var newest appsv1.ControllerRevision
	for _, r := range list.Items {
		if metav1.IsControlledBy(&r, ds) && r.Revision > newest.Revision {
			newest = r
		}
	}
	return newest.Labels[appsv1.ControllerRevisionHashLabelKey]
}

// nodeOf is where a pod is, or is to be: the DaemonSet controller names the node in
// an affinity and leaves the binding to the scheduler.
func nodeOf(p corev1.Pod) string {
	if p.Spec.NodeName != "" {
		return p.Spec.NodeName
	}
	if a := p.Spec.Affinity; a != nil && a.NodeAffinity != nil && a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution != nil {
		for _, term := range a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms {
			for _, f := range term.MatchFields {
				if f.Key == metav1.ObjectNameField && len(f.Values) == 1 {
					return f.Values[0]
				}
			}
		}
	}
	return "(no node)"
}

// waitsFor says what a pod lacks to be ready, as far as its status tells; empty:
// nothing.
func waitsFor(p corev1.Pod) string {
	for _, cond := range p.Status.Conditions {
		if cond.Type == corev1.PodReady && cond.Status == corev1.ConditionTrue {
			return ""
		}
		if cond.Type == corev1.PodScheduled && cond.Status == corev1.ConditionFalse {
			return "not scheduled: " + cond.Message
		}
	}
	for _, s := range append(slices.Clone(p.Status.InitContainerStatuses), p.Status.ContainerStatuses...) {
		if says := containerWaitsFor(s); says != "" {
			return says
		}
	}
	if p.Status.Phase == corev1.PodFailed {
		return cmp.Or(p.Status.Message, p.Status.Reason, "the pod failed")
	}
	if len(p.Status.ContainerStatuses) == 0 {
		return "the kubelet has not taken the pod up"
	}
	return "twilld runs and is not ready (/readyz): see kubectl -n " + p.Namespace + " logs " + p.Name
}

func containerWaitsFor(s corev1.ContainerStatus) string {
	ended := func(t *corev1.ContainerStateTerminated) string {
		said := strings.TrimSpace(t.Message)
		if i := strings.LastIndexByte(said, '\n'); i >= 0 {
			said = said[i+1:]
		}
		return fmt.Sprintf("%s ended with code %d: %s", s.Name, t.ExitCode, cmp.Or(said, t.Reason))
	}
	switch t := s.LastTerminationState.Terminated; {
	case s.State.Terminated != nil && s.State.Terminated.ExitCode != 0:
		return ended(s.State.Terminated)
	case s.State.Waiting != nil && t != nil && t.ExitCode != 0:
		return ended(t)
	case s.State.Waiting != nil && s.State.Waiting.Reason != "PodInitializing":
		w := s.State.Waiting
		return strings.TrimSuffix(fmt.Sprintf("%s: %s: %s", s.Name, cmp.Or(w.Reason, "waiting"), w.Message), ": ")
	}
	return ""
}
