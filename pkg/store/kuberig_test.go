package store

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/nettest/kubeapi"
	"github.com/twill-net/twill/pkg/overlay"
)

const (
	prefix  = "flannel.alpha.coreos.com/"
	account = "system:serviceaccount:twill-system:twill"
)

// kubeRig is an API server and one host to reach it from, as twilld's ServiceAccount.
type kubeRig struct {
	*kubeapi.Server
	lab        *nettest.Lab
	host       *nettest.Host
	kubeconfig string
	netConf    string // file
}

func newKubeRig(t testing.TB, args ...string) *kubeRig {
	t.Helper()
	lab, hosts := nettest.NewHosts(t, 1)
	s, err := kubeapi.Start(lab, args...)
	check(t, err)
	r := &kubeRig{Server: s, lab: lab, host: hosts[0], netConf: filepath.Join(t.TempDir(), "net-conf.json")}
	r.configure(t, goodConfig)
	token, err := s.AddServiceAccount(t.Context(), "twill-system", "twill")
	check(t, err)
	r.kubeconfig, err = s.WriteKubeconfig("twill", token)
	check(t, err)
	r.allow(t, rights())
	return r
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// rights are all that twilld needs, by resource; namespaced ones behind "twill-system/".
func rights() map[string][]string {
	return map[string][]string{
		"nodes": {"get", "list", "watch", "patch"}, "nodes/status": {"patch"}, "pods": {"get"},
		"twill-system/leases": {"create", "list", "delete"},
	}
}

// allow makes the rights the only ones of twilld's ServiceAccount.
func (r *kubeRig) allow(t testing.TB, rights map[string][]string) {
	t.Helper()
	var cluster, namespaced []rbacv1.PolicyRule
	for resource, verbs := range rights {
		if name, ok := strings.CutPrefix(resource, "twill-system/"); ok {
			namespaced = append(namespaced, rbacv1.PolicyRule{Verbs: verbs, APIGroups: []string{"coordination.k8s.io"}, Resources: []string{name}})
		} else {
			cluster = append(cluster, rbacv1.PolicyRule{Verbs: verbs, APIGroups: []string{""}, Resources: []string{resource}})
		}
	}
	rbac, meta := r.Admin.RbacV1(), metav1.ObjectMeta{Name: "twill"}
	subjects := []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: "twill-system", Name: "twill"}}
	if _, err := rbac.ClusterRoles().Get(t.Context(), "twill", metav1.GetOptions{}); err == nil {
		_, err = rbac.ClusterRoles().Update(t.Context(), &rbacv1.ClusterRole{ObjectMeta: meta, Rules: cluster}, metav1.UpdateOptions{})
		check(t, err)
		_, err = rbac.Roles("twill-system").Update(t.Context(), &rbacv1.Role{ObjectMeta: meta, Rules: namespaced}, metav1.UpdateOptions{})
		check(t, err)
		return
	}
	_, err := rbac.ClusterRoles().Create(t.Context(), &rbacv1.ClusterRole{ObjectMeta: meta, Rules: cluster}, metav1.CreateOptions{})
	check(t, err)
	_, err = rbac.Roles("twill-system").Create(t.Context(), &rbacv1.Role{ObjectMeta: meta, Rules: namespaced}, metav1.CreateOptions{})
	check(t, err)
	_, err = rbac.ClusterRoleBindings().Create(t.Context(), &rbacv1.ClusterRoleBinding{
		ObjectMeta: meta, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "twill"}, Subjects: subjects,
	}, metav1.CreateOptions{})
	check(t, err)
	_, err = rbac.RoleBindings("twill-system").Create(t.Context(), &rbacv1.RoleBinding{
		ObjectMeta: meta, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: "twill"}, Subjects: subjects,
	}, metav1.CreateOptions{})
	check(t, err)
}

// configure replaces net-conf.json as a kubelet does.
func (r *kubeRig) configure(t testing.TB, config string) {
	t.Helper()
	check(t, os.WriteFile(r.netConf+".new", []byte(config), 0o644))
	check(t, os.Rename(r.netConf+".new", r.netConf))
}

func (r *kubeRig) config() KubeConfig {
	return KubeConfig{
		NodeName: "n1", Kubeconfig: r.kubeconfig, NetConfig: r.netConf, SetNetworkUnavailable: true,
		Dial: r.host.DialContext,
	}
}

// open opens the store of the rig, changed by the functions.
func (r *kubeRig) open(t testing.TB, change ...func(*KubeConfig)) *Kube {
	t.Helper()
	cfg := r.config()
	for _, c := range change {
		c(&cfg)
	}
	k, err := OpenKube(cfg)
	check(t, err)
	t.Cleanup(func() { check(t, k.Close()) })
	return k
}

func (r *kubeRig) addNode(t testing.TB, n *corev1.Node) *corev1.Node {
	t.Helper()
	out, err := r.Admin.CoreV1().Nodes().Create(t.Context(), n, metav1.CreateOptions{})
	check(t, err)
	return out
}

func (r *kubeRig) patchNode(t testing.TB, name, patch string) {
	t.Helper()
	_, err := r.Admin.CoreV1().Nodes().Patch(t.Context(), name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}, "status")
	check(t, err)
}

func (r *kubeRig) getNode(t testing.TB, name string) *corev1.Node {
	t.Helper()
	n, err := r.Admin.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
	check(t, err)
	return n
}

func (r *kubeRig) removeNode(t testing.TB, name string) {
	t.Helper()
	check(t, r.Admin.CoreV1().Nodes().Delete(t.Context(), name, metav1.DeleteOptions{}))
}

// bareNode is a Node as a kubelet registers it, with podCIDRs as the controller
// gives them.
func bareNode(name string, cidrs ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{PodCIDRs: cidrs}}
	if len(cidrs) > 0 {
		n.Spec.PodCIDR = cidrs[0]
	}
	return n
}

// flannelNode is node i as flannel leaves it: vxlan, 10.5.i.0/24.
func flannelNode(i int) *corev1.Node {
	n := bareNode(fmt.Sprintf("n%d", i), fmt.Sprintf("10.5.%d.0/24", i))
	n.Annotations = map[string]string{
		prefix + "kube-subnet-manager": "true",
		prefix + "backend-type":        "vxlan",
		prefix + "backend-data":        fmt.Sprintf(`{"VNI":1,"VtepMAC":"0e:2a:00:00:%02x:%02x"}`, i>>8, i&255),
		prefix + "public-ip":           fmt.Sprintf("198.18.%d.%d", i>>8, i&255),
	}
	return n
}

// named returns the Snapshot's lease of a node.
func named(s *overlay.Snapshot, node string) *overlay.Lease {
	for _, l := range s.Leases {
		if l.Node == node {
			return l
		}
	}
	return nil
}

// describeNodes writes out what a Snapshot says but for revisions, which a reader
// that comes later sees otherwise.
func describeNodes(s *overlay.Snapshot) string {
	if s == nil {
		return "none"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "config %+v\nnode %+v\ntaken %v\n", s.Config, s.Node, s.Taken)
	for _, l := range s.Leases {
		fmt.Fprintf(&b, "%s %s %s err=%v created=%d grant=%d\n", l.Node, l.Key(), describeValue(l), l.Err, l.Created, l.Grant)
	}
	for _, p := range s.Problems {
		fmt.Fprintf(&b, "problem %s\n", p)
	}
	return b.String()
}

// read is a fresh Snapshot.
func (r *kubeRig) read(t testing.TB, change ...func(*KubeConfig)) *overlay.Snapshot {
	t.Helper()
	k := r.open(t, change...)
	s, err := k.Snapshot(context.Background(), overlay.Config{})
	check(t, err)
	return s
}

func mustPrefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// wrongCA is an authority that has signed nothing.
func wrongCA(t testing.TB) string {
	t.Helper()
	ca, err := nettest.NewCA(t.TempDir(), "ca")
	check(t, err)
	return ca.Cert
}
