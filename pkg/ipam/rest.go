package ipam

import (
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// maxKept bounds the pods that addresses are kept for: a node whose range is wide
// enough would keep one for every pod that ever ran there.
const maxKept = 1024

// tidyEvery bounds how much lies about that nobody needs, and what that costs.
const tidyEvery = 10 * time.Minute

// rest is what is known of an address that was released.
type rest struct {
	since   time.Time // zero: it does not rest
	keptFor string    // key of a pod; empty: nobody's
}

// within reports whether the address still rests. A clock that was set back makes
// it rest for twice the cool-down at most, and one that was set on ends its rest.
func (r rest) within(coolDown time.Duration, now time.Time) bool {
	age := now.Sub(r.since)
	return !r.since.IsZero() && age < coolDown && age > -coolDown
}

// key names the interface of a pod whose addresses are kept; empty if it has no
// name to know it by.
func key(pod string, o Owner) string {
	if pod == "" || strings.ContainsAny(pod+o.IfName, "\r\n") {
		return ""
	}
	return pod + "/" + o.IfName
}

func (d Dir) restFile(a netip.Addr) string { return filepath.Join(d.state, "rest", a.String()) }

// stickyFile is a hash, for names can be longer than those of files.
func (d Dir) stickyFile(key string) string {
	h := fnv.New128a()
	h.Write([]byte(key))
	return filepath.Join(d.state, "sticky", fmt.Sprintf("%x", h.Sum(nil)))
}

func (d Dir) restOf(a netip.Addr) (rest, error) {
	name := d.restFile(a)
	st, err := os.Lstat(name)
	if isAbsent(err) {
		return rest{}, nil
	}
	if err != nil {
		return rest{}, fmt.Errorf("look up rest of %s: %w", a, err)
	}
	r := rest{since: st.ModTime()}
	if st.Size() == 0 {
		return r, nil
	}
	b, err := os.ReadFile(name)
	if err != nil {
		return rest{}, fmt.Errorf("read rest of %s: %w", a, err)
	}
	r.keptFor, _ = parseSticky(b)
	return r, nil
}

// kept returns the addresses of the pod, which has ended.
func (d Dir) kept(key string) []netip.Addr {
	b, err := os.ReadFile(d.stickyFile(key))
	if err != nil {
		return nil // what cannot be read is not kept
	}
	got, addrs := parseSticky(b)
	if got != key {
		return nil // another's with the same hash
	}
	return addrs
}

// isKept reports whether a is kept for the pod that r names: both files must say
// so, for either may be left from a process that was killed.
func (d Dir) isKept(a netip.Addr, r rest) bool {
	return r.keptFor != "" && slices.Contains(d.kept(r.keptFor), a)
}

// putToRest notes that addrs of o are being released.
func (d Dir) putToRest(addrs []netip.Addr, o Owner, opts ReleaseOptions) error {
	var errs error
	var note []byte
	if k := key(opts.Pod, o); opts.Sticky && k != "" {
		note = formatSticky(k, nil)
		// A release that was killed half-way has noted the others.
		const most = 16
		all := slices.Clone(addrs)
		for _, a := range d.kept(k) {
			if !slices.Contains(all, a) && len(all) < most {
				all = append(all, a)
			}
		}
		errs = write(d.stickyFile(k), formatSticky(k, all))
	}
	for _, a := range addrs {
		errs = errors.Join(errs, write(d.restFile(a), note))
	}
	return errs
}

// endRest forgets that a, which is in use now, rested.
func (d Dir) endRest(a netip.Addr, r rest) error {
	if r.since.IsZero() {
		return nil
	}
	if addrs := d.kept(r.keptFor); r.keptFor != "" && slices.Contains(addrs, a) {
		addrs = slices.DeleteFunc(addrs, func(b netip.Addr) bool { return b == a })
		err := d.forget(r.keptFor)
		if len(addrs) > 0 {
			err = write(d.stickyFile(r.keptFor), formatSticky(r.keptFor, addrs))
		}
		if err != nil {
			return err
		}
	}
	return removeFile(d.restFile(a))
}

func (d Dir) forget(key string) error { return removeFile(d.stickyFile(key)) }

// tidyIfDue costs a look at one file as a rule.
func (d Dir) tidyIfDue(coolDown time.Duration) error {
	name := filepath.Join(d.state, "tidied")
	st, err := os.Lstat(name)
	if err == nil && (rest{since: st.ModTime()}).within(max(coolDown, tidyEvery), time.Now()) {
		return nil
	}
	return errors.Join(d.tidy(coolDown), write(name, nil))
}

// tidy removes the notes that mean nothing any more: of addresses that have rested
// and are kept for nobody, and of the pods that ended first if there are many.
func (d Dir) tidy(coolDown time.Duration) error {
	errs := d.limitSticky()
	addrs, err := names(filepath.Join(d.state, "rest"))
	errs = errors.Join(errs, err)
	now := time.Now()
	for a := range addrs {
		r, err := d.restOf(a)
		if err == nil && !r.since.IsZero() && !r.within(coolDown, now) && !d.isKept(a, r) {
			err = removeFile(d.restFile(a))
		}
		errs = errors.Join(errs, err)
	}
	return errs
}

func (d Dir) limitSticky() error {
	entries, err := os.ReadDir(filepath.Join(d.state, "sticky"))
	if isAbsent(err) || err == nil && len(entries) <= maxKept {
		return nil
	}
	var files []fs.FileInfo
	for _, e := range entries {
		if st, err := e.Info(); err == nil && st.Mode().IsRegular() {
			files = append(files, st)
		}
	}
	slices.SortFunc(files, func(a, b fs.FileInfo) int { return a.ModTime().Compare(b.ModTime()) })
	for _, st := range files[:max(0, len(files)-maxKept)] {
		err = errors.Join(err, removeFile(filepath.Join(d.state, "sticky", st.Name())))
	}
	return err
}

// write makes the directory when it turns out to be missing.
func write(name string, b []byte) error {
	err := os.WriteFile(name, b, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		if err = os.MkdirAll(filepath.Dir(name), 0o755); err == nil {
			err = os.WriteFile(name, b, 0o600)
		}
	}
	if err != nil {
		return fmt.Errorf("note rest of addresses: %w", err)
	}
	return nil
}

func removeFile(name string) error {
	if err := os.Remove(name); err != nil && !isAbsent(err) {
		return fmt.Errorf("forget rest of addresses: %w", err)
	}
	return nil
}

// formatSticky writes the pod's key and its addresses, a line each.
func formatSticky(key string, addrs []netip.Addr) []byte {
	lines := []byte(key + "\n")
	for _, a := range addrs {
		lines = append(a.AppendTo(lines), '\n')
	}
	return lines
}

// parseSticky reads what formatSticky wrote. A line without its end was cut short
// and does not count.
func parseSticky(b []byte) (key string, addrs []netip.Addr) {
	lines := strings.Split(string(b), "\n")
	lines = lines[:len(lines)-1]
	for i, line := range lines {
		if i == 0 {
			key = line
		} else if a, ok := parseName(line); ok {
			addrs = append(addrs, a)
		}
	}
	return key, addrs
}
