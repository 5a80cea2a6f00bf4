package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/twill-net/twill/e2e"
	"github.com/twill-net/twill/pkg/netctl"
	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// meshOptions bound the load.
type meshOptions struct {
	nodes      int
	reflectors int
	limit      time.Duration
}

// defaultMesh takes about three minutes and 10 GiB at most.
var defaultMesh = meshOptions{nodes: 100, reflectors: 3, limit: 2 * time.Minute}

// meshIdle is how long nodes are watched that have nothing to do.
const meshIdle = 10 * time.Second

func meshCommand() *cobra.Command {
	o := defaultMesh
	asJSON := false
	cmd := &cobra.Command{
		Use:   "mesh",
		Short: "Measure how a hundred BGP speakers converge, and what they take",
		Long: `Measure how many BGP speakers converge: a twilld with backend bgp on each of so many
hosts, without pods, all started at once. The time is taken from the start of the first
until each says that all its sessions are established and that it has learned the
subnet of every other by BGP. Then one more node comes and goes. First every node speaks
to every other, then only to route reflectors, which are nodes themselves.`,
		Example: `  lab bench mesh
  lab bench mesh --nodes 30 -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			report, err := benchMesh(ctx, o)
			if asJSON {
				return errors.Join(err, json.NewEncoder(os.Stdout).Encode(report))
			}
			return errors.Join(err, report.print())
		},
	}
	cmd.Flags().IntVar(&o.nodes, "nodes", o.nodes, "how many nodes, 188 at most")
	cmd.Flags().IntVar(&o.reflectors, "reflectors", o.reflectors, "how many of them reflect in the second run; 0: no such run")
	cmd.Flags().DurationVar(&o.limit, "limit", o.limit, "how long to wait for all nodes")
	cmd.Flags().VarPF((*jsonFlag)(&asJSON), "output", "o", "table or json")
	return cmd
}

// benchMesh measures the mesh, and then the same nodes with reflectors. If one fails,
// the other is in the report.
func benchMesh(ctx context.Context, o meshOptions) (meshReport, error) {
	if o.nodes < 2 || o.nodes > 188 {
		return nil, fmt.Errorf("--nodes: %d: must be 2..188", o.nodes)
	}
	if o.reflectors < 0 || o.reflectors >= o.nodes {
		return nil, fmt.Errorf("--reflectors: %d: must be 0..%d", o.reflectors, o.nodes-1)
	}
	runs := []int{0}
	if o.reflectors > 0 {
		runs = append(runs, o.reflectors)
	}
	var report meshReport
	var errs []error
	for _, reflectors := range runs {
		if ctx.Err() != nil {
			break
		}
		r, err := runMesh(ctx, o, reflectors)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s of %d nodes: %w", r.title(), o.nodes, err))
			continue
		}
		report = append(report, r)
	}
	return report, errors.Join(errs...)
}

// mesh is a cluster under measurement.
type mesh struct {
	nodes      []*e2e.Node // the first are the reflectors
	extra      *e2e.Node   // comes and goes
	reflectors int
	limit      time.Duration
	cluster    *e2e.Cluster
	asking     time.Duration // what asking all nodes took last
}

// runMesh measures one lab of its own.
func runMesh(ctx context.Context, o meshOptions, reflectors int) (r meshResult, err error) {
	r.Nodes, r.Reflectors = o.nodes, reflectors
	self, err := os.Executable()
	if err != nil {
		return r, err
	}
	lab, err := nettest.New(nettest.Options{Program: self})
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, lab.Close()) }()
	fmt.Fprintf(os.Stderr, "%s of %d nodes: setting up …\n", r.title(), o.nodes)
	config := fmt.Sprintf(`{"Network": %q, "Backend": {"Type": "bgp", "NodeMesh": %t}}`, e2e.PodNetwork, reflectors == 0)
	c, err := e2e.New(ctx, lab, e2e.Options{Hosts: o.nodes + 1, Config: config})
	if err != nil {
		return r, err
	}
	hosts := []*nettest.Host{c.Etcd.Members[0].Host}
	for _, n := range c.Nodes {
		hosts = append(hosts, n.Host)
	}
	if err := e2e.Introduce(hosts); err != nil {
		return r, err
	}
	m := &mesh{nodes: c.Nodes[:o.nodes], extra: c.Nodes[o.nodes], reflectors: reflectors, limit: o.limit, cluster: c}
	for _, step := range []struct {
		what string
		do   func(context.Context, *meshResult) error
	}{{"converging", m.converge}, {"one more node comes", m.join}, {"and goes", m.leave}, {"idle", m.idle}} {
		fmt.Fprintf(os.Stderr, "%s of %d nodes: %s …\n", r.title(), o.nodes, step.what)
		if err := step.do(ctx, &r); err != nil {
			return r, fmt.Errorf("%s: %w", step.what, err)
		}
	}
	return r, nil
}

// converge starts all nodes and waits until all know all.
func (m *mesh) converge(ctx context.Context, r *meshResult) error {
	began := time.Now()
	for i, n := range m.nodes {
		var more []string
		if i < m.reflectors {
			more = []string{"--bgp-route-reflector", "--bgp-cluster-id=192.0.2.1"}
		}
		if err := n.Start(more...); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	r.StartedSeconds = time.Since(began).Seconds()
	reached, err := m.await(ctx, func(n *e2e.Node) error { return m.inKernel(n, len(m.nodes)-1) })
	if err != nil {
		return err
	}
	r.KernelSeconds = reached.Sub(began).Seconds()
	last := began
	converged, err := m.await(ctx, func(n *e2e.Node) error {
		st, err := m.learned(ctx, n, len(m.nodes)-1)
		for _, s := range st.Sessions {
			if err == nil && s.Since.After(last) {
				last = s.Since
			}
		}
		return err
	})
	if err != nil {
		return err
	}
	r.SessionsSeconds, r.ConvergedSeconds = last.Sub(began).Seconds(), converged.Sub(began).Seconds()
	r.AskingSeconds = m.asking.Seconds()
	ends := 0
	for i := range m.nodes {
		ends += m.sessions(i, len(m.nodes)-1)
	}
	r.Sessions = ends / 2
	return m.usage(r)
}

// sessions is how many the i-th node has while it has so many peers.
func (m *mesh) sessions(i, peers int) int {
	if m.reflectors == 0 || i < m.reflectors {
		return peers
	}
	return m.reflectors
}

// learned returns nil once the node's speaker has all its sessions and has learned
// the subnets of so many peers.
func (m *mesh) learned(ctx context.Context, n *e2e.Node, peers int) (overlay.BGPStatus, error) {
	// The daemon's own view of the files: its host has a mount namespace.
	client := netctl.NewClient(fmt.Sprintf("/proc/%d/root%s", n.Daemon.Pid(), netctl.DefaultSocket))
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	st, err := client.BGP(ctx)
	if err != nil {
		return st, err
	}
	index := len(m.nodes)
	for i, o := range m.nodes {
		if o == n {
			index = i
		}
	}
	up, why := 0, "none is missing"
	for _, s := range st.Sessions {
		if s.State == "established" {
			up++
		} else {
			why = fmt.Sprintf("%s is in %s: %s", s.Neighbor.Address, s.State, s.Error)
		}
	}
	want := m.sessions(index, peers)
	if up != want || len(st.Sessions) != want || len(st.Received) != peers {
		return st, fmt.Errorf("%d of %d sessions are established (%s), %d of %d routes are learned", up, want, why, len(st.Received), peers)
	}
	return st, nil
}

// inKernel returns nil once the kernel has routes to so many peers. Those on the
// link are reached by their leases before anything is learned.
func (m *mesh) inKernel(n *e2e.Node, peers int) error {
	routes, err := e2e.PeerRoutes(n.NS)
	if err == nil && len(routes) != peers {
		err = fmt.Errorf("%d of %d routes are in the kernel", len(routes), peers)
	}
	return err
}

// await waits until check is content with every node at once, and returns when it
// first was with the last of them. Only one node at a time is asked, ten times a
// second: asking costs the CPU that is measured.
func (m *mesh) await(ctx context.Context, check func(*e2e.Node) error) (time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, m.limit)
	defer cancel()
	for {
		for i, n := range m.nodes {
			for err := check(n); err != nil; err = check(n) {
				select {
				case <-n.Daemon.Done():
					return time.Time{}, fmt.Errorf("twilld on %s has ended: %w; see its log in %s", n.Name, n.Daemon.Wait(), n.Daemon.Log)
				case <-ctx.Done():
					return time.Time{}, fmt.Errorf("%d of %d nodes are done after %s; on %s %w", i, len(m.nodes), m.limit, n.Name, err)
				case <-time.After(100 * time.Millisecond):
				}
			}
		}
		at, again := time.Now(), false
		for _, n := range m.nodes {
			again = again || check(n) != nil
		}
		m.asking = time.Since(at)
		if !again {
			return at, nil
		}
	}
}

// join starts one more node and waits until all others have its route, first by its
// lease and then by BGP.
func (m *mesh) join(ctx context.Context, r *meshResult) error {
	began := time.Now()
	if err := m.extra.Start(); err != nil {
		return err
	}
	reached, err := m.await(ctx, func(n *e2e.Node) error { return m.inKernel(n, len(m.nodes)) })
	if err != nil {
		return err
	}
	r.JoinKernelSeconds = reached.Sub(began).Seconds()
	learned, err := m.await(ctx, func(n *e2e.Node) error {
		_, err := m.learned(ctx, n, len(m.nodes))
		return err
	})
	r.JoinSeconds = learned.Sub(began).Seconds()
	return err
}

// leave ends the node's daemon and then its lease, and waits until its route is gone
// from all kernels. Without the second part it would stay for the restart time: a
// daemon that ends is expected back.
func (m *mesh) leave(ctx context.Context, r *meshResult) error {
	subnet, err := m.subnet(ctx)
	if err != nil {
		return err
	}
	if err := m.extra.Daemon.Term(); err != nil {
		return err
	}
	began := time.Now()
	if _, err := m.cluster.Etcd.Client().Delete(ctx, e2e.Prefix+"/subnets/"+(overlay.Subnets{V4: subnet}).Key()); err != nil {
		return err
	}
	gone, err := m.await(ctx, func(n *e2e.Node) error { return m.inKernel(n, len(m.nodes)-1) })
	r.LeaveSeconds = gone.Sub(began).Seconds()
	return err
}

// subnet is the lease of the extra node.
func (m *mesh) subnet(ctx context.Context) (netip.Prefix, error) {
	st, err := m.learned(ctx, m.extra, len(m.nodes))
	if err == nil && len(st.Announced) != 1 {
		err = fmt.Errorf("%s announces %d subnets", m.extra.Name, len(st.Announced))
	}
	if err != nil {
		return netip.Prefix{}, err
	}
	return st.Announced[0].Prefix, nil
}

// usage notes what every node has used until now.
func (m *mesh) usage(r *meshResult) error {
	for i, n := range m.nodes {
		u, err := e2e.UsageOf(n.Daemon.Pid())
		if err != nil {
			return err
		}
		r.CPUSeconds.add(i < m.reflectors, u.CPU.Seconds())
		r.RSSMiB.add(i < m.reflectors, mib(u.RSS))
		r.AnonMiB.add(i < m.reflectors, mib(u.Anon))
	}
	return nil
}

// idle measures nodes that have nothing to do but to say that they are alive.
func (m *mesh) idle(ctx context.Context, r *meshResult) error {
	const rest = 3 * time.Second // until what the last change has caused is done
	var before []time.Duration
	for _, wait := range []time.Duration{rest, meshIdle} {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
		for i, n := range m.nodes {
			u, err := e2e.UsageOf(n.Daemon.Pid())
			if err != nil {
				return err
			}
			if wait == rest {
				before = append(before, u.CPU)
				continue
			}
			r.IdlePercent.add(i < m.reflectors, 100*(u.CPU-before[i]).Seconds()/meshIdle.Seconds())
		}
	}
	return nil
}
