package kernel

import (
	"bytes"
	"fmt"
	"os/exec"
	"slices"
	"strings"

	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/xtables"
)

func families() []overlay.Family { return []overlay.Family{overlay.IPv4, overlay.IPv6} }

// holdings is what a flavour holds, of one family or of both.
type holdings struct {
	hint   int  // how surely Kubernetes uses this flavour, 0: nothing says so
	ours   bool // Twill's or flannel's chains are in it
	rules  int  // of others
	chains map[place]bool
}

// hints are chains in table mangle by which kubelet shows which flavour the node
// uses: its hint, or, from older ones, that by which it sees that somebody has flushed
// the table. kube-proxy, in a container, may have guessed wrong.
func hints() map[string]int {
	return map[string]int{"KUBE-IPTABLES-HINT": 2, "KUBE-KUBELET-CANARY": 2, "KUBE-PROXY-CANARY": 1}
}

func (h *holdings) add(o holdings) {
	h.hint, h.ours, h.rules = max(h.hint, o.hint), h.ours || o.ours, h.rules+o.rules
}

// parseSave reads what iptables-save prints.
func parseSave(text []byte) holdings {
	h := holdings{chains: map[place]bool{}}
	table := ""
	for line := range bytes.Lines(text) {
		word, rest, _ := strings.Cut(strings.TrimSpace(string(line)), " ")
		switch {
		case strings.HasPrefix(word, "*"):
			table = word[1:]
		case strings.HasPrefix(word, ":"):
			if table == "mangle" {
				h.hint = max(h.hint, hints()[word[1:]])
			}
			for _, p := range places() {
				if p.table == table && p.name == word[1:] {
					h.chains[p], h.ours = true, true
				}
			}
		case word == "-A" && !strings.Contains(rest, overlay.CommentPrefix) && !strings.Contains(rest, "FLANNEL-"):
			h.rules++
		}
	}
	return h
}

// held reads what a flavour holds of one family; nothing if it cannot be read, as
// without the kernel's part of it. It never makes a table, as other questions to the
// legacy flavour do.
func held(v xtables.Flavour, f overlay.Family) holdings {
	if !v.Named(f) || v == xtables.Legacy && len(xtables.LegacyTables(f)) == 0 {
		return holdings{}
	}
	// The exit status may be that of one table which nft(8) has written to; the
	// others are in the output.
	out, _ := exec.Command(xtables.Plain(f) + "-" + string(v) + "-save").Output()
	return parseSave(out)
}

// heldInAll is held of both families.
func heldInAll(v xtables.Flavour) holdings {
	var all holdings
	for _, f := range families() {
		all.add(held(v, f))
	}
	return all
}

// chooseFlavour says which flavour the node uses, one for both families: that of
// Kubernetes, else the one that has our rules, else the one with more rules, else
// the system's.
//
// kubelet leaves its hint before it starts pods, so twilld in a pod finds it. A
// twilld that starts earlier takes what the rest says, and moves to the hint's
// flavour when it comes (see moveToHint).
func chooseFlavour(system xtables.Flavour, nft, legacy holdings) xtables.Flavour {
	for _, v := range [][2]int{{nft.hint, legacy.hint}, {one(nft.ours), one(legacy.ours)}, {nft.rules, legacy.rules}} {
		switch {
		case v[0] > v[1]:
			return xtables.Nft
		case v[0] < v[1]:
			return xtables.Legacy
		}
	}
	if system == "" {
		return xtables.Nft
	}
	return system
}

func one(b bool) int {
	if b {
		return 1
	}
	return 0
}

// flavours is what is known of the flavours of the node.
type flavours struct {
	used xtables.Flavour // nothing: the node has no iptables
	both bool            // the other flavour is installed, too
	// other is what the other flavour holds.
	other map[overlay.Family]holdings
	// counted are the rules of others in the used one, and those in the other when
	// that was counted.
	counted [2]int
}

func newFlavours() *flavours {
	system, _ := xtables.System() // newIptables says what is wrong
	nft, legacy := slices.ContainsFunc(families(), xtables.Nft.Named), slices.ContainsFunc(families(), xtables.Legacy.Named)
	s := &flavours{used: system}
	switch {
	case nft && legacy:
		s.used, s.both = chooseFlavour(system, heldInAll(xtables.Nft), heldInAll(xtables.Legacy)), true
	case system == "" && nft:
		s.used = xtables.Nft
	case system == "" && legacy:
		s.used = xtables.Legacy
	}
	return s
}

// command returns the name of the used flavour's command for a family. That is
// iptables if it is of this flavour.
func (s *flavours) command(f overlay.Family) (string, error) {
	plain := xtables.Plain(f)
	path, err := exec.LookPath(plain)
	if err != nil && !s.used.Named(f) {
		return "", fmt.Errorf("find %s: %w: install the iptables package and restart", plain, err)
	}
	if err == nil {
		if got, err := xtables.Of(path); err != nil || got == s.used {
			return plain, err
		}
	}
	return s.used.Command(f)
}

// look reads what the other flavour holds.
func (s *flavours) look() {
	s.other = map[overlay.Family]holdings{}
	for _, f := range families() {
		if s.both {
			s.other[f] = held(s.used.Other(), f)
		}
	}
}

func (s *flavours) allOther() holdings {
	var all holdings
	for _, h := range s.other {
		all.add(h)
	}
	return all
}

// moveToHint uses the other flavour from now on if by now Kubernetes says so. More
// rules in it are no reason: we would go to and fro. It reports whether it did.
func (s *flavours) moveToHint() bool {
	if hint := s.allOther().hint; hint == 0 || hint <= heldInAll(s.used).hint {
		return false
	}
	s.used = s.used.Other()
	s.look()
	return true
}

// leftovers are Twill's and flannel's chains in the other flavour: of a time when it
// was the used one, or of a flannel that used it.
func (s *flavours) leftovers() []overlay.Chain {
	var out []overlay.Chain
	for _, f := range families() {
		for p := range s.other[f].chains {
			out = append(out, overlay.Chain{Tool: s.used.Other().Tool(), Family: f, Table: p.table, Name: p.name, Hook: p.hook, Hash: flannelHash})
		}
	}
	return out
}

// problem says that the other flavour holds rules of other programs, if it does.
func (s *flavours) problem() []overlay.Problem {
	n := s.allOther().rules
	if n == 0 {
		return nil
	}
	if s.counted[1] != n { // reading all of kube-proxy's rules takes time
		s.counted = [2]int{heldInAll(s.used).rules, n}
	}
	used, other := s.used, s.used.Other()
	return []overlay.Problem{{
		Object: "iptables",
		Reason: fmt.Sprintf("both flavours are in use, and packets must pass both: other programs have %d rules in iptables-%s, as Twill, and %d in iptables-%s", s.counted[0], used, n, other),
		Remedy: fmt.Sprintf("see whose they are (iptables-%s-save, ip6tables-%[1]s-save), have that program use iptables-%[2]s (update-alternatives --set iptables /usr/sbin/iptables-%[2]s, and ip6tables), and reboot the node", other, used),
	}}
}
