package store

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"sync"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/twill-net/twill/pkg/overlay"
)

// The labels of a claim, and the annotation with the subnet in full.
const (
	claimLabel      = "app.kubernetes.io/name=twill"
	claimSubnetName = "twill.net/subnet"
	claimNodeLabel  = "twill.net/node-uid"
)

// claims are subnets that other nodes have claimed and that no Node may show yet.
// Only a node that lost a race asks for them.
type claims struct {
	news chan struct{}

	mu     sync.Mutex
	others []overlay.Subnets
}

func (c *claims) taken() []overlay.Subnets {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.others)
}

func (c *claims) set(others []overlay.Subnets) {
	c.mu.Lock()
	c.others = others
	c.mu.Unlock()
	select {
	case c.news <- struct{}{}:
	default:
	}
}

// claimName is a subnet as the name of an object: of lower case letters, digits, "-"
// and "." alone.
func claimName(p netip.Prefix) string {
	return "subnet-" + strings.NewReplacer("/", "-", ":", ".").Replace(p.Masked().Addr().StringExpanded()+p.String()[strings.LastIndexByte(p.String(), '/'):])
}

// newClaim is an object that belongs to the Node: it goes with it.
func newClaim(node *corev1.Node, namespace string, p netip.Prefix) *coordinationv1.Lease {
	holder := node.Name
	return &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{
			Name: claimName(p), Namespace: namespace,
			Labels:          map[string]string{"app.kubernetes.io/name": "twill", claimNodeLabel: string(node.UID)},
			Annotations:     map[string]string{claimSubnetName: p.String()},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: node.Name, UID: node.UID}},
		},
		Spec: coordinationv1.LeaseSpec{HolderIdentity: &holder},
	}
}

func claimOf(l *coordinationv1.Lease, uid types.UID) bool {
	return l.Labels[claimNodeLabel] == string(uid)
}

// claimSubnet claims one subnet; done is false if another node has it. Then the next
// Snapshot names all that others have claimed.
func (k *Kube) claimSubnet(ctx context.Context, node *corev1.Node, p netip.Prefix) (done bool, err error) {
	c := k.client.Load()
	claim := newClaim(node, k.cfg.PodNamespace, p)
	what := k.claimAccess("create", claim.Name)
	err = c.explain(what, c.coordination.Post().Namespace(what.namespace).Resource("leases").Body(claim).Do(ctx).Error())
	if !apierrors.IsAlreadyExists(err) {
		return err == nil, err
	}
	all, err := k.listClaims(ctx, claimLabel)
	if err != nil {
		return false, err
	}
	var others []overlay.Subnets
	ours := false
	for i := range all {
		l := &all[i]
		held, err := netip.ParsePrefix(l.Annotations[claimSubnetName])
		switch {
		case claimOf(l, node.UID):
			ours = ours || l.Name == claim.Name
		case err != nil: // somebody's Lease that is no claim
		case held.Addr().Is4():
			others = append(others, overlay.Subnets{V4: held})
		default:
			others = append(others, overlay.Subnets{V6: held})
		}
	}
	k.claimed.set(others)
	return ours, nil
}

// release gives up what this node has claimed before and does not want any more.
func (k *Kube) release(ctx context.Context, node *corev1.Node, want overlay.Subnets) error {
	c := k.client.Load()
	ours, err := k.listClaims(ctx, claimLabel+","+claimNodeLabel+"="+string(node.UID))
	if err != nil {
		return err
	}
	keep := map[string]bool{}
	for _, p := range want.All() {
		keep[claimName(p)] = true
	}
	for i := range ours {
		if keep[ours[i].Name] {
			continue
		}
		what := k.claimAccess("delete", ours[i].Name)
		err := c.coordination.Delete().Namespace(what.namespace).Resource("leases").Name(what.name).Do(ctx).Error()
		if err != nil && !apierrors.IsNotFound(err) {
			return c.explain(what, err)
		}
	}
	return nil
}

func (k *Kube) listClaims(ctx context.Context, selector string) ([]coordinationv1.Lease, error) {
	c, what := k.client.Load(), k.claimAccess("list", "")
	var all coordinationv1.LeaseList
	err := c.coordination.Get().Namespace(what.namespace).Resource("leases").Param("labelSelector", selector).Do(ctx).Into(&all)
	return all.Items, c.explain(what, err)
}

func (k *Kube) claimAccess(verb, name string) access {
	return access{verb: verb, resource: "leases", group: "coordination.k8s.io", namespace: k.cfg.PodNamespace, name: name}
}
