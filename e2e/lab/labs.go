package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/twill-net/twill/pkg/nettest"
)

func listCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List the labs on this machine",
		Example: `  lab list`,
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			labs, err := nettest.List()
			if err != nil {
				return err
			}
			w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "LAB\tSTATE\tAGE\tNAMESPACES")
			for _, l := range labs {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", l.ID, state(l),
					time.Since(l.Created).Round(time.Second), strings.Join(l.Namespaces, " "))
			}
			return w.Flush()
		},
	}
}

func state(l nettest.Info) string {
	switch {
	case l.Alive:
		return fmt.Sprintf("of pid %d", l.PID)
	case l.Kept:
		return "kept"
	default:
		return "dead"
	}
}

func downCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "down [LAB...]",
		Short: "Remove labs with all that runs in them",
		Long: `Remove labs with all that runs in them: those named, or all kept and dead ones. A lab
whose owner is alive is not removed: end the owner.`,
		Example: `  lab down
  lab down $(lab list | awk '$2 == "kept" { print $1 }')`,
		RunE: func(_ *cobra.Command, ids []string) error {
			if len(ids) == 0 {
				labs, err := nettest.List()
				if err != nil {
					return err
				}
				for _, l := range labs {
					if !l.Alive {
						ids = append(ids, l.ID)
					}
				}
			}
			for _, id := range ids {
				if err := nettest.Down(id); err != nil {
					return err
				}
				fmt.Println("removed lab", id)
			}
			return nil
		},
	}
}

func execCommand() *cobra.Command {
	var id string
	cmd := &cobra.Command{
		Use:   "exec HOST|POD -- COMMAND...",
		Short: "Run a command in a lab, by default the only kept one",
		Long: `Run a command on a host (h1, etcd1) or in a pod (h1-p1) of a lab, by default the only
kept one. Programs beside lab itself are found without a path.`,
		Example: `  lab exec h1 -- ip route
  lab exec h1 -- netctl leases
  lab exec h1-p1 -- ping -c 3 198.51.100.12`,
		Args: cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := pick(id)
			if err != nil {
				return err
			}
			ns, err := l.NS(args[0])
			if err != nil {
				return err
			}
			if err := preferOwnPrograms(); err != nil {
				return err
			}
			c := ns.Command(cmd.Context(), args[1], args[2:]...)
			c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
			return c.Run()
		},
	}
	cmd.Flags().StringVar(&id, "lab", "", "id of the lab, see lab list")
	return cmd
}

// pick returns the lab with this id, or the only kept one.
func pick(id string) (nettest.Info, error) {
	labs, err := nettest.List()
	if err != nil {
		return nettest.Info{}, err
	}
	var found []nettest.Info
	for _, l := range labs {
		if l.ID == id || id == "" && l.Kept {
			found = append(found, l)
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case id != "":
		return nettest.Info{}, fmt.Errorf("find lab %s: there is none", id)
	default:
		return nettest.Info{}, fmt.Errorf("find lab: %d are kept, name one with --lab (see lab list)", len(found))
	}
}

// preferOwnPrograms makes `netctl` the one that was built with this lab.
func preferOwnPrograms() error {
	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find own program: %w", err)
	}
	return os.Setenv("PATH", filepath.Dir(exe)+":"+os.Getenv("PATH"))
}
