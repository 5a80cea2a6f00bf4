package portmap

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"

	"github.com/twill-net/twill/pkg/overlay"
)

// NftTable is the name of our nftables table, one per family.
const NftTable = "twill-hostport"

// nftables writes the rules of both families through nft(8). Ports are looked up
// in maps: a packet costs the same however many there are.
type nftables struct{ tools }

// block is a part of a table: a chain with its rules, or a set or map with its
// elements. A chain's come in order, a set's do not. Which blocks there are does
// not depend on the entries, so that a table is changed without being made anew:
// while a base chain is replaced, packets can pass by.
type block struct {
	kind, name string // kind: chain, set, map
	head       string // type, flags; hook
	base       string // of a base chain, as nft lists it: type hook priority
	items      []string
	values     []string // of a map's items
}

// nftTable prints a family's rules. A ruleset without rules has no table.
func nftTable(r ruleset) []block {
	if r.empty() {
		return nil
	}
	ip, addrType := nftWords(r.family)
	const port, proto = "inet_service", "inet_proto"
	hairpin := block{kind: "set", name: "hairpin", head: fmt.Sprintf("type %s . %s . %s; flags interval;", addrType, proto, port)}
	one := block{kind: "map", name: "one-address", head: fmt.Sprintf("type %s . %s . %s : %s . %s;", addrType, proto, port, addrType, port)}
	all := block{kind: "map", name: "any-address", head: fmt.Sprintf("type %s . %s : %s . %s;", proto, port, addrType, port)}
	sources := map[string][]netip.Prefix{}
	for _, f := range r.forwards {
		key := fmt.Sprintf("%s . %d", f.protocol, f.port)
		to := fmt.Sprintf("%s . %d", f.to.Addr(), f.to.Port())
		if f.host.IsValid() {
			one.add(fmt.Sprintf("%s . %s", f.host, key), to)
		} else {
			all.add(key, to)
		}
		sources[key] = covering(append(sources[key], f.local...))
	}
	for key, prefixes := range sources {
		for _, p := range prefixes {
			hairpin.add(fmt.Sprintf("%s . %s", p, key), "")
		}
	}
	slices.Sort(hairpin.items)
	pods := block{kind: "set", name: "masqueraded", head: fmt.Sprintf("type %s;", addrType)}
	kept := block{kind: "set", name: "not-masqueraded", head: fmt.Sprintf("type %s . %s; flags interval;", addrType, addrType)}
	for _, m := range r.masquerade {
		pods.add(m.pod.String(), "")
		for _, p := range covering(append(m.except, multicast(r.family))) {
			kept.add(fmt.Sprintf("%s . %s", m.pod, p), "")
		}
	}

	local := []string{"fib daddr type local goto translate"}
	guard := []string{fmt.Sprintf(`ip daddr %s iifname != "lo" ct state != { established, related } drop`, loopback())}
	if r.family == overlay.IPv6 || len(r.forwards) == 0 {
		guard = nil
	}
	// kube-proxy's rules are at -100, in whatever tool, so a service comes first
	// if both claim a packet; sources are replaced at 99, before the accept rules
	// that somebody may have at 100.
	return []block{
		hairpin, one, all, pods, kept,
		{kind: "chain", name: "translate", items: []string{
			fmt.Sprintf("%s saddr . meta l4proto . th dport @%s meta mark set meta mark | %#x", ip, hairpin.name, HairpinMark),
			fmt.Sprintf("dnat %s to %s daddr . meta l4proto . th dport map @%s", ip, ip, one.name),
			fmt.Sprintf("dnat %s to meta l4proto . th dport map @%s", ip, all.name),
		}},
		baseChain("nat-prerouting", "nat prerouting -99", local),
		baseChain("nat-output", "nat output -99", local),
		baseChain("nat-postrouting", "nat postrouting 99", []string{
			fmt.Sprintf("meta mark & %#x == %#x ct status dnat masquerade", HairpinMark, HairpinMark),
			fmt.Sprintf("meta mark & %#x == %#x return", kubeProxyMark, kubeProxyMark),
			fmt.Sprintf("%s saddr @%s %s saddr . %s daddr != @%s masquerade", ip, pods.name, ip, ip, kept.name),
		}),
		baseChain("filter-input", "filter input -1", guard),
	}
}

func nftWords(f overlay.Family) (ip, addrType string) {
	if f == overlay.IPv6 {
		return "ip6", "ipv6_addr"
	}
	return "ip", "ipv4_addr"
}

func (b *block) add(item, value string) {
	b.items = append(b.items, item)
	if value != "" {
		b.values = append(b.values, value)
	}
}

func baseChain(name, base string, rules []string) block {
	w := strings.Fields(base)
	return block{
		kind: "chain", name: name, base: base, items: rules,
		head: fmt.Sprintf("type %s hook %s priority %s; policy accept;", w[0], w[1], w[2]),
	}
}

// hash is the comment of item i.
func (b block) hash(i int) string {
	text := b.items[i]
	if len(b.values) > 0 {
		text += " : " + b.values[i]
	}
	return overlay.CommentPrefix + overlay.RuleHash(text)
}

// nftDocument prints one transaction. If there are rules before and after, only the
// elements that differ are in it: to write a chain anew, the kernel waits for all
// packets that are in it, which takes three times as long as the rest. In the exact form, a table is made anew: it
// may hold anything. "add" before "delete" makes deleting succeed if there is none.
func nftDocument(cs []change) string {
	var s strings.Builder
	for _, c := range cs {
		ip, _ := nftWords(c.after.family)
		table := ip + " " + NftTable
		blocks, old := nftTable(c.after), nftTable(c.before)
		if !c.exact && blocks != nil && old != nil {
			for i, b := range blocks {
				b.turn(&s, table, old[i])
			}
			continue
		}
		fmt.Fprintf(&s, "add table %s\n", table)
		if c.exact || blocks == nil {
			fmt.Fprintf(&s, "delete table %s\n", table)
		}
		if blocks == nil {
			continue
		}
		fmt.Fprintf(&s, "table %s {\n", table)
		for _, b := range blocks {
			fmt.Fprintf(&s, "\t%s %s {\n", b.kind, b.name)
			if b.head != "" {
				fmt.Fprintf(&s, "\t\t%s\n", b.head)
			}
			s.WriteString("\t}\n")
		}
		s.WriteString("}\n")
		for _, b := range blocks {
			fmt.Fprintf(&s, "flush %s %s %s\n", b.kind, table, b.name)
		}
		for _, b := range blocks {
			b.fill(&s, table)
		}
	}
	return s.String()
}

// turn prints what makes b of the same block before.
func (b block) turn(s *strings.Builder, table string, before block) {
	if b.kind == "chain" {
		if !slices.Equal(b.items, before.items) {
			fmt.Fprintf(s, "flush chain %s %s\n", table, b.name)
			b.fill(s, table)
		}
		return
	}
	for _, item := range before.without(b).items {
		fmt.Fprintf(s, "delete element %s %s { %s }\n", table, b.name, item)
	}
	b.without(before).fill(s, table)
}

// without is b with those elements alone that o has not.
func (b block) without(o block) block {
	there := map[string]bool{}
	for i := range o.items {
		there[o.hash(i)] = true
	}
	left := b
	left.items, left.values = nil, nil
	for i, item := range b.items {
		if there[b.hash(i)] {
			continue
		}
		left.items = append(left.items, item)
		if b.kind == "map" {
			left.values = append(left.values, b.values[i])
		}
	}
	return left
}

// fill prints what is in b.
func (b block) fill(s *strings.Builder, table string) {
	for i, item := range b.items {
		switch {
		case b.kind == "chain":
			fmt.Fprintf(s, "add rule %s %s %s comment %q\n", table, b.name, item, b.hash(i))
		case b.kind == "map":
			fmt.Fprintf(s, "add element %s %s { %s comment %q : %s }\n", table, b.name, item, b.hash(i), b.values[i])
		default:
			fmt.Fprintf(s, "add element %s %s { %s comment %q }\n", table, b.name, item, b.hash(i))
		}
	}
}

// write needs one process, or, if the table is not what it was left as, two.
func (t nftables) write(ctx context.Context, cs []change) error {
	cs = slices.DeleteFunc(cs, func(c change) bool { return c.impossible(installed("nft")) })
	if len(cs) == 0 {
		return nil
	}
	p := t.start(ctx, nftDocument(cs), "nft", "-f", "-")
	err := p.wait()
	if err == nil || p.exitStatus() <= 0 || cs[0].exact {
		return err
	}
	for i := range cs {
		cs[i].exact = true
	}
	return t.start(ctx, nftDocument(cs), "nft", "-f", "-").wait()
}

// nftListing is the output of nft --json list table.
type nftListing struct {
	Nftables []struct {
		Chain *struct {
			Name, Type, Hook string
			Prio             int
		}
		Set, Map *struct {
			Name string
			Elem []json.RawMessage
		}
		Rule *struct{ Chain, Comment string }
	}
}

// contents says what is in a table, or should be: the hashes of each block.
type contents map[string][]string

func wanted(blocks []block) contents {
	out := contents{}
	for _, b := range blocks {
		hashes := []string{b.base}
		for i := range b.items {
			hashes = append(hashes, b.hash(i))
		}
		if b.kind != "chain" {
			slices.Sort(hashes)
		}
		out[b.kind+" "+b.name] = hashes
	}
	return out
}

// installed reads the same from a listing.
func (l nftListing) installed() (contents, error) {
	out := contents{}
	rules := map[string][]string{}
	for _, o := range l.Nftables {
		if o.Rule != nil {
			rules[o.Rule.Chain] = append(rules[o.Rule.Chain], o.Rule.Comment)
		}
	}
	for _, o := range l.Nftables {
		if c := o.Chain; c != nil {
			base := ""
			if c.Hook != "" {
				base = fmt.Sprintf("%s %s %d", c.Type, c.Hook, c.Prio)
			}
			out["chain "+c.Name] = append([]string{base}, rules[c.Name]...)
		}
		kind, set := "set", o.Set
		if o.Map != nil {
			kind, set = "map", o.Map
		}
		if set == nil {
			continue
		}
		hashes := []string{""}
		for _, e := range set.Elem {
			comment, err := elementComment(e, kind)
			if err != nil {
				return nil, fmt.Errorf("read %s %s: %w", kind, set.Name, err)
			}
			hashes = append(hashes, comment)
		}
		slices.Sort(hashes)
		out[kind+" "+set.Name] = hashes
	}
	return out, nil
}

// elementComment reads the comment of {"elem": {"val": key, "comment": ""}}, which
// in a map is the first of a pair. A stranger's element may have none.
func elementComment(raw json.RawMessage, kind string) (string, error) {
	if kind == "map" {
		var pair []json.RawMessage
		if err := json.Unmarshal(raw, &pair); err != nil || len(pair) == 0 {
			return "", fmt.Errorf("element %s is no pair", raw)
		}
		raw = pair[0]
	}
	var e struct{ Elem struct{ Comment string } }
	if json.Unmarshal(raw, &e) != nil {
		return "?", nil // a bare key
	}
	return e.Elem.Comment, nil
}

func (t nftables) differences(ctx context.Context, want []ruleset) ([]string, error) {
	var listings []*process
	for _, r := range want {
		ip, _ := nftWords(r.family)
		listings = append(listings, t.start(ctx, "", "nft", "--json", "list", "table", ip, NftTable))
	}
	var out []string
	var errs []error
	for i, r := range want {
		ip, _ := nftWords(r.family)
		err := listings[i].wait()
		have := contents{}
		if err == nil {
			var l nftListing
			if err = json.Unmarshal(listings[i].stdout.Bytes(), &l); err == nil {
				have, err = l.installed()
			}
		} else if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && strings.Contains(err.Error(), "No such file or directory") {
			err = nil // no such table
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("list nftables table %s %s: %w", ip, NftTable, err))
			continue
		}
		out = append(out, compare(fmt.Sprintf("nftables table %s %s", ip, NftTable), have, wanted(nftTable(r)))...)
	}
	return out, errors.Join(errs...)
}

// compare says how have differs from want, by the hashes alone.
func compare(where string, have, want contents) []string {
	if len(have) == 0 && len(want) > 0 {
		return []string{where + " is missing"}
	}
	var out []string
	for name, hashes := range want {
		if got, ok := have[name]; !ok {
			out = append(out, fmt.Sprintf("%s: %s is missing", where, name))
		} else if !slices.Equal(got, hashes) {
			out = append(out, fmt.Sprintf("%s: %s was changed", where, name))
		}
	}
	for name := range have {
		if _, ok := want[name]; !ok {
			out = append(out, fmt.Sprintf("%s: %s should not be there", where, name))
		}
	}
	slices.Sort(out)
	return out
}

// remove deletes our tables. nft is asked first: a kernel without IPv6 tables
// could not even add one.
func (t nftables) remove(ctx context.Context) error {
	list := t.start(ctx, "", "nft", "list", "tables")
	if err := list.wait(); err != nil {
		return fmt.Errorf("list nftables tables: %w", err)
	}
	var doc strings.Builder
	for line := range strings.Lines(list.stdout.String()) {
		for _, f := range families() {
			if ip, _ := nftWords(f); strings.TrimSpace(line) == "table "+ip+" "+NftTable {
				fmt.Fprintf(&doc, "delete table %s %s\n", ip, NftTable)
			}
		}
	}
	if doc.Len() == 0 {
		return nil
	}
	return t.start(ctx, doc.String(), "nft", "-f", "-").wait()
}
