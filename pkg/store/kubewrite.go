package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/twill-net/twill/pkg/overlay"
)

// Do makes one write to this node's Node. If done is false, somebody else was
// quicker: decide again, from a newer Snapshot. After an error the write may have
// happened or not; a later Snapshot shows it.
//
// A Snapshot newer than the one decided on need not show the write yet. So after a
// Create, whatever came of it, the claim must Prefer the subnets of the Step.
func (k *Kube) Do(ctx context.Context, step overlay.Step) (done bool, err error) {
	if step.Act == overlay.Hold {
		return true, nil
	}
	name := k.node.Load()
	if name == nil || step.Lease.Node != *name {
		return false, fmt.Errorf("%s the lease of node %q: twilld writes to no Node but its own", step.Act, step.Lease.Node)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	switch step.Act {
	case overlay.Update:
		return k.patchStatus(ctx, types.MergePatchType, map[string]any{
			"metadata": map[string]any{"annotations": k.names.fields(step.Lease.Attrs)},
		})
	case overlay.Announce:
		return k.patchStatus(ctx, types.StrategicMergePatchType, map[string]any{
			"status": map[string]any{"conditions": []any{networkUp(time.Now())}},
		})
	case overlay.Create:
		return k.claim(ctx, step.Lease.Subnets)
	default:
		return false, fmt.Errorf("%s the podCIDRs of node %s: Kubernetes takes them away with the Node alone: kubectl delete node %s", step.Act, *name, *name)
	}
}

// networkUp is the condition that takes the taint
// node.kubernetes.io/network-unavailable from a Node.
func networkUp(now time.Time) corev1.NodeCondition {
	at := metav1.NewTime(now)
	return corev1.NodeCondition{
		Type: corev1.NodeNetworkUnavailable, Status: corev1.ConditionFalse,
		Reason: "TwillIsUp", Message: "Twill is running on this node",
		LastHeartbeatTime: at, LastTransitionTime: at,
	}
}

// patchStatus changes the status and metadata of this node's Node. done is false if
// there is none.
func (k *Kube) patchStatus(ctx context.Context, kind types.PatchType, patch any) (done bool, err error) {
	err = k.patchNode(ctx, kind, patch, "status")
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}

func (k *Kube) patchNode(ctx context.Context, kind types.PatchType, patch any, sub ...string) error {
	text, err := json.Marshal(patch)
	if err != nil {
		return fmt.Errorf("write patch of a Node: %w", err)
	}
	c, what := k.client.Load(), access{verb: "patch", resource: "nodes", name: *k.node.Load()}
	if len(sub) > 0 {
		what.resource += "/" + sub[0]
	}
	return c.explain(what, c.core.Patch(kind).Resource("nodes").Name(what.name).SubResource(sub...).Body(text).Do(ctx).Error())
}

// claim gives this node free subnets. Each is first claimed by an object named after
// it, which only one node can make; then they are written into the Node.
func (k *Kube) claim(ctx context.Context, want overlay.Subnets) (done bool, err error) {
	if !k.cfg.Allocate {
		return false, errors.New("allocate podCIDRs: not without --kube-allocate-subnets")
	}
	node, err := k.ownNode(ctx)
	if apierrors.IsNotFound(err) || err == nil && len(node.Spec.PodCIDRs) > 0 {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	for _, p := range want.All() {
		if done, err := k.claimSubnet(ctx, node, p); !done || err != nil {
			return false, err
		}
	}
	if err := k.release(ctx, node, want); err != nil {
		return false, err
	}
	var cidrs []string
	for _, p := range want.All() {
		cidrs = append(cidrs, p.String())
	}
	// A Node's podCIDRs can be set once. The kubelet writes to its Node all the time,
	// so a newer version is no reason to give up.
	for {
		err = k.patchNode(ctx, types.MergePatchType, map[string]any{
			"metadata": map[string]any{"resourceVersion": node.ResourceVersion, "uid": node.UID},
			"spec":     map[string]any{"podCIDR": cidrs[0], "podCIDRs": cidrs},
		})
		if !apierrors.IsConflict(err) {
			break
		}
		uid := node.UID
		if node, err = k.ownNode(ctx); err != nil || node.UID != uid || len(node.Spec.PodCIDRs) > 0 {
			break
		}
	}
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	return err == nil && len(node.Spec.PodCIDRs) == 0, err
}

// ownNode asks for this node's Node as it is now.
func (k *Kube) ownNode(ctx context.Context) (*corev1.Node, error) {
	c, what := k.client.Load(), access{verb: "get", resource: "nodes", name: *k.node.Load()}
	n := &corev1.Node{}
	err := c.core.Get().Resource("nodes").Name(what.name).Do(ctx).Into(n)
	return n, c.explain(what, err)
}
