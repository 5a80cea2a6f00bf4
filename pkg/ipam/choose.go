package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"time"
)

// probes is how many neighbours are looked at one by one before the directory is
// read instead: about what reading the names of a few hundred files costs.
const probes = 16

// allocation is one Request on its way.
type allocation struct {
	Request
	d      Dir
	sets   []set
	wanted []netip.Addr // for each set; zero: any
	now    time.Time
	key    string       // of the pod, if it is sticky
	own    []netip.Addr // that the pod had before
	names  *listing     // once it was needed
	taken  []taken
	// claim makes a the pod's, and reports false if somebody has it.
	claim func(a netip.Addr) (bool, error)
}

type taken struct {
	addr netip.Addr
	turn bool // by round robin, which goes on from there
	rest rest // what it was found in
}

// listing is the names of the files there are.
type listing struct{ reserved, resting map[netip.Addr]bool }

func (d Dir) plan(req Request) (*allocation, error) {
	if req.CoolDown < 0 || req.CoolDown > MaxCoolDown {
		return nil, fmt.Errorf("cool-down of addresses %s: must be between 0s and %s", req.CoolDown, MaxCoolDown)
	}
	sets, err := compile(req.Sets)
	if err != nil {
		return nil, err
	}
	wanted, err := assign(sets, req.Wanted)
	if err != nil {
		return nil, err
	}
	al := &allocation{Request: req, d: d, sets: sets, wanted: wanted, now: time.Now()}
	if req.Sticky {
		al.key = key(req.Pod, req.Owner)
	}
	return al, nil
}

// looks reports whether what rests matters at all.
func (al *allocation) looks() bool { return al.Sticky || al.CoolDown > 0 }

func (al *allocation) takeAll() error {
	if al.key != "" {
		al.own = al.d.kept(al.key)
	}
	for i, s := range al.sets {
		take := al.search
		if al.wanted[i].IsValid() {
			take = al.request
		}
		t, err := take(s)
		if err != nil {
			return err
		}
		al.taken = append(al.taken, t)
	}
	return nil
}

// undo frees what was taken.
func (al *allocation) undo() error {
	var errs error
	for _, t := range al.taken {
		errs = errors.Join(errs, al.d.remove(t.addr))
	}
	return errs
}

// settle writes down what follows from the reservations. Killed before or within
// it, a process leaves a round robin that stands too early, or notes about
// addresses that are in use, and neither misleads anyone.
func (al *allocation) settle() error {
	for i, t := range al.taken {
		if !t.turn {
			continue
		}
		if err := al.d.setLast(i, t.addr); err != nil {
			return fmt.Errorf("write round robin: %w", err)
		}
	}
	for _, t := range al.taken {
		if err := al.d.endRest(t.addr, t.rest); err != nil {
			return err
		}
	}
	if len(al.own) > 0 {
		return al.d.forget(al.key)
	}
	return nil
}

// request takes the address that was asked for.
func (al *allocation) request(s set) (taken, error) {
	a := al.wanted[s.index]
	r, err := al.restOf(a)
	if err != nil {
		return taken{}, err
	}
	ok, err := al.claim(a)
	if err != nil {
		return taken{}, err
	}
	if !ok {
		holder, _ := al.d.Owner(a)
		return taken{}, &TakenError{Addr: a, Holder: holder, File: al.d.Path(a)}
	}
	return taken{addr: a, rest: r}, nil
}

// restOf returns the zero rest if a does not rest, or if that does not matter.
func (al *allocation) restOf(a netip.Addr) (rest, error) {
	if !al.looks() {
		return rest{}, nil
	}
	return al.d.restOf(a)
}

// search chooses: an address the pod had before; else the next in turn that is
// free and neither rests nor is kept for another pod, so that an address is away
// as long as possible; else the one kept for another pod for the longest time.
func (al *allocation) search(s set) (taken, error) {
	for _, a := range al.own {
		r, err := al.restOf(a)
		if err != nil {
			return taken{}, err
		}
		others := r.keptFor != al.key && (r.keptFor != "" || r.within(al.CoolDown, al.now))
		if others || !s.chooses(a) {
			continue
		}
		if ok, err := al.claim(a); ok || err != nil {
			return taken{addr: a, rest: r}, err
		}
	}
	var put putOff
	full := &ExhaustedError{Ranges: describe(s), Dir: al.d.path}
	missed := 0
	for a := range s.after(al.d.last(s.index)) {
		if missed == probes {
			if err := al.list(); err != nil {
				return taken{}, err
			}
		}
		if n := al.names; n != nil && (n.reserved[a] || n.resting[a]) {
			put.later = append(put.later, a)
			continue
		}
		if t, err := al.try(a, full, &put); err != nil || t.addr.IsValid() {
			return t, err
		}
		missed++
	}
	// Nothing is left but what rests, and what has a file: some may be empty, some
	// may have rested long enough.
	for _, a := range put.later {
		if t, err := al.try(a, full, &put); err != nil || t.addr.IsValid() {
			return t, err
		}
	}
	slices.SortStableFunc(put.kept, func(t, u taken) int { return t.rest.since.Compare(u.rest.since) })
	for _, t := range put.kept {
		if ok, err := al.claim(t.addr); ok || err != nil {
			return t, err
		}
		full.InUse++
	}
	return taken{}, full
}

// putOff is what a search comes back to if nothing better is found.
type putOff struct {
	later []netip.Addr // have a file of some kind
	kept  []taken      // for other pods
}

// try takes a unless it is in use, rests, or is kept for another pod, which it
// writes down.
func (al *allocation) try(a netip.Addr, full *ExhaustedError, put *putOff) (taken, error) {
	r, err := al.restOf(a)
	if err != nil {
		return taken{}, err
	}
	t := taken{addr: a, turn: true, rest: r}
	switch {
	case r.within(al.CoolDown, al.now):
		full.AtRest++
		if next := r.since.Add(al.CoolDown); full.Next.IsZero() || next.Before(full.Next) {
			full.Next = next
		}
		return taken{}, nil
	case al.d.isKept(a, r) && r.keptFor != al.key:
		put.kept = append(put.kept, t)
		return taken{}, nil
	}
	ok, err := al.claim(a)
	if err != nil || ok {
		return t, err
	}
	full.InUse++
	return taken{}, nil
}

// list reads the names of the files that there are, once per allocation.
func (al *allocation) list() error {
	if al.names != nil {
		return nil
	}
	var n listing
	var err error
	if n.reserved, err = names(al.d.path); err != nil {
		return err
	}
	if al.looks() {
		if n.resting, err = names(filepath.Join(al.d.state, "rest")); err != nil {
			return err
		}
	}
	al.names = &n
	return nil
}
