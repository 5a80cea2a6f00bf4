package netctl

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/twill-net/twill/pkg/overlay"
)

func (a *app) drift() *cobra.Command {
	var since time.Duration
	c := &cobra.Command{
		Use:   "drift",
		Short: "Show what others changed in the kernel and twilld repaired",
		Long: `Show what others changed of Twill's objects in the kernel, and what twilld made
of them again: when, what, what was found, what it is now, and what woke twilld.
The oldest comes first.

Reads twilld's memory, which holds the last 1000 and ends with the process.

Exit code: 0 nothing was changed (in that time), 1 something was, and is
repaired, 2 could not find out.`,
		Example: "  netctl drift\n  netctl drift --since 10m\n  netctl drift -o json | jq '.[-1]'",
		Args:    noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if since < 0 {
				return fmt.Errorf("--since=%s: must not be negative", since)
			}
			return a.runDrift(c.Context(), since)
		},
	}
	c.Flags().DurationVar(&since, "since", 0, "only what is not older than this `time`, like 90s or 10m; 0: all")
	return c
}

func (a *app) runDrift(ctx context.Context, since time.Duration) error {
	entries, err := within(ctx, a.timeout, NewClient(a.socket).Drift)
	if err != nil {
		return err
	}
	if since > 0 {
		first := a.now().Add(-since)
		entries = without(entries, func(d overlay.Drift) bool { return d.Time.Before(first) })
	}
	if a.json() {
		err = a.printJSON(orEmpty(entries))
	} else {
		err = a.printDrift(entries)
	}
	if err == nil && len(entries) > 0 {
		err = errDiffers
	}
	return err
}

func (a *app) printDrift(entries []overlay.Drift) error {
	if len(entries) == 0 {
		_, err := fmt.Fprintln(a.stdout, "no drift")
		return err
	}
	t := a.table()
	t.header("TIME", "KIND", "WHAT", "BEFORE", "AFTER", "WOKEN BY")
	for _, d := range entries {
		before, after := strings.TrimPrefix(d.Before, d.Kind+" "), strings.TrimPrefix(d.After, d.Kind+" ")
		if before == after {
			before = "the same with another secret" // no object prints one
		}
		if after == d.What {
			after = "restored"
		}
		t.row(texts(d.Time.Format(timeFormat), d.Kind, d.What, before, after, d.Why)...)
	}
	return t.print(a.stdout)
}

// timeFormat is RFC 3339 to the millisecond: heals are measured in them.
const timeFormat = "2006-01-02T15:04:05.000Z07:00"
