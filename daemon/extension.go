package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
)

const (
	extensionLimit = 30 * time.Second
	// extensionOutput bounds what is kept of a command's output, in bytes. That of
	// PreStartupCommand becomes part of the lease.
	extensionOutput = 64 << 10
)

// extensionRunner runs the operator's commands of backend extension. What it
// remembers ends with the process: after a restart every peer is added again, as
// flannel does, so commands must take being run twice.
type extensionRunner struct {
	log   *slog.Logger
	limit time.Duration // of one command
	// started is what the last successful PostStartupCommand was run with; nil: none
	// was.
	started *startup
	added   map[netip.Prefix]addedPeer
}

// startup is all that PostStartupCommand depends on. Another one makes all peers
// be removed and added anew.
type startup struct {
	overlay.ExtensionConfig
	network, subnet, subnetV6, publicIP, publicIPv6 string
}

func (s startup) env() []string {
	return []string{
		"NETWORK=" + s.network, "SUBNET=" + s.subnet, "IPV6SUBNET=" + s.subnetV6,
		"PUBLIC_IP=" + s.publicIP, "PUBLIC_IPV6=" + s.publicIPv6,
	}
}

// addedPeer is a peer for which SubnetAddCommand was run, with the command that
// undoes it.
type addedPeer struct {
	overlay.ExtensionPeer
	remove string
	stale  bool // to be removed, even if it is wanted
}

func newExtensionRunner(log *slog.Logger) *extensionRunner {
	return &extensionRunner{log: log, limit: extensionLimit, added: map[netip.Prefix]addedPeer{}}
}

// preStartup runs PreStartupCommand and returns its output, which the lease tells
// the peers.
func (x *extensionRunner) preStartup(ctx context.Context, c overlay.ExtensionConfig) (output string, err error) {
	return x.run(ctx, extensionCommand{what: "PreStartupCommand", line: c.PreStartup})
}

// set makes the commands' world agree with e; nil is no extension at all. What
// failed is tried again by the next call. It takes as long as the commands do.
func (x *extensionRunner) set(ctx context.Context, e *overlay.Extension) []error {
	want := map[netip.Prefix]overlay.ExtensionPeer{}
	var next *startup
	if e != nil {
		for _, p := range e.Peers {
			want[p.Subnet] = p
		}
		s := newStartup(e)
		next = &s
	}
	if next == nil || x.started == nil || *next != *x.started {
		x.started = nil
		for subnet, p := range x.added {
			p.stale = true
			x.added[subnet] = p
		}
	}
	errs := x.removePeers(ctx, want)
	if next == nil {
		return errs
	}
	if x.started == nil {
		if _, err := x.run(ctx, extensionCommand{what: "PostStartupCommand", line: next.PostStartup, env: next.env()}); err != nil {
			return append(errs, err) // peers are added to what it makes
		}
		x.started = next
	}
	return append(errs, x.addPeers(ctx, want)...)
}

func newStartup(e *overlay.Extension) startup {
	s := startup{ExtensionConfig: e.ExtensionConfig, publicIP: addrText(e.PublicIP), publicIPv6: addrText(e.PublicIPv6)}
	for _, n := range e.Networks {
		if n.Addr().Is4() {
			s.network = n.String()
		}
	}
	for _, n := range e.Subnets {
		if n.Addr().Is4() {
			s.subnet = n.String()
		} else {
			s.subnetV6 = n.String()
		}
	}
	return s
}

// addrText makes an absent address an empty variable.
func addrText(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

func (x *extensionRunner) removePeers(ctx context.Context, want map[netip.Prefix]overlay.ExtensionPeer) (errs []error) {
	for _, subnet := range sortedSubnets(x.added) {
		p := x.added[subnet]
		if wanted, ok := want[subnet]; ok && wanted == p.ExtensionPeer && !p.stale {
			continue
		}
		if _, err := x.run(ctx, peerCommand("SubnetRemoveCommand", p.remove, p.ExtensionPeer)); err != nil {
			p.stale = true // it may be half gone
			x.added[subnet] = p
			errs = append(errs, err)
			continue
		}
		delete(x.added, subnet)
	}
	return errs
}

func (x *extensionRunner) addPeers(ctx context.Context, want map[netip.Prefix]overlay.ExtensionPeer) (errs []error) {
	for _, subnet := range sortedSubnets(want) {
		if _, ok := x.added[subnet]; ok { // or its removal failed
			continue
		}
		if _, err := x.run(ctx, peerCommand("SubnetAddCommand", x.started.SubnetAdd, want[subnet])); err != nil {
			errs = append(errs, err)
			continue
		}
		x.added[subnet] = addedPeer{ExtensionPeer: want[subnet], remove: x.started.SubnetRemove}
	}
	return errs
}

func sortedSubnets[T any](m map[netip.Prefix]T) []netip.Prefix {
	return slices.SortedFunc(maps.Keys(m), netip.Prefix.Compare)
}

// extensionCommand is one run of a command.
type extensionCommand struct {
	what  string // for people
	line  string // as configured; empty: nothing to run
	env   []string
	stdin string
}

func peerCommand(what, line string, p overlay.ExtensionPeer) extensionCommand {
	return extensionCommand{
		what: what + " for " + p.Subnet.String(), line: line,
		env: []string{"SUBNET=" + p.Subnet.String(), "PUBLIC_IP=" + addrText(p.PublicIP)},
		// A line, so that the shell's `read` takes it; flannel ends it so too.
		stdin: p.Data + "\n",
	}
}

// words splits the line on blanks, then puts in the values of $VAR and ${VAR}: one
// with blanks stays one argument. There is no shell.
func (c extensionCommand) words(env []string) []string {
	words := strings.Fields(c.line)
	for i, w := range words {
		words[i] = os.Expand(w, func(name string) string {
			for _, e := range slices.Backward(env) { // the last one counts, as for a process
				if value, ok := strings.CutPrefix(e, name+"="); ok {
					return value
				}
			}
			return ""
		})
	}
	return words
}

// run runs a command to its end and returns its output and errors in one, trimmed.
// When its time is over, its process group is killed.
func (x *extensionRunner) run(ctx context.Context, c extensionCommand) (string, error) {
	env := append(os.Environ(), c.env...)
	words := c.words(env)
	if len(words) == 0 {
		return "", nil
	}
	limited, cancel := context.WithTimeout(ctx, x.limit)
	defer cancel()
	var output firstBytes
	cmd := exec.CommandContext(limited, words[0], words[1:]...)
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = env, strings.NewReader(c.stdin), &output, &output
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error {
		if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); !errors.Is(err, syscall.ESRCH) {
			return err
		}
		return os.ErrProcessDone
	}
	// What a command leaves running in the background may hold its output open.
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	text := strings.TrimSpace(string(output.kept))
	switch {
	case err == nil, errors.Is(err, exec.ErrWaitDelay):
		x.log.Info("command run", "command", c.what, "output", text)
		return text, nil
	case ctx.Err() == nil && limited.Err() != nil:
		err = fmt.Errorf("killed: it did not end in %s", x.limit)
	}
	if text != "" {
		err = fmt.Errorf("%w; its output: %.500s", err, text)
	}
	return text, fmt.Errorf("run %s %q: %w", c.what, c.line, err)
}

// firstBytes keeps the beginning of what is written.
type firstBytes struct{ kept []byte }

func (f *firstBytes) Write(b []byte) (int, error) {
	f.kept = append(f.kept, b[:min(len(b), extensionOutput-len(f.kept))]...)
	return len(b), nil
}
