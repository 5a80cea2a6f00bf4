package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/twill-net/twill/pkg/overlay"
)

// leaseKey is a lease as etcd holds it.
type leaseKey struct {
	name, value       string
	created, modified int64
	grant             clientv3.LeaseID
}

func (c *Cluster) leases(t *testing.T, prefix string) []leaseKey {
	t.Helper()
	dir := prefix + "/subnets/"
	r, err := c.Etcd.Client().Get(t.Context(), dir, clientv3.WithPrefix())
	must(t, err)
	var out []leaseKey
	for _, kv := range r.Kvs {
		out = append(out, leaseKey{strings.TrimPrefix(string(kv.Key), dir), string(kv.Value), kv.CreateRevision, kv.ModRevision, clientv3.LeaseID(kv.Lease)})
	}
	return out
}

// lease returns the only lease that bears the node's own address.
func (n *Node) lease(t *testing.T) leaseKey {
	t.Helper()
	return n.leaseOf(t, n.IPv4)
}

func (n *Node) leaseOf(t *testing.T, public netip.Addr) leaseKey {
	t.Helper()
	var found []leaseKey
	for _, l := range n.cluster.leases(t, Prefix) {
		if strings.Contains(l.value, `"PublicIP":"`+public.String()+`"`) {
			found = append(found, l)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%s has %d leases of %s: %v", n.Name, len(found), public, found)
	}
	return found[0]
}

// eventuallyLeased waits until the status names a lease for which ok holds.
func (n *Node) eventuallyLeased(ctx context.Context, what string, ok func(overlay.Status) bool) error {
	return n.WaitStatus(ctx, what, func(s overlay.Status) bool { return s.Ready && s.Lease != "" && ok(s) })
}

func TestReservation(t *testing.T) {
	c, ctx := newCluster(t, Options{Hosts: 2, Config: ConfigIPv4})
	n := c.Nodes[0]
	key := Prefix + "/subnets/10.5.77.0-24"
	_, err := c.Etcd.Client().Put(ctx, key, fmt.Sprintf(`{"PublicIP": %q}`, n.IPv4))
	must(t, err)
	must(t, c.Start(ctx))
	must(t, c.WaitPeers(ctx))
	l := n.lease(t)
	if l.name != "10.5.77.0-24" || l.grant != 0 || !strings.Contains(l.value, "VtepMAC") {
		t.Errorf("the reservation was not taken as it is: %+v", l)
	}
	pods := onePod(t, c)
	must(t, pods[0].Ping(pods[1].IPv4, 2, 56))
	must(t, n.Daemon.Term())
	must(t, n.Start())
	must(t, n.WaitReady(ctx))
	if again := n.lease(t); again != l {
		t.Errorf("a restart made of %+v: %+v", l, again)
	}
}

func TestRenewal(t *testing.T) {
	c, ctx := startCluster(t, Options{Hosts: 1, Config: ConfigIPv4})
	n, etcd := c.Nodes[0], c.Etcd.Client()
	l := n.lease(t)
	ttl := func() *clientv3.LeaseTimeToLiveResponse {
		t.Helper()
		r, err := etcd.TimeToLive(ctx, l.grant)
		must(t, err)
		return r
	}
	if r := ttl(); r.GrantedTTL != 24*3600 {
		t.Errorf("leased for %d s, flannel's is a day", r.GrantedTTL)
	}
	revision := func() int64 {
		t.Helper()
		r, err := etcd.Get(ctx, "x")
		must(t, err)
		return r.Header.Revision
	}
	before := revision()
	// A life only becomes longer by a renewal.
	must(t, Eventually(ctx, func() bool { return ttl().TTL < 24*3600-5 }))
	low := ttl().TTL
	must(t, n.Daemon.Kill9())
	must(t, n.Start())
	must(t, n.WaitReady(ctx))
	must(t, Eventually(ctx, func() bool { return ttl().TTL > low }))
	if again := n.lease(t); again != l {
		t.Errorf("renewal made of %+v: %+v", l, again)
	}
	if after := revision(); after != before {
		t.Errorf("renewal wrote to etcd: revision %d, then %d", before, after)
	}
	out, _, err := n.Get("/metrics")
	must(t, err)
	if !strings.Contains(out, `twill_lease_renewals_total{result="ok"} 1`) {
		t.Errorf("/metrics does not count the renewal")
	}
}

func TestOwnKeyLost(t *testing.T) {
	c, ctx := startCluster(t, Options{Hosts: 2, Config: ConfigIPv4})
	pods := onePod(t, c)
	n, etcd := c.Nodes[0], c.Etcd.Client()
	first := n.lease(t)
	key := Prefix + "/subnets/" + first.name
	back := func() leaseKey {
		t.Helper()
		var l leaseKey
		err := Eventually(ctx, func() bool {
			i := slices.IndexFunc(c.leases(t, Prefix), func(l leaseKey) bool { return l.name == first.name && l.value == first.value })
			if i >= 0 {
				l = c.leases(t, Prefix)[i]
			}
			return i >= 0
		})
		if err != nil {
			t.Fatalf("the lease does not come back: %v", c.leases(t, Prefix))
		}
		return l
	}
	lossTold(t, pods[0], pods[1], func() {
		_, err := etcd.Put(ctx, key, "garbage", clientv3.WithIgnoreLease())
		must(t, err)
		if l := back(); l.grant != first.grant || l.created != first.created {
			t.Errorf("garbage made of %+v: %+v", first, l)
		}
		must(t, c.WaitPeers(ctx))
	})
	// To delete the key, or to end its lease, takes the route away from the others
	// for as long as it takes to make it anew: our own side loses nothing.
	before, err := n.dumpKernel()
	must(t, err)
	_, err = etcd.Delete(ctx, key)
	must(t, err)
	back()
	_, err = etcd.Revoke(ctx, back().grant)
	must(t, err)
	if l := back(); l.grant == 0 {
		t.Errorf("the new key does not expire: %+v", l)
	}
	must(t, c.WaitPeers(ctx))
	after, err := n.dumpKernel()
	must(t, err)
	sameLines(t, "own key deleted", before, after)
	must(t, pods[0].Ping(pods[1].IPv4, 2, 56))
	for _, n := range c.Nodes {
		must(t, n.waitProblem(ctx))
	}
}

// TestOwnKeyDeleted has a lease deleted under traffic.
func TestOwnKeyDeleted(t *testing.T) {
	c, ctx := startCluster(t, Options{Hosts: 2, Config: ConfigIPv4})
	pods := onePod(t, c)
	n := c.Nodes[0]
	first := n.lease(t)
	lossTold(t, pods[0], pods[1], func() {
		_, err := c.Etcd.Client().Delete(ctx, Prefix+"/subnets/"+first.name)
		must(t, err)
		must(t, Eventually(ctx, func() bool {
			return slices.ContainsFunc(c.leases(t, Prefix), func(l leaseKey) bool { return l.name == first.name && l.value == first.value })
		}))
		must(t, c.WaitPeers(ctx))
	})
}

func TestSamePublicIP(t *testing.T) {
	c, ctx := newCluster(t, Options{Hosts: 3, Config: ConfigIPv4})
	shared := "--public-ip=" + c.Nodes[0].IPv4.String()
	must(t, c.Nodes[0].Start(shared))
	must(t, c.Nodes[0].WaitReady(ctx))
	first, err := c.Nodes[0].Status()
	must(t, err)
	must(t, c.Nodes[1].Start(shared))
	must(t, c.Nodes[2].Start())
	for _, n := range c.Nodes {
		must(t, n.WaitReady(ctx))
	}
	two := c.Nodes[:2]
	for _, n := range two {
		must(t, n.waitProblem(ctx, c.Nodes[0].IPv4.String(), "which is this node's address", "delete the key, or give one of the nodes another address"))
	}
	var kept int
	names := map[string]bool{}
	for _, n := range two {
		s, err := n.Status()
		must(t, err)
		names[s.Lease] = true
		if s.Lease == first.Lease {
			kept++
		}
	}
	if kept != 1 || len(names) != 2 {
		t.Errorf("%d of the two keep %s: %v", kept, first.Lease, names)
	}
	c.stable(t)
	for _, n := range two { // and a restart does not start the quarrel anew
		must(t, n.Daemon.Term())
		must(t, n.Start(shared))
		must(t, n.WaitReady(ctx))
		s, err := n.Status()
		if err != nil || !names[s.Lease] {
			t.Errorf("after a restart %s has %s: %v", n.Name, s.Lease, err)
		}
	}
	c.stable(t)
}

// stable fails if the leases change while several passes and retries go by.
func (c *Cluster) stable(t *testing.T) {
	t.Helper()
	before := c.keys(t)
	counts := make([]uint64, len(c.Nodes))
	for i, n := range c.Nodes {
		s, err := n.Status()
		must(t, err)
		counts[i] = s.Pass.Count
	}
	// A write of another's makes everybody decide once more, three times over.
	for i := range 3 {
		_, err := c.Etcd.Client().Put(t.Context(), Prefix+"/subnets/10.5.250.0-24", fmt.Sprintf(`{"PublicIP":"198.51.100.%d"}`, 150+i))
		must(t, err)
		for j, n := range c.Nodes {
			must(t, n.WaitStatus(t.Context(), "passing", func(s overlay.Status) bool { ok := s.Pass.Count > counts[j]; counts[j] = s.Pass.Count; return ok }))
		}
	}
	_, err := c.Etcd.Client().Delete(t.Context(), Prefix+"/subnets/10.5.250.0-24")
	must(t, err)
	time.Sleep(3 * time.Second) // longer than the keeper's pauses between two tries
	sameLines(t, "leases", before, c.keys(t))
}

func TestOverlappingKeys(t *testing.T) {
	c, ctx := startCluster(t, Options{Hosts: 2, Config: ConfigIPv4})
	n := c.Nodes[0]
	own := n.lease(t)
	wide := netip.MustParsePrefix(strings.Replace(own.name, "-", "/", 1))
	wide = netip.PrefixFrom(wide.Addr(), 23).Masked()
	key := Prefix + "/subnets/" + (overlay.Subnets{V4: wide}).Key()
	// A younger key, of a node that would carry off our traffic.
	_, err := c.Etcd.Client().Put(ctx, key, `{"PublicIP":"198.51.100.88","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:2a:00:00:00:09"}}`)
	must(t, err)
	for _, n := range c.Nodes {
		must(t, n.waitProblem(ctx, (overlay.Subnets{V4: wide}).Key(), "overlaps", own.name))
	}
	if l := n.lease(t); l != own {
		t.Errorf("the older lease gave way: %+v", l)
	}
	out, err := n.Run("ip", "route", "show", "root", wide.String(), "proto", "84")
	if err != nil || out != "" {
		t.Errorf("routes %s, %v", out, err)
	}
	_, err = c.Etcd.Client().Delete(ctx, key)
	must(t, err)
	for _, n := range c.Nodes {
		must(t, n.waitProblem(ctx))
	}
}

func TestUplinkAddressChanges(t *testing.T) {
	c, ctx := startCluster(t, Options{Hosts: 2, Config: ConfigIPv4})
	pods := onePod(t, c)
	n, peer := c.Nodes[0], c.Nodes[1]
	own := n.lease(t)
	next := netip.MustParseAddr("198.51.100.111")
	_, err := n.Run("sh", "-c", fmt.Sprintf("ip addr del %s/24 dev eth0 && ip addr add %s/24 dev eth0 && ip route replace default via 198.51.100.1", n.IPv4, next))
	must(t, err)
	must(t, n.eventuallyLeased(ctx, "at its new address", func(s overlay.Status) bool { return s.PublicIP == next }))
	must(t, Eventually(ctx, func() bool {
		return slices.ContainsFunc(c.leases(t, Prefix), func(l leaseKey) bool { return strings.Contains(l.value, next.String()) })
	}))
	if l := n.leaseOf(t, next); l.name != own.name || l.grant != own.grant || l.created != own.created {
		t.Errorf("the lease %+v has become %+v", own, l)
	}
	must(t, c.WaitPeers(ctx))
	must(t, Eventually(ctx, func() bool {
		out, err := peer.Run("bridge", "fdb", "show", "dev", "flannel.1")
		return err == nil && strings.Contains(out, "dst "+next.String()+" ") && !strings.Contains(out, "dst "+n.IPv4.String()+" ")
	}))
	out, err := n.Run("ip", "-d", "link", "show", "flannel.1")
	if err != nil || !strings.Contains(out, "local "+next.String()) {
		t.Errorf("%v: %s", err, out)
	}
	must(t, pods[0].Ping(pods[1].IPv4, 3, 1422))
	must(t, pods[1].Ping(pods[0].IPv4, 3, 1422))
	for _, n := range c.Nodes {
		must(t, n.waitProblem(ctx))
	}
}
