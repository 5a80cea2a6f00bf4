package store

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
)

// TestKubeSnapshots follows what happens to Nodes and configuration.
func TestKubeSnapshots(t *testing.T) {
	r := newKubeRig(t)
	for i := 2; i <= 4; i++ {
		r.addNode(t, flannelNode(i))
	}
	r.addNode(t, bareNode("n1", "10.5.1.0/24"))
	r.addNode(t, bareNode("other", "10.5.9.0/24")) // of another overlay, or not yet set up
	log := &logs{}
	k := r.open(t, func(c *KubeConfig) { c.Log = log.logger() })
	f := follow(t, k)
	s := f.wait(t, "four leases", func(s *overlay.Snapshot) bool { return len(s.Leases) == 4 })
	if f.count() != 1 {
		t.Errorf("%d Snapshots, want one that is complete", f.count())
	}
	own := named(s, "n1")
	if own == nil || own.Attrs != (overlay.Attrs{}) || own.Key() != "10.5.1.0-24" {
		t.Errorf("the node's own lease is %+v, want 10.5.1.0-24 that says nothing", own)
	}
	if l := named(s, "n3"); describeValue(l) != nodeValue(3) || l.Err != nil || l.Grant != 0 || l.Created == 0 || l.Modified == 0 {
		t.Errorf("lease of n3 is %+v", l)
	}
	if len(s.Taken) != 1 || s.Taken[0].Key() != "10.5.9.0-24" {
		t.Errorf("taken: %v, want 10.5.9.0/24", s.Taken)
	}
	if !s.Config.V4.Assigned || !s.Node.Unavailable || s.Node.Missing || len(s.Problems) > 0 {
		t.Errorf("config %+v, node %+v, problems %v", s.Config.V4, s.Node, s.Problems)
	}
	if st := k.Status(); st.Kind != "kubernetes" || !st.Connected || st.Node != "n1" || st.Revision != s.Revision || st.Endpoints[0] != r.URL || st.Error != "" {
		t.Errorf("status %+v", st)
	}
	if named(r.read(t), "n1") == nil {
		t.Error("a single read has no lease of the node itself")
	}

	// What says nothing new wakes nobody.
	before := f.count()
	for i := range 5 {
		r.patchNode(t, "n2", fmt.Sprintf(`{"metadata":{"labels":{"beat":"%d"}}}`, i))
	}
	rv := r.getNode(t, "n2").ResourceVersion
	eventually(t, func() string {
		if got := fmt.Sprint(k.Status().Revision); got != rv {
			return "status is at revision " + got + ", the API at " + rv
		}
		return ""
	})
	if f.count() != before {
		t.Errorf("%d Snapshots for heartbeats", f.count()-before)
	}

	r.patchNode(t, "n2", `{"metadata":{"annotations":{"`+prefix+`public-ip":"198.18.7.7"}}}`)
	old := s
	s = f.wait(t, "n2's new address", func(s *overlay.Snapshot) bool { return named(s, "n2").PublicIP.String() == "198.18.7.7" })
	if named(s, "n3") != named(old, "n3") || named(old, "n2").PublicIP.String() != "198.18.0.2" {
		t.Error("a lease that did not change is another one, or one in a Snapshot was changed")
	}
	r.removeNode(t, "n3")
	f.wait(t, "n3 gone", func(s *overlay.Snapshot) bool { return named(s, "n3") == nil })
	r.patchNode(t, "other", `{"metadata":{"annotations":{"`+prefix+`kube-subnet-manager":"true","`+prefix+`public-ip":"198.18.0.9"}}}`)
	f.wait(t, "the other node as a peer", func(s *overlay.Snapshot) bool { return named(s, "other") != nil && len(s.Taken) == 0 })
	r.patchNode(t, "n1", `{"metadata":{"annotations":{"`+prefix+`public-ip-overwrite":"203.0.113.7","`+prefix+`node-public-ipv6":"2001:db8::7"}}}`)
	f.wait(t, "the operator's addresses", func(s *overlay.Snapshot) bool {
		return s.Node.PublicIP.String() == "203.0.113.7" && s.Node.PublicIPv6.String() == "2001:db8::7"
	})
	r.removeNode(t, "n1")
	f.wait(t, "the own node gone", func(s *overlay.Snapshot) bool { return s.Node.Missing })
	if err := f.errors(); err != nil {
		t.Error(err)
	}
}

// TestKubeConfigFile changes net-conf.json under a running store.
func TestKubeConfigFile(t *testing.T) {
	r := newKubeRig(t)
	r.addNode(t, bareNode("n1", "10.5.1.0/24", "fd00:5:0:1::/64"))
	r.addNode(t, bareNode("n2", "fd00:5:0:2::/64", "10.5.2.0/24"))
	r.patchNode(t, "n2", `{"metadata":{"annotations":{"`+prefix+`kube-subnet-manager":"true","`+prefix+`public-ip":"198.18.0.2"}}}`)
	check(t, os.Remove(r.netConf))
	k := r.open(t)
	f := follow(t, k)
	eventually(t, func() string {
		if e := k.Status().Error; !strings.Contains(e, "no such file") || !strings.Contains(e, r.netConf) || !strings.Contains(e, "ConfigMap twill-config") {
			return "status says " + e
		}
		return ""
	})
	if f.count() > 0 {
		t.Error("a Snapshot without a configuration")
	}
	r.configure(t, goodConfig)
	s := f.wait(t, "IPv4", func(s *overlay.Snapshot) bool { return len(s.Leases) == 2 })
	if s.Leases[0].V6.IsValid() || named(s, "n2").Key() != "10.5.2.0-24" {
		t.Errorf("leases with a family that is off:\n%s", describeNodes(s))
	}
	r.configure(t, `{"Network":`)
	s = f.wait(t, "a problem", func(s *overlay.Snapshot) bool { return len(s.Problems) == 1 })
	if p := s.Problems[0].String(); !strings.Contains(p, r.netConf) || !strings.Contains(p, "the last good one stays in force") || len(s.Leases) != 2 {
		t.Errorf("problem %s", p)
	}
	r.configure(t, `{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}`)
	s = f.wait(t, "IPv6", func(s *overlay.Snapshot) bool { return !s.Config.V4.Enabled() })
	if named(s, "n1").Key() != "fd00:5:0:1::-64" || len(s.Problems) > 0 || !s.Config.V6.Assigned {
		t.Errorf("IPv6 alone:\n%s", describeNodes(s))
	}
	if err := f.errors(); err != nil {
		t.Error(err)
	}
}

// TestKubeAway takes the API away in every way there is. Nothing is emitted
// meanwhile, Status tells why, and what has changed is seen afterwards.
func TestKubeAway(t *testing.T) {
	r := newKubeRig(t)
	r.addNode(t, flannelNode(1))
	r.addNode(t, flannelNode(2))
	log := &logs{}
	k := r.open(t, func(c *KubeConfig) { c.Log = log.logger() })
	f := follow(t, k)
	f.wait(t, "two leases", func(s *overlay.Snapshot) bool { return len(s.Leases) == 2 })
	down := func(wants ...string) {
		t.Helper()
		want := strings.Join(wants, " or ")
		begin := time.Now()
		eventually(t, func() string {
			st := k.Status()
			if !slices.ContainsFunc(wants, func(w string) bool { return !st.Connected && strings.Contains(st.Error, w) }) {
				return fmt.Sprintf("status %+v, want an error with %q", st, want)
			}
			return ""
		})
		t.Logf("%q after %s: %s", want, time.Since(begin).Round(time.Millisecond), k.Status().Error)
	}
	next := 3
	up := func() {
		t.Helper()
		begin := time.Now()
		r.addNode(t, flannelNode(next))
		f.wait(t, "the new node", func(s *overlay.Snapshot) bool { return named(s, fmt.Sprint("n", next)) != nil })
		t.Logf("back after %s", time.Since(begin).Round(time.Millisecond))
		next++
		if st := k.Status(); !st.Connected || st.Error != "" {
			t.Errorf("status %+v", st)
		}
	}
	count := f.count()
	check(t, r.Stop())
	down("connection refused")
	if f.count() != count {
		t.Error("a Snapshot while the API is away")
	}
	check(t, r.Start())
	up()
	check(t, r.host.Cut())
	down("no answer in time", "no route to host")
	r.addNode(t, flannelNode(next))
	next++
	// Its memory is new, and does not reach back to what we have seen.
	check(t, r.Stop())
	check(t, r.Start())
	r.removeNode(t, "n2")
	check(t, r.host.Restore())
	up()
	f.wait(t, "all that happened meanwhile", func(s *overlay.Snapshot) bool {
		return named(s, "n2") == nil && named(s, fmt.Sprint("n", next-2)) != nil
	})
	if !strings.Contains(log.String(), "reading all nodes again") {
		t.Errorf("nothing of reading all again in the log:\n%s", log)
	}
	check(t, r.Pause())
	down("no answer in time")
	check(t, r.Resume())
	up()
}

// TestKubeProperty makes random writes. What the store has followed is what a fresh
// reader sees.
func TestKubeProperty(t *testing.T) {
	r := newKubeRig(t)
	r.addNode(t, flannelNode(1))
	f := follow(t, r.open(t))
	f.wait(t, "the first lease", func(s *overlay.Snapshot) bool { return len(s.Leases) == 1 })
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	there := map[int]bool{1: true}
	annotations := []string{
		`"public-ip":"198.18.9.%d"`, `"public-ip":"nonsense %d"`, `"backend-type":"host-gw%.0d"`, `"backend-type":"vxlan%.0d"`,
		`"backend-data":"{%d"`, `"backend-data":"null%.0d"`, `"kube-subnet-manager":"%d"`, `"kube-subnet-manager":"true%.0d"`,
		`"public-ip-overwrite":"203.0.113.%d"`, `"public-ip-overwrite":"x%d"`,
	}
	for step := range 300 {
		i := 1 + rnd.IntN(20)
		switch {
		case !there[i]:
			n := flannelNode(i)
			switch rnd.IntN(6) {
			case 0:
				n.Spec.PodCIDR, n.Spec.PodCIDRs = "10.5.3.0/24", []string{"10.5.3.0/24"}
			case 1:
				n.Spec.PodCIDR, n.Spec.PodCIDRs = "10.77.0.0/24", []string{"10.77.0.0/24"}
			case 2:
				n.Spec.PodCIDR, n.Spec.PodCIDRs = "10.5.0.0/20", []string{"10.5.0.0/20", "fd00::/64"}
			case 3:
				n.Spec.PodCIDR, n.Spec.PodCIDRs = "", nil
			}
			r.addNode(t, n)
			there[i] = true
		case rnd.IntN(4) == 0:
			r.removeNode(t, fmt.Sprint("n", i))
			there[i] = false
		default:
			r.patchNode(t, fmt.Sprint("n", i), `{"metadata":{"annotations":{"`+prefix+fmt.Sprintf(annotations[rnd.IntN(len(annotations))], rnd.IntN(250)+1)[1:]+`}}}`)
		}
		if step%30 == 29 {
			want := describeNodes(r.read(t))
			eventually(t, func() string {
				if got := describeNodes(f.snapshot()); got != want {
					return fmt.Sprintf("step %d: followed:\n%s\nread:\n%s", step, got, want)
				}
				return ""
			})
		}
	}
	if err := f.errors(); err != nil {
		t.Error(err)
	}
}

// TestKubeOldServer follows an API server that sends no list with a watch.
func TestKubeOldServer(t *testing.T) {
	r := newKubeRig(t, "--feature-gates=WatchList=false")
	r.addNode(t, flannelNode(1))
	f := follow(t, r.open(t))
	f.wait(t, "one lease", func(s *overlay.Snapshot) bool { return len(s.Leases) == 1 })
	r.addNode(t, flannelNode(2))
	f.wait(t, "two", func(s *overlay.Snapshot) bool { return len(s.Leases) == 2 })
	if err := f.errors(); err != nil {
		t.Error(err)
	}
	if errors.Is(f.errors(), errNoWatchList) {
		t.Error("a way out that is an error")
	}
}
