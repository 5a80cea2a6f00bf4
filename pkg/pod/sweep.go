package pod

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/ipam"
	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/portmap"
)

// Sweeper takes back what dead pods left, for runtimes that never call GC, and
// restores host ports that somebody flushed.
type Sweeper struct {
	DataDir     string
	HandoffFile string
	Firewall    overlay.Tool

	// suspects are reservations of other plugins that no pod seems to have, and
	// since when.
	suspects map[string]time.Time
}

// suspicion is how long a reservation of another plugin must have been nobody's: one
// that was just made is of a pod that is still being wired.
const suspicion = 5 * time.Minute

// Sweep goes over all that is written down of pods on this node, once. It returns in
// words what it did.
func (s *Sweeper) Sweep(ctx context.Context) (done []string, err error) {
	h, err := openNetlink()
	if err != nil {
		return nil, err
	}
	defer h.Close()
	var errs error
	for _, step := range []func() ([]string, error){
		func() ([]string, error) { return s.sweepRecords(h) },
		func() ([]string, error) { return s.sweepReservations(h) },
		func() ([]string, error) { return s.SyncPorts(ctx) },
		func() ([]string, error) { return s.sweepBridge(h) },
	} {
		did, err := step()
		done, errs = append(done, did...), errors.Join(errs, err)
	}
	return done, errors.Join(errs, DeleteDoomed())
}

// config is what takes a pod of a network apart.
func (s *Sweeper) config(network, bridge string) *Config {
	return &Config{Name: network, DataDir: s.DataDir, HandoffFile: s.HandoffFile, Firewall: s.Firewall, Bridge: bridge}
}

func (s *Sweeper) sweepRecords(h *netlink.Handle) (done []string, errs error) {
	all := recordsIn(s.DataDir)
	networks, err := all.networks()
	if err != nil {
		return nil, err
	}
	boot := bootID()
	for _, network := range networks {
		err := all.each(network, func(rec *heldRecord) error {
			defer rec.release()
			why, err := rec.dead(h, boot)
			if why == "" || err != nil {
				return err
			}
			if err := s.config(network, rec.Bridge).discard(h, rec); err != nil {
				return err
			}
			done = append(done, fmt.Sprintf("freed %v of %s: %s", rec.Addrs, attachment{Owner: rec.Owner, pod: rec.Pod}, why))
			return nil
		})
		errs = errors.Join(errs, err)
	}
	return done, errs
}

// dead says why an attachment is nobody's any more; empty: it is somebody's. That no
// verb works on it is known, for its lock is ours.
func (r Record) dead(h *netlink.Handle, boot string) (why string, err error) {
	switch {
	case !r.Complete:
		return "its ADD was killed", nil
	case r.Boot != boot:
		return "the node was started anew since", nil
	case r.Namespace.alive():
		return "", nil
	}
	// The daemon may not see the path. But a veth goes with its namespace.
	at := attachment{Owner: r.Owner}
	l, err := h.LinkByName(at.hostLink())
	if isNotFound(err) || err == nil && !mayDelete(at, l) {
		return "its network namespace is gone", nil
	}
	return "", err
}

// sweepReservations frees addresses that another plugin reserved, on a node that
// came from flannel, and that no pod has. There is no record of those pods; what the
// kernel says of their addresses is all that is known.
func (s *Sweeper) sweepReservations(h *netlink.Handle) (done []string, errs error) {
	unrecorded, err := s.unrecorded()
	if err != nil || len(unrecorded) == 0 {
		s.suspects = nil
		return nil, err
	}
	live, err := podAddrs(h)
	if err != nil {
		return nil, err
	}
	still := map[string]time.Time{}
	for _, u := range unrecorded {
		if live[u.Addr] {
			continue
		}
		path := ipam.NewDir(s.DataDir, u.network).Path(u.Addr)
		since, known := s.suspects[path]
		if !known {
			since = time.Now()
		}
		if still[path] = since; time.Since(since) < suspicion {
			continue
		}
		err := s.config(u.network, "").reservations().Release(u.Owner, []netip.Addr{u.Addr}, ipam.ReleaseOptions{})
		if err == nil {
			delete(still, path)
			done = append(done, fmt.Sprintf("freed %s of container %s: no pod on this node has it", u.Addr, u.Owner))
		}
		errs = errors.Join(errs, err)
	}
	s.suspects = still
	return done, errs
}

type unrecorded struct {
	ipam.Reservation
	network string
}

// unrecorded are the reservations without a record, of all networks. It marks those
// networks that have none.
func (s *Sweeper) unrecorded() ([]unrecorded, error) {
	networks, err := names(s.DataDir)
	if err != nil {
		return nil, err
	}
	var out []unrecorded
	for _, network := range networks {
		if info, err := os.Stat(filepath.Join(s.DataDir, network)); strings.HasPrefix(network, ".") || err != nil || !info.IsDir() {
			continue
		}
		// The records after the reservations: an ADD makes its record first.
		list, err := ipam.NewDir(s.DataDir, network).List()
		if err != nil {
			return nil, err
		}
		recorded, err := recordsIn(s.DataDir).owners(network)
		if err != nil {
			return nil, err
		}
		before := len(out)
		for _, r := range list {
			if !recorded[r.Owner] {
				out = append(out, unrecorded{r, network})
			}
		}
		if err := recordsIn(s.DataDir).setMark(network, len(out) == before); err != nil {
			return nil, fmt.Errorf("mark the network as recorded: %w", err)
		}
	}
	return out, nil
}

// SyncPorts restores host ports that somebody flushed, and closes those of pods whose
// link is gone.
func (s *Sweeper) SyncPorts(ctx context.Context) ([]string, error) {
	did, err := s.config("", "").portmap().Sync(ctx, func(e portmap.Entry) bool {
		_, err := net.InterfaceByName(e.HostLink)
		return err == nil
	})
	if err != nil {
		return did, fmt.Errorf("check the host ports: %w", err)
	}
	return did, nil
}

// sweepBridge takes away what renumbering left for pods that are gone: their routes,
// and with the last of a family the gateways of the subnets before.
func (s *Sweeper) sweepBridge(h *netlink.Handle) (done []string, errs error) {
	br, err := h.LinkByName(overlay.Bridge)
	if isNotFound(err) {
		return nil, nil
	}
	w, werr := newWiring(s.config("", overlay.Bridge), 0)
	if err != nil || werr != nil {
		return nil, err // without a hand-off it is not known what is old
	}
	w.Mode = Bridged
	addrs, err := w.readBridge(br)
	if err != nil || len(addrs.old) == 0 {
		return nil, err
	}
	if err := w.renumber(h, br, addrs.old); err != nil {
		return nil, err
	}
	left, err := s.oldPods(h, br)
	if err != nil {
		return nil, err
	}
	for _, gw := range addrs.old {
		if slices.ContainsFunc(left, func(a netip.Addr) bool { return a.Is4() == gw.Addr().Is4() }) {
			continue
		}
		now, err := linkAddrs(br.Attrs().Index)
		errs = errors.Join(errs, err)
		for _, a := range now {
			if n := ipNet(a.Prefix); a.Addr() == gw.Addr() {
				errs = errors.Join(errs, h.AddrDel(br, &netlink.Addr{IPNet: &n}))
				done = append(done, fmt.Sprintf("deleted address %s of %s: no pod is left that sends to it", gw, w.Bridge))
			}
		}
	}
	return done, errs
}

// oldPods returns the addresses that the bridge has a route to, and deletes the
// routes to those that are free.
func (s *Sweeper) oldPods(h *netlink.Handle, br netlink.Link) ([]netip.Addr, error) {
	reserved := map[netip.Addr]bool{}
	networks, err := names(s.DataDir)
	if err != nil {
		return nil, err
	}
	for _, network := range networks {
		list, err := ipam.NewDir(s.DataDir, network).List()
		if err != nil && !absent(err) {
			return nil, err
		}
		for _, r := range list {
			reserved[r.Addr] = true
		}
	}
	routes, err := complete(func() ([]netlink.Route, error) {
		return h.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{LinkIndex: br.Attrs().Index, Protocol: overlay.Protocol}, netlink.RT_FILTER_OIF|netlink.RT_FILTER_PROTOCOL)
	})
	if err != nil {
		return nil, fmt.Errorf("list the routes of %s: %w", br.Attrs().Name, err)
	}
	var left []netip.Addr
	for _, r := range routes {
		a := prefixOf(*r.Dst).Addr()
		if reserved[a] {
			left = append(left, a)
		} else if err := h.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			return nil, fmt.Errorf("delete route %s: %w", r.Dst, err)
		}
	}
	return left, nil
}
