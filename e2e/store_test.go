package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// noLoss is called with a probe between two pods running, and fails if it lost one.
func noLoss(t *testing.T, from, to *Pod, during func()) {
	t.Helper()
	p, err := nettest.StartProbe(from.NS, to.NS, to.IPv4)
	must(t, err)
	during()
	r, err := p.Stop()
	must(t, err)
	if r.Lost != 0 || r.Sent == 0 {
		t.Errorf("packets lost: %s at %v ms", r, r.LostAt)
	}
}

// lossTold is noLoss where packets must be lost: peers send to whom the store
// names, and for a moment it names somebody no more. It tells how many.
func lossTold(t *testing.T, from, to *Pod, during func()) {
	t.Helper()
	p, err := nettest.StartProbe(from.NS, to.NS, to.IPv4)
	must(t, err)
	during()
	must(t, from.Ping(to.IPv4, 3, 56))
	r, err := p.Stop()
	must(t, err)
	t.Logf("until the lease was there again: %s", r)
}

// wipe puts an empty etcd in the place of the one that runs.
func (c *Cluster) wipe(ctx context.Context) error {
	if err := c.Etcd.Stop(); err != nil {
		return err
	}
	for _, m := range c.Etcd.Members {
		if err := os.RemoveAll(filepath.Join(c.Lab.Dir, m.Name)); err != nil {
			return err
		}
	}
	return c.Etcd.Start(ctx)
}

func TestRestartAfterEtcdLostAll(t *testing.T) {
	c, ctx := startCluster(t, Options{Hosts: 2, Config: ConfigIPv4})
	pods := onePod(t, c)
	var had []string
	for _, n := range c.Nodes {
		had = append(had, n.lease(t).name)
		must(t, n.Daemon.Kill9())
	}
	must(t, c.wipe(ctx))
	must(t, c.Configure(ctx, ConfigIPv4))
	must(t, c.Start(ctx))
	must(t, c.WaitPeers(ctx))
	for i, n := range c.Nodes {
		if l := n.lease(t); l.name != had[i] || l.grant == 0 {
			t.Errorf("%s had %s and has %+v", n.Name, had[i], l)
		}
	}
	must(t, pods[0].Ping(pods[1].IPv4, 3, 56))
}

// TestEtcdMadeAnew has etcd lose everything, or be restored from a backup, under
// running daemons: its revision goes back.
func TestEtcdMadeAnew(t *testing.T) {
	c, ctx := startCluster(t, Options{Hosts: 2, Config: ConfigIPv4})
	pods := onePod(t, c)
	for i := range 20 { // so that the new revision is far below
		_, err := c.Etcd.Client().Put(ctx, "/unrelated", fmt.Sprint(i))
		must(t, err)
	}
	var had []string
	for _, n := range c.Nodes {
		had = append(had, n.lease(t).name)
	}
	same := func() {
		t.Helper()
		for i, n := range c.Nodes {
			err := Eventually(ctx, func() bool {
				return slices.ContainsFunc(c.leases(t, Prefix), func(l leaseKey) bool { return l.name == had[i] && l.grant != 0 })
			})
			if err != nil {
				s, _ := n.Status()
				t.Fatalf("%s does not lease %s again: %v; status %+v", n.Name, had[i], c.leases(t, Prefix), s)
			}
		}
		must(t, c.WaitPeers(ctx))
	}
	t.Run("wiped", func(t *testing.T) {
		lossTold(t, pods[0], pods[1], func() {
			must(t, c.wipe(ctx))
			must(t, c.Configure(ctx, ConfigIPv4))
			same()
		})
	})
	t.Run("restored", func(t *testing.T) {
		dir := filepath.Join(c.Lab.Dir, c.Etcd.Members[0].Name)
		must(t, c.Etcd.Stop())
		must(t, os.CopyFS(dir+".backup", os.DirFS(dir)))
		must(t, c.Etcd.Start(ctx))
		for _, n := range c.Nodes { // what the backup does not know
			_, err := c.Etcd.Client().Delete(ctx, Prefix+"/subnets/"+n.lease(t).name)
			must(t, err)
			same()
		}
		lossTold(t, pods[0], pods[1], func() {
			must(t, c.Etcd.Stop())
			must(t, os.RemoveAll(dir))
			must(t, os.Rename(dir+".backup", dir))
			must(t, c.Etcd.Start(ctx))
			same()
		})
	})
	for _, n := range c.Nodes {
		must(t, n.waitProblem(ctx))
	}
}

func TestStoreVariants(t *testing.T) {
	for _, x := range []struct {
		name string
		etcd nettest.EtcdOptions
	}{
		{"TLS", nettest.EtcdOptions{TLS: true}},
		{"TLS and password", nettest.EtcdOptions{TLS: true, Auth: true}},
		{"client certificates", nettest.EtcdOptions{TLS: true, ClientAuth: true}},
		{"password in clear", nettest.EtcdOptions{Auth: true}},
		{"three members", nettest.EtcdOptions{Members: 3}},
	} {
		t.Run(x.name, func(t *testing.T) {
			c, _ := startCluster(t, Options{Hosts: 2, Config: ConfigIPv4, Etcd: x.etcd})
			c.reach(t)
			out, code, err := c.Nodes[0].Netctl(append([]string{"leases"}, c.StoreArgs()...)...)
			if err != nil || code != 0 || !strings.Contains(out, c.Nodes[1].IPv4.String()) {
				t.Errorf("netctl leases says %d, %v: %s", code, err, out)
			}
		})
	}
}

// reach has a pod of each node ping one of each other.
func (c *Cluster) reach(t *testing.T) {
	t.Helper()
	pods := onePod(t, c)
	for _, from := range pods {
		for _, to := range pods {
			if from != to {
				must(t, from.Ping(to.IPv4, 2, 1422))
			}
		}
	}
}

func TestEtcdPrefix(t *testing.T) {
	c, ctx := newCluster(t, Options{Hosts: 2, Args: []string{"--etcd-prefix=/net/a b/overlay/"}})
	const prefix = "/net/a b/overlay"
	_, err := c.Etcd.Client().Put(ctx, prefix+"/config", ConfigIPv4)
	must(t, err)
	must(t, c.Start(ctx))
	must(t, c.WaitPeers(ctx))
	c.reach(t)
	if l := c.leases(t, prefix); len(l) != 2 {
		t.Errorf("leases %v", l)
	}
	if l := c.leases(t, Prefix); len(l) != 0 {
		t.Errorf("leases elsewhere %v", l)
	}
}

func TestFirstEndpointDead(t *testing.T) {
	c, ctx := newCluster(t, Options{Hosts: 2, Config: ConfigIPv4})
	live := c.Etcd.Endpoints()[0]
	for _, dead := range []string{
		"http://198.51.100.201:2379", // nobody has this address
		"http://198.51.100.200:2399", // nobody listens
	} {
		for _, n := range c.Nodes {
			must(t, n.StartWith("--etcd-endpoints="+dead+","+live, "--healthz-ip=127.0.0.1", fmt.Sprintf("--healthz-port=%d", healthPort)))
		}
		must(t, c.WaitPeers(ctx))
		for _, n := range c.Nodes {
			must(t, n.Daemon.Term())
		}
	}
	c.reach(t)
}

// TestEtcd34 runs against the etcd that Debian 12 has.
func TestEtcd34(t *testing.T) {
	binary := os.Getenv("TWILL_ETCD34")
	if binary == "" {
		binary = "../build/etcd-3.4/usr/bin/etcd"
	}
	binary, err := filepath.Abs(binary)
	must(t, err)
	if _, err := os.Stat(binary); err != nil {
		t.Fatalf("no etcd 3.4: %v; `make deps` unpacks it, or set TWILL_ETCD34", err)
	}
	c, ctx := startCluster(t, Options{Hosts: 3, Config: ConfigDual, Etcd: nettest.EtcdOptions{Binary: binary, TLS: true, Auth: true}})
	r, err := c.Etcd.Client().Status(ctx, c.Etcd.Endpoints()[0])
	must(t, err)
	if !strings.HasPrefix(r.Version, "3.4.") {
		t.Errorf("etcd is %s", r.Version)
	}
	pods := onePod(t, c)
	for _, to := range pods[1:] {
		must(t, pods[0].Ping(to.IPv4, 2, 1430-28))
		must(t, pods[0].Ping(to.IPv6, 2, 1430-48))
	}
	n := c.Nodes[0]
	had := n.lease(t)
	noLoss(t, pods[0], pods[1], func() {
		must(t, n.Daemon.Kill9())
		must(t, n.Start())
		must(t, n.WaitReady(ctx))
		must(t, c.Etcd.Compact(ctx))
		must(t, c.Etcd.Stop())
		must(t, n.WaitStatus(ctx, "without etcd", func(s overlay.Status) bool { return !s.Store.Connected }))
		must(t, c.Etcd.Start(ctx))
		must(t, n.WaitStatus(ctx, "connected again", func(s overlay.Status) bool { return s.Ready && s.Store.Connected }))
		must(t, c.WaitPeers(ctx))
	})
	// etcd's own client never gets over the loss of its token when 3.4 starts anew.
	etcd, err := c.Etcd.NewClient(nettest.EtcdRoot, nettest.EtcdRootPassword)
	must(t, err)
	defer etcd.Close()
	now, err := etcd.Get(ctx, Prefix+"/subnets/"+had.name)
	must(t, err)
	if len(now.Kvs) != 1 || now.Kvs[0].ModRevision != had.modified || now.Kvs[0].Lease != int64(had.grant) {
		t.Errorf("the lease %+v has become %v", had, now.Kvs)
	}
}

// TestStartTogether has many nodes take a subnet at the same moment.
func TestStartTogether(t *testing.T) {
	const hosts = 8
	c, ctx := newCluster(t, Options{Hosts: hosts, Config: `{"Network": "10.5.0.0/20", "SubnetLen": 24, "Backend": {"Type": "vxlan", "Port": 4789}}`})
	must(t, c.Start(ctx))
	must(t, c.WaitPeers(ctx))
	if l := c.leases(t, Prefix); len(l) != hosts {
		t.Errorf("%d nodes hold %d leases: %v", hosts, len(l), l)
	}
	for _, n := range c.Nodes {
		n.lease(t)
	}
}

func TestConfigChangeLive(t *testing.T) {
	c, ctx := startCluster(t, Options{Hosts: 2, Config: ConfigIPv4})
	pods := onePod(t, c)
	config := func(more, backend string) string {
		return fmt.Sprintf(`{"Network": "10.5.0.0/16"%s, "Backend": {"Type": "vxlan", "Port": 4789%s}}`, more, backend)
	}
	link := func(n *Node) string {
		out, err := n.Run("ip", "-d", "link", "show", "flannel.1")
		must(t, err)
		return out
	}
	rules := func(n *Node) string {
		out, err := n.Run("nft", "list", "ruleset")
		must(t, err)
		return out
	}
	noLoss(t, pods[0], pods[1], func() {
		for _, x := range []struct {
			config string
			done   func(n *Node) bool
		}{
			{config("", `, "MTU": 1400`), func(n *Node) bool { return strings.Contains(link(n), "mtu 1350") }},
			{config("", `, "MTU": 1400, "Learning": true`), func(n *Node) bool { return !strings.Contains(link(n), "nolearning") }},
			{config(`, "EnableNFTables": true`, `, "MTU": 1400`), func(n *Node) bool {
				return strings.Contains(rules(n), "table ip twill") && !strings.Contains(rules(n), "jump TWILL-POSTRTG") && strings.Contains(link(n), "nolearning")
			}},
			{config(`, "SubnetMax": "10.5.254.0"`, ""), func(n *Node) bool {
				return !strings.Contains(rules(n), "table ip twill") && strings.Contains(rules(n), "jump TWILL-POSTRTG") && strings.Contains(link(n), "mtu 1450")
			}},
		} {
			must(t, c.Configure(ctx, x.config))
			for _, n := range c.Nodes {
				if err := Eventually(ctx, func() bool { return x.done(n) }); err != nil {
					t.Errorf("%s does not take up %s: %s\n%s", n.Name, x.config, link(n), rules(n))
				}
				must(t, n.WaitInSync(ctx))
			}
		}
	})
	// The MTU for pods to come follows, too.
	must(t, c.Configure(ctx, config("", `, "MTU": 1400`)))
	for _, n := range c.Nodes {
		must(t, n.WaitStatus(ctx, "at the new MTU", func(s overlay.Status) bool { return s.Ready && s.PodMTU == 1350 }))
		must(t, Eventually(ctx, func() bool {
			out, err := n.Run("cat", "/run/flannel/subnet.env", "/run/flannel/twill.json")
			return err == nil && containsAll(out, []string{"FLANNEL_MTU=1350", `"mtu": 1350`})
		}))
		must(t, n.waitProblem(ctx))
	}
}
