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
	lock, err := lockNamespace()
	if err != nil {
		return err
	}
	defer lock.Close()
	k, err := kernel.Open(kernel.Options{Log: log})
	if err != nil {
		return fmt.Errorf("open the kernel's network interfaces: %w; --cleanup needs CAP_NET_ADMIN", err)
	}
	defer k.Close()
	have, err := k.Observe(ctx, kernel.Scope{})
	if err != nil {
		return fmt.Errorf("read the kernel's state: %w", err)
	}
	plan, _ := overlay.Diff(ours(have), overlay.State{})
	failed := map[string]error{}
	for _, f := range k.Apply(ctx, plan) {
		failed[f.Op.String()] = f.Err
	}
	var errs []error
	for _, op := range plan {
		if err := failed[op.String()]; err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", op, err))
			continue
		}
		fmt.Fprintln(out, op)
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
	if len(plan) == 0 && !bridge && len(errs) == 0 {
		fmt.Fprintln(out, "nothing of Twill's is in the kernel")
	}
	return errors.Join(errs...)
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
