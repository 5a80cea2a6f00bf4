// Package ipam hands out the addresses of one node's pods. A reservation is a
// file named after its address, in host-local's layout, so that a node moves from
// flannel to Twill and back while its pods run:
//
//	<data dir>/<network>/10.5.1.7            "<container id>\r\n<interface>"
//	<data dir>/<network>/last_reserved_ip.0  where the round robin stands (0: first range set)
//	<data dir>/<network>/lock                flock(2) held by every writer
package ipam

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// Owner is whom an address is reserved for: one interface of one container.
type Owner struct {
	ContainerID string
	IfName      string // empty in the files of host-local before 0.8
}

func (o Owner) String() string { return o.ContainerID + "/" + o.IfName }

// Holds reports whether a reservation made for o is one of p.
func (o Owner) Holds(p Owner) bool {
	return o.ContainerID == p.ContainerID && (o.IfName == p.IfName || o.IfName == "")
}

// Dir is the reservations of one network.
type Dir struct {
	path string
}

// NewDir returns the reservations of the network below dataDir. It touches
// nothing on disk.
func NewDir(dataDir, network string) Dir {
	return Dir{path: filepath.Join(dataDir, network)}
}

// ExhaustedError says that every address of a subnet is reserved.
type ExhaustedError struct {
	Subnet netip.Prefix
	InUse  int
	Dir    string // where the reservations are
}

func (e *ExhaustedError) Error() string {
	return fmt.Sprintf("no free address in %s: %d in use, reserved by the files in %s", e.Subnet, e.InUse, e.Dir)
}

// Allocate reserves one address of each subnet, or none at all. Subnet i is
// host-local's range set i. Each address comes with the length of its subnet.
// A subnet without a free address is an *ExhaustedError.
func (d Dir) Allocate(o Owner, subnets []netip.Prefix) ([]netip.Prefix, error) {
	if err := os.MkdirAll(d.path, 0o755); err != nil {
		return nil, fmt.Errorf("create reservation directory: %w", err)
	}
	unlock, err := d.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()

	var got []netip.Prefix
	for i, subnet := range subnets {
		a, err := d.allocate(o, subnet, i)
		if err != nil {
			for _, p := range got {
				err = errors.Join(err, d.remove(p.Addr()))
			}
			return nil, err
		}
		got = append(got, netip.PrefixFrom(a, subnet.Bits()))
	}
	return got, nil
}

// allocate takes the first free address after the one handed out last, so that
// an address rests as long as possible before another pod gets it. The number of
// pods costs nothing: only neighbours that are taken are looked at.
func (d Dir) allocate(o Owner, subnet netip.Prefix, set int) (netip.Addr, error) {
	r, err := rangeOf(subnet)
	if err != nil {
		return netip.Addr{}, err
	}
	taken := 0
	for a := range r.after(d.last(set)) {
		ok, err := d.reserve(a, o)
		if err != nil {
			return netip.Addr{}, err
		}
		if !ok {
			taken++
			continue
		}
		if err := os.WriteFile(d.lastFile(set), []byte(a.String()), 0o600); err != nil {
			return netip.Addr{}, errors.Join(fmt.Errorf("write round robin: %w", err), d.remove(a))
		}
		return a, nil
	}
	return netip.Addr{}, &ExhaustedError{Subnet: subnet, InUse: taken, Dir: d.path}
}

// reserve writes the reservation of a, and reports false if somebody else has it.
// The caller holds the lock, as does every writer, host-local's too: an empty file
// is of a writer that was killed, and no reservation.
func (d Dir) reserve(a netip.Addr, o Owner) (bool, error) {
	name := d.Path(a)
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		if _, err := d.Owner(a); !errors.Is(err, fs.ErrNotExist) {
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

// Free returns nil if subnet has a free address, else an *ExhaustedError.
func (d Dir) Free(subnet netip.Prefix, set int) error {
	r, err := rangeOf(subnet)
	if err != nil {
		return err
	}
	taken := 0
	for a := range r.after(d.last(set)) {
		_, err := os.Lstat(d.Path(a))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("look up %s: %w", a, err)
		}
		taken++
	}
	return &ExhaustedError{Subnet: subnet, InUse: taken, Dir: d.path}
}

// Release frees the addresses of o. If known says where they are, and they are
// there, nothing else is read; else all reservations are. Releasing what is not
// reserved succeeds.
func (d Dir) Release(o Owner, known []netip.Addr) error {
	unlock, err := d.lock()
	if isAbsent(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unlock()

	missed := len(known) == 0
	for _, a := range known {
		got, err := d.Owner(a)
		if err != nil || !got.Holds(o) {
			missed = true
			continue
		}
		if err := d.remove(a); err != nil {
			return err
		}
	}
	if !missed {
		return nil
	}
	_, err = d.sweep(func(got Owner) bool { return !got.Holds(o) })
	return err
}

// isAbsent reports that there is no directory, and so no reservation.
func isAbsent(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR)
}

// Sweep frees the addresses whose owners are not kept, and returns them.
func (d Dir) Sweep(keep func(Owner) bool) ([]netip.Addr, error) {
	unlock, err := d.lock()
	if isAbsent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer unlock()
	return d.sweep(keep)
}

func (d Dir) sweep(keep func(Owner) bool) ([]netip.Addr, error) {
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return nil, fmt.Errorf("list reservations: %w", err)
	}
	var freed []netip.Addr
	var errs error
	for _, e := range entries {
		a, err := netip.ParseAddr(e.Name())
		if err != nil || e.IsDir() {
			continue // lock, last_reserved_ip.N, the operator's notes
		}
		o, err := d.Owner(a)
		if err == nil && keep(o) {
			continue
		}
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			err = d.remove(a)
		}
		if err != nil {
			errs = errors.Join(errs, err)
			continue
		}
		freed = append(freed, a)
	}
	return freed, errs
}

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

func (d Dir) remove(a netip.Addr) error {
	if err := os.Remove(d.Path(a)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("release %s: %w", a, err)
	}
	return nil
}

// Path returns the file that reserves a.
func (d Dir) Path(a netip.Addr) string { return filepath.Join(d.path, a.String()) }

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
	a, err := netip.ParseAddr(strings.TrimSpace(string(b)))
	if err != nil {
		return netip.Addr{}
	}
	return a
}

// parse reads the content of a reservation. It reports false for a file without
// content.
func parse(b []byte) (Owner, bool) {
	id, ifname, _ := strings.Cut(strings.TrimSpace(string(b)), "\r\n")
	id = strings.TrimSpace(id)
	return Owner{ContainerID: id, IfName: strings.TrimSpace(ifname)}, id != ""
}

func format(o Owner) []byte {
	return []byte(strings.TrimSpace(o.ContainerID) + "\r\n" + o.IfName)
}
