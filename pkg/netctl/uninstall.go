package netctl

import (
	"time"

	"github.com/spf13/cobra"

	"github.com/twill-net/twill/pkg/install"
)

func (a *app) uninstall() *cobra.Command {
	var f clusterFlags
	var o install.UninstallOptions
	c := &cobra.Command{
		Use:   "uninstall",
		Short: "Take Twill out of a Kubernetes cluster",
		Long: `Take Twill out of a Kubernetes cluster: end twilld on every node; remove the plugin,
its configuration, and Twill's devices, routes and rules there, by a short-lived pod
on each node; then delete Twill's objects. It goes on where it was interrupted.

Pods lose their network, and end only when another one is installed: drain the nodes
first if that matters. With --keep-nodes nothing changes for the pods: the data path
stays as it is, until netctl install finds it again.

` + clusterExitCodes,
		Example: "  netctl uninstall --dry-run\n  netctl uninstall\n  netctl uninstall --keep-nodes",
		Args:    noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			cluster, err := a.cluster(f)
			if err != nil {
				return err
			}
			o.Namespace = f.namespace
			return a.report(cluster.Uninstall(c.Context(), o))
		},
	}
	s := c.Flags()
	f.connectTo(s)
	s.BoolVar(&o.KeepNodes, "keep-nodes", false, "leave the nodes' network as it is")
	s.BoolVar(&o.DryRun, "dry-run", false, "say what would be deleted, and do nothing")
	s.BoolVar(&o.Force, "force", false, "delete Twill's objects even if nodes could not be cleaned")
	s.DurationVar(&o.Wait, "wait", 2*time.Minute, "`time` that a node may take")
	return c
}
