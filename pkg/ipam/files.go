package ipam

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
)

// Path returns the file that reserves a.
func (d Dir) Path(a netip.Addr) string { return filepath.Join(d.path, a.String()) }

// Owner returns whom a is reserved for. An error that is fs.ErrNotExist means
// nobody; the file of a killed writer counts as nobody's.
func (d Dir) Owner(a netip.Addr) (Owner, error) {
	b, err := os.ReadFile(d.Path(a))
	if err != nil {
		return Owner{}, fmt.Errorf("read reservation: %w", err)
	}
	o, ok := parse(b)
	if !ok {
		return Owner{}, fmt.Errorf("read reservation %s: empty: %w", d.Path(a), fs.ErrNotExist)
	}
	return o, nil
}

// reserve writes the reservation of a, and reports false if somebody else has it.
// The caller holds the lock, as does every writer, host-local's too: an empty file
// is of a writer that was killed, and no reservation.
func (d Dir) reserve(a netip.Addr, o Owner) (bool, error) {
	name := d.Path(a)
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		if free, err := d.isFree(a); !free || err != nil {
			return false, err
		}
		f, err = os.OpenFile(name, os.O_WRONLY|os.O_TRUNC, 0o600)
	}
	if err != nil {
		return false, fmt.Errorf("reserve %s: %w", a, err)
	}
	_, err = f.Write(format(o))
	if err := errors.Join(err, f.Close()); err != nil {
		return false, errors.Join(fmt.Errorf("reserve %s: %w", a, err), d.remove(a))
	}
	return true, nil
}

// isFree reports whether nobody has a. Only a file too short to be sure is read.
func (d Dir) isFree(a netip.Addr) (bool, error) {
	st, err := os.Lstat(d.Path(a))
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("look up %s: %w", a, err)
	}
	const sure = 4 // container, \r, \n, interface
	if st.Size() >= sure || !st.Mode().IsRegular() {
		return false, nil
	}
	_, err = d.Owner(a)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	return false, err
}

func (d Dir) remove(a netip.Addr) error {
	if err := os.Remove(d.Path(a)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("release %s: %w", a, err)
	}
	return nil
}

func (d Dir) removeAll(addrs []netip.Addr) error {
	var errs error
	for _, a := range addrs {
		errs = errors.Join(errs, d.remove(a))
	}
	return errs
}

// each calls f for every reservation, with the zero Owner for an empty file.
func (d Dir) each(f func(netip.Addr, Owner)) error {
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return fmt.Errorf("list reservations: %w", err)
	}
	var errs error
	for _, e := range entries {
		a, ok := parseName(e.Name())
		if !ok || e.IsDir() {
			continue // lock, last_reserved_ip.N, the operator's notes
		}
		b, err := os.ReadFile(d.Path(a))
		if errors.Is(err, fs.ErrNotExist) {
			continue // released meanwhile: not every caller holds the lock
		}
		if err != nil {
			errs = errors.Join(errs, fmt.Errorf("read reservation: %w", err))
			continue
		}
		o, _ := parse(b)
		f(a, o)
	}
	return errs
}

// names returns the addresses that dir has files for, without reading them. A
// directory that is not there has none.
func names(dir string) (map[netip.Addr]bool, error) {
	f, err := os.Open(dir)
	if isAbsent(err) {
		return map[netip.Addr]bool{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	defer f.Close()
	files, err := f.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	out := make(map[netip.Addr]bool, len(files))
	for _, name := range files {
		if a, ok := parseName(name); ok {
			out[a] = true
		}
	}
	return out, nil
}

// parseName reads the name of an address's file. There is one per address: no
// other way to write it counts.
func parseName(name string) (netip.Addr, bool) {
	a, err := netip.ParseAddr(name)
	return a, err == nil && a.Zone() == "" && a.String() == name
}

func (d Dir) lastFile(set int) string {
	return filepath.Join(d.path, fmt.Sprintf("last_reserved_ip.%d", set))
}

// last returns the address handed out last, or the zero Addr. A file that cannot
// be read or makes no sense only restarts the round robin.
func (d Dir) last(set int) netip.Addr {
	b, err := os.ReadFile(d.lastFile(set))
	if err != nil {
		return netip.Addr{}
	}
	return parseLast(b)
}

// setLast overwrites and then cuts off: ext4 writes out a file that was emptied
// first (auto_da_alloc), which takes longer than all the rest of an ADD. A process
// killed in between leaves a longer address, and the round robin stands elsewhere.
func (d Dir) setLast(set int, a netip.Addr) error {
	f, err := os.OpenFile(d.lastFile(set), os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	n, err := f.WriteString(a.String())
	if err == nil {
		err = f.Truncate(int64(n))
	}
	return errors.Join(err, f.Close())
}

func parseLast(b []byte) netip.Addr {
	a, err := netip.ParseAddr(strings.TrimSpace(string(b)))
	if err != nil {
		return netip.Addr{}
	}
	return a.Unmap()
}

// parse reads the content of a reservation. It reports false for a file without
// content.
func parse(b []byte) (Owner, bool) {
	id, ifname, _ := strings.Cut(strings.TrimSpace(string(b)), "\r\n")
	id = strings.TrimSpace(id)
	if id == "" {
		return Owner{}, false
	}
	return Owner{ContainerID: id, IfName: strings.TrimSpace(ifname)}, true
}

func format(o Owner) []byte {
	return []byte(strings.TrimSpace(o.ContainerID) + "\r\n" + o.IfName)
}
