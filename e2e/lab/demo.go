package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/twill-net/twill/e2e"
	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

func demoCommand() *cobra.Command {
	var keep bool
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show the overlay at work: three hosts, an etcd, pods, faults",
		Long: `Show the overlay at work: three hosts in network namespaces, a real etcd, a real
twilld each, and pods wired by the real CNI plugin. Exits 1 if a packet was lost that
must not be, or anything else went wrong.`,
		Example: `  lab demo
  lab demo --keep`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return runDemo(ctx, keep)
		},
	}
	cmd.Flags().BoolVar(&keep, "keep", false, "leave the hosts up and say how to look around")
	return cmd
}

// demo is a lab with the pods of the show.
type demo struct {
	ctx     context.Context
	lab     *nettest.Lab
	cluster *e2e.Cluster
	pods    []*e2e.Pod // one on each host
	began   time.Time
}

func runDemo(ctx context.Context, keep bool) (err error) {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	lab, err := nettest.New(nettest.Options{Keep: keep, Program: self})
	if err != nil {
		return err
	}
	d := &demo{ctx: ctx, lab: lab, began: time.Now()}
	defer func() {
		if keep && err == nil {
			err = lab.Leave()
			return
		}
		if closeErr := lab.Close(); err == nil {
			err = closeErr
		}
	}()
	for _, act := range []struct {
		title string
		run   func() error
	}{
		{"Three hosts on a switch, an etcd, a twilld each", d.hosts},
		{"A pod on every host, wired by the CNI plugin", d.addPods},
		{"The leases in etcd, and what became of them on h1", d.leases},
		{"Pods reach each other", d.reach},
		{"A route, a neighbour and an FDB entry are deleted on h1", d.sabotage},
		{"twilld on h2 is killed and started again under traffic", d.restart},
		{"The cluster moves from VXLAN to plain routes, to BGP and back under traffic", d.move},
	} {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		fmt.Printf("\n== %s\n", act.title)
		if err := act.run(); err != nil {
			return err
		}
	}
	fmt.Printf("\nDone in %.0f s: everything above was real. ", time.Since(d.began).Seconds())
	if keep {
		d.tour(self)
		return nil
	}
	fmt.Println("All of it is removed now; make demo KEEP=1 leaves it up.")
	return nil
}

func (d *demo) hosts() error {
	var err error
	if d.cluster, err = e2e.New(d.ctx, d.lab, e2e.Options{Hosts: 3, Config: e2e.ConfigDual}); err != nil {
		return err
	}
	fmt.Printf("stored in etcd at %s: %s\n", strings.Join(d.cluster.Etcd.Endpoints(), " "), e2e.ConfigDual)
	began := time.Now()
	if err := d.cluster.Start(d.ctx); err != nil {
		return err
	}
	if err := d.cluster.WaitPeers(d.ctx); err != nil {
		return err
	}
	fmt.Printf("all three ready and in sync after %.1f s\n", time.Since(began).Seconds())
	return nil
}

func (d *demo) addPods() error {
	for _, n := range d.cluster.Nodes {
		began := time.Now()
		p, err := n.AddPod("p1")
		if err != nil {
			return err
		}
		fmt.Printf("%s  pod %s  %-12s %-18s ADD took %.0f ms\n", n.Name, p.Name, p.IPv4, p.IPv6, float64(time.Since(began).Microseconds())/1000)
		d.pods = append(d.pods, p)
	}
	return nil
}

func (d *demo) leases() error {
	for _, args := range [][]string{{"leases"}, {"routes"}} {
		if err := d.show(d.cluster.Nodes[0], args...); err != nil {
			return err
		}
	}
	return nil
}

// show runs netctl as the operator would and prints what it prints.
func (d *demo) show(n *e2e.Node, args ...string) error {
	fmt.Printf("\n%s# netctl %s\n", n.Name, strings.Join(args, " "))
	out, code, err := n.Netctl(args...)
	fmt.Print(out)
	if err == nil && code > 1 {
		err = fmt.Errorf("netctl %s exits with %d", strings.Join(args, " "), code)
	}
	return err
}

func (d *demo) reach() error {
	capture, err := d.cluster.Nodes[1].Capture(nettest.CaptureOptions{Keep: func(f nettest.Frame) bool { return f.Inner != nil }})
	if err != nil {
		return err
	}
	from := d.pods[0]
	mtu := from.Result.Interfaces[len(from.Result.Interfaces)-1].Mtu
	for _, to := range d.pods[1:] {
		for _, f := range []overlay.Family{overlay.IPv4, overlay.IPv6} {
			headers := 28
			if f == overlay.IPv6 {
				headers = 48
			}
			if err := from.Ping(to.Addr(f), 3, mtu-headers); err != nil {
				return err
			}
			r, err := nettest.Transfer(from.NS, to.NS, to.Addr(f), 64<<20)
			if err != nil {
				return err
			}
			fmt.Printf("%s to %s %-18s ping with %d byte packets ok, TCP 64 MiB in %.2f s, checksum %s ok\n", from.Name, to.Name, to.Addr(f), mtu, r.Seconds, r.CRC32C)
		}
	}
	frames, err := capture.Stop()
	if err != nil {
		return err
	}
	if len(frames) == 0 {
		return fmt.Errorf("no VXLAN packet was seen on h2's cable")
	}
	fmt.Printf("on h2's cable: %d VXLAN packets on UDP port 4789, the first: %s\n", len(frames), &frames[0])
	return nil
}

func (d *demo) sabotage() error {
	n, peer := d.cluster.Nodes[0], d.pods[1]
	subnet := peer.IPv4.As4()
	net := fmt.Sprintf("%d.%d.%d.0", subnet[0], subnet[1], subnet[2])
	mac, err := n.Run("sh", "-c", "ip neigh show dev flannel.1 "+net+" | cut -d' ' -f3")
	if err != nil {
		return err
	}
	for _, c := range []string{
		"ip route delete " + net + "/24",
		"ip neigh delete " + net + " dev flannel.1",
		"bridge fdb delete " + strings.TrimSpace(mac) + " dev flannel.1 dst " + peer.Node.IPv4.String() + " self",
	} {
		fmt.Printf("h1# %s\n", c)
		if _, err := n.Run("sh", "-c", c); err != nil {
			return err
		}
		began := time.Now()
		if err := n.WaitInSync(d.ctx); err != nil {
			return err
		}
		fmt.Printf("    in sync again when netctl diff looked, %.0f ms later\n", float64(time.Since(began).Microseconds())/1000)
	}
	return d.show(n, "drift")
}

func (d *demo) restart() error {
	n := d.cluster.Nodes[1]
	return d.probed(func() error {
		if err := n.Daemon.Kill9(); err != nil {
			return err
		}
		fmt.Println("h2# kill -9 $(pidof twilld)")
		time.Sleep(2 * time.Second)
		if err := n.Daemon.Start(); err != nil {
			return err
		}
		if err := n.WaitReady(d.ctx); err != nil {
			return err
		}
		fmt.Println("h2# twilld … : ready again")
		return nil
	})
}

// move stores one backend after the other.
func (d *demo) move() error {
	return d.probed(func() error {
		for _, backend := range []string{"host-gw", "bgp", "vxlan"} {
			config := e2e.ConfigDual
			if backend != "vxlan" {
				config = strings.Replace(config, `"Type": "vxlan", "Port": 4789`, `"Type": "`+backend+`"`, 1)
			}
			if err := d.cluster.Configure(d.ctx, config); err != nil {
				return err
			}
			began := time.Now()
			for _, n := range d.cluster.Nodes {
				err := n.WaitStatus(d.ctx, "moved to "+backend, func(s overlay.Status) bool { return s.Ready && s.Backend == backend })
				if err == nil {
					err = n.WaitInSync(d.ctx)
				}
				if err != nil {
					return err
				}
			}
			fmt.Printf("stored %s: all three nodes use it after %.1f s\n", config, time.Since(began).Seconds())
		}
		return nil
	})
}

// probed sends probes from one pod to another while something happens. None may be
// lost.
func (d *demo) probed(what func() error) error {
	probe, err := nettest.StartProbe(d.pods[0].NS, d.pods[1].NS, d.pods[1].IPv4)
	if err != nil {
		return err
	}
	time.Sleep(time.Second)
	if err := what(); err != nil {
		return err
	}
	time.Sleep(time.Second)
	r, err := probe.Stop()
	if err != nil {
		return err
	}
	fmt.Printf("1,000 probes a second from %s to %s: %s\n", d.pods[0].Name, d.pods[1].Name, r)
	if r.Lost > 0 {
		return fmt.Errorf("%d probes were lost", r.Lost)
	}
	return nil
}

// tour tells how to look around in a kept lab.
func (d *demo) tour(self string) {
	fmt.Printf(`It is left up as lab %s. Look around:

  %[2]s exec h1 -- netctl status
  %[2]s exec h1 -- netctl routes
  %[2]s exec h1 -- ip -d link show flannel.1
  %[2]s exec h1-p1 -- ping -c 3 %[3]s
  %[2]s exec h1 -- bash
  %[2]s down
`, d.lab.ID, self, d.pods[1].IPv4)
}
