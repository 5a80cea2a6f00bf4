// Package router hands what a node's BGP speaker has to do to a router that is
// not Twill's: BIRD 2 or FRR. Their configuration is rendered from a template,
// checked by the router's own parser, swapped in one step, and reloaded. The
// router then speaks, and programs the routes itself.
package router

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
)

// Options say which router there is and where. In commands, {file} stands for the
// path of the configuration: for Check that of the candidate.
type Options struct {
	Kind string // "bird" or "frr"
	// Config is the file that the router is started with. All of it is written by
	// us; what was there before is kept once, as FILE.before-twill. Empty: that of
	// Debian's package, /etc/bird/bird.conf or /etc/frr/frr.conf.
	Config string
	// Templates is a directory with the operator's bird.conf.tmpl or
	// frr.conf.tmpl, instead of the built-in one. Empty: none.
	Templates string
	// Check fails if the router does not accept the file; empty:
	//	bird -p -c {file}
	//	vtysh -C -f {file}
	Check []string
	// Reload makes the running router take the file up; empty:
	//	birdc configure "{file}"
	//	/usr/lib/frr/frr-reload.py --reload --stdout --log-level warning --confdir DIR {file}
	// The latter is in Debian's frr-pythontools. It is what takes away what is no
	// longer in the file: vtysh -f only adds.
	Reload []string
	// Show prints the sessions; empty:
	//	birdc -r show protocols all
	//	vtysh -c "show bgp summary json"
	Show []string
	Log  *slog.Logger
}

// kind is what differs between the routers.
type kind struct {
	name, template, config string
	check, reload, show    []string
	quote                  func(string) (string, error)
	sessions               func(output string) (map[string]overlay.BGPSession, error)
	remedy                 string // if it does not reload
}

func kindOf(name, config string) (kind, error) {
	switch name {
	case "bird":
		return kind{
			name: "bird", template: "bird.conf.tmpl", config: cmp.Or(config, "/etc/bird/bird.conf"),
			check:  []string{"bird", "-p", "-c", "{file}"},
			reload: []string{"birdc", "configure", `"{file}"`},
			show:   []string{"birdc", "-r", "show", "protocols", "all"},
			quote:  quoteBIRD, sessions: birdSessions,
			remedy: "is bird running, with this file? see its log",
		}, nil
	case "frr":
		config = cmp.Or(config, "/etc/frr/frr.conf")
		return kind{
			name: "frr", template: "frr.conf.tmpl", config: config,
			check:  []string{"vtysh", "-C", "-f", "{file}"},
			reload: []string{"/usr/lib/frr/frr-reload.py", "--reload", "--stdout", "--log-level", "warning", "--confdir", filepath.Dir(config), "{file}"},
			show:   []string{"vtysh", "-c", "show bgp summary json"},
			quote:  wordFRR, sessions: frrSessions,
			remedy: "are zebra and bgpd running (bgpd=yes in /etc/frr/daemons), is frr-pythontools installed? see FRR's log",
		}, nil
	}
	return kind{}, fmt.Errorf("use router %q: Twill renders for bird and frr", name)
}

// Router keeps the configuration of one router. Its methods may be called from
// several goroutines.
type Router struct {
	kind   kind
	config string
	log    *slog.Logger

	mu       sync.Mutex
	source   source
	reloaded bool // the router runs with what is in the file
	last     overlay.BGP
}

// New checks the options and the operator's template. It touches nothing yet.
func New(o Options) (*Router, error) {
	k, err := kindOf(o.Kind, o.Config)
	if err != nil {
		return nil, err
	}
	override(&k.check, o.Check)
	override(&k.reload, o.Reload)
	override(&k.show, o.Show)
	r := &Router{kind: k, config: k.config, log: o.Log, source: source{kind: k}}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	if o.Templates != "" {
		r.source.file = filepath.Join(o.Templates, k.template)
	}
	if err := r.source.load(); err != nil {
		return nil, err
	}
	return r, nil
}

func override(to *[]string, s []string) {
	if len(s) > 0 {
		*to = s
	}
}

// Set makes the router do what b says. It reports whether the file was replaced.
// On an error before that, the router goes on with the old file; an error of the
// reload is tried again at the next Set.
func (r *Router) Set(ctx context.Context, b overlay.BGP) (changed bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last = b
	text, err := r.source.render(b)
	if err != nil {
		return false, fmt.Errorf("keep %s: %w", r.config, err)
	}
	old, err := os.ReadFile(r.config)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, fmt.Errorf("keep %s: %w", r.config, err)
	}
	if err != nil || !bytes.Equal(old, text) {
		if err := r.replace(ctx, text, old); err != nil {
			return false, fmt.Errorf("keep %s: %w", r.config, err)
		}
		changed, r.reloaded = true, false
	}
	if r.reloaded {
		return changed, nil
	}
	if _, err := r.run(ctx, r.kind.reload, r.config); err != nil {
		return changed, fmt.Errorf("reload %s: %w; the file is in place and %s is told again; %s", r.kind.name, err, r.kind.name, r.kind.remedy)
	}
	r.reloaded = true
	if changed {
		r.log.Info("router reloaded", "router", r.kind.name, "file", r.config, "neighbours", len(b.Neighbors))
	}
	return changed, nil
}

// replace puts text in the place of old, if the router's parser accepts it.
func (r *Router) replace(ctx context.Context, text, old []byte) error {
	candidate := sibling(r.config, ".new")
	if err := write(candidate, r.config, text); err != nil {
		return err
	}
	if _, err := r.run(ctx, r.kind.check, candidate); err != nil {
		rejected := r.config + ".rejected"
		err = fmt.Errorf("check configuration rendered from %s: %s", r.source.parsed.Name(), strings.ReplaceAll(err.Error(), candidate, rejected))
		return errors.Join(err, os.Rename(candidate, rejected))
	}
	if len(old) > 0 && !bytes.HasPrefix(old, []byte(mark)) {
		if err := keep(r.config); err != nil {
			return errors.Join(err, os.Remove(candidate))
		}
	}
	if err := os.Rename(candidate, r.config); err != nil {
		return errors.Join(err, os.Remove(candidate))
	}
	if err := os.Remove(r.config + ".rejected"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return syncDir(filepath.Dir(r.config))
}

// run runs a command and returns all it printed, without passwords.
func (r *Router) run(ctx context.Context, command []string, file string) (string, error) {
	args := slices.Clone(command)
	for i := range args {
		args[i] = strings.ReplaceAll(args[i], "{file}", file)
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	text := r.redact(strings.TrimSpace(string(out)))
	if err != nil {
		return text, fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, text)
	}
	return text, nil
}

func (r *Router) redact(s string) string {
	for _, n := range r.last.Neighbors {
		if n.Password != "" {
			s = strings.ReplaceAll(s, n.Password, "(password)")
		}
	}
	return s
}
