//go:build linux && amd64

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// state is all that a pod could leave behind, a line for each thing.
type state []string

func (s *state) add(format string, a ...any) { *s = append(*s, fmt.Sprintf(format, a...)) }

// minus returns what is in s and not in other.
func (s state) minus(other state) state {
	have := map[string]int{}
	for _, line := range other {
		have[line]++
	}
	var out state
	for _, line := range s {
		if have[line]--; have[line] < 0 {
			out = append(out, line)
		}
	}
	return out
}

// list repeats a dump that changed under the kernel's hands.
func list[T any](t testing.TB, dump func() ([]T, error)) []T {
	t.Helper()
	for {
		got, err := dump()
		if errors.Is(err, netlink.ErrDumpInterrupted) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
}

// network is the state of a namespace without the links that are the node's (or
// the pod's own loopback) and what the kernel keeps for them.
func (n *namespace) network(without ...string) state {
	n.t.Helper()
	var s state
	names := map[int]string{0: "-"}
	links := list(n.t, n.nl.LinkList)
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	ours := func(index int) bool { return !slices.Contains(without, names[index]) }
	for _, l := range links {
		a := l.Attrs()
		if ours(a.Index) {
			s.add("link %s %s master %s alias %q MTU %d up %t", l.Type(), a.Name, names[a.MasterIndex], a.Alias, a.MTU, a.Flags&net.FlagUp != 0)
		}
		for _, parent := range []uint32{netlink.HANDLE_ROOT, netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
			for _, f := range list(n.t, func() ([]netlink.Filter, error) { return n.nl.FilterList(l, parent) }) {
				s.add("filter %s dev %s parent %x", f.Type(), a.Name, parent)
			}
		}
	}
	for _, q := range list(n.t, func() ([]netlink.Qdisc, error) { return n.nl.QdiscList(nil) }) {
		if q.Type() != "noqueue" { // every virtual link's own
			s.add("qdisc %s dev %s", q.Type(), names[q.Attrs().LinkIndex])
		}
	}
	for _, a := range list(n.t, func() ([]netlink.Addr, error) { return n.nl.AddrList(nil, netlink.FAMILY_ALL) }) {
		if ours(a.LinkIndex) {
			s.add("address %s dev %s", a.IPNet, names[a.LinkIndex])
		}
	}
	n.neighbours(&s, names, ours)
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		all := &netlink.Route{Table: unix.RT_TABLE_UNSPEC}
		for _, r := range list(n.t, func() ([]netlink.Route, error) {
			return n.nl.RouteListFiltered(family, all, netlink.RT_FILTER_TABLE)
		}) {
			if ours(r.LinkIndex) {
				s.add("route %s via %s dev %s table %d", r.Dst, r.Gw, names[r.LinkIndex], r.Table)
			}
		}
		for _, r := range list(n.t, func() ([]netlink.Rule, error) { return n.nl.RuleList(family) }) {
			s.add("rule %s", r)
		}
	}
	return append(s, n.firewall()...)
}

// neighbours adds the neighbour tables and FDBs. Multicast groups come and go with
// the links. What a bridge learned goes with the port, which is in the state.
func (n *namespace) neighbours(s *state, names map[int]string, ours func(int) bool) {
	n.t.Helper()
	for _, e := range list(n.t, func() ([]netlink.Neigh, error) { return n.nl.NeighProxyList(0, netlink.FAMILY_ALL) }) {
		s.add("proxy neighbour %s dev %s", e.IP, names[e.LinkIndex])
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6, unix.AF_BRIDGE} {
		for _, e := range list(n.t, func() ([]netlink.Neigh, error) { return n.nl.NeighList(0, family) }) {
			switch {
			case family != unix.AF_BRIDGE && e.State != netlink.NUD_NOARP:
				s.add("neighbour %s dev %s", e.IP, names[e.LinkIndex])
			case family == unix.AF_BRIDGE && e.State == netlink.NUD_PERMANENT && ours(e.LinkIndex):
				s.add("FDB %s dev %s", e.HardwareAddr, names[e.LinkIndex])
			}
		}
	}
}

// firewall is nftables' whole ruleset, which has that of iptables-nft in it, and
// what legacy iptables has.
func (n *namespace) firewall() state {
	n.t.Helper()
	var s state
	err := n.do(func() error {
		out, err := exec.Command("nft", "--stateless", "list", "ruleset").Output()
		if err != nil {
			return fmt.Errorf("nft list ruleset: %w", err)
		}
		s = ruleset(string(out))
		for _, family := range []string{"ip", "ip6"} {
			// Reading a table that is not there would make it.
			tables, err := os.ReadFile("/proc/thread-self/net/" + family + "_tables_names")
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			for table := range strings.FieldsSeq(string(tables)) {
				out, err := exec.Command(family+"tables-legacy-save", "-t", table).Output()
				if err != nil {
					return fmt.Errorf("%stables-legacy-save: %w", family, err)
				}
				for line := range strings.Lines(string(out)) {
					// A chain with a policy is there with its table.
					if line = strings.TrimSpace(line); strings.HasPrefix(line, "-A") || strings.HasPrefix(line, ":") && strings.Contains(line, " - ") {
						s.add("%stables-legacy %s: %s", family, table, line)
					}
				}
			}
		}
		return nil
	})
	if err != nil {
		n.t.Fatal(err)
	}
	return s
}

// ruleset reads what nft lists. The tables of iptables with their built-in chains,
// empty, are everybody's: they come with the first rule, and nobody can tell
// whether another program is about to use them.
func ruleset(list string) state {
	var s state
	table, within := "", "" // what is in the braces
	for line := range strings.Lines(list) {
		line = strings.TrimSpace(line)
		head, opens := strings.CutSuffix(line, " {")
		switch {
		case line == "" || line == "}" || line[0] == '#':
			continue
		case opens && strings.HasPrefix(line, "table "):
			table, within = head, ""
		case opens:
			within = head
		}
		if !builtin(table, within, line) {
			// The order of a set's elements means nothing, nor where its lines break.
			element := strings.TrimSuffix(strings.TrimSuffix(strings.TrimPrefix(line, "elements = { "), ","), " }")
			s.add("nft %s %s: %s", table, within, element)
		}
	}
	return s
}

func builtin(table, chain, line string) bool {
	f := strings.Fields(table)
	shared := (f[1] == "ip" || f[1] == "ip6") && slices.Contains([]string{"filter", "nat", "mangle", "raw", "security"}, f[2])
	own := strings.TrimPrefix(chain, "chain ")
	return shared && (chain == "" || own == strings.ToUpper(own) && !strings.Contains(own, "-") &&
		(strings.HasSuffix(line, "{") || strings.HasPrefix(line, "type ")))
}

// files is what is below the node's directory without what is the node's: empty
// directories, the lock and the round robin.
//
// What is kept of released addresses is the node's, too.
func (w *walk) files() state {
	w.t.Helper()
	var s state
	err := filepath.WalkDir(w.dir, func(path string, d fs.DirEntry, err error) error {
		base := filepath.Base(path)
		if w.sc.rests && strings.HasPrefix(path, filepath.Join(w.dir, "networks", ".twill", "ipam")+"/") {
			return err
		}
		if err != nil || d.IsDir() || base == "lock" || strings.HasPrefix(base, "last_reserved_ip.") {
			return err
		}
		content, err := os.ReadFile(path)
		s.add("file %s %q", strings.TrimPrefix(path, w.dir), bytes.TrimSpace(content))
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}
