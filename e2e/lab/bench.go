package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/twill-net/twill/e2e"
	"github.com/twill-net/twill/pkg/nettest"
)

// benchOptions bound the load.
type benchOptions struct {
	peers []int
	idle  time.Duration
	json  bool
}

// scaleResult is one row: twilld with so many peers, and the plain way beside it.
type scaleResult struct {
	Peers           int     `json:"peers"`
	StartSeconds    float64 `json:"start_s"`     // from exec to the last entry in the kernel
	KernelSeconds   float64 `json:"kernel_s"`    // of it, writing to the kernel
	ReferenceSec    float64 `json:"reference_s"` // the same entries, one call at a time
	Ratio           float64 `json:"ratio"`       // reference / kernel
	CPUSeconds      float64 `json:"cpu_s"`
	PeakMiB         float64 `json:"peak_mib"`
	OneMoreMedianMS float64 `json:"one_more_median_ms,omitempty"`
	OneMoreP99MS    float64 `json:"one_more_p99_ms,omitempty"`
	ThousandMS      float64 `json:"thousand_more_ms,omitempty"`
	IdleCPUPercent  float64 `json:"idle_cpu_percent,omitempty"`
	ResidentMiB     float64 `json:"resident_mib,omitempty"`
}

func benchCommand() *cobra.Command {
	o := benchOptions{}
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure the overlay at scale and its throughput, beside a reference in the same run",
		Long: `Measure the overlay at scale. For each number of peers: their leases are put into a
real etcd, twilld is started on one host, and the time is taken until the last entry is
in the kernel; then the same entries are made one netlink call at a time with plain
onlink routes, as the reference. At the largest number: one more peer, 1,000 more at
once, memory, and CPU while nothing happens. Then what "lab bench throughput",
"lab bench mesh" and "lab bench cni" measure.`,
		Example: `  lab bench
  lab bench --peers 100,1000 --idle 10s -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return runBench(ctx, o)
		},
	}
	cmd.AddCommand(throughputCommand(), meshCommand(), cniCommand())
	cmd.Flags().IntSliceVar(&o.peers, "peers", []int{100, 1000, 10000}, "numbers of peers, the largest last, 14000 at most")
	cmd.Flags().DurationVar(&o.idle, "idle", time.Minute, "how long to measure an idle daemon")
	cmd.Flags().VarPF((*jsonFlag)(&o.json), "output", "o", "table or json")
	return cmd
}

// jsonFlag is -o table|json.
type jsonFlag bool

func (j *jsonFlag) String() string {
	if *j {
		return "json"
	}
	return "table"
}
func (j *jsonFlag) Type() string { return "format" }
func (j *jsonFlag) Set(s string) error {
	if s != "table" && s != "json" {
		return fmt.Errorf("%q is not table or json", s)
	}
	*j = s == "json"
	return nil
}

func runBench(ctx context.Context, o benchOptions) error {
	var results []scaleResult
	for i, n := range o.peers {
		if n < 1 || n > 14000 {
			return fmt.Errorf("--peers: %d: must be 1..14000", n)
		}
		fmt.Fprintf(os.Stderr, "%d peers …\n", n)
		r, err := benchScale(ctx, n, o, i == len(o.peers)-1)
		if err != nil {
			return err
		}
		results = append(results, r)
	}
	throughput, err := benchThroughput(ctx, throughputRounds)
	if err != nil {
		return err
	}
	mesh, err := benchMesh(ctx, defaultMesh)
	cni, cniErr := benchCNI(ctx, defaultCNI)
	err = errors.Join(err, cniErr)
	if o.json {
		return errors.Join(err, json.NewEncoder(os.Stdout).Encode(struct {
			Scale      []scaleResult    `json:"scale"`
			Throughput throughputReport `json:"throughput"`
			Mesh       meshReport       `json:"mesh"`
			CNI        cniReport        `json:"cni"`
		}{results, throughput, mesh, cni}))
	}
	printBench(results)
	fmt.Println()
	err = errors.Join(err, throughput.print())
	fmt.Println()
	err = errors.Join(err, mesh.print())
	fmt.Println()
	return errors.Join(err, cni.print())
}

func printBench(results []scaleResult) {
	fmt.Printf("overlay at scale: %d CPUs, %s, etcd in memory on another host\n\n", runtime.NumCPU(), runtime.Version())
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "peers\tstart s\tin kernel s\treference s\tratio\tCPU s\tpeak MiB\t")
	for _, r := range results {
		fmt.Fprintf(w, "%d\t%.3f\t%.3f\t%.3f\t%.1f\t%.3f\t%.1f\t\n", r.Peers, r.StartSeconds, r.KernelSeconds, r.ReferenceSec, r.Ratio, r.CPUSeconds, r.PeakMiB)
	}
	w.Flush()
	last := results[len(results)-1]
	fmt.Printf(`
at %d peers
  one more peer, etcd write to kernel   median %.1f ms, 99%% %.1f ms
  1,000 more at once                    %.0f ms
  resident memory                       %.1f MiB
  CPU when nothing happens              %.3f %%
`, last.Peers, last.OneMoreMedianMS, last.OneMoreP99MS, last.ThousandMS, last.ResidentMiB, last.IdleCPUPercent)
}

// benchScale measures one number of peers on a fresh lab.
func benchScale(ctx context.Context, n int, o benchOptions, whole bool) (r scaleResult, err error) {
	self, err := os.Executable()
	if err != nil {
		return r, err
	}
	lab, err := nettest.New(nettest.Options{Program: self})
	if err != nil {
		return r, err
	}
	defer func() {
		if closeErr := lab.Close(); err == nil {
			err = closeErr
		}
	}()
	c, err := e2e.New(ctx, lab, e2e.Options{Hosts: 1, Config: e2e.ConfigScale})
	if err != nil {
		return r, err
	}
	if err := e2e.PutPeers(ctx, c.Etcd.Client(), 0, n); err != nil {
		return r, err
	}
	r.Peers = n
	if err := startScale(c, n, &r); err != nil {
		return r, err
	}
	if whole {
		if err := growScale(ctx, c, n, &r); err != nil {
			return r, err
		}
		if err := idleScale(ctx, c, o.idle, &r); err != nil {
			return r, err
		}
	}
	if err := c.Nodes[0].Daemon.Term(); err != nil {
		return r, err
	}
	ns, err := lab.NewNS("reference")
	if err != nil {
		return r, err
	}
	took, err := e2e.ReferenceProgram(ns, n)
	r.ReferenceSec = took.Seconds()
	r.Ratio = r.ReferenceSec / r.KernelSeconds
	return r, err
}

// startScale takes the time from exec to READY=1 and checks that all is there.
func startScale(c *e2e.Cluster, n int, r *scaleResult) error {
	node := c.Nodes[0]
	notify, err := e2e.NewNotify(c.Lab.Dir)
	if err != nil {
		return err
	}
	defer notify.Close()
	if err := c.Lab.Setenv("NOTIFY_SOCKET", notify.Path); err != nil {
		return err
	}
	began := time.Now()
	if err := node.Start(); err != nil {
		return err
	}
	ready, err := notify.Ready(2 * time.Minute)
	if err != nil {
		return err
	}
	r.StartSeconds = ready.Sub(began).Seconds()
	routes, neighs, fdb, err := e2e.CountObjects(node.NS)
	if err != nil {
		return err
	}
	if routes != n || neighs < n || fdb < n {
		return fmt.Errorf("ready with %d routes, %d neighbours, %d FDB entries; must be %d each", routes, neighs, fdb, n)
	}
	if r.KernelSeconds, err = node.Metric("twill_apply_seconds_sum"); err != nil {
		return err
	}
	u, err := e2e.UsageOf(node.Daemon.Pid())
	r.CPUSeconds, r.PeakMiB = u.CPU.Seconds(), mib(u.HWM)
	return err
}

// growScale adds peers to a running daemon: one at a time, then 1,000 at once.
func growScale(ctx context.Context, c *e2e.Cluster, n int, r *scaleResult) error {
	const single, burst = 60, 1000
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	events, err := e2e.RouteEvents(ctx, c.Nodes[0].NS)
	if err != nil {
		return err
	}
	var took []float64
	for i := n; i < n+single; i++ {
		time.Sleep(300 * time.Millisecond) // each from rest
		began := time.Now()
		if err := e2e.PutPeers(ctx, c.Etcd.Client(), i, i+1); err != nil {
			return err
		}
		if err := await(events, e2e.ScalePeer(i).V4, 1); err != nil {
			return err
		}
		took = append(took, ms(time.Since(began)))
	}
	slices.Sort(took)
	r.OneMoreMedianMS, r.OneMoreP99MS = took[len(took)/2], took[len(took)*99/100]
	began := time.Now()
	if err := e2e.PutPeers(ctx, c.Etcd.Client(), n+single, n+single+burst); err != nil {
		return err
	}
	err = await(events, e2e.ScalePeer(n+single+burst-1).V4, burst)
	r.ThousandMS = ms(time.Since(began))
	return err
}

// idleScale measures memory and CPU of a daemon that has nothing to do.
func idleScale(ctx context.Context, c *e2e.Cluster, d time.Duration, r *scaleResult) error {
	pid := c.Nodes[0].Daemon.Pid()
	time.Sleep(3 * time.Second)
	before, err := e2e.UsageOf(pid)
	if err != nil {
		return err
	}
	began := time.Now()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
	}
	after, err := e2e.UsageOf(pid)
	r.IdleCPUPercent = 100 * (after.CPU - before.CPU).Seconds() / time.Since(began).Seconds()
	r.ResidentMiB = mib(after.RSS)
	return err
}

func mib(bytes int64) float64 { return float64(bytes) / (1 << 20) }

// await reads count new routes; the last of a batch may come in any order.
func await[P comparable](events <-chan P, last P, count int) error {
	limit := time.After(30 * time.Second)
	seen := false
	for n := 0; n < count || !seen; {
		select {
		case e, ok := <-events:
			if !ok {
				return fmt.Errorf("the kernel's route events broke off")
			}
			n++
			seen = seen || e == last
		case <-limit:
			return fmt.Errorf("after 30 s %d of %d routes have come", n, count)
		}
	}
	return nil
}
