package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// forwardDrop makes the forward chain needed: while it were not there, no packet
// of a pod would leave its node.
const forwardDrop = "iptables -P FORWARD DROP && ip6tables -P FORWARD DROP"

// TestSurvive sends 1,000 probes a second and family each way between pods of two
// hosts, through whatever may happen to daemons and store. None may be lost, and
// nothing may look as if somebody else had changed the kernel.
func TestSurvive(t *testing.T) {
	c, ctx := startCluster(t, Options{Hosts: 2, Config: ConfigDual, Etcd: nettest.EtcdOptions{Members: 3}})
	pods := onePod(t, c)
	for _, n := range c.Nodes {
		n.shell(t, forwardDrop)
	}
	s := &survival{Cluster: c, ctx: ctx, pods: pods, victim: c.Nodes[1]}
	for _, act := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"SIGKILL and restart", s.killed},
		{"SIGTERM and restart", s.stopped},
		{"restart with other rules", s.otherRules},
		{"etcd away", s.etcdAway},
		{"compaction while not watching", s.compaction},
		{"etcd leader killed", s.leaderKilled},
		{"peer joins and leaves", s.peerJoinsAndLeaves},
		{"rules rewritten by another program", s.rulesRewritten},
	} {
		t.Run(act.name, func(t *testing.T) {
			p := startProbes(t, pods[0], pods[1])
			act.run(t)
			p.stopAfter(t, 1000)
			for _, n := range c.Nodes {
				must(t, n.WaitInSync(ctx))
				if d := drifts(t, n); len(d) > 0 {
					t.Errorf("%d drifts on %s that nobody caused, the first: %+v", len(d), n.Name, d[0])
				}
			}
		})
	}
}

// survival is the cluster of TestSurvive and the node that it is hardest on.
type survival struct {
	*Cluster
	ctx    context.Context
	pods   []*Pod
	victim *Node
}

func (s *survival) killed(t *testing.T) {
	for range 3 {
		must(t, s.victim.Daemon.Kill9())
		time.Sleep(300 * time.Millisecond)
		must(t, s.victim.Start())
		must(t, s.victim.WaitReady(s.ctx))
	}
}

func (s *survival) stopped(t *testing.T) {
	for range 3 {
		must(t, s.victim.Daemon.Term())
		time.Sleep(300 * time.Millisecond)
		must(t, s.victim.Start())
		must(t, s.victim.WaitReady(s.ctx))
	}
}

// otherRules makes the daemon write its chains anew, twice.
func (s *survival) otherRules(t *testing.T) {
	for _, more := range [][]string{{"--ip-masq-fully-random-disable"}, nil} {
		must(t, s.victim.Daemon.Term())
		must(t, s.victim.Start(more...))
		must(t, s.victim.WaitReady(s.ctx))
		must(t, s.victim.WaitInSync(s.ctx))
	}
}

func (s *survival) etcdAway(t *testing.T) {
	away := time.Minute
	if testing.Short() {
		away = 20 * time.Second
	}
	must(t, s.Etcd.Stop())
	for _, n := range s.Nodes {
		must(t, n.WaitStatus(s.ctx, "without its store", func(s overlay.Status) bool { return !s.Store.Connected && s.Ready }))
	}
	time.Sleep(away)
	for _, n := range s.Nodes {
		if body, code, err := n.Get("/readyz"); code != 200 || err != nil {
			t.Errorf("/readyz of %s without etcd: %d %s %v", n.Name, code, body, err)
		}
	}
	must(t, s.Etcd.Start(s.ctx))
	s.waitConnected(t)
}

func (s *survival) waitConnected(t *testing.T) {
	t.Helper()
	for _, n := range s.Nodes {
		must(t, n.WaitStatus(s.ctx, "back at its store", func(s overlay.Status) bool { return s.Store.Connected }))
	}
}

// compaction throws the revisions away that the daemons have yet to see: etcd
// begins anew while they stand still, so that nothing is on its way to them.
func (s *survival) compaction(t *testing.T) {
	for _, n := range s.Nodes {
		must(t, n.Daemon.Pause())
	}
	must(t, s.Etcd.Stop())
	must(t, s.Etcd.Start(s.ctx))
	key, value := peerLease(netip.MustParsePrefix("10.5.222.0/24"), "198.51.100.122", overlay.MAC{2, 0, 0, 0, 0, 122})
	for range 20 {
		must(t, putLease(s.ctx, s.Cluster, key, value))
	}
	must(t, s.Etcd.Compact(s.ctx))
	for _, n := range s.Nodes {
		must(t, n.Daemon.Resume())
	}
	for _, n := range s.Nodes {
		must(t, n.WaitStatus(s.ctx, "aware of the new peer", func(s overlay.Status) bool { return s.Peers == 2 }))
		must(t, n.WaitInSync(s.ctx))
	}
	_, err := s.Etcd.Client().Delete(s.ctx, key)
	must(t, err)
	must(t, s.WaitPeers(s.ctx))
}

func (s *survival) leaderKilled(t *testing.T) {
	leader, err := s.Etcd.Leader(s.ctx)
	must(t, err)
	must(t, leader.Kill9())
	// The others elect a new one and take writes, of which the daemons hear.
	key, value := peerLease(netip.MustParsePrefix("10.5.223.0/24"), "198.51.100.123", overlay.MAC{2, 0, 0, 0, 0, 123})
	must(t, Eventually(s.ctx, func() bool {
		ctx, cancel := context.WithTimeout(s.ctx, 2*time.Second)
		defer cancel()
		return putLease(ctx, s.Cluster, key, value) == nil
	}))
	for _, n := range s.Nodes {
		must(t, n.WaitStatus(s.ctx, "aware of the new peer", func(s overlay.Status) bool { return s.Peers == 2 }))
	}
	must(t, leader.Start())
	must(t, s.Etcd.WaitReady(s.ctx))
	_, err = s.Etcd.Client().Delete(s.ctx, key)
	must(t, err)
	must(t, s.WaitPeers(s.ctx))
}

// peerJoinsAndLeaves has a third host come, be reached, and go; and a hundred
// more that are only in the store.
func (s *survival) peerJoinsAndLeaves(t *testing.T) {
	h, err := s.Lab.NewHost()
	must(t, err)
	n := &Node{Host: h, cluster: s.Cluster}
	must(t, n.Start())
	must(t, n.WaitReady(s.ctx))
	must(t, n.WaitInSync(s.ctx))
	guest, err := n.AddPod("p1")
	must(t, err)
	status, err := n.Status()
	must(t, err)
	for _, o := range s.Nodes {
		must(t, o.WaitStatus(s.ctx, "aware of the new host", func(s overlay.Status) bool { return s.Peers == 2 }))
		must(t, o.WaitInSync(s.ctx))
	}
	for _, f := range families(guest) {
		must(t, guest.Ping(s.pods[0].Addr(f), 2, 1000))
	}
	for i := range 100 {
		// Nodes draw theirs from the first hundred.
		key, value := peerLease(netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 5, byte(120 + i), 0}), 24),
			fmt.Sprintf("203.0.113.%d", i+1), overlay.MAC{2, 0, 0, 0, 1, byte(i)})
		must(t, putLease(s.ctx, s.Cluster, key, value))
		_, err := s.Etcd.Client().Delete(s.ctx, key)
		must(t, err)
	}
	must(t, n.Daemon.Term())
	_, err = s.Etcd.Client().Delete(s.ctx, Prefix+"/subnets/"+status.Lease)
	must(t, err)
	must(t, s.WaitPeers(s.ctx))
}

// rulesRewritten is what programs do that write whole tables.
func (s *survival) rulesRewritten(t *testing.T) {
	for range 10 {
		s.victim.shell(t, "iptables-save | iptables-restore; ip6tables-save | ip6tables-restore")
	}
	s.victim.shell(t, `for i in 1 2 3 4 5; do
		printf '*nat\n:OTHER - [0:0]\n-A OTHER -p tcp --dport 9 -j RETURN\n-A POSTROUTING -j OTHER\nCOMMIT\n' | iptables-restore --noflush
		printf '*nat\n-F OTHER\n-D POSTROUTING -j OTHER\n-X OTHER\nCOMMIT\n' | iptables-restore --noflush
	done`)
}
