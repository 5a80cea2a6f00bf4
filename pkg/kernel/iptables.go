package kernel

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"

	goiptables "github.com/coreos/go-iptables/iptables"
	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/xtables"
)

// lockSeconds bounds the wait for the xtables lock, which every iptables command
// of every program on the node takes.
const lockSeconds = 5

// iptables reads and writes the tables of one family through one flavour of iptables
// or ip6tables.
type iptables struct {
	family  overlay.Family
	command string // iptables, ip6tables-legacy
	path    string
	restore string // path of the matching restore command
	flavour xtables.Flavour
	reader  *goiptables.IPTables
}

// place is where a chain stands and which foreign chain jumps to it.
type place struct{ table, name, hook string }

// places are the chains that observe looks for: ours and flannel's.
func places() []place {
	return []place{
		{"nat", overlay.PostroutingChain, "POSTROUTING"},
		{"nat", "FLANNEL-POSTRTG", "POSTROUTING"},
		{"filter", overlay.ForwardChain, "FORWARD"},
		{"filter", "FLANNEL-FWD", "FORWARD"},
	}
}

func newIptables(family overlay.Family, command string) (*iptables, error) {
	t := &iptables{family: family, command: command}
	protocol := goiptables.ProtocolIPv4
	if family == overlay.IPv6 {
		protocol = goiptables.ProtocolIPv6
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if errors.Is(err, unix.EAFNOSUPPORT) {
			return nil, errors.New("the kernel runs without IPv6: start it without ipv6.disable=1")
		} else if err == nil {
			unix.Close(fd)
		}
	}
	var err error
	if t.path, err = exec.LookPath(t.command); err != nil {
		return nil, fmt.Errorf("find %s: %w: install the iptables package and restart", t.command, err)
	}
	if t.restore, err = exec.LookPath(t.command + "-restore"); err != nil {
		return nil, fmt.Errorf("find %s-restore: %w: install the iptables package and restart", t.command, err)
	}
	if t.flavour, err = xtables.Of(t.path); err != nil {
		return nil, err
	}
	restoreFlavour, err := xtables.Of(t.restore)
	if err != nil {
		return nil, err
	}
	if restoreFlavour != t.flavour {
		return nil, fmt.Errorf("use %s: it is of flavour %s, but %s is of flavour %s: make them match (update-alternatives) and restart",
			t.path, t.flavour, t.restore, restoreFlavour)
	}
	t.reader, err = goiptables.New(goiptables.IPFamily(protocol), goiptables.Path(t.path), goiptables.Timeout(lockSeconds))
	if err != nil {
		return nil, fmt.Errorf("use %s: %w", t.path, err)
	}
	return t, nil
}

func (t *iptables) observe() ([]overlay.Chain, error) {
	hooks := map[[2]string][]installedRule{}
	var out []overlay.Chain
	for _, p := range places() {
		at := [2]string{p.table, p.hook}
		hook, read := hooks[at]
		if !read {
			var err error
			if hook, err = t.list(p.table, p.hook); err != nil && !unlisted(err) {
				return nil, err
			}
			hooks[at] = hook
		}
		rules, err := t.list(p.table, p.name)
		if err != nil && !unlisted(err) {
			return nil, err
		}
		garbled := exitStatus(err) == statusUnreadable
		if rules == nil && !garbled {
			continue
		}
		c := overlay.Chain{Tool: overlay.Iptables, Family: t.family, Table: p.table, Name: p.name, Hook: p.hook, Hash: flannelHash}
		if strings.HasPrefix(p.name, "TWILL-") {
			c.Hash = contents(rules)
			if jumps := jumpsTo(hook, p.name); garbled || len(jumps) != 1 || !jumps[0].isJump(p.hook, p.name) {
				c.Hash = ""
			}
		}
		out = append(out, c)
	}
	return out, nil
}

// Exit statuses of iptables -S. A chain that somebody wrote to with nft(8) in
// words that iptables does not know is unreadable: ours then has no Hash and is
// written anew; a foreign one fails the writing of this table, not the pass.
const (
	statusAbsent     = 1 // no such chain; iptables-nft says "incompatible" for that and for some it cannot read
	statusUnreadable = 3
)

// exitStatus returns the exit status in the error of a reader, 0 if there is none.
func exitStatus(err error) int {
	if ee := (*goiptables.Error)(nil); errors.As(err, &ee) {
		return ee.ExitStatus()
	}
	return 0
}

func unlisted(err error) bool {
	status := exitStatus(err)
	return status == statusAbsent || status == statusUnreadable
}

// contents is the Hash of a chain of ours as its rules' comments give it.
func contents(rules []installedRule) string {
	var hashes []string
	for _, r := range rules {
		hashes = append(hashes, ruleHash(r.comment))
	}
	return overlay.ChainHash(hashes)
}

// ruleHash reads the hash out of a rule's comment. A rule that is not ours has
// the hash "?", which spoils that of the chain.
func ruleHash(comment string) string {
	if hash, ok := strings.CutPrefix(comment, overlay.CommentPrefix); ok {
		return hash
	}
	return "?"
}

// list returns the rules of a chain, nil if there is no such chain or table.
func (t *iptables) list(table, chain string) ([]installedRule, error) {
	lines, err := t.reader.List(table, chain)
	if ee := (*goiptables.Error)(nil); errors.As(err, &ee) && ee.IsNotExist() {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("list %s %s chain %s: %w", t.command, table, chain, lockNamed(err, err.Error()))
	}
	rules := []installedRule{}
	for _, line := range lines {
		if strings.HasPrefix(line, "-A ") {
			rules = append(rules, parseRule(line))
		}
	}
	return rules, nil
}

// write makes the changes of tx in one transaction of iptables-restore, so that
// no packet sees a half-written table.
func (t *iptables) write(ctx context.Context, tx transaction) error {
	doc, err := t.document(tx)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, t.restore, "--noflush", fmt.Sprintf("--wait=%d", lockSeconds))
	cmd.Stdin = strings.NewReader(doc)
	out, err := cmd.CombinedOutput()
	if err != nil {
		text := strings.TrimSpace(string(out))
		return lockNamed(fmt.Errorf("run %s: %w: %s", cmd, err, text), text)
	}
	return nil
}

// lockNamed says of an iptables command that gave up waiting what it waited for.
func lockNamed(err error, output string) error {
	if strings.Contains(output, "xtables lock") {
		return fmt.Errorf("another program has held the xtables lock for %d s (fuser /run/xtables.lock names it): %w", lockSeconds, err)
	}
	return err
}

// document prints tx in the format of iptables-restore. A line ":NAME -" makes
// the chain or empties it, so that deleting an absent chain succeeds.
func (t *iptables) document(tx transaction) (string, error) {
	var declare, fill, detach, remove strings.Builder
	hooks := map[string][]installedRule{}
	for _, op := range tx.ops {
		c := op.Object.(overlay.Chain)
		if _, read := hooks[c.Hook]; !read {
			rules, err := t.list(tx.table, c.Hook)
			if err != nil {
				return "", err
			}
			hooks[c.Hook] = rules
		}
		jumps := jumpsTo(hooks[c.Hook], c.Name)
		fmt.Fprintf(&declare, ":%s - [0:0]\n", c.Name)
		if op.Verb != overlay.Delete {
			for _, rule := range c.Rules {
				fmt.Fprintf(&fill, "-A %s -m comment --comment %s%s %s\n", c.Name, overlay.CommentPrefix, overlay.RuleHash(rule), rule)
			}
			if len(jumps) == 1 && jumps[0].isJump(c.Hook, c.Name) {
				continue
			}
		}
		for _, jump := range jumps {
			fmt.Fprintf(&detach, "-D %s\n", joinWords(jump.words[1:]))
		}
		if op.Verb == overlay.Delete {
			fmt.Fprintf(&remove, "-X %s\n", c.Name)
		} else {
			fmt.Fprintf(&detach, "-A %s\n", joinWords(jumpWords(c.Hook, c.Name)[1:]))
		}
	}
	return "*" + tx.table + "\n" + declare.String() + fill.String() + detach.String() + remove.String() + "COMMIT\n", nil
}

// installedRule is a line of iptables -S.
type installedRule struct {
	words   []string // "-A", the chain, and so on, without counters
	comment string
	target  string // of -j or -g
}

// jumpWords is the rule that sends the packets of a foreign chain to ours. It is
// appended: kube-proxy's and a network policy's rules come first.
func jumpWords(hook, name string) []string {
	return []string{"-A", hook, "-m", "comment", "--comment", overlay.JumpComment, "-j", name}
}

func (r installedRule) isJump(hook, name string) bool {
	return slices.Equal(r.words, jumpWords(hook, name))
}

// jumpsTo returns the rules that lead to a chain, whoever made them: a chain
// cannot be deleted while one is left.
func jumpsTo(rules []installedRule, name string) []installedRule {
	var out []installedRule
	for _, r := range rules {
		if r.target == name {
			out = append(out, r)
		}
	}
	return out
}

// parseRule reads a line of iptables -S. What it cannot read has no words, thus
// is nobody's jump and carries no hash.
func parseRule(line string) installedRule {
	words, ok := splitWords(line)
	if !ok {
		return installedRule{}
	}
	if n := len(words); n >= 3 && words[n-3] == "-c" {
		words = words[:n-3] // go-iptables puts the counters that some versions print there
	}
	r := installedRule{words: words}
	for i := 2; i+1 < len(words); i++ {
		switch words[i] {
		case "--comment":
			r.comment = words[i+1]
			i++
		case "-j", "-g":
			r.target = words[i+1]
			i++
		}
	}
	return r
}

// splitWords splits a line as iptables-restore does: at blanks, except between
// double quotes, where a backslash takes the next character's meaning. It
// reports false for an open quote.
func splitWords(line string) ([]string, bool) {
	var words []string
	var word strings.Builder
	inWord, quoted, escaped := false, false, false
	for _, c := range []byte(line) {
		switch {
		case escaped:
			word.WriteByte(c)
			escaped = false
		case quoted && c == '\\':
			escaped = true
		case c == '"':
			quoted, inWord = !quoted, true
		case !quoted && (c == ' ' || c == '\t'):
			if inWord {
				words = append(words, word.String())
				word.Reset()
				inWord = false
			}
		default:
			word.WriteByte(c)
			inWord = true
		}
	}
	if inWord {
		words = append(words, word.String())
	}
	return words, !quoted
}

// joinWords is the reverse of splitWords.
func joinWords(words []string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		if w == "" || strings.ContainsAny(w, " \t\"\\'") {
			w = `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(w) + `"`
		}
		quoted[i] = w
	}
	return strings.Join(quoted, " ")
}
