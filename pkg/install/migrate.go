package install

import (
	"context"
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

// migrationLabel is on a node, and is all that a migration remembers. A node without
// it is flannel's. flannel's DaemonSet selects nodes without it, Twill's those where
// it is onTwill; in between neither daemon runs, so that they never meet, and packets
// follow what the kernel was told.
const (
	migrationLabel = "twill.net/migration"
	leaving        = "leaving"   // flannel's pod ends
	onTwill        = "twill"     // Twill's runs, or starts
	returning      = "returning" // Twill's pod ends, flannel's files come back
)

// MigrateOptions say what a migration does.
type MigrateOptions struct {
	Values     Values // on top of what flannel was told: the image
	DefaultTag string
	Nodes      []string // only these; empty: all
	Apply      ApplyOptions
	Wait       time.Duration // for each node
}

// Migrate takes flannel's place, one node after the other, with the pods running. It
// stops at the first node that does not come up, and goes on where it was interrupted.
func (c *Cluster) Migrate(ctx context.Context, o MigrateOptions) (Report, error) {
	report := Report{DryRun: o.Apply.DryRun}
	if err := c.checkServer(); err != nil {
		return report, err
	}
	f, err := c.findFlannel(ctx)
	if err != nil {
		return report, err
	}
	if f == nil {
		return report, errors.New("look for flannel: neither kube-flannel nor kube-system has a DaemonSet kube-flannel…: netctl install is for clusters without it; netctl migrate-from-flannel --finish ends a migration")
	}
	nodes, err := c.chosen(ctx, o.Nodes)
	if err != nil {
		return report, err
	}
	values, err := f.values()
	if err != nil {
		return report, err
	}
	values = values.merged(o.Values)
	values.Set("twill.nodeSelector", map[string]any{migrationLabel: onTwill})
	report, err = c.Install(ctx, Options{Values: values, DefaultTag: o.DefaultTag, Apply: o.Apply, besideFlannel: true})
	if err != nil {
		return report, err
	}
	fenced, err := c.fence(ctx, f, o.Apply)
	report.Changes = append(report.Changes, fenced...)
	if err != nil || o.Apply.DryRun {
		return report, err
	}
	for _, n := range nodes {
		state, err := c.migrateNode(ctx, f, n, values.Namespace(), o.Wait)
		report.Nodes = append(report.Nodes, state)
		if err != nil {
			return report, fmt.Errorf("migrate node %s: %w: the nodes after it are still flannel's; mend it and run this command again, or give it back: netctl migrate-from-flannel --back --node %s", n.Name, err, n.Name)
		}
	}
	return report, nil
}

// chosen are the nodes of these names, or all.
func (c *Cluster) chosen(ctx context.Context, names []string) ([]corev1.Node, error) {
	all, err := c.nodes(ctx)
	if err != nil || len(names) == 0 {
		return all, err
	}
	var out []corev1.Node
	for _, want := range names {
		i := slices.IndexFunc(all, func(n corev1.Node) bool { return n.Name == want })
		if i < 0 {
			return nil, fmt.Errorf("--node %s: there is no such node with Linux", want)
		}
		out = append(out, all[i])
	}
	return out, nil
}

func (c *Cluster) migrateNode(ctx context.Context, f *flannel, n corev1.Node, namespace string, patience time.Duration) (NodeState, error) {
	limited, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("it is not done within %s", patience))
	defer cancel()
	if n.Labels[migrationLabel] != onTwill {
		if !nodeReady(n) {
			err := errors.New("the node is not Ready")
			return NodeState{Node: n.Name, Waits: err.Error()}, err
		}
		c.Progress("%s: flannel's pod ends; packets follow what it set up", n.Name)
		if err := c.label(limited, n.Name, leaving); err != nil {
			return NodeState{Node: n.Name, Waits: err.Error()}, err
		}
		if err := c.waitGone(limited, f.daemonSets, n.Name); err != nil {
			return NodeState{Node: n.Name, Waits: err.Error()}, err
		}
		if err := c.label(limited, n.Name, onTwill); err != nil {
			return NodeState{Node: n.Name, Waits: err.Error()}, err
		}
	}
	return c.waitNode(limited, namespace, name, n.Name)
}

// label marks a node; empty: it takes the mark off.
func (c *Cluster) label(ctx context.Context, node, value string) error {
	quoted := "null"
	if value != "" {
		quoted = fmt.Sprintf("%q", value)
	}
	patch := fmt.Sprintf(`{"metadata":{"labels":{%q:%s}}}`, migrationLabel, quoted)
	_, err := c.core.Nodes().Patch(ctx, node, types.MergePatchType, []byte(patch), metav1.PatchOptions{FieldManager: FieldManager})
	return c.explain("label node "+node, err)
}

// waitGone waits until none of the DaemonSets has a pod on a node.
func (c *Cluster) waitGone(ctx context.Context, daemonSets []appsv1.DaemonSet, node string) error {
	left := ""
	look := func() (bool, error) {
		left = ""
		for _, ds := range daemonSets {
			pods, err := c.pods(ctx, ds.Namespace, &ds)
			if err != nil {
				if passing(err) {
					return false, nil
				}
				return false, c.explain("watch node "+node, err)
			}
			for _, p := range pods {
				if nodeOf(p) == node {
					left = ds.Namespace + "/" + p.Name
				}
			}
		}
		return left == "", nil
	}
	return poll(ctx, look, func() error { return fmt.Errorf("pod %s does not end: see whether the node's kubelet runs", left) })
}

// waitNode waits until a DaemonSet's pod is ready on a node, and tells what it lacks.
func (c *Cluster) waitNode(ctx context.Context, namespace, daemonSet, node string) (NodeState, error) {
	state := NodeState{Node: node, Waits: "no pod yet"}
	look := func() (bool, error) {
		ds, err := c.apps.DaemonSets(namespace).Get(ctx, daemonSet, metav1.GetOptions{})
		var pods []corev1.Pod
		if err == nil {
			pods, err = c.pods(ctx, namespace, ds)
		}
		if err != nil {
			if passing(err) {
				return false, nil
			}
			return false, c.explain("watch node "+node, err)
		}
		now := NodeState{Node: node, Waits: "no pod yet"}
		for _, p := range pods {
			if nodeOf(p) == node && p.DeletionTimestamp == nil {
				now.Waits = waitsFor(p)
				now.Ready = now.Waits == ""
			}
		}
		if now != state {
			c.Progress("%s", now)
		}
		state = now
		return state.Ready, nil
	}
	err := poll(ctx, look, func() error { return errors.New(state.Waits) })
	return state, err
}

func nodeReady(n corev1.Node) bool {
	return slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	})
}

// Back gives nodes back to flannel; if it has all of them, Twill's objects go.
func (c *Cluster) Back(ctx context.Context, o MigrateOptions) (Report, error) {
	report := Report{DryRun: o.Apply.DryRun}
	f, err := c.findFlannel(ctx)
	if err != nil {
		return report, err
	}
	if f == nil {
		return report, errors.New("look for flannel: its DaemonSet is not there any more: apply flannel's manifest with a node affinity that keeps it off (" + migrationLabel + " DoesNotExist) first")
	}
	nodes, err := c.chosen(ctx, o.Nodes)
	if err != nil {
		return report, err
	}
	namespace := o.Values.Namespace()
	ds, err := c.apps.DaemonSets(namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return c.release(ctx, f, namespace, report, o)
	}
	if err != nil {
		return report, c.explain("read DaemonSet "+namespace+"/"+name, err)
	}
	for _, n := range nodes {
		if n.Labels[migrationLabel] == "" || o.Apply.DryRun {
			continue
		}
		state, warnings, err := c.returnNode(ctx, f, ds, n, o.Wait)
		report.Nodes, report.Warnings = append(report.Nodes, state), append(report.Warnings, warnings...)
		if err != nil {
			return report, fmt.Errorf("give node %s back: %w: run this command again", n.Name, err)
		}
	}
	return c.release(ctx, f, namespace, report, o)
}

// returnNode gives one node back.
func (c *Cluster) returnNode(ctx context.Context, f *flannel, ds *appsv1.DaemonSet, n corev1.Node, patience time.Duration) (NodeState, []string, error) {
	limited, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("it is not done within %s", patience))
	defer cancel()
	failed := func(err error) (NodeState, []string, error) {
		return NodeState{Node: n.Name, Waits: err.Error()}, nil, err
	}
	c.Progress("%s: Twill's pod ends; packets follow what it set up", n.Name)
	if err := c.label(limited, n.Name, returning); err != nil {
		return failed(err)
	}
	if err := c.waitGone(limited, []appsv1.DaemonSet{*ds}, n.Name); err != nil {
		return failed(err)
	}
	c.Progress("%s: flannel's configuration comes back", n.Name)
	if _, err := c.run(limited, returnConf, ds, n.Name); err != nil {
		return failed(err)
	}
	if err := c.label(limited, n.Name, ""); err != nil {
		return failed(err)
	}
	state, err := c.waitNode(limited, f.namespace(), f.forNode(n).Name, n.Name)
	if err != nil {
		return state, nil, err
	}
	var warnings []string
	if _, err := c.run(limited, handBack, ds, n.Name); err != nil {
		warnings = append(warnings, fmt.Sprintf("%v: chains of Twill's are left there, and do no harm", err))
	}
	return state, warnings, nil
}

// forNode is the DaemonSet that serves a node, where there is one per architecture.
func (f *flannel) forNode(n corev1.Node) appsv1.DaemonSet {
	for _, ds := range f.daemonSets {
		if strings.HasSuffix(ds.Name, "-"+n.Labels[corev1.LabelArchStable]) {
			return ds
		}
	}
	return f.daemonSets[0]
}

// release ends the migration if no node is Twill's any more.
func (c *Cluster) release(ctx context.Context, f *flannel, namespace string, report Report, o MigrateOptions) (Report, error) {
	all, err := c.nodes(ctx)
	if err != nil {
		return report, err
	}
	for _, n := range all {
		if n.Labels[migrationLabel] != "" && !o.Apply.DryRun {
			return report, nil
		}
	}
	deleted, err := c.deleteAll(ctx, namespace, o.Apply, o.Wait)
	report.Changes = append(report.Changes, deleted...)
	if err != nil {
		return report, err
	}
	freed, err := c.unfence(ctx, f, o.Apply)
	report.Changes = append(report.Changes, freed...)
	return report, err
}
