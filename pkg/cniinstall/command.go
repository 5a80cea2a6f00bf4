package cniinstall

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
)

// Exit codes of Command.
const (
	exitDone  = 0 // also if nothing was to be done
	exitError = 1
	exitUsage = 2
)

const about = `install-cni puts the CNI plugin twill and its network configuration on this node.

Each file is replaced as a whole: a runtime, and a run after a crash, find the old
one or the new. What is there already is left alone, so it can run at every start.
A newer release of twill, a plugin of that name that is not Twill's, and a
configuration that was edited stay, and are named; --force replaces them.

The network has the name it has already, else that of flannel's configuration in
--conf-dir, else cbr0: the pods' reservations are in a directory of that name, so a
node can move from flannel and back with its pods running. Runtimes take the first
configuration by name; those before ours are named. On a node of flannel's, use
--replace-flannel, which moves flannel's configuration aside once ours is in place, or
--as-flannel: then that configuration, unchanged, gets Twill's plugin.

--uninstall removes the configuration and then the plugin, and puts back flannel's.
Drain the node first: pods that are left cannot be removed without the plugin.

Example:
  twilld install-cni
  twilld install-cni --mode=routed -o json
  twilld install-cni --uninstall

Exit code: 0 done, or nothing to do; 1 error; 2 wrong flags.

Flags:
`

// command is a command line.
type command struct {
	Options
	set       *flag.FlagSet
	uninstall bool
	output    string
}

func newCommand() *command {
	c := &command{set: flag.NewFlagSet("install-cni", flag.ContinueOnError)}
	s := c.set
	s.SetOutput(io.Discard)
	s.Usage = func() {}
	s.StringVar(&c.BinDir, "bin-dir", "/opt/cni/bin", "`directory` of the runtime's plugins; made if absent")
	s.StringVar(&c.ConfDir, "conf-dir", "/etc/cni/net.d", "`directory` of the runtime's network configurations; made if absent")
	s.StringVar(&c.Plugin, "plugin", "", "the twill `binary` to install (default: beside twilld, else the one in --bin-dir)")
	s.StringVar(&c.ConfName, "conf-name", "10-twill.conflist", "`name` of the configuration in --conf-dir")
	s.StringVar(&c.Mode, "mode", "", "`wiring` of pods: bridged, by the bridge cni0, or routed, without a bridge (default: as the configuration there says, else bridged)")
	s.BoolVar(&c.AsFlannel, "as-flannel", false, "put the plugin in the place of flannel's, too, which is kept and put back by --uninstall")
	s.BoolVar(&c.ReplaceFlannel, "replace-flannel", false, "move flannel's configuration aside, which --uninstall puts back")
	s.BoolVar(&c.SkipConf, "skip-conf", false, "leave the configuration to the operator")
	s.BoolVar(&c.Force, "force", false, "replace a newer release, a foreign plugin, an edited configuration; with --uninstall remove what is still in use")
	s.BoolVar(&c.uninstall, "uninstall", false, "remove what is Twill's")
	s.BoolVar(&c.KeepPlugin, "keep-plugin", false, "with --uninstall: leave the plugin, which flannel's calls for the pods that Twill wired")
	s.StringVar(&c.output, "o", "table", "`format` of the output: table or json")
	return c
}

// parse reads and checks the flags. exe is the path of the running program.
func (c *command) parse(args []string, exe string) error {
	if err := c.set.Parse(args); err != nil {
		return err
	}
	if c.set.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", c.set.Arg(0))
	}
	if c.Mode != "" && c.Mode != "bridged" && c.Mode != "routed" {
		return fmt.Errorf("--mode %q: must be bridged or routed", c.Mode)
	}
	if c.AsFlannel && c.ReplaceFlannel {
		return errors.New("--as-flannel --replace-flannel: one keeps flannel's configuration, the other moves it aside: give one of them")
	}
	if c.ReplaceFlannel && c.SkipConf {
		return errors.New("--replace-flannel --skip-conf: without ours in its place flannel's configuration must stay: give one of them")
	}
	if c.KeepPlugin && !c.uninstall {
		return errors.New("--keep-plugin: has a meaning only with --uninstall")
	}
	if c.output != "table" && c.output != "json" {
		return fmt.Errorf("-o %q: must be table or json", c.output)
	}
	if n := c.ConfName; n != filepath.Base(n) || filepath.Ext(n) != ".conflist" || strings.HasPrefix(n, ".") {
		return fmt.Errorf("--conf-name %q: must be a file's name that ends in .conflist, or runtimes do not see it", n)
	}
	for name, dir := range map[string]*string{"bin-dir": &c.BinDir, "conf-dir": &c.ConfDir} {
		if *dir == "" {
			return fmt.Errorf("--%s: must name a directory", name)
		}
		path, err := filepath.Abs(*dir)
		if err != nil {
			return err
		}
		*dir = path
	}
	if c.Plugin == "" {
		c.Plugin = filepath.Join(filepath.Dir(exe), "twill")
		installed := filepath.Join(c.BinDir, "twill")
		if !exists(c.Plugin) && exists(installed) {
			c.Plugin = installed // as make install puts it
		}
	}
	return nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// Command is twilld install-cni. It returns the exit code.
func Command(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	exe, err := os.Executable()
	c := newCommand()
	if err == nil {
		err = c.parse(args, exe)
	}
	if errors.Is(err, flag.ErrHelp) {
		c.help(stdout)
		return exitDone
	}
	if err != nil {
		fmt.Fprintf(stderr, "twilld install-cni: %v; see twilld install-cni --help\n", err)
		return exitUsage
	}
	do := Install
	if c.uninstall {
		do = Uninstall
	}
	report, err := do(ctx, c.Options)
	if c.output == "json" {
		report.writeJSON(stdout, err)
	} else {
		report.write(stdout, stderr)
	}
	if err != nil {
		fmt.Fprintf(stderr, "twilld install-cni: %v\n", err)
		return exitError
	}
	return exitDone
}

func (c *command) help(w io.Writer) {
	fmt.Fprint(w, about)
	c.set.VisitAll(func(f *flag.Flag) {
		arg, usage := flag.UnquoteUsage(f)
		if f.DefValue != "" && f.DefValue != "false" {
			usage += fmt.Sprintf(" (default %s)", f.DefValue)
		}
		dashes := "--"
		if len(f.Name) == 1 {
			dashes = "-"
		}
		fmt.Fprintf(w, "  %s\n        %s\n", strings.TrimSpace(dashes+f.Name+" "+arg), usage)
	})
}

// write prints a table, and what the operator should see to beside it.
func (r Report) write(stdout, stderr io.Writer) {
	if len(r.Steps) > 0 {
		var table bytes.Buffer
		t := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "WHAT\tPATH\tRESULT\tDETAIL")
		for _, s := range r.Steps {
			detail := s.Detail
			if detail == "" {
				detail = "-"
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", s.What, s.Path, s.Result, detail)
		}
		t.Flush()
		_, _ = table.WriteTo(stdout) // who reads it sees that it is short
	}
	for _, w := range r.Warnings {
		fmt.Fprintln(stderr, "warning:", w)
	}
}

func (r Report) writeJSON(w io.Writer, err error) {
	out := struct {
		Report
		Error string `json:"error,omitempty"`
	}{Report: r}
	if out.Steps == nil {
		out.Steps = []Step{} // none is a list, too
	}
	if err != nil {
		out.Error = err.Error()
	}
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	_ = enc.Encode(out)
}
