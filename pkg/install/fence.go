package install

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/retry"
)

// beforeAnnotation is on flannel's DaemonSets: what fence changed.
const beforeAnnotation = "twill.net/before-migration"

// before is what fence changes of a DaemonSet.
type before struct {
	Affinity *corev1.Affinity               `json:"affinity"`
	Strategy appsv1.DaemonSetUpdateStrategy `json:"strategy"`
}

// fence keeps flannel off nodes with the migration's label. The pods that run are left
// alone by the strategy OnDelete: otherwise each of them would be restarted for nothing.
func (c *Cluster) fence(ctx context.Context, f *flannel, o ApplyOptions) ([]Change, error) {
	return c.reshape(ctx, f, o, func(ds *appsv1.DaemonSet) (bool, error) {
		if ds.Annotations[beforeAnnotation] != "" {
			return false, nil
		}
		spec := &ds.Spec.Template.Spec
		was, err := json.Marshal(before{spec.Affinity, ds.Spec.UpdateStrategy})
		if err != nil {
			return false, err
		}
		metav1.SetMetaDataAnnotation(&ds.ObjectMeta, beforeAnnotation, string(was))
		ds.Spec.UpdateStrategy = appsv1.DaemonSetUpdateStrategy{Type: appsv1.OnDeleteDaemonSetStrategyType}
		spec.Affinity = without(spec.Affinity, corev1.NodeSelectorRequirement{Key: migrationLabel, Operator: corev1.NodeSelectorOpDoesNotExist})
		return true, nil
	})
}

// unfence undoes fence.
func (c *Cluster) unfence(ctx context.Context, f *flannel, o ApplyOptions) ([]Change, error) {
	return c.reshape(ctx, f, o, func(ds *appsv1.DaemonSet) (bool, error) {
		text := ds.Annotations[beforeAnnotation]
		if text == "" {
			return false, nil
		}
		var was before
		if err := json.Unmarshal([]byte(text), &was); err != nil {
			return false, fmt.Errorf("annotation %s: %w", beforeAnnotation, err)
		}
		delete(ds.Annotations, beforeAnnotation)
		ds.Spec.Template.Spec.Affinity, ds.Spec.UpdateStrategy = was.Affinity, was.Strategy
		return true, nil
	})
}

// reshape changes flannel's DaemonSets.
func (c *Cluster) reshape(ctx context.Context, f *flannel, o ApplyOptions, edit func(*appsv1.DaemonSet) (bool, error)) ([]Change, error) {
	var changes []Change
	for _, ds := range f.daemonSets {
		done := Change{Kind: "DaemonSet", Name: ds.Namespace + "/" + ds.Name, Result: "unchanged"}
		daemonSets := c.apps.DaemonSets(ds.Namespace)
		// Its controller writes its status all the time.
		err := retry.RetryOnConflict(retry.DefaultBackoff, func() error {
			fresh, err := daemonSets.Get(ctx, ds.Name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			changed, err := edit(fresh)
			if err != nil || !changed {
				return err
			}
			done.Result = "changed"
			_, err = daemonSets.Update(ctx, fresh, metav1.UpdateOptions{FieldManager: FieldManager, DryRun: o.dryRun()})
			return err
		})
		if err != nil {
			return changes, c.explain("change flannel's DaemonSet "+done.Name, err)
		}
		changes = append(changes, done)
	}
	return changes, nil
}

// without adds a requirement to every way in which an affinity admits a node.
func without(a *corev1.Affinity, r corev1.NodeSelectorRequirement) *corev1.Affinity {
	a = a.DeepCopy()
	if a == nil {
		a = &corev1.Affinity{}
	}
	if a.NodeAffinity == nil {
		a.NodeAffinity = &corev1.NodeAffinity{}
	}
	required := &a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution
	if *required == nil {
		*required = &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{}}}
	}
	for i := range (*required).NodeSelectorTerms {
		term := &(*required).NodeSelectorTerms[i]
		term.MatchExpressions = append(term.MatchExpressions, r)
	}
	return a
}

// Finish deletes flannel's objects and lets Twill run on every node, once all of them
// are Twill's.
func (c *Cluster) Finish(ctx context.Context, o MigrateOptions) (Report, error) {
	report := Report{DryRun: o.Apply.DryRun}
	namespace := o.Values.Namespace()
	values, err := c.KeptValues(ctx, namespace)
	if err != nil {
		return report, err
	}
	if len(values) == 0 {
		return report, fmt.Errorf("finish the migration: namespace %s holds none: start it with netctl migrate-from-flannel", namespace)
	}
	nodes, err := c.nodes(ctx)
	if err == nil {
		err = c.checkMigrated(ctx, nodes, namespace)
	}
	if err != nil {
		return report, err
	}
	f, err := c.findFlannel(ctx)
	if err == nil && f != nil {
		report.Changes, err = c.deleteFlannel(ctx, f, o.Apply)
	}
	if err != nil {
		return report, err
	}
	if t, ok := values["twill"].(map[string]any); ok {
		delete(t, "nodeSelector")
	}
	installed, err := c.Install(ctx, Options{Values: values.merged(o.Values), Reset: true, DefaultTag: o.DefaultTag, Apply: o.Apply, besideFlannel: true, Wait: o.Wait})
	report.Changes, report.Nodes = append(report.Changes, installed.Changes...), installed.Nodes
	if err != nil || o.Apply.DryRun {
		return report, err
	}
	for _, n := range nodes {
		if n.Labels[migrationLabel] != "" {
			if err := c.label(ctx, n.Name, ""); err != nil {
				return report, err
			}
		}
	}
	return report, nil
}

// checkMigrated names the nodes that are not Twill's yet. Once flannel is gone the
// labels have no meaning.
func (c *Cluster) checkMigrated(ctx context.Context, nodes []corev1.Node, namespace string) error {
	ds, err := c.apps.DaemonSets(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return c.explain("finish the migration: read DaemonSet "+namespace+"/"+name, err)
	}
	if ds.Spec.Template.Spec.NodeSelector[migrationLabel] == "" {
		return nil // it runs on all nodes already
	}
	pods, err := c.pods(ctx, namespace, ds)
	if err != nil {
		return c.explain("finish the migration: list Twill's pods", err)
	}
	var errs []error
	for _, n := range nodes {
		runs := slices.ContainsFunc(pods, func(p corev1.Pod) bool { return nodeOf(p) == n.Name && ready(p) })
		if n.Labels[migrationLabel] != onTwill || !runs {
			errs = append(errs, fmt.Errorf("finish the migration: node %s is not on Twill, or Twill is not ready there: run netctl migrate-from-flannel first", n.Name))
		}
	}
	return errors.Join(errs...)
}

// deleteFlannel deletes what flannel's manifest made: its namespace, if nothing else is
// in there, or the objects one by one.
func (c *Cluster) deleteFlannel(ctx context.Context, f *flannel, o ApplyOptions) ([]Change, error) {
	var changes []Change
	add := func(kind, namespace, object string) error {
		done, err := c.delete(ctx, kind, namespace, object, o)
		if err == nil {
			changes = append(changes, done)
		}
		return err
	}
	account := f.daemonSets[0].Spec.Template.Spec.ServiceAccountName
	bindings, err := c.rbac.ClusterRoleBindings().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, c.explain("list ClusterRoleBindings", err)
	}
	for _, ds := range f.daemonSets {
		if err := add("DaemonSet", ds.Namespace, ds.Name); err != nil {
			return changes, err
		}
	}
	own := func(s rbacv1.Subject) bool {
		return s.Kind == rbacv1.ServiceAccountKind && s.Namespace == f.namespace() && s.Name == account
	}
	for _, b := range bindings.Items {
		if len(b.Subjects) == 0 || slices.ContainsFunc(b.Subjects, func(s rbacv1.Subject) bool { return !own(s) }) {
			continue
		}
		err := add("ClusterRoleBinding", "", b.Name)
		if err == nil && strings.Contains(b.RoleRef.Name, "flannel") {
			err = add("ClusterRole", "", b.RoleRef.Name)
		}
		if err != nil {
			return changes, err
		}
	}
	if err := add("ConfigMap", f.namespace(), f.config.Name); err != nil {
		return changes, err
	}
	if account != "" && account != "default" {
		if err := add("ServiceAccount", f.namespace(), account); err != nil {
			return changes, err
		}
	}
	alone, err := c.holdsOnly(ctx, f)
	if err == nil && alone {
		err = add("Namespace", "", f.namespace())
	}
	return changes, err
}

// holdsOnly reports whether flannel's namespace is its own and holds no other pod.
func (c *Cluster) holdsOnly(ctx context.Context, f *flannel) (bool, error) {
	if f.namespace() != "kube-flannel" {
		return false, nil
	}
	pods, err := c.core.Pods(f.namespace()).List(ctx, metav1.ListOptions{})
	if err != nil {
		return false, c.explain("list pods of "+f.namespace(), err)
	}
	return !slices.ContainsFunc(pods.Items, func(p corev1.Pod) bool {
		return !slices.ContainsFunc(f.daemonSets, func(ds appsv1.DaemonSet) bool { return metav1.IsControlledBy(&p, &ds) })
	}), nil
}
