package install

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// errand is a short-lived pod that runs Twill's own programs on one node, with the
// rights and files that the DaemonSet's pods have there.
type errand struct {
	what  string // in its name
	steps []step
}

// step is one program of an errand: they run one after the other, each if the one
// before succeeded.
type step struct {
	container string   // whose rights and files it has: daemonName or initName
	args      []string // in place of that container's, or, with more, behind them
	more      bool
}

// The errands there are.
var (
	// cleanNode first takes the configuration away, so that no pod comes to a network
	// that goes.
	cleanNode = errand{"clean", []step{{initName, []string{"--uninstall"}, true}, {daemonName, []string{"--cleanup"}, false}}}
	// returnConf puts flannel's configuration back, which the kubelet's next pod uses.
	// flannel's plugin needs Twill's for the pods that Twill wired.
	returnConf = errand{"return", []step{{initName, []string{"--uninstall", "--keep-plugin"}, true}}}
	// handBack removes what flannel does not replace.
	handBack = errand{"handback", []step{{daemonName, []string{"--hand-back"}, false}}}
)

// pod is the errand's pod on a node, made after the DaemonSet's template.
func (e errand) pod(ds *appsv1.DaemonSet, node string) (*corev1.Pod, error) {
	template := ds.Spec.Template.Spec
	spec := *template.DeepCopy()
	spec.NodeName, spec.RestartPolicy = node, corev1.RestartPolicyNever
	spec.NodeSelector, spec.Affinity = nil, nil
	spec.ServiceAccountName, spec.DeprecatedServiceAccount = "", ""
	no := false
	spec.AutomountServiceAccountToken = &no // it asks the API server nothing
	spec.InitContainers, spec.Containers = nil, nil
	for i, s := range e.steps {
		all := slices.Concat(template.InitContainers, template.Containers)
		at := slices.IndexFunc(all, func(c corev1.Container) bool { return c.Name == s.container })
		if at < 0 {
			return nil, fmt.Errorf("make pod for node %s: DaemonSet %s/%s has no container %s: it is not of this netctl's release; apply that first with netctl install", node, ds.Namespace, ds.Name, s.container)
		}
		container := *all[at].DeepCopy()
		container.Name = fmt.Sprintf("%s-%d", e.what, i)
		container.StartupProbe, container.LivenessProbe, container.ReadinessProbe = nil, nil, nil
		container.Args = s.args
		if s.more {
			container.Args = append(slices.Clone(all[at].Args), s.args...)
		}
		if i < len(e.steps)-1 {
			spec.InitContainers = append(spec.InitContainers, container)
		} else {
			spec.Containers = append(spec.Containers, container)
		}
	}
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name: e.podName(node), Namespace: ds.Namespace,
			Labels: map[string]string{"app.kubernetes.io/name": name, "app.kubernetes.io/component": e.what},
		},
		Spec: spec,
	}, nil
}

// podName is valid for every node's name, which may be as long as a pod's.
func (e errand) podName(node string) string {
	const longest = 200
	return fmt.Sprintf("twill-%s-%.*s-%.8x", e.what, longest, node, sha256.Sum256([]byte(node)))
}

// run runs the errand on a node and returns what its programs said.
func (c *Cluster) run(ctx context.Context, e errand, ds *appsv1.DaemonSet, node string) (said string, err error) {
	want, err := e.pod(ds, node)
	if err != nil {
		return "", err
	}
	pods := c.core.Pods(ds.Namespace)
	if err := c.gone(ctx, want.Namespace, want.Name); err != nil { // of a run that was interrupted
		return "", err
	}
	if _, err := pods.Create(ctx, want, metav1.CreateOptions{FieldManager: FieldManager}); err != nil {
		return "", c.explain("create pod "+want.Name, err)
	}
	// If the time is up, the pod goes nevertheless.
	defer func() { _ = pods.Delete(context.WithoutCancel(ctx), want.Name, metav1.DeleteOptions{}) }()
	var p *corev1.Pod
	look := func() (bool, error) {
		got, err := pods.Get(ctx, want.Name, metav1.GetOptions{})
		if err != nil {
			if passing(err) {
				return false, nil
			}
			return false, c.explain("watch pod "+want.Name, err)
		}
		p = got
		return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed, nil
	}
	waiting := func() error {
		if p == nil {
			return fmt.Errorf("run %s on node %s: nothing is known of its pod", e.what, node)
		}
		return fmt.Errorf("run %s on node %s: %s", e.what, node, waitsFor(*p))
	}
	if err := poll(ctx, look, waiting); err != nil {
		return "", err
	}
	said = c.logs(ctx, p)
	if p.Status.Phase == corev1.PodFailed {
		return said, fmt.Errorf("run %s on node %s: %s", e.what, node, waitsFor(*p))
	}
	return said, nil
}

// gone deletes a pod and waits until it is.
func (c *Cluster) gone(ctx context.Context, namespace, pod string) error {
	pods := c.core.Pods(namespace)
	err := pods.Delete(ctx, pod, metav1.DeleteOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return c.explain("delete pod "+pod, err)
	}
	look := func() (bool, error) {
		_, err := pods.Get(ctx, pod, metav1.GetOptions{})
		return apierrors.IsNotFound(err), nil
	}
	return poll(ctx, look, func() error { return errors.New("delete pod " + pod + ": it does not end") })
}

// logs is what the containers of a pod said: of no importance if it cannot be had, as
// for the kubelets behind a broken network.
func (c *Cluster) logs(ctx context.Context, p *corev1.Pod) string {
	const limit = 64 << 10
	var all strings.Builder
	for _, container := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
		stream, err := c.core.Pods(p.Namespace).GetLogs(p.Name, &corev1.PodLogOptions{Container: container.Name}).Stream(ctx)
		if err != nil {
			continue
		}
		_, _ = io.Copy(&all, io.LimitReader(stream, limit))
		_ = stream.Close()
	}
	return all.String()
}
