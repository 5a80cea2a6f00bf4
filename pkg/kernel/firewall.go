package kernel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"sync"

	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/xtables"
)

// flannelHash is the Hash of what flannel left behind. No wanted chain has it,
// so that flannel's leftovers are always deleted.
const flannelHash = "flannel"

// errReplacementMissing is why an old chain stays: without the new one, pods
// would lose their masquerade or be dropped by a FORWARD policy.
var errReplacementMissing = errors.New("kept, because the chains of this family that replace it could not be installed")

// firewall reads and writes the chains of one network namespace: the one of the
// thread that called newFirewall. A tool that the node lacks is no error until a
// chain in it is wanted.
type firewall struct {
	log      *slog.Logger
	iptables map[overlay.Family]*iptables
	nft      *nftables
	missing  map[toolKey]error // why a tool is not in the two fields above
	events   *eventSocket

	mu       sync.Mutex // guards the fields below, iptables, and missing
	flavours *flavours
	legacy   bool // some family's iptables is of that flavour
	printer  *fingerprinter
	cache    []overlay.Chain
	cachedAt prints
	cached   bool
	problems []overlay.Problem
	// unreplaced are the families for which something new could not be
	// installed since the last observe.
	unreplaced map[overlay.Family]bool
}

type toolKey struct {
	tool   overlay.Tool
	family overlay.Family
}

func newFirewall(opts Options) (*firewall, error) {
	f := &firewall{
		log:      opts.Log,
		iptables: map[overlay.Family]*iptables{},
		missing:  map[toolKey]error{},
		flavours: newFlavours(),

		unreplaced: map[overlay.Family]bool{},
	}
	nft, err := newNftables()
	if err != nil {
		f.missing[toolKey{tool: overlay.Nftables}] = err
		f.log.Info("nftables not used", "reason", err)
	}
	f.nft = nft
	if err := f.openIptables(); err != nil {
		return nil, fmt.Errorf("open firewall: %w", err)
	}
	if f.events, err = newEventSocket(); err != nil {
		f.printer.close()
		return nil, fmt.Errorf("open firewall: %w", err)
	}
	return f, nil
}

// openIptables takes the commands of the flavour that is used.
func (f *firewall) openIptables() error {
	legacy, unused := map[overlay.Family]bool{}, map[overlay.Family]bool{}
	for _, family := range families() {
		delete(f.iptables, family)
		command, err := f.flavours.command(family)
		var tool *iptables
		if err == nil {
			tool, err = newIptables(family, command)
		}
		if err != nil {
			f.missing[toolKey{overlay.Iptables, family}] = err
			f.log.Info("iptables not used", "family", family, "reason", err)
			continue
		}
		f.iptables[family] = tool
		legacy[family] = tool.flavour == xtables.Legacy
		unused[family] = !legacy[family] && f.flavours.both
		f.log.Info("iptables found", "family", family, "path", tool.path, "flavour", tool.flavour)
	}
	f.legacy = legacy[overlay.IPv4] || legacy[overlay.IPv6]
	printer, err := newFingerprinter(legacy, unused)
	if err != nil {
		return err
	}
	if f.printer != nil {
		err = f.printer.close()
	}
	f.printer = printer
	return err
}

func (f *firewall) close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return errors.Join(f.printer.close(), f.events.close())
}

// HasRandomFully reports whether masquerading can choose ports at random, which
// avoids the lost packets of two connections that pick one port at a time.
func (k *Kernel) HasRandomFully(family overlay.Family, tool overlay.Tool) bool {
	return k.firewall.hasRandomFully(family, tool)
}

func (f *firewall) hasRandomFully(family overlay.Family, tool overlay.Tool) bool {
	if tool == overlay.Nftables {
		return f.nft != nil // older kernels than nft 1.0.1 runs on know fully-random
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	ipt := f.iptables[family]
	return ipt != nil && ipt.reader.HasRandomFully()
}

// FirewallTool names the flavour of iptables that is used, if tool is iptables.
func (k *Kernel) FirewallTool(tool overlay.Tool) overlay.Tool {
	f := k.firewall
	f.mu.Lock()
	defer f.mu.Unlock()
	if tool != overlay.Iptables {
		return tool
	}
	return f.flavours.used.Tool()
}

// Problems are what the last Observe found in the firewall that will make trouble.
func (k *Kernel) Problems() []overlay.Problem {
	k.firewall.mu.Lock()
	defer k.firewall.mu.Unlock()
	return k.firewall.problems
}

// observe returns our chains and flannel's. As long as the kernel says that no
// rule has changed, that is the last answer again, for a few microseconds.
func (f *firewall) observe(ctx context.Context) ([]overlay.Chain, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.unreplaced = map[overlay.Family]bool{}
	now, err := f.print()
	if err != nil {
		return nil, fmt.Errorf("observe firewall: %w", err)
	}
	if f.cached && now == f.cachedAt {
		return slices.Clone(f.cache), nil
	}
	f.cached = false
	f.flavours.look()
	if f.flavours.moveToHint() {
		f.log.Info("iptables of the other flavour from now on, as Kubernetes", "flavour", f.flavours.used)
		if err = f.openIptables(); err == nil {
			now, err = f.print()
		}
		if err != nil {
			return nil, fmt.Errorf("observe firewall: %w", err)
		}
	}
	out := f.flavours.leftovers()
	f.problems = nil
	for _, family := range families() {
		ipt := f.iptables[family]
		if ipt == nil {
			continue
		}
		chains, err := ipt.observe()
		if err != nil {
			return nil, fmt.Errorf("observe firewall: %w", err)
		}
		out = append(out, chains...)
		if len(chains) > 0 && f.problems == nil { // without rules of ours it does not concern us
			f.problems = f.flavours.problem()
		}
	}
	if f.nft != nil {
		chains, err := f.nft.observe(ctx)
		if err != nil {
			return nil, fmt.Errorf("observe firewall: %w", err)
		}
		out = append(out, chains...)
	}
	// The print is older than the answer: a change during the reading shows as
	// a new print next time.
	f.cache, f.cachedAt, f.cached = out, now, true
	return slices.Clone(out), nil
}

// prints change whenever a rule does.
type prints struct {
	used   fingerprint
	unused unusedPrint
}

func (f *firewall) print() (p prints, err error) {
	if p.used, err = f.printer.read(math.MaxUint32); err == nil {
		p.unused, err = f.printer.readUnused()
	}
	return p, err
}

// apply makes one transaction of all changes to a table. A table that gets new
// contents comes before one that only loses some; if a family's new contents
// fail, its old ones stay, also in the calls that follow until the next observe.
func (f *firewall) apply(ctx context.Context, ops []overlay.Op) []Failure {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cached = false
	var failures []Failure
	for _, tx := range transactions(ops) {
		err := errReplacementMissing
		if tx.adds || !f.unreplaced[tx.family] {
			err = f.write(ctx, tx)
		}
		if err == nil {
			continue
		}
		if tx.adds {
			f.unreplaced[tx.family] = true
		}
		for _, op := range tx.ops {
			failures = append(failures, Failure{Op: op, Err: fmt.Errorf("write %s %s table %s: %w", tx.tool, tx.family, tx.table, err)})
		}
	}
	return failures
}

func (f *firewall) write(ctx context.Context, tx transaction) error {
	if tx.tool == overlay.Nftables {
		if f.nft == nil {
			return f.missing[toolKey{tool: tx.tool}]
		}
		return f.nft.write(ctx, tx)
	}
	ipt := f.iptables[tx.family]
	if tx.tool != overlay.Iptables { // leftovers
		command, err := xtables.OfTool(tx.tool).Command(tx.family)
		if err != nil {
			return err
		}
		if ipt, err = newIptables(tx.family, command); err != nil {
			return err
		}
	}
	if ipt == nil {
		return f.missing[toolKey{tx.tool, tx.family}]
	}
	return ipt.write(ctx, tx)
}

// transaction is the changes that one table undergoes at one moment.
type transaction struct {
	tool   overlay.Tool
	family overlay.Family
	table  string
	ops    []overlay.Op // their objects are Chains
	adds   bool         // has more than deletions
}

// transactions groups ops, which are about Chains, by table.
func transactions(ops []overlay.Op) []transaction {
	var out []transaction
	for _, op := range ops {
		c := op.Object.(overlay.Chain)
		i := slices.IndexFunc(out, func(t transaction) bool {
			return t.tool == c.Tool && t.family == c.Family && t.table == c.Table
		})
		if i < 0 {
			i = len(out)
			out = append(out, transaction{tool: c.Tool, family: c.Family, table: c.Table})
		}
		out[i].ops = append(out[i].ops, op)
		out[i].adds = out[i].adds || op.Verb != overlay.Delete
	}
	slices.SortStableFunc(out, func(a, b transaction) int {
		switch {
		case a.adds == b.adds:
			return 0
		case a.adds:
			return -1
		}
		return 1
	})
	return out
}
