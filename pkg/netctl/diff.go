package netctl

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/twill-net/twill/pkg/overlay"
)

// diffReport is the JSON form of diff.
type diffReport struct {
	Changes  []change          `json:"changes"` // in the order in which they are made
	Problems []overlay.Problem `json:"problems"`
}

type change struct {
	Verb   string `json:"verb"`   // add, change, delete
	Kind   string `json:"kind"`   // link, addr, nexthop, route, neigh, fdb, wgpeer, sysctl, chain
	Object string `json:"object"` // as it shall be, in ip(8) words; as it is if it goes
	Before string `json:"before,omitempty"`
}

func (a *app) diff() *cobra.Command {
	return &cobra.Command{
		Use:   "diff",
		Short: "Show what twilld would change in the kernel now",
		Long: `Show twilld's next plan: what it would change in the kernel now, in the words of
ip(8), in order. + is added, ~ is changed, - is deleted. twilld makes such changes
by itself within a second; what stays here is what it cannot do.
Problems are printed below: what the store or the kernel hold that Twill can
make no sense of or must not touch.

Reads the leases in the store, the kernel, and from twilld what this node is.

Exit code: 0 no differences, 1 differences, or a change that a stranger's object
stands in the way of, 2 could not find out. Other problems do not count here;
netctl status and netctl leases exit with 1 for them.`,
		Example: "  netctl diff\n  netctl diff -o json | jq -r '.changes[].object'",
		Args:    noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.runDiff(c.Context())
		},
	}
}

func (a *app) runDiff(ctx context.Context) error {
	s := a.look(ctx, false)
	for _, err := range []error{s.selfErr, s.kernelErr, s.storeErr} {
		if err != nil {
			return err
		}
	}
	report := diffReport{Changes: []change{}, Problems: orEmpty(slices.Concat(s.refused, s.problems))}
	for _, op := range s.plan {
		report.Changes = append(report.Changes, changeOf(op))
	}
	if a.json() {
		if err := a.printJSON(report); err != nil {
			return err
		}
	} else {
		a.printDiff(s, report)
	}
	if len(s.plan)+len(s.refused) > 0 {
		return errDiffers
	}
	return nil
}

func changeOf(op overlay.Op) change {
	c := change{Verb: op.Verb.String(), Object: op.Object.String()}
	c.Kind, _, _ = strings.Cut(c.Object, " ")
	if op.Verb == overlay.Change {
		c.Before = op.Before.String()
	}
	return c
}

func (a *app) printDiff(s *sight, report diffReport) {
	t := a.table()
	for i, op := range s.plan {
		line := cell{"+ " + op.String(), good}
		switch op.Verb {
		case overlay.Change:
			_, before, _ := strings.Cut(report.Changes[i].Before, " ")
			if report.Changes[i].Before == report.Changes[i].Object {
				before = "the same with another secret" // no object prints one
			}
			line = cell{fmt.Sprintf("~ %s (was %s)", op, before), doubt}
		case overlay.Delete:
			line = cell{"- " + op.String(), bad}
		}
		fmt.Fprintln(a.stdout, t.paint(line))
	}
	switch {
	case len(s.plan) > 0:
	case len(s.refused) > 0:
		fmt.Fprintln(a.stdout, "no change that twilld can make")
	default:
		fmt.Fprintln(a.stdout, "no differences")
	}
	a.printProblems(report.Problems)
}
