package ipam

import (
	"fmt"
	"net/netip"
	"time"
)

// ExhaustedError says that a set has no address left for a pod.
type ExhaustedError struct {
	Ranges string    // of the set
	InUse  int       // addresses reserved
	AtRest int       // addresses released lately
	Next   time.Time // when the first of those at rest is free again; zero: none rests
	Dir    string    // where the reservations are
}

func (e *ExhaustedError) Error() string {
	msg := fmt.Sprintf("no free address in %s: %d in use, reserved by the files in %s", e.Ranges, e.InUse, e.Dir)
	if e.AtRest > 0 {
		msg += fmt.Sprintf("; %d at rest, the next one free at %s", e.AtRest, e.Next.Format(time.RFC3339))
	}
	return msg
}

// TakenError says that a requested address is another's.
type TakenError struct {
	Addr   netip.Addr
	Holder Owner  // zero: its file cannot be read
	File   string // that says so
}

func (e *TakenError) Error() string {
	holder := e.Holder.String()
	if e.Holder == (Owner{}) {
		holder = "somebody"
	}
	return fmt.Sprintf("requested address %s is in use by %s, says %s: request another, or none", e.Addr, holder, e.File)
}

// OutOfRangeError says that no pod can have the requested address.
type OutOfRangeError struct {
	Addr   netip.Addr
	Ranges string // of all sets
	Reason string
}

func (e *OutOfRangeError) Error() string {
	return fmt.Sprintf("requested address %s: %s: request another of %s, or none", e.Addr, e.Reason, e.Ranges)
}
