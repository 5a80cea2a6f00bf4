package netctl

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/twill-net/twill/pkg/install"
)

// migrateFlags are those of netctl migrate-from-flannel.
type migrateFlags struct {
	clusterFlags
	finish, back, force bool
	dryRun              choice
	nodes               []string
	wait                time.Duration
}

func (a *app) migrate() *cobra.Command {
	f := &migrateFlags{dryRun: choice{value: "none", among: []string{"none", "server"}}}
	c := &cobra.Command{
		Use:   "migrate-from-flannel",
		Short: "Take flannel's place in a Kubernetes cluster, node by node, with the pods running",
		Long: `Take flannel's place in a Kubernetes cluster, node by node, with the pods running.

Twill takes over flannel's net-conf.json as it is, and its flags; what it does not know
is an error before anything is changed. Then, on one node after the other: flannel's
pod ends, Twill's starts, adopts what flannel set up, and moves flannel's CNI
configuration aside. The next node's turn comes when Twill is ready (/readyz, asked by
the node's kubelet). At a node that does not come up it stops; the other nodes go on
with flannel, and nodes of both reach each other.

How far it is stands in the nodes' label twill.net/migration, so the same command goes
on where it stopped. At the end flannel's DaemonSet is still there and selects no node:
--finish deletes flannel's objects, --back gives the nodes back.

` + clusterExitCodes,
		Example: `  netctl migrate-from-flannel --dry-run=server
  netctl migrate-from-flannel --node worker-1
  netctl migrate-from-flannel
  netctl migrate-from-flannel --finish`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error { return a.runMigrate(c.Context(), f) },
	}
	s := c.Flags()
	f.connectTo(s)
	f.valuesFrom(s)
	s.StringArrayVar(&f.nodes, "node", nil, "only the node of this `name`; repeatable")
	s.BoolVar(&f.finish, "finish", false, "delete flannel's objects; all nodes must be Twill's")
	s.BoolVar(&f.back, "back", false, "give the nodes back to flannel")
	s.Var(&f.dryRun, "dry-run", "`where`: server shows what would be changed there, and changes nothing; or none")
	s.BoolVar(&f.force, "force", false, "take over fields of Twill's objects that somebody else has set")
	s.DurationVar(&f.wait, "wait", defaultWait, "`time` that a node may take")
	return c
}

func (a *app) runMigrate(ctx context.Context, f *migrateFlags) error {
	if f.finish && f.back {
		return errors.New("--finish --back: give one of them")
	}
	if f.finish && len(f.nodes) > 0 {
		return errors.New("--finish --node: it is for all nodes at once: leave --node out")
	}
	v, err := f.values()
	if err != nil {
		return err
	}
	cluster, err := a.cluster(f.clusterFlags)
	if err != nil {
		return err
	}
	do, next := cluster.Migrate, "When all nodes are Twill's: netctl migrate-from-flannel --finish"
	switch {
	case f.finish:
		do, next = cluster.Finish, ""
	case f.back:
		do, next = cluster.Back, ""
	}
	o := install.MigrateOptions{
		Values: v, DefaultTag: a.imageTag(), Nodes: f.nodes, Wait: f.wait,
		Apply: install.ApplyOptions{DryRun: f.dryRun.value == "server", Force: f.force},
	}
	report, err := do(ctx, o)
	err = a.report(report, err)
	if err == nil && next != "" && !a.json() {
		fmt.Fprintln(a.stderr, next)
	}
	return err
}
