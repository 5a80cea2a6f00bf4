package install

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/nettest/kubeapi"
)

// rig is a real API server, with the controllers if asked for, and kubelets that only
// say what kubelets say.
type rig struct {
	*Cluster
	api    *kubeapi.Server
	admin  *kubernetes.Clientset
	config *rest.Config
	lab    *nettest.Lab

	mu   sync.Mutex
	said []string          // by Progress
	bad  map[string]string // pods that do not become ready, by "node/container", and what they say
	ran  []string          // pods that ran, as "node name"
}

func newRig(t *testing.T) *rig {
	t.Helper()
	lab := nettest.NewT(t)
	api, err := kubeapi.Start(lab)
	check(t, err)
	config := api.AdminConfig()
	config.ContentType = "" // dynamic clients speak JSON
	r := &rig{api: api, admin: api.Admin, config: config, lab: lab, bad: map[string]string{}}
	r.Cluster, err = New(config)
	check(t, err)
	r.Progress = func(format string, a ...any) {
		r.mu.Lock()
		r.said = append(r.said, fmt.Sprintf(format, a...))
		r.mu.Unlock()
	}
	return r
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wantError checks that an error names all of these.
func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one with %q", parts)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error lacks %q:\n%v", p, err)
		}
	}
}

func (r *rig) addNodes(t *testing.T, cidrs map[string]string) {
	t.Helper()
	for _, node := range slices.Sorted(maps.Keys(cidrs)) {
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node, Labels: map[string]string{"kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}}}
		if cidrs[node] != "" {
			n.Spec.PodCIDR, n.Spec.PodCIDRs = cidrs[node], []string{cidrs[node]}
		}
		n, err := r.admin.CoreV1().Nodes().Create(t.Context(), n, metav1.CreateOptions{})
		check(t, err)
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
		n.Spec.Taints = nil
		_, err = r.admin.CoreV1().Nodes().UpdateStatus(t.Context(), n, metav1.UpdateOptions{})
		check(t, err)
	}
}

var threeNodes = map[string]string{"n1": "10.244.0.0/24", "n2": "10.244.1.0/24", "n3": "10.244.2.0/24"}

// startControllers starts kube-controller-manager, and the kubelets.
func (r *rig) startControllers(t *testing.T) {
	t.Helper()
	kubeconfig, err := r.api.WriteKubeconfig("controllers", "")
	check(t, err)
	path, err := kubeapi.Program("kube-controller-manager")
	check(t, err)
	_, err = r.api.Host.Start(nettest.Program{Path: path, Args: []string{
		"--kubeconfig=" + kubeconfig, "--leader-elect=false", "--secure-port=0",
		"--controllers=daemonset-controller,serviceaccount-controller,namespace-controller,garbage-collector-controller",
	}})
	check(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			r.kubelets(ctx)
			time.Sleep(20 * time.Millisecond)
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
}

// kubelets does one round of what kubelets and the scheduler do with DaemonSets' pods
// and errands. What fails is tried again in the next one.
func (r *rig) kubelets(ctx context.Context) {
	pods, err := r.admin.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return
	}
	for _, p := range pods.Items {
		of := r.admin.CoreV1().Pods(p.Namespace)
		switch {
		case p.DeletionTimestamp != nil:
			var now int64
			_ = of.Delete(ctx, p.Name, metav1.DeleteOptions{GracePeriodSeconds: &now})
		case p.Spec.NodeName == "":
			_ = of.Bind(ctx, &corev1.Binding{ObjectMeta: metav1.ObjectMeta{Name: p.Name}, Target: corev1.ObjectReference{Kind: "Node", Name: nodeOf(p)}}, metav1.CreateOptions{})
		case p.Status.Phase == corev1.PodPending || p.Status.Phase == "":
			r.start(ctx, &p)
		}
	}
}

// start lets a pod run, or end at once, or fail as the test wants it.
func (r *rig) start(ctx context.Context, p *corev1.Pod) {
	r.mu.Lock()
	says, bad := r.bad[p.Spec.NodeName+"/"+p.Spec.Containers[0].Name]
	r.mu.Unlock()
	status := corev1.ContainerStatus{Name: p.Spec.Containers[0].Name, Ready: !bad}
	p.Status.Phase = corev1.PodRunning
	switch once := p.Spec.RestartPolicy == corev1.RestartPolicyNever; {
	case once && bad:
		p.Status.Phase = corev1.PodFailed
		status.State.Terminated = &corev1.ContainerStateTerminated{ExitCode: 1, Message: says}
	case once:
		p.Status.Phase = corev1.PodSucceeded
		status.State.Terminated = &corev1.ContainerStateTerminated{}
	case bad:
		p.Status.Phase = corev1.PodPending
		status.State.Waiting = &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}
		status.LastTerminationState.Terminated = &corev1.ContainerStateTerminated{ExitCode: 1, Message: says}
	}
	ready := corev1.ConditionFalse
	if p.Status.Phase == corev1.PodRunning {
		ready = corev1.ConditionTrue
	}
	p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: ready, LastTransitionTime: metav1.Now()}}
	p.Status.ContainerStatuses = []corev1.ContainerStatus{status}
	if _, err := r.admin.CoreV1().Pods(p.Namespace).UpdateStatus(ctx, p, metav1.UpdateOptions{}); err == nil && !(bad && p.Status.Phase == corev1.PodPending) {
		r.mu.Lock()
		r.ran = append(r.ran, p.Spec.NodeName+" "+p.Spec.Containers[0].Name)
		r.mu.Unlock()
	}
}

// mend lets what failed run.
func (r *rig) mend() {
	r.mu.Lock()
	r.bad = map[string]string{}
	r.mu.Unlock()
}

// results are the changes as "Kind name result".
func results(report Report) string {
	var out []string
	for _, c := range report.Changes {
		out = append(out, c.Kind+" "+c.Name+" "+c.Result)
	}
	return strings.Join(out, "\n")
}
