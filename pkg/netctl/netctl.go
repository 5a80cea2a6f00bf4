// Package netctl is the operator's view of the overlay: what the cluster says
// (the lease store), what the node has (its kernel) and what the daemon makes of
// both, with every difference marked. On a node it reads and never writes; into
// Kubernetes clusters it puts Twill, by pkg/install.
package netctl

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

// The exit codes of every command.
const (
	exitFine    = 0
	exitDiffers = 1 // differences were found, or something is wrong
	exitUnknown = 2 // it could not be found out
)

const exitCodes = `
Exit code: 0 fine, 1 differences or something wrong, 2 could not find out.`

// Results of a command that has already said everything.
var (
	errDiffers = errors.New("differences found")
	errPartial = errors.New("only a part could be read")
)

// app is one run of netctl: its streams, flags, and ways to the outside.
type app struct {
	stdout, stderr io.Writer
	built          string // the version
	now            func() time.Time
	getenv         func(string) string
	openStore      func(storeConfig) (Store, error)
	openKernel     func() (Kernel, error)

	output, colour choice
	socket         string
	timeout        time.Duration
	store          storeConfig
}

// Program is netctl as it was started.
type Program struct {
	Version        string
	Stdin          io.Reader
	Stdout, Stderr io.Writer
}

// Run runs netctl with the arguments behind its name and returns the exit code.
func (p Program) Run(ctx context.Context, args []string) int {
	a := &app{
		stdout: p.Stdout, stderr: p.Stderr, built: p.Version, now: time.Now, getenv: os.Getenv,
		openStore: openStore, openKernel: openKernel,
	}
	return a.run(ctx, args, p.Stdin)
}

func (a *app) run(ctx context.Context, args []string, stdin io.Reader) int {
	root := a.root()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	switch err := root.ExecuteContext(ctx); {
	case err == nil:
		return exitFine
	case errors.Is(err, errDiffers):
		return exitDiffers
	case errors.Is(err, errPartial):
		return exitUnknown
	default:
		fmt.Fprintln(a.stderr, "netctl:", err)
		return exitUnknown
	}
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "netctl",
		Short: "Show the overlay network and what is wrong with it",
		Long: `netctl shows the overlay network of this node: what the cluster says (the
leases in etcd or the Kubernetes API), what the kernel has, and what twilld makes of both. Reading the
kernel's firewall needs root. It changes nothing, but for the commands that put Twill
into a Kubernetes cluster (install, uninstall, migrate-from-flannel).
` + exitCodes,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	a.output = choice{value: "table", among: []string{"table", "json"}}
	a.colour = choice{value: "auto", among: []string{"auto", "always", "never"}}
	f := root.PersistentFlags()
	f.VarP(&a.output, "output", "o", "`format` of the output: table or json")
	f.Var(&a.colour, "color", "`when` to colour: auto (on a terminal, unless NO_COLOR is set), always or never")
	f.StringVar(&a.socket, "socket", "", "`path` of twilld's local API (env TWILL_SOCKET; default "+DefaultSocket+")")
	f.DurationVar(&a.timeout, "timeout", 5*time.Second, "`time` to wait for twilld, and for the store")
	for _, x := range a.store.flags() {
		f.StringVar(x.value, x.name, "", x.usage+" (env "+envName(x.name)+")")
	}
	root.PersistentPreRunE = func(*cobra.Command, []string) error { return a.complete() }
	for name, c := range map[string]*choice{"output": &a.output, "color": &a.colour} {
		// The one error there is: a flag of another name.
		_ = root.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(c.among, cobra.ShellCompDirectiveNoFileComp))
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return fmt.Errorf("%w; see %s --help", err, c.CommandPath())
	})
	root.AddCommand(a.leases(), a.routes(), a.status(), a.diff(), a.drift(), a.bgp(), a.version(), a.install(), a.uninstall(), a.migrate())
	return root
}

// complete takes what flags leave open from the environment, as flanneld does. A
// password taken so never shows as a default in --help.
func (a *app) complete() error {
	for _, x := range a.store.flags() {
		if *x.value == "" {
			*x.value = a.getenv(envName(x.name))
		}
	}
	a.socket = cmp.Or(a.socket, a.getenv("TWILL_SOCKET"), DefaultSocket)
	if a.timeout <= 0 {
		return fmt.Errorf("--timeout=%s: must be more than 0", a.timeout)
	}
	return nil
}

func envName(flag string) string {
	return "FLANNELD_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

func noArgs(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("%s takes no argument, but there is %q; see %s --help", c.Name(), args[0], c.CommandPath())
	}
	return nil
}

// choice is the value of a flag that takes one of a few words.
type choice struct {
	value string
	among []string
}

func (c *choice) String() string { return c.value }
func (c *choice) Type() string   { return "word" }

func (c *choice) Set(s string) error {
	if !slices.Contains(c.among, s) {
		return fmt.Errorf("must be one of %s", strings.Join(c.among, ", "))
	}
	c.value = s
	return nil
}

// orEmpty gives programs [] where there is nothing, never null.
func orEmpty[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}

func (a *app) json() bool { return a.output.value == "json" }

// printJSON prints one value. Programs read it: fields are added, never renamed.
func (a *app) printJSON(v any) error {
	e := json.NewEncoder(a.stdout)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

func (a *app) table() *table { return &table{colour: a.coloured()} }

func (a *app) coloured() bool {
	if a.colour.value != "auto" {
		return a.colour.value == "always"
	}
	f, ok := a.stdout.(*os.File)
	if !ok || a.getenv("NO_COLOR") != "" || a.getenv("TERM") == "dumb" {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// note says on stderr what could not be read.
func (a *app) note(err error) { fmt.Fprintln(a.stderr, "netctl:", err) }

func (a *app) printProblems(problems []overlay.Problem) {
	if len(problems) == 0 {
		return
	}
	t := a.table()
	fmt.Fprintln(a.stdout, "\nproblems:")
	for _, p := range problems {
		fmt.Fprintf(a.stdout, "  %s: %s\n", t.paint(cell{p.Object, bad}), p.Reason)
		if p.Remedy != "" {
			fmt.Fprintf(a.stdout, "    remedy: %s\n", p.Remedy)
		}
	}
}
