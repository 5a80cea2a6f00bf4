package netctl

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/twill-net/twill/pkg/install"
)

// installFlags are those of netctl install.
type installFlags struct {
	clusterFlags
	print, reset, force, skipChecks bool
	dryRun                          choice
	wait                            time.Duration
}

func (a *app) install() *cobra.Command {
	f := &installFlags{dryRun: choice{value: "none", among: []string{"none", "server"}}}
	c := &cobra.Command{
		Use:   "install",
		Short: "Put Twill into a Kubernetes cluster",
		Long: `Put Twill into a Kubernetes cluster, or bring what is there to this release: check
the cluster, apply the objects of the Helm chart that is part of this program, and
wait until every node can connect pods. What each node waits for is told on stderr.
A second run changes nothing.

The pods' network is that of kube-controller-manager (kubeadm), unless named. Values
of earlier runs stay; --reset-values forgets them.

` + clusterExitCodes,
		Example: `  netctl install --print
  netctl install --dry-run=server
  netctl install --backend host-gw --pod-cidr 10.244.0.0/16
  netctl install --set twill.mode=routed --set 'twill.args={--iface=eth1}'`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error { return a.runInstall(c, f) },
	}
	s := c.Flags()
	f.connectTo(s)
	s.StringVar(&f.podCIDR, "pod-cidr", "", "`prefix` of the pods' IPv4 network, as kube-controller-manager's --cluster-cidr")
	s.StringVar(&f.podCIDRv6, "pod-cidr-v6", "", "`prefix` of the pods' IPv6 network; without --pod-cidr there is no IPv4")
	s.StringVar(&f.backend, "backend", "", "`name`: vxlan (default), host-gw, bgp, udp, wireguard, ipip, alloc or extension")
	f.valuesFrom(s)
	s.BoolVar(&f.print, "print", false, "print the objects as YAML, and do nothing; no cluster is asked")
	s.Var(&f.dryRun, "dry-run", "`where`: server shows what would be changed there, and changes nothing; or none")
	s.BoolVar(&f.reset, "reset-values", false, "forget the values of earlier runs")
	s.BoolVar(&f.force, "force", false, "take over fields of Twill's objects that somebody else has set")
	s.BoolVar(&f.skipChecks, "skip-checks", false, "do not look for another network, and at the nodes' podCIDRs")
	s.DurationVar(&f.wait, "wait", defaultWait, "`time` to wait until all nodes are ready; 0: do not wait")
	return c
}

func (a *app) runInstall(c *cobra.Command, f *installFlags) error {
	v, err := f.values()
	if err != nil {
		return err
	}
	if f.print {
		r, err := install.Render(v.WithTag(a.imageTag()))
		if err == nil {
			_, err = fmt.Fprint(a.stdout, r.YAML)
		}
		return err
	}
	cluster, err := a.cluster(f.clusterFlags)
	if err != nil {
		return err
	}
	return a.report(cluster.Install(c.Context(), install.Options{
		Values: v, Reset: f.reset, SkipChecks: f.skipChecks, Wait: f.wait, DefaultTag: a.imageTag(),
		Apply: install.ApplyOptions{DryRun: f.dryRun.value == "server", Force: f.force},
	}))
}
