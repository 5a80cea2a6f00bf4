package store

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/twill-net/twill/pkg/overlay"
)

// kubeFold is what the API says of all Nodes, and the configuration's file. Not safe
// for concurrent use; the Snapshots it gives out are.
type kubeFold struct {
	names     annotations
	self      string // this node's name
	condition bool   // NetworkUnavailable is looked after
	path      string // of the configuration
	text      []byte // of it, when it was read last

	revision string // resource version; empty: everything has to be read
	least    string // the last one there was; what is read must not be older
	nodes    map[string]*kubeNode
	config   foldedConfig
	claimed  *claims
}

func newKubeFold(names annotations, c KubeConfig) *kubeFold {
	f := &kubeFold{names: names, condition: c.SetNetworkUnavailable, path: c.NetConfig, nodes: map[string]*kubeNode{}}
	f.config = foldedConfig{kind: "file", name: c.NetConfig, modified: unread}
	f.config.remedy = "mount ConfigMap twill-config there, or name the file with --net-config-path"
	return f
}

// readConfig reads the file again and reports whether it says something else. It is
// read anew each time, for the kubelet replaces a ConfigMap's files by moving a link.
func (f *kubeFold) readConfig() bool {
	if f.path == "" {
		return false
	}
	text, err := os.ReadFile(f.path)
	c := &f.config
	switch {
	case err != nil:
		if path := (*os.PathError)(nil); errors.As(err, &path) {
			err = path.Err
		}
		if c.modified == 0 && c.refused.Error() == err.Error() {
			return false
		}
		f.text = nil
		c.none(err)
	case c.modified > 0 && bytes.Equal(text, f.text):
		return false
	default:
		f.text = text
		c.set(text, max(0, c.modified)+1)
		// Any subnet of the network is good: kube-controller-manager gives them.
		c.good.V4.Assigned, c.good.V6.Assigned = true, true
	}
	return true
}

// seen takes note of a newer revision.
func (f *kubeFold) seen(revision string) { f.revision, f.least = revision, revision }

// expired asks for everything to be read again.
func (f *kubeFold) expired() { f.revision = "" }

// put takes a Node as it is now and reports whether it says anything new.
func (f *kubeFold) put(n *corev1.Node) bool {
	s := f.names.said(n)
	if n.Name == f.self {
		s.own = f.names.own(n, f.condition)
	}
	if old := f.nodes[n.Name]; old != nil && old.said == s {
		return false
	}
	f.nodes[n.Name] = &kubeNode{said: s}
	return true
}

func (f *kubeFold) remove(name string) bool {
	_, there := f.nodes[name]
	delete(f.nodes, name)
	return there
}

// keep has the Nodes that say what they said keep their leases, which are the same
// pointers then.
func (f *kubeFold) keep(old *kubeFold) {
	for name, n := range f.nodes {
		if o := old.nodes[name]; o != nil && o.said == n.said {
			f.nodes[name] = o
		}
	}
}

// number is the revision as a number, which it is with every API server there is;
// else 0.
func (f *kubeFold) number() int64 {
	n, err := strconv.ParseInt(f.revision, 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// snapshot returns the Snapshot, or nil as long as there never was a good
// configuration.
func (f *kubeFold) snapshot() *overlay.Snapshot {
	if !f.config.have {
		return nil
	}
	s := &overlay.Snapshot{Revision: f.number(), Config: f.config.good, Problems: f.config.problems(), Taken: f.claimed.taken()}
	// If not even our own podCIDR fits, it is the configuration that is wrong. It must
	// be judged by what all leases are, or a slip of the pen would cost every peer.
	self := f.nodes[f.self]
	misfit := self != nil && f.outside(self) != nil
	for _, name := range slices.Sorted(maps.Keys(f.nodes)) {
		n := f.nodes[name]
		own := name == f.self
		switch {
		case n.badCIDRs != "":
			if own || n.managed {
				s.Problems = append(s.Problems, overlay.Problem{Object: "node " + name, Reason: n.badCIDRs, Remedy: recreate(name)})
			}
		case n.subnets == (overlay.Subnets{}):
		case !own && !n.managed:
			s.Taken = append(s.Taken, n.subnets)
		default:
			if p := f.outside(n); p != nil && !own && !misfit { // our own is NodeClaim's matter
				s.Problems = append(s.Problems, *p)
			} else if l := f.lease(n); l.Subnets != (overlay.Subnets{}) || own {
				s.Leases = append(s.Leases, l)
			}
		}
	}
	slices.SortFunc(s.Leases, func(a, b *overlay.Lease) int {
		return cmp.Or(a.Compare(b.Subnets), strings.Compare(a.Node, b.Node))
	})
	f.addOwn(s)
	f.dropLosers(s)
	f.addTwins(s)
	return s
}

// recreate is the only way to another podCIDR.
func recreate(node string) string {
	return "podCIDRs never change: kubectl delete node " + node + ", and restart its kubelet, which registers it again"
}

// lease returns the node's lease, the one given out last if it is the same.
func (f *kubeFold) lease(n *kubeNode) *overlay.Lease {
	subnets := f.inUse(n.subnets)
	if n.lease != nil && n.lease.Subnets == subnets {
		return n.lease
	}
	l := &overlay.Lease{Subnets: subnets, Attrs: n.attrs, Node: n.name, Created: n.created, Modified: f.number()}
	if n.badAttrs != "" {
		l.Err = errors.New(n.badAttrs)
	}
	n.lease = l
	return l
}

// inUse leaves out the family that the configuration turns off: a cluster may be
// dual stack and its overlay not.
func (f *kubeFold) inUse(n overlay.Subnets) overlay.Subnets {
	if !f.config.good.V4.Enabled() {
		n.V4 = overlay.Subnets{}.V4
	}
	if !f.config.good.V6.Enabled() {
		n.V6 = overlay.Subnets{}.V6
	}
	return n
}

// outside says which podCIDR of a node the network does not hold.
func (f *kubeFold) outside(n *kubeNode) *overlay.Problem {
	for _, p := range f.inUse(n.subnets).All() {
		if err := f.config.good.Pool(overlay.FamilyOf(p.Addr())).Check(p); err != nil {
			return &overlay.Problem{
				Object: "node " + n.name,
				Reason: fmt.Sprintf("podCIDR %s: %v of net-conf.json", p, err),
				Remedy: "Network there and --cluster-cidr of kube-controller-manager must agree",
			}
		}
	}
	return nil
}

// addOwn adds what is said of this node alone.
func (f *kubeFold) addOwn(s *overlay.Snapshot) {
	if f.self == "" {
		return
	}
	n := f.nodes[f.self]
	if n == nil {
		s.Node.Missing = true
		return
	}
	s.Node = n.own.facts
	if n.own.overwrite != "" {
		s.Problems = append(s.Problems, overlay.Problem{
			Object: "node " + f.self, Reason: n.own.overwrite,
			Remedy: "correct or remove it: kubectl annotate node " + f.self,
		})
	}
}

// dropLosers leaves one of the nodes that share a subnet: the older one, as every
// node decides alike. Our own stays in any case, for the pods of this node: what
// becomes of packets from afar, the others decide.
func (f *kubeFold) dropLosers(s *overlay.Snapshot) {
	lost := overlay.Losers(s.Leases, older)
	if len(lost) == 0 {
		return
	}
	var own *overlay.Lease // if it loses
	for _, l := range s.Leases {
		winner := lost[l]
		if winner == nil {
			continue
		}
		if l.Node == f.self {
			own = l
		}
		s.Problems = append(s.Problems, overlay.Problem{
			Object: "node " + l.Node,
			Reason: fmt.Sprintf("podCIDRs %v overlap %v of node %s, which is older: packets go there", l.All(), winner.All(), winner.Node),
			Remedy: recreate(l.Node),
		})
	}
	s.Leases = slices.DeleteFunc(s.Leases, func(l *overlay.Lease) bool {
		return l != own && (lost[l] != nil || own != nil && l.Overlaps(own.Subnets))
	})
}

// older puts the older node first. Nodes of one second are ordered by name.
func older(a, b *overlay.Lease) int {
	return cmp.Or(cmp.Compare(a.Created, b.Created), strings.Compare(a.Node, b.Node))
}
