package install

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
)

// Change is what became of one object.
type Change struct {
	Kind   string   `json:"kind"`
	Name   string   `json:"name"`   // namespace/name, or name
	Result string   `json:"result"` // created, changed, unchanged, deleted or absent
	Fields []string `json:"fields,omitempty"`
}

// ApplyOptions say how objects are applied.
type ApplyOptions struct {
	DryRun bool // the server says what it would do, and does nothing
	Force  bool // take over fields that somebody else has set
}

func (o ApplyOptions) dryRun() []string {
	if o.DryRun {
		return []string{metav1.DryRunAll}
	}
	return nil
}

var resources = map[string]schema.GroupVersionResource{
	"Namespace":          {Version: "v1", Resource: "namespaces"},
	"ServiceAccount":     {Version: "v1", Resource: "serviceaccounts"},
	"ConfigMap":          {Version: "v1", Resource: "configmaps"},
	"ClusterRole":        {Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "clusterroles"},
	"ClusterRoleBinding": {Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "clusterrolebindings"},
	"Role":               {Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "roles"},
	"RoleBinding":        {Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "rolebindings"},
	"DaemonSet":          {Group: "apps", Version: "v1", Resource: "daemonsets"},
}

func (c *Cluster) resource(kind, namespace string) dynamic.ResourceInterface {
	all := c.objects.Resource(resources[kind])
	if namespace == "" {
		return all
	}
	return all.Namespace(namespace)
}

// Apply makes the cluster have these objects, by server-side apply: what others have
// set beside stays. Rights that an earlier run needed and this one does not are
// withdrawn.
func (c *Cluster) Apply(ctx context.Context, objects []*unstructured.Unstructured, o ApplyOptions) ([]Change, error) {
	var changes []Change
	newNamespace := ""
	for _, object := range objects {
		if object.GetNamespace() != "" && object.GetNamespace() == newNamespace {
			// A dry run has not made it: the server could not answer.
			changes = append(changes, change(object, "created", nil))
			continue
		}
		done, err := c.applyOne(ctx, object, o)
		if err != nil {
			return changes, err
		}
		if o.DryRun && done.Kind == "Namespace" && done.Result == "created" {
			newNamespace = object.GetName()
		}
		changes = append(changes, done)
	}
	withdrawn, err := c.withdraw(ctx, objects, o)
	return append(changes, withdrawn...), err
}

func (c *Cluster) applyOne(ctx context.Context, object *unstructured.Unstructured, o ApplyOptions) (Change, error) {
	r := c.resource(object.GetKind(), object.GetNamespace())
	what := object.GetKind() + " " + fullName(object)
	before, err := r.Get(ctx, object.GetName(), metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return Change{}, c.explain("read "+what, err)
	}
	absent := err != nil
	data, err := json.Marshal(object)
	if err != nil {
		return Change{}, fmt.Errorf("apply %s: %w", what, err)
	}
	after, err := r.Patch(ctx, object.GetName(), applyPatch, data, metav1.PatchOptions{FieldManager: FieldManager, Force: &o.Force, DryRun: o.dryRun()})
	if err != nil {
		return Change{}, c.explain("apply "+what, err)
	}
	switch fields := differences(before, after); {
	case absent:
		return change(object, "created", nil), nil
	case len(fields) > 0:
		return change(object, "changed", fields), nil
	}
	return change(object, "unchanged", nil), nil
}

// withdraw deletes those of our kinds that are named twill and no longer wanted: the
// rights of --kube-allocate-subnets.
func (c *Cluster) withdraw(ctx context.Context, objects []*unstructured.Unstructured, o ApplyOptions) ([]Change, error) {
	namespace := namespaceOf(objects)
	var changes []Change
	for _, kind := range []string{"RoleBinding", "Role"} {
		if slices.ContainsFunc(objects, func(u *unstructured.Unstructured) bool { return u.GetKind() == kind }) {
			continue
		}
		done, err := c.delete(ctx, kind, namespace, name, o)
		if err != nil {
			return changes, err
		}
		if done.Result == "deleted" {
			changes = append(changes, done)
		}
	}
	return changes, nil
}

// delete removes an object, and waits for nothing.
func (c *Cluster) delete(ctx context.Context, kind, namespace, object string, o ApplyOptions) (Change, error) {
	background := metav1.DeletePropagationBackground
	done := Change{Kind: kind, Name: object, Result: "deleted"}
	if namespace != "" {
		done.Name = namespace + "/" + object
	}
	err := c.resource(kind, namespace).Delete(ctx, object, metav1.DeleteOptions{DryRun: o.dryRun(), PropagationPolicy: &background})
	if apierrors.IsNotFound(err) {
		done.Result = "absent"
		return done, nil
	}
	return done, c.explain(fmt.Sprintf("delete %s %s", kind, done.Name), err)
}

func change(object *unstructured.Unstructured, result string, fields []string) Change {
	return Change{Kind: object.GetKind(), Name: fullName(object), Result: result, Fields: fields}
}

func fullName(object *unstructured.Unstructured) string {
	if ns := object.GetNamespace(); ns != "" {
		return ns + "/" + object.GetName()
	}
	return object.GetName()
}

// namespaceOf is where the rendered objects live.
func namespaceOf(objects []*unstructured.Unstructured) string {
	for _, o := range objects {
		if ns := o.GetNamespace(); ns != "" {
			return ns
		}
	}
	return ""
}

// differences lists what of an object is not as it was, as "path: before → after".
// What the server keeps for itself does not count.
func differences(before, after *unstructured.Unstructured) []string {
	if before == nil || after == nil {
		return nil
	}
	var out []string
	strip := func(u *unstructured.Unstructured) map[string]any {
		m := maps.Clone(u.Object)
		delete(m, "status")
		meta, _ := m["metadata"].(map[string]any)
		meta = maps.Clone(meta)
		for _, own := range []string{"managedFields", "resourceVersion", "generation", "creationTimestamp", "uid"} {
			delete(meta, own)
		}
		if notes, ok := meta["annotations"].(map[string]any); ok {
			notes = maps.Clone(notes)
			delete(notes, "deprecated.daemonset.template.generation")
			meta["annotations"] = notes
		}
		m["metadata"] = meta
		return m
	}
	compare("", strip(before), strip(after), &out)
	return out
}

func compare(path string, was, is any, out *[]string) {
	if reflect.DeepEqual(was, is) {
		return
	}
	a, okA := was.(map[string]any)
	b, okB := is.(map[string]any)
	if okA && okB {
		keys := maps.Clone(a)
		maps.Copy(keys, b)
		for _, key := range slices.Sorted(maps.Keys(keys)) {
			compare(path+"."+key, a[key], b[key], out)
		}
		return
	}
	listA, okA := was.([]any)
	listB, okB := is.([]any)
	if okA && okB && len(listA) == len(listB) {
		for i := range listA {
			compare(fmt.Sprintf("%s[%d]", path, i), listA[i], listB[i], out)
		}
		return
	}
	*out = append(*out, fmt.Sprintf("%s: %s → %s", path[1:], short(was), short(is)))
}

// short is a value for people.
func short(v any) string {
	const limit = 200
	b, err := json.Marshal(v)
	if v == nil || err != nil {
		return "-"
	}
	if len(b) > limit {
		return string(b[:limit]) + "…"
	}
	return string(b)
}
