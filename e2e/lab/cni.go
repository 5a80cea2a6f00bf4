package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"

	"github.com/containernetworking/cni/libcni"
	"github.com/spf13/cobra"

	"github.com/twill-net/twill/e2e"
	"github.com/twill-net/twill/pkg/nettest"
)

// cniOptions bound the load.
type cniOptions struct {
	pods   []int // on the node while one comes and goes, the last also of the reference
	most   int   // the same, of Twill alone
	rounds int
	calls  []int // at once
}

// defaultCNI takes about four minutes.
var defaultCNI = cniOptions{pods: []int{1, 100, 500}, most: 2000, rounds: 100, calls: []int{1, 8, 32}}

const (
	// maxPorts leaves some of a bridge's 1,023 ports (BR_MAX_PORTS in the kernel's
	// net/bridge/br_private.h) to the pods that come and go.
	maxPorts = 1000
	// maxPods is what a node's subnet has addresses for.
	maxPods = 4000
)

// Where Debian's containernetworking-plugins are.
const referencePlugins = "/usr/lib/cni"

func (o cniOptions) check() error {
	for _, n := range o.pods {
		if n < 1 || n > maxPorts {
			return fmt.Errorf("--pods: %d: must be 1..%d", n, maxPorts)
		}
	}
	for _, n := range o.calls {
		if n < 1 || n > 128 {
			return fmt.Errorf("--calls: %d: must be 1..128", n)
		}
	}
	switch {
	case len(o.pods) == 0 || len(o.calls) == 0:
		return errors.New("--pods and --calls must not be empty")
	case !slices.IsSorted(o.pods) || !slices.IsSorted(o.calls):
		return errors.New("--pods and --calls must grow")
	case o.most < o.pods[len(o.pods)-1] || o.most > maxPods:
		return fmt.Errorf("--most: %d: must be %d..%d", o.most, o.pods[len(o.pods)-1], maxPods)
	case o.rounds < 1:
		return fmt.Errorf("--rounds: %d: must be at least 1", o.rounds)
	}
	return nil
}

func cniCommand() *cobra.Command {
	o := defaultCNI
	asJSON := false
	cmd := &cobra.Command{
		Use:   "cni",
		Short: "Measure ADD and DEL beside the reference plugins, in the same rounds",
		Long: `Measure what ADD and DEL of one pod take on a node that has some pods: Twill with
twilld running, and on another host of the same lab Debian's bridge + host-local, with
portmap if the pod has a host port, and ptp + host-local for routed pods. Both are called
by libcni, one process per plugin, and round after round each is measured once. DEL is
measured until it returns, and until the kernel says that the link is gone. A ratio is
Twill's median to the reference's. CPU time is that of the plugins and of what they
execute, not that of the kernel's own threads.

Pods have IPv4 alone, which is the harder comparison: with IPv6, too, the reference waits
for duplicate address detection (one row shows it). A bridge has 1,023 ports at most, so
with more pods than that only routed ones are measured.`,
		Example: `  lab bench cni
  lab bench cni --pods 1,100 --most 200 --rounds 30 -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			report, err := benchCNI(ctx, o)
			if asJSON {
				return errors.Join(err, json.NewEncoder(os.Stdout).Encode(report))
			}
			return errors.Join(err, report.print())
		},
	}
	cmd.Flags().IntSliceVar(&o.pods, "pods", o.pods, "pods on the node, growing")
	cmd.Flags().IntVar(&o.most, "most", o.most, "pods on the node in the end, of Twill alone")
	cmd.Flags().IntVar(&o.rounds, "rounds", o.rounds, "how often to measure each")
	cmd.Flags().IntSliceVar(&o.calls, "calls", o.calls, "calls at once, growing")
	cmd.Flags().VarPF((*jsonFlag)(&asJSON), "output", "o", "table or json")
	return cmd
}

// cniBench is a run: what it needs, and what has come of it.
type cniBench struct {
	cniOptions
	twill, nothing string // paths
	cniReport
}

// benchCNI reports what it has also if a part failed.
func benchCNI(ctx context.Context, o cniOptions) (report cniReport, err error) {
	if err := o.check(); err != nil {
		return report, err
	}
	b := &cniBench{cniOptions: o}
	for _, p := range []string{"bridge", "ptp", "host-local", "portmap"} {
		if _, err := exec.LookPath(filepath.Join(referencePlugins, p)); err != nil {
			return report, fmt.Errorf("find reference: %w; install containernetworking-plugins (make deps)", err)
		}
	}
	if b.twill, err = nettest.BuildProgram("./plugins/twill"); err != nil {
		return report, err
	}
	if b.nothing, err = nettest.BuildProgram("./e2e/nothing"); err != nil {
		return report, err
	}
	if b.Load, err = load(); err != nil {
		return report, err
	}
	// A goroutine that comes back from a blocking call needs one of these to go
	// on; with one per CPU it would wait for the runtime to notice which are idle.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(64))
	before, err := readNeighbours()
	if err != nil {
		return report, err
	}
	for _, part := range []struct {
		name string
		run  func(context.Context) error
	}{
		{"one pod", b.onePod},
		{"one pod, dual stack", b.dualStack},
		{"host ports", b.hostPorts},
		{"many calls", b.manyCalls},
		{"bridged pods", b.bridged},
		{"routed pods", b.routed},
	} {
		fmt.Fprintf(os.Stderr, "CNI: %s …\n", part.name)
		if e := part.run(ctx); e != nil {
			err = errors.Join(err, fmt.Errorf("measure %s: %w", part.name, e))
		}
		if ctx.Err() != nil {
			break
		}
	}
	after, e := readNeighbours()
	b.Overflows = after - before
	return b.cniReport, errors.Join(err, e)
}

// cniHosts are the hosts of a part: one of the reference, the others run twilld.
type cniHosts struct {
	cluster   *e2e.Cluster
	dual      bool // stack; else IPv4 alone
	twill     []*cniNode
	reference *cniNode
}

// Configurations with a subnet of 4,094 IPv4 addresses per node.
const (
	cniIPv4 = `{"Network": "198.18.0.0/16", "SubnetLen": 20, "Backend": {"Type": "vxlan", "Port": 4789}}`
	cniDual = `{"Network": "198.18.0.0/16", "SubnetLen": 20, "EnableIPv6": true, "IPv6Network": "fd00:18::/48", "Backend": {"Type": "vxlan", "Port": 4789}}`
)

// onHosts makes a lab with so many nodes of Twill, and removes it after f.
func (b *cniBench) onHosts(ctx context.Context, twill int, dual bool, f func(*cniHosts) error) (err error) {
	lab, err := nettest.New(nettest.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lab.Close()) }()
	config := cniIPv4
	if dual {
		config = cniDual
	}
	h := &cniHosts{dual: dual}
	if h.cluster, err = e2e.New(ctx, lab, e2e.Options{Hosts: twill + 1, Config: config}); err != nil {
		return err
	}
	for i, node := range h.cluster.Nodes {
		n, err := newCNINode(node.Host, b.calls[len(b.calls)-1])
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, n.close()) }()
		if i == twill {
			h.reference = n
			break
		}
		h.twill = append(h.twill, n)
		if err := node.Start(); err != nil {
			return err
		}
		if err := node.WaitReady(ctx); err != nil {
			return err
		}
	}
	return f(h)
}

// twillNetwork is Twill's on the i-th node, with more keys of its configuration.
func (b *cniBench) twillNetwork(h *cniHosts, i int, more string) (*cniNetwork, error) {
	return h.network(h.twill[i], filepath.Dir(b.twill), `{"type": "twill", "capabilities": {"portMappings": true}`+more+`}`)
}

// Plugins of the reference. All give a pod default routes and Twill's MTU.
const (
	bridgePlugin  = `{"type": "bridge", "bridge": "cni0", "isDefaultGateway": true, "hairpinMode": true, "mtu": 1450, "ipam": {"type": "host-local", "ranges": [%s]}}`
	ptpPlugin     = `{"type": "ptp", "mtu": 1450, "ipam": {"type": "host-local", "ranges": [%s], "routes": [{"dst": "0.0.0.0/0"}]}}`
	portmapPlugin = `{"type": "portmap", "snat": true, "capabilities": {"portMappings": true}}`
)

func (h *cniHosts) referenceNetwork(plugin, more string) (*cniNetwork, error) {
	ranges := `[{"subnet": "198.19.0.0/20"}]`
	if h.dual {
		ranges += `, [{"subnet": "fd00:19:0:1::/64"}]`
	}
	return h.network(h.reference, referencePlugins, fmt.Sprintf(plugin, ranges)+more)
}

func (h *cniHosts) network(n *cniNode, path, plugins string) (*cniNetwork, error) {
	conflist := `{"cniVersion": "1.0.0", "name": "bench", "plugins": [` + plugins + `]}`
	list, err := libcni.NetworkConfFromBytes([]byte(conflist))
	if err != nil {
		return nil, fmt.Errorf("read network configuration: %w: %s", err, conflist)
	}
	net := &cniNetwork{node: n, list: list, path: path, families: 1}
	if h.dual {
		net.families = 2
	}
	return net, nil
}
