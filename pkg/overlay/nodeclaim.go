package overlay

import (
	"fmt"
	"slices"
)

// NodeClaim is what a node of Kubernetes wants of the API: that its Node says
// Attrs. Which lease is its own follows from its name, and its subnets are given
// to it: nobody else writes either.
type NodeClaim struct {
	Node  string
	Attrs Attrs
	// Allocate lets a node without podCIDRs take free subnets of the configuration,
	// those of Prefer if it can.
	Allocate bool
	Prefer   Subnets
	Ready    bool // the kernel is as the leases say
}

// Next returns the next write that brings the API closer to the claim.
func (c NodeClaim) Next(cfg Config, snap *Snapshot, draw func(n int) int) (Step, error) {
	if snap.Node.Missing {
		return Step{}, fmt.Errorf("there is no node %q in the API; is that the name it is registered with? see `kubectl get nodes`, and --hostname-override of its kubelet", c.Node)
	}
	i := slices.IndexFunc(snap.Leases, func(l *Lease) bool { return l.Node == c.Node })
	if i < 0 {
		return c.assign(cfg, snap, draw)
	}
	own := snap.Leases[i]
	if err := cfg.Check(own.Subnets); err != nil {
		return Step{}, fmt.Errorf("podCIDRs %v of node %s: %w; Network in net-conf.json and --cluster-cidr of kube-controller-manager must agree", own.All(), c.Node, err)
	}
	switch {
	case own.Attrs != c.Attrs || own.Err != nil:
		step := Step{Act: Update, Lease: *own, Why: "what this node publishes has changed"}
		step.Lease.Attrs, step.Lease.Err = c.Attrs, nil
		return step, nil
	case c.Ready && snap.Node.Unavailable:
		return Step{Act: Announce, Lease: *own, Why: "packets find their way"}, nil
	}
	return Step{Act: Hold, Lease: *own}, nil
}

// assign gives a node its first subnets.
func (c NodeClaim) assign(cfg Config, snap *Snapshot, draw func(n int) int) (Step, error) {
	if !c.Allocate {
		return Step{}, fmt.Errorf("node %s has no podCIDR; start kube-controller-manager with --allocate-node-cidrs and --cluster-cidr=%s, or every twilld with --kube-allocate-subnets", c.Node, cfg.clusterCIDR())
	}
	leases := slices.Clone(snap.Leases)
	for _, t := range snap.Taken {
		leases = append(leases, &Lease{Subnets: t})
	}
	n, err := cfg.pick(leases, c.Prefer, draw)
	if err != nil {
		return Step{}, err
	}
	return Step{Act: Create, Lease: Lease{Subnets: n, Node: c.Node, Attrs: c.Attrs}, Why: "this node has no podCIDR"}, nil
}

// clusterCIDR is the networks as kube-controller-manager is told them.
func (c Config) clusterCIDR() string {
	var s string
	for i, n := range c.Networks() {
		if i > 0 {
			s += ","
		}
		s += n.String()
	}
	return s
}
