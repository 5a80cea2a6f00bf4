package install

import (
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	sigsyaml "sigs.k8s.io/yaml"
)

// flannelNetConf has a key order, a port and an indent of its own.
const flannelNetConf = "{\n   \"Network\": \"10.244.0.0/16\", \"EnableNFTables\": false,\n  \"Backend\": {\"Type\": \"vxlan\"}\n}\n"

const flannelDaemonSet = `
spec:
  selector: {matchLabels: {app: flannel}}
  template:
    metadata: {labels: {app: flannel}}
    spec:
      affinity:
        nodeAffinity:
          requiredDuringSchedulingIgnoredDuringExecution:
            nodeSelectorTerms:
              - matchExpressions: [{key: kubernetes.io/os, operator: In, values: [linux]}]
      hostNetwork: true
      tolerations: [{operator: Exists}]
      serviceAccountName: flannel
      initContainers:
        - {name: install-cni-plugin, image: cni, volumeMounts: [{name: cni-plugin, mountPath: /opt/cni/bin}]}
        - {name: install-cni, image: f, volumeMounts: [{name: cni, mountPath: /etc/cni/net.d}, {name: flannel-cfg, mountPath: /etc/kube-flannel/}]}
      containers:
        - name: kube-flannel
          image: f
          command: [/opt/bin/flanneld]
          args: [--ip-masq, --kube-subnet-mgr, -iface, eth1, --healthz-port=8081]
          env:
            - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
            - {name: EVENT_QUEUE_DEPTH, value: "5000"}
            - {name: FLANNELD_PUBLIC_IP, value: 203.0.113.9}
          volumeMounts: [{name: run, mountPath: /run/flannel}, {name: flannel-cfg, mountPath: /etc/kube-flannel/}]
      volumes:
        - {name: run, hostPath: {path: /run/flannel}}
        - {name: cni-plugin, hostPath: {path: /usr/libexec/cni}}
        - {name: cni, hostPath: {path: /etc/cni/net.d}}
        - {name: flannel-cfg, configMap: {name: kube-flannel-cfg}}
`

func parseDaemonSet(t *testing.T, text string) *appsv1.DaemonSet {
	t.Helper()
	ds := &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Name: "kube-flannel-ds"}}
	check(t, sigsyaml.UnmarshalStrict([]byte(text), ds))
	return ds
}

// addFlannel makes the objects of flannel's manifest.
func (r *rig) addFlannel(t *testing.T, namespace, daemonSet string) {
	t.Helper()
	ctx, core := t.Context(), r.admin.CoreV1()
	if namespace == "kube-flannel" {
		_, err := core.Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace, Labels: map[string]string{"pod-security.kubernetes.io/enforce": "privileged"}}}, metav1.CreateOptions{})
		check(t, err)
	}
	meta := metav1.ObjectMeta{Name: "flannel"}
	_, err := core.ServiceAccounts(namespace).Create(ctx, &corev1.ServiceAccount{ObjectMeta: meta}, metav1.CreateOptions{})
	check(t, err)
	_, err = r.admin.RbacV1().ClusterRoles().Create(ctx, &rbacv1.ClusterRole{ObjectMeta: meta}, metav1.CreateOptions{})
	check(t, err)
	_, err = r.admin.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
		ObjectMeta: meta, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "flannel"},
		Subjects: []rbacv1.Subject{{Kind: "ServiceAccount", Name: "flannel", Namespace: namespace}},
	}, metav1.CreateOptions{})
	check(t, err)
	_, err = core.ConfigMaps(namespace).Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "kube-flannel-cfg"}, Data: map[string]string{"net-conf.json": flannelNetConf}}, metav1.CreateOptions{})
	check(t, err)
	_, err = r.admin.AppsV1().DaemonSets(namespace).Create(ctx, parseDaemonSet(t, daemonSet), metav1.CreateOptions{})
	check(t, err)
}

// where says which daemon's pod is ready on which node, as "n1=flannel n2=twill".
func (r *rig) where(t *testing.T) string {
	t.Helper()
	pods, err := r.admin.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{})
	check(t, err)
	var out []string
	for _, p := range pods.Items {
		if app := p.Labels["app"]; app != "" && p.DeletionTimestamp == nil && ready(p) {
			out = append(out, p.Spec.NodeName+"="+app)
		}
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func (r *rig) awaits(t *testing.T, want string) {
	t.Helper()
	got := ""
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if got = r.where(t); got == want {
			return
		}
	}
	t.Fatalf("daemons run as %q, want %q", got, want)
}

// TestMigrate goes to Twill, back to flannel, and to Twill for good.
func TestMigrate(t *testing.T) {
	r := newRig(t)
	r.addNodes(t, threeNodes)
	r.addFlannel(t, "kube-flannel", flannelDaemonSet)
	r.startControllers(t)
	r.awaits(t, "n1=flannel n2=flannel n3=flannel")
	uids := r.podUIDs(t)
	o := MigrateOptions{Wait: time.Minute, Apply: ApplyOptions{DryRun: true}}

	report, err := r.Migrate(t.Context(), o)
	check(t, err)
	if got := results(report); got != allCreated+"\nDaemonSet kube-flannel/kube-flannel-ds changed" {
		t.Errorf("dry run:\n%s", got)
	}
	o.Apply.DryRun = false
	o.Nodes = []string{"n1"}
	_, err = r.Migrate(t.Context(), o)
	check(t, err)
	r.awaits(t, "n1=twill n2=flannel n3=flannel")
	if now := r.podUIDs(t); now["n2"] != uids["n2"] || now["n3"] != uids["n3"] {
		t.Error("flannel was restarted on nodes that stay its own")
	}
	r.checkTakenOver(t)

	// The second does not come up: the third is not touched, and both ways go on.
	o.Nodes, o.Wait = nil, 3*time.Second
	r.bad["n2/twilld"] = "twilld: no uplink\n"
	report, err = r.Migrate(t.Context(), o)
	wantError(t, err, "migrate node n2: twilld ended with code 1: twilld: no uplink", "--back --node n2")
	r.awaits(t, "n1=twill n3=flannel")
	if len(report.Nodes) != 2 || !report.Nodes[0].Ready || report.Nodes[1].Ready {
		t.Errorf("nodes %v", report.Nodes)
	}
	_, err = r.Finish(t.Context(), o)
	wantError(t, err, "node n2 is not on Twill", "node n3 is not on Twill")
	r.mend()
	o.Wait = time.Minute
	o.Nodes = []string{"n2"}
	_, err = r.Back(t.Context(), o)
	check(t, err)
	r.awaits(t, "n1=twill n2=flannel n3=flannel")
	if want := []string{"n2 return-0", "n2 kube-flannel", "n2 handback-0"}; !inOrder(r.ran, want) {
		t.Errorf("ran %q, want %q in this order", r.ran, want)
	}

	o.Nodes = nil
	_, err = r.Migrate(t.Context(), o)
	check(t, err)
	r.awaits(t, "n1=twill n2=twill n3=twill")
	report, err = r.Migrate(t.Context(), o)
	check(t, err)
	if report.Changed() {
		t.Errorf("the second run changed:\n%s", results(report))
	}

	// All back: everything is as it was.
	was := r.flannelSpec(t)
	if was.UpdateStrategy.Type != appsv1.OnDeleteDaemonSetStrategyType {
		t.Errorf("strategy during the migration: %v", was.UpdateStrategy)
	}
	_, err = r.Back(t.Context(), o)
	check(t, err)
	r.awaits(t, "n1=flannel n2=flannel n3=flannel")
	is, want := r.flannelSpec(t), parseDaemonSet(t, flannelDaemonSet)
	if is.UpdateStrategy.Type != appsv1.RollingUpdateDaemonSetStrategyType || is.Template.Spec.Affinity.String() != want.Spec.Template.Spec.Affinity.String() {
		t.Errorf("flannel's DaemonSet was not restored: %v %v", is.UpdateStrategy, is.Template.Spec.Affinity)
	}
	r.awaitNamespaceGone(t, "twill-system")

	_, err = r.Migrate(t.Context(), o)
	check(t, err)
	report, err = r.Finish(t.Context(), o)
	check(t, err)
	for _, want := range []string{"DaemonSet kube-flannel/kube-flannel-ds deleted", "ClusterRole flannel deleted", "ClusterRoleBinding flannel deleted", "ConfigMap kube-flannel/kube-flannel-cfg deleted", "DaemonSet twill-system/twill changed"} {
		if !strings.Contains(results(report), want) {
			t.Errorf("finish lacks %q:\n%s", want, results(report))
		}
	}
	r.awaits(t, "n1=twill n2=twill n3=twill")
	r.awaitNamespaceGone(t, "kube-flannel")
	nodes, err := r.admin.CoreV1().Nodes().List(t.Context(), metav1.ListOptions{LabelSelector: migrationLabel})
	check(t, err)
	if len(nodes.Items) > 0 {
		t.Errorf("labels stay on %d nodes", len(nodes.Items))
	}
	installed, err := r.Install(t.Context(), Options{Wait: time.Minute})
	check(t, err)
	if installed.Changed() {
		t.Errorf("install after the migration changed:\n%s", results(installed))
	}
	r.checkTakenOver(t)
	v := Values{}
	v.Set("twill.backend", "host-gw")
	_, err = r.Install(t.Context(), Options{Values: v})
	wantError(t, err, "twill.backend", "taken over from flannel", "--reset-values")
	_, err = r.Migrate(t.Context(), o)
	wantError(t, err, "look for flannel", "netctl install")
}

// checkTakenOver compares what Twill runs with to what flannel was told.
func (r *rig) checkTakenOver(t *testing.T) {
	t.Helper()
	cm, err := r.admin.CoreV1().ConfigMaps("twill-system").Get(t.Context(), configMapName, metav1.GetOptions{})
	check(t, err)
	if cm.Data[netConfKey] != flannelNetConf {
		t.Errorf("net-conf.json is %q", cm.Data[netConfKey])
	}
	ds, err := r.admin.AppsV1().DaemonSets("twill-system").Get(t.Context(), name, metav1.GetOptions{})
	check(t, err)
	spec := ds.Spec.Template.Spec
	if got, want := spec.Containers[0].Args, []string{"--kube-subnet-mgr", "--ip-masq", "--healthz-ip=127.0.0.1", "--healthz-port=8081", "--iface=eth1"}; !slices.Equal(got, want) {
		t.Errorf("args %q, want %q", got, want)
	}
	if !slices.Contains(spec.Containers[0].Env, corev1.EnvVar{Name: "FLANNELD_PUBLIC_IP", Value: "203.0.113.9"}) {
		t.Errorf("env %v", spec.Containers[0].Env)
	}
	if !slices.Contains(spec.InitContainers[0].Args, "--replace-flannel") {
		t.Errorf("init args %q", spec.InitContainers[0].Args)
	}
	if i := slices.IndexFunc(spec.Volumes, func(v corev1.Volume) bool { return v.Name == "cni-bin" }); spec.Volumes[i].HostPath.Path != "/usr/libexec/cni" {
		t.Errorf("plugins go to %s", spec.Volumes[i].HostPath.Path)
	}
}

func (r *rig) flannelSpec(t *testing.T) appsv1.DaemonSetSpec {
	t.Helper()
	ds, err := r.admin.AppsV1().DaemonSets("kube-flannel").Get(t.Context(), "kube-flannel-ds", metav1.GetOptions{})
	check(t, err)
	return ds.Spec
}

func (r *rig) podUIDs(t *testing.T) map[string]string {
	t.Helper()
	pods, err := r.admin.CoreV1().Pods("kube-flannel").List(t.Context(), metav1.ListOptions{})
	check(t, err)
	out := map[string]string{}
	for _, p := range pods.Items {
		out[p.Spec.NodeName] = string(p.UID)
	}
	return out
}

func (r *rig) awaitNamespaceGone(t *testing.T, namespace string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if _, err := r.admin.CoreV1().Namespaces().Get(t.Context(), namespace, metav1.GetOptions{}); apierrors.IsNotFound(err) {
			return
		}
	}
	t.Errorf("namespace %s stays", namespace)
}

// inOrder reports whether list holds all of want in that order, others between.
func inOrder(list, want []string) bool {
	for _, x := range list {
		if len(want) > 0 && x == want[0] {
			want = want[1:]
		}
	}
	return len(want) == 0
}

// TestFlannelRefused: what Twill cannot take over is named, all of it.
func TestFlannelRefused(t *testing.T) {
	for _, tt := range []struct {
		was, is string
		says    []string
	}{
		{"--ip-masq, ", "--ip-masqq=1, --etcd-endpoints=x, here, ", []string{"--ip-masqq: Twill knows no such flag", "--etcd-endpoints: has no meaning", "here: is no flag"}},
		{"--kube-subnet-mgr", "--kube-subnet-mgr=false", []string{"keeps its leases in etcd"}},
		{"-iface, eth1", "--public-ip=$(IP)", []string{"--public-ip=$(IP)", "--set twill.args"}},
		{"[/opt/bin/flanneld]", "[/bin/sh, -c]", []string{"/bin/sh"}},
		{"FLANNELD_PUBLIC_IP", "FLANNELD_NEWS", []string{"FLANNELD_NEWS: Twill knows no such setting"}},
	} {
		if !strings.Contains(flannelDaemonSet, tt.was) {
			t.Fatalf("the DaemonSet does not hold %q", tt.was)
		}
		ds := parseDaemonSet(t, strings.Replace(flannelDaemonSet, tt.was, tt.is, 1))
		f := &flannel{daemonSets: []appsv1.DaemonSet{*ds}, container: ds.Spec.Template.Spec.Containers[0]}
		f.config.Data = map[string]string{netConfKey: flannelNetConf}
		_, err := f.values()
		wantError(t, err, tt.says...)
	}
	f := &flannel{daemonSets: []appsv1.DaemonSet{*parseDaemonSet(t, flannelDaemonSet)}}
	f.config.Data = map[string]string{netConfKey: `{"Network":"10.244.0.0/16","Backend":{"Type":"ali-vpc"}}`}
	_, err := f.values()
	wantError(t, err, "take over flannel's net-conf.json", "ali-vpc")
}
