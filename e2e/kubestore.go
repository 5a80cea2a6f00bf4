package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/twill-net/twill/pkg/nettest/kubeapi"
)

// KubeStore is a kube-apiserver that keeps the leases. Nothing else of Kubernetes
// runs: the hosts' Nodes are made by hand.
type KubeStore struct {
	*kubeapi.Server
	kubeconfig string // of twilld's ServiceAccount, with the rights of the manifests
}

func (c *Cluster) startKube(ctx context.Context) error {
	s, err := kubeapi.Start(c.Lab)
	if err != nil {
		return err
	}
	c.Etcd, c.Kube = s.Etcd, &KubeStore{Server: s}
	token, err := s.AddServiceAccount(ctx, "twill-system", "twill")
	if err == nil {
		c.Kube.kubeconfig, err = s.WriteKubeconfig("twill", token)
	}
	if err == nil {
		err = c.Kube.grant(ctx)
	}
	for i := 0; i < len(c.Nodes) && err == nil; i++ {
		err = c.Kube.AddNode(ctx, c.Nodes[i].Name, i+1)
	}
	if err != nil {
		return fmt.Errorf("start Kubernetes as store: %w", err)
	}
	return nil
}

// grant gives twilld the rights that the manifests give it.
func (k *KubeStore) grant(ctx context.Context) error {
	meta := metav1.ObjectMeta{Name: "twill"}
	_, err := k.Admin.RbacV1().ClusterRoles().Create(ctx, &rbacv1.ClusterRole{ObjectMeta: meta, Rules: []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"nodes"}, Verbs: []string{"get", "list", "watch"}},
		{APIGroups: []string{""}, Resources: []string{"nodes/status"}, Verbs: []string{"patch"}},
	}}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	_, err = k.Admin.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
		ObjectMeta: meta, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "twill"},
		Subjects: []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: "twill-system", Name: "twill"}},
	}, metav1.CreateOptions{})
	return err
}

// AddNode makes a Node with the podCIDRs of number n.
func (k *KubeStore) AddNode(ctx context.Context, name string, n int) error {
	cidrs := []string{fmt.Sprintf("10.5.%d.0/24", n), fmt.Sprintf("fd00:5:0:%x::/64", n)}
	_, err := k.Admin.CoreV1().Nodes().Create(ctx, &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{PodCIDR: cidrs[0], PodCIDRs: cidrs},
	}, metav1.CreateOptions{})
	return err
}

// configureKube replaces each node's net-conf.json at once, as kubelets do by and by.
func (c *Cluster) configureKube(config string) error {
	for _, n := range c.Nodes {
		if err := os.WriteFile(n.netConf()+".new", []byte(config), 0o644); err != nil {
			return err
		}
		if err := os.Rename(n.netConf()+".new", n.netConf()); err != nil {
			return err
		}
	}
	return nil
}

func (n *Node) netConf() string { return filepath.Join(n.cluster.Lab.Dir, n.Name+"-net-conf.json") }

func (n *Node) kubeArgs() []string {
	return []string{"--kube-subnet-mgr", "--kubeconfig-file=" + n.cluster.Kube.kubeconfig, "--net-config-path=" + n.netConf()}
}
