package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/e2e"
	"github.com/twill-net/twill/pkg/nettest"
)

// marks are the ratios to the reference that a backend is to reach; 0: none is set.
type marks struct {
	of   string  // the reference of rate; p50's is always bare
	rate float64 // of the four throughputs, at least
	p50  float64 // at most
}

// runner is a backend on its way through the rounds.
type runner struct {
	name   string
	config string // the Backend object; empty: no pods, no twilld
	user   bool   // packets pass through twilld
	marks  marks

	road   road
	rounds []speed // those that went well
	err    error   // why there are no more
}

const bare = "bare"

// runners are all that run here. The first is the bare veth path: between two
// hosts, over the same kind of switch with the same MTU, with no pod, no twilld
// and no rule.
func runners() []*runner {
	routed := marks{of: bare, rate: 0.95, p50: 1.2}
	return []*runner{
		{name: bare},
		{name: "host-gw", config: `{"Type": "host-gw"}`, marks: routed},
		{name: "bgp", config: `{"Type": "bgp"}`, marks: routed},
		{name: "vxlan", config: `{"Type": "vxlan", "Port": 4789}`, marks: marks{of: bare, rate: 0.80, p50: 1.5}},
		{name: "udp", config: `{"Type": "udp"}`, user: true, marks: marks{of: "vxlan", rate: 0.80}},
		{name: "wireguard", config: `{"Type": "wireguard"}`, user: true},
	}
}

func throughputCommand() *cobra.Command {
	var rounds int
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "throughput",
		Short: "Measure what every backend carries between pods, beside the bare path",
		Long: `Measure what every backend carries between two pods on two hosts: one and four TCP
streams, UDP packets, and the time of a byte there and back. All stand at the same
time, and round after round each is measured once, after the bare veth path between two
hosts. A ratio is the median of the rounds' own ratios.`,
		Example: `  lab bench throughput
  lab bench throughput --rounds 15 -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			report, err := benchThroughput(ctx, rounds)
			if err != nil {
				return err
			}
			return printReport(report, asJSON)
		},
	}
	cmd.Flags().IntVar(&rounds, "rounds", throughputRounds, "how often to measure each")
	cmd.Flags().VarPF((*jsonFlag)(&asJSON), "output", "o", "table or json")
	return cmd
}

// throughputRounds take about a minute and a half.
const throughputRounds = 7

// benchThroughput fails only without a bare path: a backend that does not work is
// reported with its error.
func benchThroughput(ctx context.Context, rounds int) (report throughputReport, err error) {
	if rounds < 1 {
		return report, fmt.Errorf("--rounds: %d: must be at least 1", rounds)
	}
	self, err := os.Executable()
	if err != nil {
		return report, err
	}
	places, err := findSeats()
	if err != nil {
		return report, err
	}
	// A goroutine that comes back from a blocking call needs one of these to go
	// on; with one per CPU it would wait for the runtime to notice which are idle.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(16))

	all := runners()
	for _, r := range all {
		lab, err := nettest.New(nettest.Options{Program: self})
		if err != nil {
			return report, err
		}
		defer func() {
			if closeErr := lab.Close(); err == nil {
				err = closeErr
			}
		}()
		fmt.Fprintf(os.Stderr, "setting up %s …\n", r.name)
		r.err = r.setUp(ctx, lab)
	}
	if report.Load, err = load(); err != nil {
		return report, err
	}
	for i := range rounds {
		fmt.Fprintf(os.Stderr, "throughput, round %d of %d …\n", i+1, rounds)
		for _, r := range all {
			if ctx.Err() != nil {
				return report, ctx.Err()
			}
			r.round(places)
		}
	}
	if err := all[0].err; err != nil {
		return report, fmt.Errorf("measure the bare path: %w", err)
	}
	report.Rows = newReport(all)
	return report, nil
}

// load returns the machine's load average of the last minute.
func load() (avg float64, err error) {
	b, err := os.ReadFile("/proc/loadavg")
	if err == nil {
		_, err = fmt.Sscan(string(b), &avg)
	}
	if err != nil {
		return 0, fmt.Errorf("read load average: %w", err)
	}
	return avg, nil
}

func (r *runner) round(s seats) {
	if r.err != nil {
		return
	}
	got, err := r.road.measure(s)
	if r.err = err; err == nil {
		r.rounds = append(r.rounds, got)
	}
}

// findSeats returns the first two CPUs that this process may run on, or the only
// one twice.
func findSeats() (seats, error) {
	var allowed unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		return seats{}, fmt.Errorf("read which CPUs may be used: %w", err)
	}
	var cpus []int
	for cpu := 0; len(cpus) < min(2, allowed.Count()); cpu++ {
		if allowed.IsSet(cpu) {
			cpus = append(cpus, cpu)
		}
	}
	return seats{cpus[0], cpus[len(cpus)-1]}, nil
}

// setUp makes two hosts, and for a backend a pod on each.
func (r *runner) setUp(ctx context.Context, lab *nettest.Lab) error {
	if r.config == "" {
		hosts, err := lab.NewHosts(2)
		if err == nil {
			r.road = road{from: hosts[0].NS, to: hosts[1].NS, addr: hosts[1].IPv4}
		}
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	config := fmt.Sprintf(`{"Network": %q, "Backend": %s}`, e2e.PodNetwork, r.config)
	c, err := e2e.New(ctx, lab, e2e.Options{Hosts: 2, Config: config})
	if err != nil {
		return err
	}
	if err := errors.Join(c.Start(ctx), c.WaitPeers(ctx)); err != nil {
		return err
	}
	var pods []*e2e.Pod
	for _, n := range c.Nodes {
		p, err := n.AddPod("p1")
		if err != nil {
			return err
		}
		pods = append(pods, p)
	}
	r.road = road{from: pods[0].NS, to: pods[1].NS, addr: pods[1].IPv4}
	return pods[0].Ping(pods[1].IPv4, 1, 56)
}
