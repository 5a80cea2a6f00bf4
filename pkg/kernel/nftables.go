package kernel

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"slices"

	"sigs.k8s.io/knftables"

	"github.com/twill-net/twill/pkg/overlay"
)

// nftables reads and writes our own tables, one per family, through nft(8).
type nftables struct {
	path   string
	writer knftables.Interface
}

func newNftables() (*nftables, error) {
	path, err := exec.LookPath("nft")
	if err != nil {
		return nil, fmt.Errorf("find nft: %w: install the nftables package and restart", err)
	}
	writer, err := knftables.New("", "")
	if err != nil {
		return nil, fmt.Errorf("use %s: %w", path, err)
	}
	return &nftables{path: path, writer: writer}, nil
}

// flannelTables are the tables that flannel makes with EnableNFTables.
func flannelTables() map[overlay.Family]string {
	return map[overlay.Family]string{overlay.IPv4: "flannel-ipv4", overlay.IPv6: "flannel-ipv6"}
}

func nftFamily(f overlay.Family) knftables.Family {
	if f == overlay.IPv6 {
		return knftables.IPv6Family
	}
	return knftables.IPv4Family
}

// nftHook is how a base chain hangs in the packets' path.
type nftHook struct {
	Type, Hook, Policy string
	Prio               int
}

// nftHooks gives the hook for the foreign chain whose place it takes.
func nftHooks() map[string]nftHook {
	return map[string]nftHook{
		"POSTROUTING": {Type: "nat", Hook: "postrouting", Prio: 100, Policy: "accept"},
		"FORWARD":     {Type: "filter", Hook: "forward", Prio: 0, Policy: "accept"},
	}
}

// nftListing is the output of nft --json list.
type nftListing struct {
	Nftables []struct {
		Table *struct{ Family, Name string }
		Chain *struct {
			nftHook
			Name string
		}
		Rule *struct{ Chain, Comment string }
	}
}

func (t *nftables) list(ctx context.Context, what ...string) (nftListing, error) {
	var out nftListing
	cmd := exec.CommandContext(ctx, t.path, append([]string{"--json", "list"}, what...)...)
	text, err := cmd.Output()
	if err != nil {
		if ee := (*exec.ExitError)(nil); errors.As(err, &ee) {
			err = fmt.Errorf("%w: %s", err, ee.Stderr)
		}
		return out, fmt.Errorf("run %s: %w", cmd, err)
	}
	if err := json.Unmarshal(text, &out); err != nil {
		return out, fmt.Errorf("read output of %s: %w", cmd, err)
	}
	return out, nil
}

// hasTable reports whether the listing of all tables has one.
func (l nftListing) hasTable(f overlay.Family, name string) bool {
	for _, object := range l.Nftables {
		if t := object.Table; t != nil && t.Family == string(nftFamily(f)) && t.Name == name {
			return true
		}
	}
	return false
}

func (t *nftables) observe(ctx context.Context) ([]overlay.Chain, error) {
	tables, err := t.list(ctx, "tables")
	if err != nil {
		return nil, err
	}
	var out []overlay.Chain
	for family, flannel := range flannelTables() {
		if tables.hasTable(family, flannel) {
			out = append(out, overlay.Chain{Tool: overlay.Nftables, Family: family, Table: flannel, Hash: flannelHash})
		}
		if !tables.hasTable(family, overlay.NftTable) {
			continue
		}
		chains, err := t.chains(ctx, family)
		if err != nil {
			return nil, err
		}
		out = append(out, chains...)
	}
	return out, nil
}

// chains returns all chains of our table, which is ours as a whole.
func (t *nftables) chains(ctx context.Context, family overlay.Family) ([]overlay.Chain, error) {
	listing, err := t.list(ctx, "table", string(nftFamily(family)), overlay.NftTable)
	if err != nil {
		return nil, err
	}
	hashes := map[string][]string{}
	for _, object := range listing.Nftables {
		if r := object.Rule; r != nil {
			hashes[r.Chain] = append(hashes[r.Chain], ruleHash(r.Comment))
		}
	}
	var out []overlay.Chain
	for _, object := range listing.Nftables {
		if object.Chain == nil {
			continue
		}
		c := overlay.Chain{Tool: overlay.Nftables, Family: family, Table: overlay.NftTable, Name: object.Chain.Name}
		for name, hook := range nftHooks() {
			if object.Chain.nftHook == hook {
				c.Hook, c.Hash = name, overlay.ChainHash(hashes[c.Name])
			}
		}
		out = append(out, c)
	}
	return out, nil
}

func (t *nftables) write(ctx context.Context, tx transaction) error {
	tables, err := t.list(ctx, "tables")
	if err != nil {
		return err
	}
	exists := tables.hasTable(tx.family, tx.table)
	table := &knftables.Table{Family: nftFamily(tx.family), Name: tx.table}
	batch := t.writer.NewTransaction()
	if tx.table != overlay.NftTable { // flannel's: no op but its deletion
		if !exists {
			return nil
		}
		batch.Delete(table)
		return t.writer.Run(ctx, batch)
	}
	var have []overlay.Chain
	if exists {
		if have, err = t.chains(ctx, tx.family); err != nil {
			return err
		}
	}
	batch.Add(table)
	left, err := changeChains(batch, tx, have)
	if err != nil {
		return err
	}
	if left == 0 {
		batch = t.writer.NewTransaction()
		batch.Add(table)
		batch.Delete(table)
	}
	return t.writer.Run(ctx, batch)
}

// changeChains adds the changes of tx to batch and returns how many chains the
// table then has.
func changeChains(batch *knftables.Transaction, tx transaction, have []overlay.Chain) (int, error) {
	family := nftFamily(tx.family)
	names := map[string]bool{}
	for _, c := range have {
		names[c.Name] = true
	}
	for _, op := range tx.ops {
		c := op.Object.(overlay.Chain)
		if op.Verb == overlay.Delete {
			if names[c.Name] {
				batch.Delete(&knftables.Chain{Family: family, Table: tx.table, Name: c.Name})
			}
			delete(names, c.Name)
			continue
		}
		hook, known := nftHooks()[c.Hook]
		if !known {
			return 0, fmt.Errorf("add chain %s: unknown hook %q", c.Name, c.Hook)
		}
		if names[c.Name] && !slices.ContainsFunc(have, func(h overlay.Chain) bool { return h.Name == c.Name && h.Hook == c.Hook }) {
			// A base chain's hook cannot be changed.
			batch.Delete(&knftables.Chain{Family: family, Table: tx.table, Name: c.Name})
		}
		names[c.Name] = true
		batch.Add(&knftables.Chain{
			Family:   family,
			Table:    tx.table,
			Name:     c.Name,
			Type:     new(knftables.BaseChainType(hook.Type)),
			Hook:     new(knftables.BaseChainHook(hook.Hook)),
			Priority: new(knftables.BaseChainPriority(fmt.Sprint(hook.Prio))),
			Policy:   new(knftables.BaseChainPolicy(hook.Policy)),
		})
		batch.Flush(&knftables.Chain{Family: family, Table: tx.table, Name: c.Name})
		for _, rule := range c.Rules {
			batch.Add(&knftables.Rule{
				Family:  family,
				Table:   tx.table,
				Chain:   c.Name,
				Rule:    rule,
				Comment: new(overlay.CommentPrefix + overlay.RuleHash(rule)),
			})
		}
	}
	return len(names), nil
}
