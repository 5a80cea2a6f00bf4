package install

import (
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const allCreated = `Namespace twill-system created
ServiceAccount twill-system/twill created
ClusterRole twill created
ClusterRoleBinding twill created
ConfigMap twill-system/twill-config created
DaemonSet twill-system/twill created`

// TestInstall goes through the life of an installation.
func TestInstall(t *testing.T) {
	r := newRig(t)
	r.addNodes(t, threeNodes)
	o := Options{Wait: time.Minute, Apply: ApplyOptions{DryRun: true}}

	report, err := r.Install(t.Context(), o)
	check(t, err)
	if got := results(report); got != allCreated || !report.Changed() {
		t.Errorf("dry run:\n%s", got)
	}
	if _, err := r.admin.CoreV1().Namespaces().Get(t.Context(), "twill-system", metav1.GetOptions{}); err == nil {
		t.Error("the dry run has made the namespace")
	}

	r.startControllers(t)
	o.Apply.DryRun = false
	report, err = r.Install(t.Context(), o)
	check(t, err)
	if got := results(report); got != allCreated {
		t.Errorf("install:\n%s", got)
	}
	if len(report.Nodes) != 3 || slices.ContainsFunc(report.Nodes, func(n NodeState) bool { return !n.Ready }) {
		t.Errorf("nodes %v", report.Nodes)
	}

	report, err = r.Install(t.Context(), o)
	check(t, err)
	if report.Changed() || len(report.Changes) != 6 {
		t.Errorf("the second run changed:\n%s", results(report))
	}

	// Values stay, and what is added is told by field.
	o.Values = Values{}
	o.Values.Set("twill.backend", "host-gw")
	report, err = r.Install(t.Context(), o)
	check(t, err)
	if !strings.Contains(results(report), "ConfigMap twill-system/twill-config changed") || !strings.Contains(results(report), "DaemonSet twill-system/twill unchanged") {
		t.Errorf("another backend:\n%s", results(report))
	}
	o.Values = Values{}
	o.Values.Set("twill.allocateSubnets", true)
	report, err = r.Install(t.Context(), o)
	check(t, err)
	cm, err := r.admin.CoreV1().ConfigMaps("twill-system").Get(t.Context(), "twill-config", metav1.GetOptions{})
	check(t, err)
	if !strings.Contains(cm.Data["net-conf.json"], "host-gw") || !strings.Contains(results(report), "Role twill-system/twill created") {
		t.Errorf("values were lost: %s\n%s", cm.Data, results(report))
	}

	// Back to the defaults: the rights go, too.
	o.Values, o.Reset = Values{}, true
	report, err = r.Install(t.Context(), o)
	check(t, err)
	if got := results(report); !strings.Contains(got, "RoleBinding twill-system/twill deleted\nRole twill-system/twill deleted") {
		t.Errorf("rights stay:\n%s", got)
	}

	// What somebody else has set is not taken from them.
	_, err = r.admin.CoreV1().ConfigMaps("twill-system").Patch(t.Context(), "twill-config", applyPatch,
		[]byte(`{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"twill-config"},"data":{"net-conf.json":"{}"}}`), metav1.PatchOptions{FieldManager: "somebody", Force: new(true)})
	check(t, err)
	_, err = r.Install(t.Context(), o)
	wantError(t, err, "apply ConfigMap twill-system/twill-config", `"somebody"`, "--force")
	o.Apply.Force = true
	_, err = r.Install(t.Context(), o)
	check(t, err)

	r.uninstall(t)
}

// uninstall is interrupted by a node that cannot be cleaned.
func (r *rig) uninstall(t *testing.T) {
	r.mu.Lock()
	r.bad["n2/clean-1"] = "flush: no such device\n"
	r.mu.Unlock()
	o := UninstallOptions{Namespace: "twill-system", Wait: time.Minute, DryRun: true}
	report, err := r.Uninstall(t.Context(), o)
	check(t, err)
	if !strings.Contains(results(report), "DaemonSet twill-system/twill deleted") {
		t.Errorf("dry run:\n%s", results(report))
	}
	o.DryRun = false
	report, err = r.Uninstall(t.Context(), o)
	wantError(t, err, "run clean on node n2: clean-1 ended with code 1: flush: no such device", "--force")
	if len(report.Nodes) != 3 || !report.Nodes[0].Ready || report.Nodes[1].Ready || !report.Nodes[2].Ready {
		t.Errorf("nodes %v", report.Nodes)
	}
	r.mend()
	report, err = r.Uninstall(t.Context(), o)
	check(t, err)
	want := `DaemonSet twill-system/twill deleted
ConfigMap twill-system/twill-config deleted
RoleBinding twill-system/twill absent
Role twill-system/twill absent
ClusterRoleBinding twill deleted
ClusterRole twill deleted
ServiceAccount twill-system/twill deleted
Namespace twill-system deleted`
	if got := results(report); got != want {
		t.Errorf("uninstall:\n%s", got)
	}
	if n := slices.Index(r.ran, "n2 clean-1"); n < 0 {
		t.Errorf("n2 was not cleaned: %q", r.ran)
	}
	report, err = r.Uninstall(t.Context(), o)
	check(t, err)
	if report.Changed() {
		t.Errorf("the second run changed:\n%s", results(report))
	}
}

// TestPreflight: what is wrong with a cluster is found before anything is changed.
func TestPreflight(t *testing.T) {
	r := newRig(t)
	try := func(set string, parts ...string) {
		t.Helper()
		v, err := ParseValues(nil, []string{set}, nil)
		check(t, err)
		_, err = r.Install(t.Context(), Options{Values: v})
		wantError(t, err, parts...)
	}
	r.addNodes(t, map[string]string{"a": "10.244.0.0/24", "b": "10.99.1.0/24", "c": ""})
	try("twill.vni=2", "find the pods' network: node b has podCIDR 10.99.1.0/24", "--pod-cidr")
	try("podCidr=10.244.0.0/16", "podCIDR 10.99.1.0/24 of node b is not in the pods' network 10.244.0.0/16", "no podCIDR on c (IPv4)", "--allocate-node-cidrs=true --cluster-cidr=10.244.0.0/16", "allocateSubnets")
	try("podCidr=10.0.0.0/8\\,x", "check values", "podCidr")
	try("twill.backend=ipsec", "check values", "twill/backend")
	try("twill.netConfJson=x", "check net-conf.json")
	try("podCidr=10.0.0.0/33", "check net-conf.json", "10.0.0.0/33")

	_, err := r.admin.CoreV1().ConfigMaps("kube-system").Create(t.Context(), &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "kubeadm-config"},
		Data:       map[string]string{"ClusterConfiguration": "networking:\n  podSubnet: 10.99.0.0/16\n"},
	}, metav1.CreateOptions{})
	check(t, err)
	try("twill.vni=2", "podCIDR 10.244.0.0/24 of node a is not in the pods' network 10.99.0.0/16")
	if !slices.Contains(r.said, "pods' network 10.99.0.0/16, from kubeadm's podSubnet") {
		t.Errorf("said %q", r.said)
	}

	r.addFlannel(t, "kube-flannel", flannelDaemonSet)
	try("podCidr=10.0.0.0/8", "DaemonSet kube-flannel/kube-flannel-ds is flannel", "netctl migrate-from-flannel")
	if _, err := r.admin.CoreV1().Namespaces().Get(t.Context(), "twill-system", metav1.GetOptions{}); err == nil {
		t.Error("the namespace was made nevertheless")
	}

	check(t, r.api.Stop())
	try("podCidr=10.0.0.0/8", "ask the API server for its version", "can be reached")
}
