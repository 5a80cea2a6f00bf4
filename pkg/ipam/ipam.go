// Package ipam hands out the addresses of one node's pods. A reservation is a
// file named after its address, in host-local's layout, so that a node moves from
// flannel to Twill and back while its pods run:
//
//	<data dir>/<network>/10.5.1.7            "<container id>\r\n<interface>"
//	<data dir>/<network>/last_reserved_ip.0  where the round robin stands (0: first range set)
//	<data dir>/<network>/lock                flock(2) held by every writer
//
// What host-local does not know is beside that, and may be deleted at any time:
//
//	<data dir>/.twill/ipam/<network>/rest/10.5.1.7  released when it was last modified; content: kept for whom
//	<data dir>/.twill/ipam/<network>/sticky/<hash>  of a pod that ended: its name, its addresses
//	<data dir>/.twill/ipam/<network>/tidied         when the two above were last tidied up
//
// A process may be killed anywhere. What it leaves is an empty file, which is no
// reservation, or reservations of its own, which Release frees. Nothing is synced
// to disk: a power cut ends the pods as well.
package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// MaxCoolDown is how long an address can rest.
const MaxCoolDown = 24 * time.Hour

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
	path  string // host-local's
	state string // Twill's own
}

// NewDir returns the reservations of the network below dataDir. It touches
// nothing on disk.
func NewDir(dataDir, network string) Dir {
	return Dir{path: filepath.Join(dataDir, network), state: filepath.Join(dataDir, ".twill", "ipam", network)}
}

// Request is what one interface of a pod needs.
type Request struct {
	Owner Owner
	// Sets: one address is taken of each. Set i is host-local's range set i.
	Sets [][]Range
	// Wanted addresses must lie in a set, one in each at most. They are given even
	// if they are excluded or at rest. The other sets choose for themselves.
	Wanted   []netip.Addr
	Pod      string        // namespace/name; empty: none
	Sticky   bool          // the pod gets the addresses again that it had, if they are free
	CoolDown time.Duration // how long an address rests after one pod before another gets it
}

// Address is one that a pod has.
type Address struct {
	Prefix  netip.Prefix // the address with the length of its subnet
	Gateway netip.Addr
}

// Reservation is one address that is in use.
type Reservation struct {
	Addr  netip.Addr
	Owner Owner
}

// Allocate reserves one address of each set, or none at all. Errors that say what
// is wrong with the request are *RangeError, *OutOfRangeError, *TakenError and
// *ExhaustedError.
func (d Dir) Allocate(req Request) ([]Address, error) {
	if id := strings.TrimSpace(req.Owner.ContainerID); id == "" || strings.ContainsAny(id+req.Owner.IfName, "\r\n") {
		return nil, fmt.Errorf("reserve for container %q, interface %q: give one line each, the container at least", req.Owner.ContainerID, req.Owner.IfName)
	}
	al, err := d.plan(req)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(d.path, 0o755); err != nil {
		return nil, fmt.Errorf("create reservation directory: %w", err)
	}
	unlock, err := d.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()

	al.claim = func(a netip.Addr) (bool, error) { return d.reserve(a, req.Owner) }
	err = al.takeAll()
	if err == nil {
		err = al.settle()
	}
	if err != nil {
		return nil, errors.Join(err, al.undo())
	}
	var out []Address
	for i, t := range al.taken {
		out = append(out, al.sets[i].address(t.addr))
	}
	return out, nil
}

// Free returns the error that Allocate would return now. It writes nothing.
func (d Dir) Free(req Request) error {
	al, err := d.plan(req)
	if err != nil {
		return err
	}
	al.claim = d.isFree
	return al.takeAll()
}

// ReleaseOptions say what becomes of released addresses. They are what the
// Request said.
type ReleaseOptions struct {
	Pod      string
	Sticky   bool
	CoolDown time.Duration
}

// Release frees the addresses of o. If known says where they are, and they are
// there, nothing else is read; else all reservations are. Releasing what is not
// reserved succeeds. An address is freed even if it cannot be written down that it
// rests; then that is the error, once.
func (d Dir) Release(o Owner, known []netip.Addr, opts ReleaseOptions) error {
	unlock, err := d.lock()
	if isAbsent(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unlock()

	addrs, err := d.held(o, known)
	if len(addrs) > 0 && (opts.Sticky || opts.CoolDown > 0) {
		err = errors.Join(err, d.putToRest(addrs, o, opts), d.tidyIfDue(opts.CoolDown))
	}
	return errors.Join(err, d.removeAll(addrs))
}

// held returns the addresses of o.
func (d Dir) held(o Owner, known []netip.Addr) ([]netip.Addr, error) {
	var addrs []netip.Addr
	for _, a := range known {
		if got, err := d.Owner(a); err == nil && got.Holds(o) {
			addrs = append(addrs, a)
		}
	}
	if len(known) > 0 && len(addrs) == len(known) {
		return addrs, nil
	}
	return d.abandoned(func(got Owner) bool { return !got.Holds(o) })
}

// Sweep frees the addresses whose owners are not kept, and returns them. If
// addresses of this network rest, these do too.
func (d Dir) Sweep(keep func(Owner) bool) ([]netip.Addr, error) {
	unlock, err := d.lock()
	if isAbsent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer unlock()

	addrs, err := d.abandoned(keep)
	if _, e := os.Lstat(filepath.Join(d.state, "rest")); !isAbsent(e) {
		err = errors.Join(err, d.putToRest(addrs, Owner{}, ReleaseOptions{}), d.tidy(MaxCoolDown))
	}
	return addrs, errors.Join(err, d.removeAll(addrs))
}

// abandoned returns the addresses whose owners are not kept, and removes the
// empty files of killed writers on its way.
func (d Dir) abandoned(keep func(Owner) bool) ([]netip.Addr, error) {
	var addrs, empty []netip.Addr
	err := d.each(func(a netip.Addr, o Owner) {
		switch {
		case o == Owner{}:
			empty = append(empty, a)
		case !keep(o):
			addrs = append(addrs, a)
		}
	})
	return addrs, errors.Join(err, d.removeAll(empty))
}

// List returns all reservations, in the order of their files' names.
func (d Dir) List() ([]Reservation, error) {
	var out []Reservation
	err := d.each(func(a netip.Addr, o Owner) {
		if o != (Owner{}) {
			out = append(out, Reservation{a, o})
		}
	})
	if isAbsent(err) {
		return nil, nil
	}
	return out, err
}
