package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"

	"github.com/twill-net/twill/pkg/kernel"
	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/pod"
)

// Cleanup removes all that is Twill's from the node's network and nothing else,
// and prints each thing. It runs while no twilld does.
func Cleanup(ctx context.Context, cfg Config, out io.Writer, log *slog.Logger) error {
	r, err := newRemover(out, log)
	if err != nil {
		return err
	}
	defer r.close()
	errs, err := r.remove(ctx, func(s overlay.State) (have, want overlay.State) { return s, overlay.State{} })
	if err != nil {
		return err
	}
	if err := pod.CloseHostPorts(ctx, cfg.CNIDataDir); err != nil {
		errs = append(errs, err)
	}
	bridge, ports, err := pod.RemoveIdleBridge(overlay.Bridge)
	switch {
	case err != nil:
		errs = append(errs, err)
	case bridge:
		fmt.Fprintln(out, "link delete", overlay.Bridge)
	case ports > 0:
		fmt.Fprintf(out, "link %s stays: %d pods hang on it\n", overlay.Bridge, ports)
	}
	for _, file := range []string{cfg.SubnetFile, cfg.HandoffFile(), formerFile(cfg.SubnetFile), udpFile(cfg.SubnetFile), cfg.Socket, pod.SocketFor(cfg.HandoffFile())} {
		switch err := os.Remove(file); {
		case err == nil:
			fmt.Fprintln(out, "file delete", file)
		case !errors.Is(err, os.ErrNotExist):
			errs = append(errs, err)
		}
	}
	if r.removed == 0 && !bridge && len(errs) == 0 {
		fmt.Fprintln(out, "nothing of Twill's is in the kernel")
	}
	return errors.Join(errs...)
}

// HandBack lets go of a node on which flannel runs again: it removes what flannel
// does not replace, and nothing that carries packets. The devices lose Twill's alias,
// so that they are flannel's.
func HandBack(ctx context.Context, out io.Writer, log *slog.Logger) error {
	r, err := newRemover(out, log)
	if err != nil {
		return err
	}
	defer r.close()
	errs, err := r.remove(ctx, besidesForwarding)
	if err != nil {
		return err
	}
	if r.removed == 0 && len(errs) == 0 {
		fmt.Fprintln(out, "nothing of Twill's is in flannel's way")
	}
	return errors.Join(errs...)
}

// besidesForwarding leaves out what packets depend on: a nexthop object takes its
// routes along.
func besidesForwarding(s overlay.State) (have, want overlay.State) {
	used := map[uint32]bool{}
	for _, r := range s.Routes {
		used[r.NH] = true
	}
	have = overlay.State{Links: s.Links, Chains: s.Chains}
	for _, n := range s.Nexthops {
		if !used[n.ID] {
			have.Nexthops = append(have.Nexthops, n)
		}
	}
	for _, l := range s.Links {
		l.Alias = ""
		want.Links = append(want.Links, l)
	}
	return have, want
}

// remover takes things out of the kernel and prints them. It holds the node's lock,
// so no twilld runs.
type remover struct {
	lock    io.Closer
	kernel  *kernel.Kernel
	out     io.Writer
	removed int
}

func newRemover(out io.Writer, log *slog.Logger) (*remover, error) {
	lock, err := lockNamespace()
	if err != nil {
		return nil, err
	}
	k, err := kernel.Open(kernel.Options{Log: log})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open the kernel's network interfaces: %w; this needs CAP_NET_ADMIN", err), lock.Close())
	}
	return &remover{lock: lock, kernel: k, out: out}, nil
}

func (r *remover) close() {
	r.kernel.Close()
	r.lock.Close()
}

// remove makes the changes between what choose returns of all that is ours. errs are
// changes that could not be made; err says that nothing was.
func (r *remover) remove(ctx context.Context, choose func(overlay.State) (have, want overlay.State)) (errs []error, err error) {
	state, err := r.kernel.Observe(ctx, kernel.Scope{})
	if err != nil {
		return nil, fmt.Errorf("read the kernel's state: %w", err)
	}
	plan, _ := overlay.Diff(choose(ours(state)))
	failed := map[string]error{}
	for _, f := range r.kernel.Apply(ctx, plan) {
		failed[f.Op.String()] = f.Err
	}
	for _, op := range plan {
		if err := failed[op.String()]; err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", op, err))
			continue
		}
		r.removed++
		fmt.Fprintln(r.out, op)
	}
	return errs, nil
}

// ours leaves out what Observe shows because Twill would adopt it: what stands
// on links that are not ours, and flannel's chains.
func ours(s overlay.State) overlay.State {
	link := map[string]bool{}
	for _, l := range s.Links {
		link[l.Name] = l.Ours()
	}
	s.Links = slices.DeleteFunc(s.Links, func(l overlay.Link) bool { return !l.Ours() })
	s.Addrs = slices.DeleteFunc(s.Addrs, func(a overlay.Addr) bool { return !link[a.Link] })
	s.Neighs = slices.DeleteFunc(s.Neighs, func(n overlay.Neigh) bool { return !link[n.Link] })
	s.FDB = slices.DeleteFunc(s.FDB, func(f overlay.FDB) bool { return !link[f.Link] })
	s.Routes = slices.DeleteFunc(s.Routes, func(r overlay.Route) bool { return r.Protocol != overlay.Protocol })
	s.Chains = slices.DeleteFunc(s.Chains, func(c overlay.Chain) bool {
		return c.Table != overlay.NftTable && !strings.HasPrefix(c.Name, "TWILL-")
	})
	s.Sysctls, s.WGPeers = nil, nil // the peers go with their device
	return s
}
