package store

import (
	"strings"
	"testing"
)

// TestKubeTwins has a node that was renamed: its former Node is a Problem to its peers,
// packets go to both, and it is none once the former Node is deleted.
func TestKubeTwins(t *testing.T) {
	former, now, peer := born(10, flannelNode(1)), born(20, flannelNode(2)), born(5, flannelNode(3))
	former.Annotations[prefix+publicIPName] = now.Annotations[prefix+publicIPName]
	f := kubeFoldOf(t, "n3", goodConfig, former, now, peer)
	s := f.snapshot()
	if got := nodesOf(s); got != "n1 n2 n3" {
		t.Errorf("leases of %s, want of all", got)
	}
	if len(s.Problems) != 1 || s.Problems[0].Object != "node n1" || !strings.Contains(s.Problems[0].Remedy, "kubectl delete node n1") {
		t.Errorf("problems %v, want one of node n1", s.Problems)
	}
	f.remove("n1")
	if s := f.snapshot(); len(s.Problems) != 0 {
		t.Errorf("problems %v of a Node that is gone", s.Problems)
	}
	// overlay.Desired tells the node itself.
	if s := kubeFoldOf(t, "n2", goodConfig, former, now, peer).snapshot(); len(s.Problems) != 0 {
		t.Errorf("the node itself is told twice: %v", s.Problems)
	}
}
