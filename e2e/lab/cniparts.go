package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"
)

// Cases, as the report calls them.
const (
	caseBridged = "bridged"
	caseRouted  = "routed"
	caseDual    = "bridged, dual stack"
	caseNoTwill = "bridged, twilld ended"

	byBridge  = "bridge + host-local"
	byPortmap = byBridge + " + portmap"
	byPtp     = "ptp + host-local"
)

// onePod is what a process costs at the least, and what is different without twilld.
func (b *cniBench) onePod(ctx context.Context) error {
	return b.onHosts(ctx, 1, false, func(h *cniHosts) error {
		networks, err := b.bridgedPair(h)
		if err != nil {
			return err
		}
		if err := b.measureFloor(ctx, networks[0]); err != nil {
			return err
		}
		if err := h.cluster.Nodes[0].Daemon.Term(); err != nil {
			return err
		}
		return b.measure(ctx, []cniRow{{Case: caseNoTwill, Pods: 1, By: byBridge}}, networks)
	})
}

func (b *cniBench) dualStack(ctx context.Context) error {
	return b.onHosts(ctx, 1, true, func(h *cniHosts) error {
		networks, err := b.bridgedPair(h)
		if err != nil {
			return err
		}
		return b.measure(ctx, []cniRow{{Case: caseDual, Pods: 1, By: byBridge}}, networks)
	})
}

// bridgedPair is Twill's network and the reference's, each on its node.
func (b *cniBench) bridgedPair(h *cniHosts) ([]*cniNetwork, error) {
	twill, err := b.twillNetwork(h, 0, "")
	if err != nil {
		return nil, err
	}
	reference, err := h.referenceNetwork(bridgePlugin, "")
	return []*cniNetwork{twill, reference}, err
}

func (b *cniBench) hostPorts(ctx context.Context) error {
	return b.onHosts(ctx, 2, false, func(h *cniHosts) error {
		var rows []cniRow
		var networks []*cniNetwork
		for i, firewall := range []string{"nftables", "iptables"} {
			n, err := b.twillNetwork(h, i, fmt.Sprintf(`, "firewall": %q`, firewall))
			if err != nil {
				return err
			}
			rows = append(rows, cniRow{Case: "host port, " + firewall, Pods: 1, By: byPortmap})
			networks = append(networks, n)
		}
		reference, err := h.referenceNetwork(bridgePlugin, ", "+portmapPlugin)
		if err != nil {
			return err
		}
		networks = append(networks, reference)
		for _, n := range networks {
			n.hostPort = 30080
		}
		return b.measure(ctx, rows, networks)
	})
}

func (b *cniBench) bridged(ctx context.Context) error {
	return b.onHosts(ctx, 1, false, func(h *cniHosts) error {
		networks, err := b.bridgedPair(h)
		if err != nil {
			return err
		}
		return b.growing(ctx, cniRow{Case: caseBridged, By: byBridge}, networks)
	})
}

func (b *cniBench) routed(ctx context.Context) error {
	return b.onHosts(ctx, 1, false, func(h *cniHosts) error {
		twill, err := b.twillNetwork(h, 0, `, "mode": "routed"`)
		if err != nil {
			return err
		}
		reference, err := h.referenceNetwork(ptpPlugin, "")
		if err != nil {
			return err
		}
		twill.routed, reference.routed = true, true
		return b.growing(ctx, cniRow{Case: caseRouted, By: byPtp}, []*cniNetwork{twill, reference})
	})
}

// growing measures with more and more pods on the nodes, at last Twill alone.
func (b *cniBench) growing(ctx context.Context, row cniRow, networks []*cniNetwork) error {
	for _, row.Pods = range b.pods {
		if err := b.measure(ctx, []cniRow{row}, networks); err != nil {
			return err
		}
	}
	row.Pods = b.most
	if !networks[0].routed {
		row.Pods = min(b.most, maxPorts)
	}
	if row.Pods == b.pods[len(b.pods)-1] {
		return nil
	}
	return b.measure(ctx, []cniRow{row}, networks[:1])
}

// measure fills the nodes up, and then measures one pod that comes and goes, by
// each network once in each round. There is a row for each network of Twill's;
// the network after those is the reference, if any.
func (b *cniBench) measure(ctx context.Context, rows []cniRow, networks []*cniNetwork) error {
	for _, n := range networks {
		if err := n.grow(ctx, rows[0].Pods); err != nil {
			return err
		}
		if err := n.tryOut(ctx); err != nil {
			return fmt.Errorf("try out %s on %s: %w", n.list.Plugins[0].Network.Type, n.node.Name, err)
		}
	}
	if err := settle(ctx, rows[0].Pods); err != nil {
		return err
	}
	series := make([]cniSeries, len(networks))
	for i, n := range networks {
		var err error
		if series[i].pods, err = newCNIPods(fmt.Sprintf("%s-%d-", n.node.Name, rows[0].Pods), b.rounds); err != nil {
			return err
		}
		defer closePods(series[i].pods)
	}
	for round := range b.rounds {
		for i := range networks {
			k := (i + round) % len(networks)
			if err := series[k].add(ctx, networks[k], round); err != nil {
				return err
			}
		}
		for i := range networks {
			k := (i + round) % len(networks)
			if err := series[k].del(ctx, networks[k], round); err != nil {
				return err
			}
		}
	}
	for i, row := range rows {
		var reference *cniSeries
		if len(series) > len(rows) {
			reference = &series[len(rows)]
		}
		b.addRows(row, &series[i], reference)
	}
	return nil
}

// settle waits until pods that have just come are quiet: for some seconds they
// all tell which multicast groups they want, and ask for routers.
func settle(ctx context.Context, pods int) error {
	wait := 200 * time.Millisecond
	if pods >= 100 {
		wait = 6 * time.Second
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(wait):
		return nil
	}
}

// grow adds pods that stay, some at once, until there are so many.
func (n *cniNetwork) grow(ctx context.Context, pods int) error {
	more, err := newCNIPods(n.node.Name+"-stays-"+strconv.Itoa(len(n.node.staying))+"-", pods-len(n.node.staying))
	if err != nil {
		return err
	}
	n.node.staying = append(n.node.staying, more...)
	hostPort := n.hostPort
	n.hostPort = 0 // only one pod can have it
	defer func() { n.hostPort = hostPort }()
	_, err = atOnce(min(4, len(more)), more, func(p *cniPod) (cniCall, error) { return n.add(ctx, p) })
	return err
}

// atOnce does f for every pod, calls of them at a time.
func atOnce(calls int, pods []*cniPod, f func(*cniPod) (cniCall, error)) ([]cniCall, error) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	var took []cniCall
	var first error
	next := make(chan *cniPod, len(pods))
	for _, p := range pods {
		next <- p
	}
	close(next)
	for range calls {
		wg.Go(func() {
			for p := range next {
				c, err := f(p)
				mu.Lock()
				took = append(took, c)
				if first == nil {
					first = err
				}
				stop := first != nil
				mu.Unlock()
				if stop {
					return
				}
			}
		})
	}
	wg.Wait()
	return took, first
}

// tryOut sees that packets reach a pod: what does not work is not measured.
func (n *cniNetwork) tryOut(ctx context.Context) (err error) {
	p, err := newCNIPod(fmt.Sprintf("%s-tried-%d", n.node.Name, len(n.node.staying)))
	if err != nil {
		return err
	}
	defer p.ns.Close()
	if _, err := n.add(ctx, p); err != nil {
		return err
	}
	defer func() {
		_, e := n.delAway(ctx, p)
		err = errors.Join(err, e)
	}()
	var listener net.Listener
	err = p.do(func() (err error) { listener, err = net.Listen("tcp", fmt.Sprint(":", podPort)); return err })
	if err != nil {
		return err
	}
	defer listener.Close()
	var to []netip.AddrPort
	for _, a := range p.addrs() {
		to = append(to, netip.AddrPortFrom(a, podPort))
	}
	if len(to) != n.families {
		return fmt.Errorf("the pod has the addresses %v, must have %d", p.addrs(), n.families)
	}
	if onBridge := p.result.Interfaces[0].Name == "cni0"; onBridge == n.routed {
		return fmt.Errorf("the pod has the interfaces %v, must be routed: %t", p.result.Interfaces, n.routed)
	}
	if n.hostPort != 0 {
		to = append(to, netip.AddrPortFrom(n.node.IPv4, uint16(n.hostPort)))
	}
	soon, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for _, a := range to {
		conn, err := n.node.DialContext(soon, "tcp", a.String())
		if err != nil {
			return err
		}
		conn.Close()
	}
	return nil
}

// manyCalls measures how many ADDs and DELs per second get through. In each round
// every network has its turn.
func (b *cniBench) manyCalls(ctx context.Context) error {
	const rounds, perCall, least = 3, 3, 32
	return b.onHosts(ctx, 1, false, func(h *cniHosts) error {
		networks, err := b.bridgedPair(h)
		if err != nil {
			return err
		}
		for _, calls := range b.calls {
			var turns [2][]cniTurn
			for round := range rounds {
				for i, n := range networks {
					t, err := n.turn(ctx, calls, fmt.Sprintf("%s-%d-%d-", n.node.Name, calls, round), max(least, perCall*calls))
					if err != nil {
						return err
					}
					turns[i] = append(turns[i], t)
				}
			}
			b.addParallel(calls, turns[0], turns[1])
		}
		return nil
	})
}

// cniTurn is a number of pods that come, and then go, some at once.
type cniTurn struct {
	adds, dels []cniCall
	add, del   time.Duration // for all; del until the last link is gone
}

func (n *cniNetwork) turn(ctx context.Context, calls int, prefix string, pods int) (t cniTurn, err error) {
	all, err := newCNIPods(prefix, pods)
	if err != nil {
		return t, err
	}
	defer closePods(all)
	begin := time.Now()
	if t.adds, err = atOnce(calls, all, func(p *cniPod) (cniCall, error) { return n.add(ctx, p) }); err != nil {
		return t, err
	}
	t.add = time.Since(begin)
	begin = time.Now()
	t.dels, err = atOnce(calls, all, func(p *cniPod) (cniCall, error) {
		_, c, err := n.del(ctx, p)
		return c, err
	})
	last := time.Now()
	for _, p := range all {
		if err != nil {
			return t, err
		}
		var at time.Time
		if at, err = n.node.watch.await(ctx, p.link); at.After(last) {
			last = at
		}
	}
	t.del = last.Sub(begin)
	return t, err
}

// measureFloor executes what does nothing, or next to nothing, on the same thread.
func (b *cniBench) measureFloor(ctx context.Context, n *cniNetwork) error {
	floors := []struct {
		what, path string
		env        []string
	}{
		{"a Go program that does nothing", b.nothing, nil},
		{"twill, VERSION", b.twill, []string{"CNI_COMMAND=VERSION"}},
		{"bridge, VERSION", referencePlugins + "/bridge", []string{"CNI_COMMAND=VERSION"}},
	}
	calls := make([][]cniCall, len(floors))
	for range b.rounds {
		for i, f := range floors {
			var err error
			n.node.do(func() {
				m := &meter{}
				begin := time.Now()
				_, err = m.ExecPlugin(ctx, f.path, []byte(`{"cniVersion": "1.0.0"}`), f.env)
				calls[i] = append(calls[i], cniCall{wall: time.Since(begin), cpu: m.cpu})
			})
			if err != nil {
				return err
			}
		}
	}
	for i, f := range floors {
		b.Floor = append(b.Floor, cniFloor{What: f.what, cniFigures: figuresOf(calls[i])})
	}
	return nil
}
