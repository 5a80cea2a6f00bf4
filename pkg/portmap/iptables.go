package portmap

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/xtables"
)

// Our iptables chains.
const (
	HostPortChain = "TWILL-HOSTPORT" // nat: the ports
	HostMasqChain = "TWILL-HOSTMASQ" // nat: sources
	LocalNetChain = "TWILL-LOCALNET" // filter: guards 127.0.0.0/8
)

// Exit statuses of iptables -S.
const (
	statusAbsent     = 1 // no such chain
	statusUnreadable = 3 // a rule of somebody's that iptables has no words for
)

const jumpComment = "-m comment --comment " + overlay.JumpComment

// iptables writes the rules of each family through iptables-restore.
type iptables struct {
	tools
	flavour xtables.Flavour
}

// chain is a chain of ours and what leads to it. Without rules it does not exist.
type chain struct {
	table, name string
	jumps       []jump
	rules       []string
}

// jump is a rule of a foreign chain.
type jump struct {
	hook, match string
	first       bool // else last
}

func (j jump) words(target string) string {
	return strings.TrimSpace(j.match+" "+jumpComment) + " -j " + target
}

// iptablesChains prints a family's rules. The guard of 127.0.0.0/8 comes before
// the ports: while the last table lacks its jumps, the next writer sees that the
// one before was killed.
//
// LocalNetChain is there because pods' packets to 127.0.0.0/8, which the kernel
// refuses else, pass where route_localnet is on; answers to the node itself do not
// count as theirs.
//
// A jump to the ports is the last of its hook, as the portmap plugin's: kube-proxy
// puts its own first, so that a service comes before a host port. The one to
// the masquerade is the first: a rule of somebody's that accepts what goes between
// pods would take the hairpin packets away.
func iptablesChains(r ruleset) []chain {
	guard := chain{table: "filter", name: LocalNetChain, jumps: []jump{{"INPUT", "-d " + loopback().String() + " ! -i lo", true}}}
	const local = "-m addrtype --dst-type LOCAL"
	ports := chain{table: "nat", name: HostPortChain, jumps: []jump{{"PREROUTING", local, false}, {"OUTPUT", local, false}}}
	masq := chain{table: "nat", name: HostMasqChain, jumps: []jump{{"POSTROUTING", "", true}}}

	for _, f := range r.forwards {
		match := fmt.Sprintf("-p %s --dport %d", f.protocol, f.port)
		if f.host.IsValid() {
			match = "-d " + netip.PrefixFrom(f.host, f.host.BitLen()).String() + " " + match
		}
		for _, p := range f.local {
			ports.rules = append(ports.rules, fmt.Sprintf("-s %s %s -j MARK --or-mark %#x", p, match, HairpinMark))
		}
		ports.rules = append(ports.rules, fmt.Sprintf("%s -j DNAT --to-destination %s", match, f.to))
	}
	if len(r.forwards) > 0 {
		masq.rules = append(masq.rules, fmt.Sprintf("-m mark --mark %#x/%#x -m conntrack --ctstate DNAT -j MASQUERADE", HairpinMark, HairpinMark))
		if r.family == overlay.IPv4 {
			guard.rules = []string{"-m conntrack ! --ctstate RELATED,ESTABLISHED -j DROP"}
		}
	}
	if len(r.masquerade) > 0 {
		masq.rules = append(masq.rules, fmt.Sprintf("-m mark --mark %#x/%#x -j RETURN", kubeProxyMark, kubeProxyMark))
	}
	for _, m := range r.masquerade {
		src := "-s " + netip.PrefixFrom(m.pod, m.pod.BitLen()).String()
		for _, p := range m.except {
			masq.rules = append(masq.rules, fmt.Sprintf("%s -d %s -j RETURN", src, p))
		}
		masq.rules = append(masq.rules, fmt.Sprintf("%s ! -d %s -j MASQUERADE", src, multicast(r.family)))
	}
	return []chain{guard, ports, masq}
}

func (c chain) hash(i int) string { return overlay.CommentPrefix + overlay.RuleHash(c.rules[i]) }

func (c chain) exists() bool { return len(c.rules) > 0 }

// found is what iptables -S shows of a chain of ours.
type found struct {
	exists bool
	hashes []string            // comments of its rules
	jumps  map[string][]string // hook: the rules that lead to it, without "-A <hook> "
}

// iptablesDocument prints one transaction per table for iptables-restore. A line
// ":NAME -" makes the chain or empties it. A jump that should be there already is
// deleted and made anew: if it is not, the whole table is refused, and the caller
// has to look. With found it is known what is there.
func iptablesDocument(before, after []chain, have []found) string {
	var s strings.Builder
	for _, table := range []string{"filter", "nat"} {
		var declare, fill, detach, remove strings.Builder
		changed := have != nil
		for i, c := range after {
			if c.table != table {
				continue
			}
			was := before[i].exists()
			if have != nil {
				was = have[i].exists
			}
			if !was && !c.exists() {
				continue
			}
			changed = changed || !slices.Equal(before[i].rules, c.rules)
			fmt.Fprintf(&declare, ":%s - [0:0]\n", c.name)
			for n, rule := range c.rules {
				fmt.Fprintf(&fill, "-A %s -m comment --comment %s %s\n", c.name, c.hash(n), rule)
			}
			for _, j := range c.jumps {
				installed := []string{j.words(c.name)}
				if have != nil {
					installed = have[i].jumps[j.hook]
				} else if !was {
					installed = nil
				}
				for _, words := range installed {
					fmt.Fprintf(&detach, "-D %s %s\n", j.hook, words)
				}
				switch {
				case !c.exists():
				case j.first:
					fmt.Fprintf(&detach, "-I %s %s\n", j.hook, j.words(c.name))
				default:
					fmt.Fprintf(&detach, "-A %s %s\n", j.hook, j.words(c.name))
				}
			}
			if !c.exists() {
				fmt.Fprintf(&remove, "-X %s\n", c.name)
			}
		}
		if changed && declare.Len() > 0 {
			s.WriteString("*" + table + "\n" + declare.String() + fill.String() + detach.String() + remove.String() + "COMMIT\n")
		}
	}
	return s.String()
}

func (t iptables) restore(ctx context.Context, f overlay.Family, doc string) *process {
	command, err := t.flavour.Command(f)
	if err != nil {
		return &process{err: err}
	}
	return t.start(ctx, doc, command+"-restore", "--noflush", fmt.Sprintf("--wait=%d", lockSeconds))
}

// able reports whether the node has the flavour for a family.
func (t iptables) able(f overlay.Family) bool {
	command, err := t.flavour.Command(f)
	return err == nil && installed(command)
}

// write needs one process per family if the rules are what they should be, else
// the one that fails, those that look, and one more.
func (t iptables) write(ctx context.Context, cs []change) error {
	cs = slices.DeleteFunc(cs, func(c change) bool { return c.impossible(t.able(c.after.family)) })
	running := make([]*process, len(cs))
	for i, c := range cs {
		if c.exact {
			continue
		}
		if doc := iptablesDocument(iptablesChains(c.before), iptablesChains(c.after), nil); doc != "" {
			running[i] = t.restore(ctx, c.after.family, doc)
		}
	}
	var errs []error
	for i, c := range cs {
		var err error
		if running[i] != nil {
			err = running[i].wait()
		}
		if c.exact || err != nil && running[i].exitStatus() > 0 && !errors.Is(err, errLocked) {
			err = t.rewrite(ctx, c.after)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("write %s rules: %w", xtables.Plain(c.after.family), err))
		}
	}
	return errors.Join(errs...)
}

// rewrite looks at what is there and writes all tables.
func (t iptables) rewrite(ctx context.Context, want ruleset) error {
	chains := iptablesChains(want)
	have, err := t.list(ctx, want.family, chains)
	if err != nil {
		return err
	}
	if doc := iptablesDocument(chains, chains, have); doc != "" {
		return t.restore(ctx, want.family, doc).wait()
	}
	return nil
}

// list reads our chains and the hooks that lead to them, all side by side.
func (t iptables) list(ctx context.Context, f overlay.Family, chains []chain) ([]found, error) {
	command, err := t.flavour.Command(f)
	if err != nil {
		return nil, err
	}
	shown := map[string]*process{}
	show := func(table, name string) {
		if shown[table+name] == nil {
			shown[table+name] = t.start(ctx, "", command, fmt.Sprintf("--wait=%d", lockSeconds), "-t", table, "-S", name)
		}
	}
	for _, c := range chains {
		show(c.table, c.name)
		for _, j := range c.jumps {
			show(c.table, j.hook)
		}
	}
	lines := map[string][]string{}
	var errs []error
	for key, p := range shown {
		err := p.wait()
		switch status := p.exitStatus(); {
		case err == nil || status == statusAbsent:
		case status == statusUnreadable && strings.Contains(key, "TWILL-"):
			lines[key] = []string{"?"} // it is there, and no rule of it is ours
		default:
			errs = append(errs, fmt.Errorf("list %s chain: %w", xtables.Plain(f), err))
		}
		for line := range strings.Lines(p.stdout.String()) {
			lines[key] = append(lines[key], strings.TrimSpace(line))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	var out []found
	for _, c := range chains {
		x := found{exists: len(lines[c.table+c.name]) > 0, jumps: map[string][]string{}}
		for _, line := range lines[c.table+c.name] {
			if rule, ok := strings.CutPrefix(line, "-A "+c.name+" "); ok {
				x.hashes = append(x.hashes, comment(rule))
			}
		}
		for _, j := range c.jumps {
			for _, line := range lines[c.table+j.hook] {
				if rule, ok := strings.CutPrefix(line, "-A "+j.hook+" "); ok && target(rule) == c.name {
					x.jumps[j.hook] = append(x.jumps[j.hook], rule)
				}
			}
		}
		out = append(out, x)
	}
	return out, nil
}

// comment returns a rule's comment. Ours need no quotes, but some versions print
// them; a comment with blanks is nobody's of us.
func comment(rule string) string {
	_, rest, _ := strings.Cut(rule, "--comment ")
	word, _, _ := strings.Cut(rest, " ")
	return strings.Trim(word, `"`)
}

func target(rule string) string {
	for _, option := range []string{"-j ", "-g "} {
		if i := strings.LastIndex(" "+rule, " "+option); i >= 0 {
			word, _, _ := strings.Cut(rule[i+len(option):], " ")
			return word
		}
	}
	return ""
}

func (t iptables) differences(ctx context.Context, want []ruleset) ([]string, error) {
	var out []string
	for _, r := range want {
		chains := iptablesChains(r)
		have, err := t.list(ctx, r.family, chains)
		if err != nil {
			return nil, err
		}
		for i, c := range chains {
			where := fmt.Sprintf("%s table %s: ", xtables.Plain(r.family), c.table)
			switch {
			case have[i].exists && !c.exists():
				out = append(out, fmt.Sprintf("%schain %s should not be there", where, c.name))
			case !have[i].exists && c.exists():
				out = append(out, fmt.Sprintf("%schain %s is missing", where, c.name))
			case c.exists():
				out = append(out, c.differences(where, have[i])...)
			}
		}
	}
	return out, nil
}

func (c chain) differences(where string, have found) []string {
	var out, hashes []string
	for i := range c.rules {
		hashes = append(hashes, c.hash(i))
	}
	if !slices.Equal(hashes, have.hashes) {
		out = append(out, fmt.Sprintf("%schain %s was changed", where, c.name))
	}
	for _, j := range c.jumps {
		if got := have.jumps[j.hook]; len(got) != 1 || comment(got[0]) != overlay.JumpComment {
			out = append(out, fmt.Sprintf("%s%s does not jump to %s once", where, j.hook, c.name))
		}
	}
	return out
}

// mayHold: a node may lack the commands of a family, and legacy tables are only
// looked for where there are some, for a look makes them.
func (t iptables) mayHold(f overlay.Family) bool {
	if t.flavour == xtables.Legacy && len(xtables.LegacyTables(f)) == 0 {
		return false
	}
	return t.able(f)
}

// remove deletes our chains of the families that the node has iptables for.
func (t iptables) remove(ctx context.Context) error {
	var errs []error
	for _, f := range families() {
		if !t.mayHold(f) {
			continue
		}
		if err := t.rewrite(ctx, ruleset{family: f}); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
