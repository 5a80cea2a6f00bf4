package overlay

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"strings"
)

// Chain names and the comments that mark what is ours in the firewall.
const (
	PostroutingChain = "TWILL-POSTRTG"
	ForwardChain     = "TWILL-FWD"
	// CommentPrefix and a RuleHash make the comment of each of our rules.
	CommentPrefix = "twill:"
	// JumpComment is the comment of the jump from a foreign chain to ours.
	JumpComment = "twill:jump"
)

// NftTable is the name of our nftables table, one per family.
const NftTable = "twill"

// kubeProxyMark is set by kube-proxy on packets that it masquerades itself.
const kubeProxyMark = "0x4000/0x4000"

// RuleHash names one rule by its text.
func RuleHash(rule string) string {
	sum := sha256.Sum256([]byte(rule))
	return hex.EncodeToString(sum[:6])
}

// ChainHash names the contents of a chain by the hashes of its rules, in order.
func ChainHash(ruleHashes []string) string {
	return RuleHash(strings.Join(ruleHashes, " "))
}

// rule is a firewall rule in no tool's words: what a packet must be, and what
// then happens to it.
type rule struct {
	mark           string // value/mask
	src, dst       netip.Prefix
	notSrc, notDst netip.Prefix
	verdict        verdict
	randomFully    bool
}

type verdict string

const (
	accept     verdict = "accept"
	leave      verdict = "return"
	masquerade verdict = "masquerade"
)

// chains returns the masquerade and forward chains of one family: what flannel
// installs, rule by rule in the same order.
func chains(tool Tool, f Family, cluster, pods netip.Prefix, o Options) []Chain {
	multicast := netip.MustParsePrefix("224.0.0.0/4")
	if f == IPv6 {
		multicast = netip.MustParsePrefix("ff00::/8")
	}
	var out []Chain
	if o.IPMasq {
		out = append(out, chain(tool, f, "nat", PostroutingChain, "POSTROUTING", []rule{
			{mark: kubeProxyMark, verdict: leave},
			{src: pods, dst: cluster, verdict: leave},
			{src: cluster, dst: pods, verdict: leave},
			{notSrc: cluster, dst: pods, verdict: leave},
			{src: cluster, notDst: multicast, verdict: masquerade, randomFully: o.RandomFully},
			{notSrc: cluster, dst: cluster, verdict: masquerade, randomFully: o.RandomFully},
		}))
	}
	if o.ForwardRules {
		out = append(out, chain(tool, f, "filter", ForwardChain, "FORWARD", []rule{
			{src: cluster, verdict: accept},
			{dst: cluster, verdict: accept},
		}))
	}
	return out
}

func chain(tool Tool, f Family, table, name, hook string, rules []rule) Chain {
	c := Chain{Tool: tool, Family: f, Table: table, Name: name, Hook: hook}
	words := rule.iptables
	if tool == Nftables {
		c.Table = NftTable
		words = func(r rule) string { return r.nft(f) }
	}
	var hashes []string
	for _, r := range rules {
		text := words(r)
		c.Rules = append(c.Rules, text)
		hashes = append(hashes, RuleHash(text))
	}
	c.Hash = ChainHash(hashes)
	return c
}

// iptables prints r in the words of iptables(8), without chain and comment.
func (r rule) iptables() string {
	var w []string
	if r.mark != "" {
		w = append(w, "-m mark --mark", r.mark)
	}
	for _, m := range []struct {
		words string
		p     netip.Prefix
	}{{"-s", r.src}, {"! -s", r.notSrc}, {"-d", r.dst}, {"! -d", r.notDst}} {
		if m.p.IsValid() {
			w = append(w, m.words, m.p.String())
		}
	}
	w = append(w, "-j", strings.ToUpper(string(r.verdict)))
	if r.randomFully {
		w = append(w, "--random-fully")
	}
	return strings.Join(w, " ")
}

// nft prints r in the words of nft(8), without the comment.
func (r rule) nft(f Family) string {
	ip := "ip"
	if f == IPv6 {
		ip = "ip6"
	}
	var w []string
	if value, mask, ok := strings.Cut(r.mark, "/"); ok {
		w = append(w, fmt.Sprintf("meta mark & %s == %s", mask, value))
	}
	for _, m := range []struct {
		words string
		p     netip.Prefix
	}{{"saddr", r.src}, {"saddr !=", r.notSrc}, {"daddr", r.dst}, {"daddr !=", r.notDst}} {
		if m.p.IsValid() {
			w = append(w, ip, m.words, m.p.String())
		}
	}
	w = append(w, string(r.verdict))
	if r.randomFully {
		w = append(w, "fully-random")
	}
	return strings.Join(w, " ")
}
