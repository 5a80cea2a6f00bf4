package portmap

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/xtables"
)

// Dir is the directory with the entries of one node, and the firewall tool that
// their rules are written with. Its methods work in the network namespace of the
// calling thread. Any number of processes may use it at once.
type Dir struct {
	path string
	tool overlay.Tool
}

// NewDir returns the entries in path. It touches nothing on disk. The tool
// overlay.Iptables stands for the flavour that the rules are in by now; if there are
// none, for the one of the command iptables.
func NewDir(path string, tool overlay.Tool) Dir { return Dir{path, tool} }

// firewall is where rules are written.
type firewall interface {
	write(ctx context.Context, cs []change) error
	// differences says what is not as rules want it.
	differences(ctx context.Context, want []ruleset) ([]string, error)
	// remove deletes all that is ours.
	remove(ctx context.Context) error
}

// flavoured is the tool that the rules are written with. Who says iptables does not
// know the flavour: an ADD or DEL while there is no hand-off.
func (d Dir) flavoured(f *files) overlay.Tool {
	if d.tool == overlay.Iptables && f.tool != "" && f.tool != overlay.Nftables {
		return f.tool
	}
	return d.tool
}

func (f *files) firewall(tool overlay.Tool) firewall {
	if tool == overlay.Nftables {
		return nftables{tools{f.lock}}
	}
	return iptables{tools{f.lock}, xtables.OfTool(tool)}
}

// Add opens the entry's ports and returns when packets reach the pod, also those
// of flows that began before. If it fails, nothing of the entry remains. The
// entry's HostLink must exist. A port that another pod has is a *ConflictError.
func (d Dir) Add(ctx context.Context, e Entry) error {
	if e.empty() {
		return d.Remove(ctx, e.Attachment)
	}
	if err := e.Validate(); err != nil {
		return err
	}
	f, err := d.open()
	if err != nil {
		return err
	}
	defer f.close()

	others, own := split(f.entries, e.Attachment)
	if err := e.conflict(others); err != nil {
		return err
	}
	if err := f.put(e); err != nil {
		return err
	}
	gone := slices.Concat(f.dead, own)
	after := append(slices.Clone(others), e)
	u := update{before: slices.Concat(f.dead, others), after: after, touched: append(gone, e), exact: len(own) > 0}
	err = d.apply(ctx, f, u)
	if err == nil {
		err = errors.Join(forgetGone(gone), forgetStray([]Entry{e}))
	}
	if err == nil {
		return f.drop(without(f.dead, e.Attachment))
	}
	// The caller may have run out of time; that must not leave the rules.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*lockSeconds*time.Second)
	defer cancel()
	back := d.apply(ctx, f, update{after: others, touched: u.touched, exact: true})
	if back == nil {
		back = f.drop(append(gone, e))
	}
	return errors.Join(err, back)
}

// Remove closes an attachment's ports. What is not there is no error and costs no
// process.
func (d Dir) Remove(ctx context.Context, attachment string) error {
	entry := filepath.Join(d.path, attachment+entryFile)
	// Of an Add that was killed before there was an entry.
	if err := os.Remove(entry + tempFile); err != nil && !isAbsent(err) {
		return fmt.Errorf("delete what a killed writer left: %w", err)
	}
	if _, err := os.Lstat(entry); isAbsent(err) {
		return nil
	}
	f, err := d.open()
	if err != nil {
		return err
	}
	defer f.close()
	kept, own := split(f.entries, attachment)
	gone := slices.Concat(own, f.dead)
	if len(gone) == 0 {
		return nil // another process was faster
	}
	err = d.apply(ctx, f, update{before: slices.Concat(kept, gone), after: kept, touched: gone})
	if err == nil {
		err = forgetGone(gone)
	}
	if err == nil {
		err = f.drop(gone)
	}
	return err
}

// update is what becomes of the entries that have rules.
type update struct {
	before, after []Entry
	touched       []Entry // those that make the difference
	exact         bool    // what is there is not known
}

// apply writes the rules that an update changes. All are removed and written anew
// if the node's configuration now names another tool than wrote them, or if they
// follow from a file that is lost.
func (d Dir) apply(ctx context.Context, f *files, u update) error {
	tool := d.flavoured(f)
	if f.tool != "" && (f.tool != tool || f.lost) {
		if err := f.firewall(f.tool).remove(ctx); err != nil {
			return fmt.Errorf("remove the rules that %s wrote: %w", f.tool, err)
		}
		u.before, u.touched, u.exact = nil, u.after, true
	}
	if len(u.after) > 0 {
		if err := f.mark(tool); err != nil {
			return err
		}
	}
	if err := f.firewall(tool).write(ctx, changes(u.before, u.after, u.touched, u.exact)); err != nil {
		return err
	}
	if len(u.after) == 0 {
		return f.mark("")
	}
	return nil
}

// Check says how the firewall and the record differ from what e needs.
func (d Dir) Check(ctx context.Context, e Entry) ([]string, error) {
	if _, err := os.Lstat(filepath.Join(d.path, e.Attachment+entryFile)); isAbsent(err) {
		if e.empty() {
			return nil, nil
		}
		return []string{"no host port or masquerade is recorded for " + e.Attachment}, nil
	}
	f, err := d.open()
	if err != nil {
		return nil, err
	}
	defer f.close()
	_, own := split(f.entries, e.Attachment)
	if len(own) != 1 || !same(own[0], e) {
		return []string{"other host ports or masquerade are recorded for " + e.Attachment}, nil
	}
	// The rules of one that died a moment ago are there until the next change.
	return f.firewall(d.flavoured(f)).differences(ctx, wantedRules(slices.Concat(f.entries, f.dead), own))
}

// wantedRules returns the rules of all entries in the families that some touch.
func wantedRules(entries, touched []Entry) []ruleset {
	var out []ruleset
	for _, c := range changes(nil, entries, touched, true) {
		out = append(out, c.after)
	}
	return out
}

// Sync drops the entries that are not kept and those whose links are gone, and
// restores the rules if they are not what they should be. It says what it did. With
// no entry it reads a directory; with entries whose rules are there, it lists them.
func (d Dir) Sync(ctx context.Context, keep func(Entry) bool) (repaired []string, err error) {
	names, err := os.ReadDir(d.path)
	if isAbsent(err) || err == nil && (len(names) == 0 || len(names) == 1 && names[0].Name() == lockFile) {
		return nil, nil
	}
	f, err := d.open()
	if err != nil {
		return nil, err
	}
	defer f.close()
	kept, gone := []Entry{}, f.dead
	for _, e := range f.entries {
		if keep == nil || keep(e) {
			kept = append(kept, e)
		} else {
			gone = append(gone, e)
		}
	}
	for _, e := range gone {
		repaired = append(repaired, fmt.Sprintf("%s of %s: dropped, the attachment is gone", e.Attachment, e.Holder))
	}
	all := slices.Concat(kept, gone)
	var drift []string
	switch {
	case f.tool == d.flavoured(f):
		drift, err = f.firewall(f.tool).differences(ctx, wantedRules(all, all))
	case f.tool != "":
		drift = []string{fmt.Sprintf("the rules of %s are replaced by those of %s", f.tool, d.tool)}
	case len(all) > 0:
		drift = []string{"the rules were removed"}
	}
	if err != nil {
		return nil, fmt.Errorf("look at host ports: %w", err)
	}
	f.lost = f.lost || len(all) == 0
	if len(gone) == 0 && len(drift) == 0 && !f.lost {
		return nil, nil
	}
	if err := d.apply(ctx, f, update{after: kept, touched: all, exact: true}); err != nil {
		return nil, fmt.Errorf("restore host ports: %w", err)
	}
	err = forgetGone(gone)
	if len(drift) > 0 {
		err = errors.Join(err, forgetStray(kept))
	}
	return append(repaired, drift...), errors.Join(err, f.drop(gone))
}

// Cleanup removes all of our rules, with every tool, and leaves the entries:
// pods that run keep their claim, and Sync restores their rules.
func (d Dir) Cleanup(ctx context.Context) error {
	f := &files{} // what is in the firewall without a directory is removed, too
	if _, err := os.Lstat(d.path); err == nil {
		if f, err = d.open(); err != nil {
			return err
		}
		defer f.close()
	}
	var errs []error
	if installed("nft") {
		errs = append(errs, f.firewall(overlay.Nftables).remove(ctx))
	}
	named := []xtables.Flavour{xtables.Nft, xtables.Legacy}
	named = slices.DeleteFunc(named, func(v xtables.Flavour) bool { return !slices.ContainsFunc(families(), v.Named) })
	if len(named) == 0 {
		named = []xtables.Flavour{""}
	}
	for _, v := range named {
		errs = append(errs, f.firewall(v.Tool()).remove(ctx))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove host port rules: %w", err)
	}
	return f.mark("")
}

// Entries returns the entries of all pods that may run.
func (d Dir) Entries() ([]Entry, error) {
	if _, err := os.Lstat(d.path); isAbsent(err) {
		return nil, nil
	}
	f, err := d.open()
	if err != nil {
		return nil, err
	}
	defer f.close()
	return f.entries, nil
}

// split takes one attachment's entry out.
func split(entries []Entry, attachment string) (others, own []Entry) {
	for _, e := range entries {
		if e.Attachment == attachment {
			own = append(own, e)
		} else {
			others = append(others, e)
		}
	}
	return others, own
}

func without(entries []Entry, attachment string) []Entry {
	others, _ := split(entries, attachment)
	return others
}

// same compares what makes rules.
func same(a, b Entry) bool {
	a.Holder, b.Holder = "", ""
	for _, f := range families() {
		if !reflect.DeepEqual(rules([]Entry{a}, f), rules([]Entry{b}, f)) {
			return false
		}
	}
	return a.HostLink == b.HostLink
}
