// Package portmap opens ports of the node for its pods, and masquerades single
// pods where the daemon does not masquerade all. What one attachment needs is an
// Entry, a file; the rules in the firewall are a function of all entries. Every
// change writes them as a whole, in one transaction per table, under a lock of the
// directory, so that no packet meets half of them and a killed process leaves
// nothing that the next call does not mend:
//
//	Add:    file, then rules
//	Remove: rules without it, then the file
//
// A packet to a mapped port of any of the node's own addresses gets the pod's
// address and port, and keeps its source. Only if the answer would not come back
// this way is the source replaced as well: that of the node's own pods, who may see
// each other on a bridge, and that of 127.0.0.1. Such a packet carries the mark
// HairpinMark from one hook to the next.
package portmap

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/twill-net/twill/pkg/overlay"
)

// HairpinMark is the bit of a packet's mark that says, from prerouting to
// postrouting, that its source is to be replaced. Nothing else there tells a pod's
// connection to a host port from one to a service with the same port, which must
// keep its source. It is the bit that the portmap plugin uses for the same
// (markMasqBit 13), so what gets along with that one gets along with this.
const HairpinMark = 0x2000

// Mapping is one entry of the portMappings capability.
type Mapping struct {
	HostPort      uint16
	ContainerPort uint16
	Protocol      string // tcp, udp or sctp
	// HostIP is the one address of the node that the port is open on. 0.0.0.0 and
	// :: stand for all of that family, no address for all.
	HostIP netip.Addr
}

func (m Mapping) String() string {
	if m.HostIP.IsValid() && !m.HostIP.IsUnspecified() {
		return fmt.Sprintf("%s/%s", netip.AddrPortFrom(m.HostIP, m.HostPort), m.Protocol)
	}
	return fmt.Sprintf("%d/%s", m.HostPort, m.Protocol)
}

// Entry is what one attachment needs of the firewall.
type Entry struct {
	Attachment string // "<network>:<container id>:<interface>", unique
	Holder     string // whose it is, in the words of messages: "pod default/web"
	HostLink   string // host's end of the veth; an entry whose link is gone is dead
	Addrs      []netip.Addr
	Mappings   []Mapping

	// Masquerade are the destinations to which the pod keeps its address; to all
	// others its packets get the node's. nil: it keeps its address everywhere.
	Masquerade []netip.Prefix
	// Local are the subnets whose clients' answers must come back through the
	// node, so that they see the address that they asked. On a bridge these are
	// the node's pod subnets; where every pod has its own link, the pod's address.
	Local []netip.Prefix
}

// empty reports that the attachment needs nothing.
func (e Entry) empty() bool { return len(e.Mappings) == 0 && e.Masquerade == nil }

// addr returns the pod's address of a family, or none.
func (e Entry) addr(f overlay.Family) netip.Addr {
	for _, a := range e.Addrs {
		if overlay.FamilyOf(a) == f {
			return a
		}
	}
	return netip.Addr{}
}

// Validate says what would make a rule of e impossible.
func (e Entry) Validate() error {
	if e.Attachment == "" || strings.ContainsRune(e.Attachment, '/') || strings.HasPrefix(e.Attachment, ".") {
		return fmt.Errorf("attachment %q: must be a file's name that does not begin with a dot", e.Attachment)
	}
	for i, m := range e.Mappings {
		if m.HostPort == 0 || m.ContainerPort == 0 || !slices.Contains(protocols(), m.Protocol) {
			return fmt.Errorf("host port %s: ports must be 1 to 65535, and the protocol one of %v", m, protocols())
		}
		if a := m.HostIP; a.IsValid() && !a.IsUnspecified() && !e.addr(overlay.FamilyOf(a)).IsValid() {
			return fmt.Errorf("host port %s: the pod has no %s address: give a hostIP of a family that it has, or none", m, overlay.FamilyOf(a))
		}
		if slices.ContainsFunc(e.Mappings[:i], m.overlaps) {
			return fmt.Errorf("host port %s is mapped twice for %s: remove one of the two", m, e.Holder)
		}
	}
	return nil
}

func protocols() []string { return []string{"tcp", "udp", "sctp"} }

// in reports whether m is open in a family, if the pod has an address of it.
func (m Mapping) in(f overlay.Family) bool {
	return !m.HostIP.IsValid() || overlay.FamilyOf(m.HostIP) == f
}

// overlaps reports that one packet could be meant by both.
func (m Mapping) overlaps(o Mapping) bool {
	if m.HostPort != o.HostPort || m.Protocol != o.Protocol {
		return false
	}
	if !m.HostIP.IsValid() || !o.HostIP.IsValid() {
		return true
	}
	return m.HostIP == o.HostIP || overlay.FamilyOf(m.HostIP) == overlay.FamilyOf(o.HostIP) &&
		(m.HostIP.IsUnspecified() || o.HostIP.IsUnspecified())
}

// ConflictError says that a host port belongs to another pod.
type ConflictError struct {
	Mapping Mapping // as it was asked for
	Holder  string
}

func (e *ConflictError) Error() string {
	return fmt.Sprintf("host port %s is taken by %s", e.Mapping, e.Holder)
}

// conflict returns a *ConflictError if a mapping of e is another's already.
func (e Entry) conflict(others []Entry) error {
	for _, m := range e.Mappings {
		for _, o := range others {
			if slices.ContainsFunc(o.Mappings, m.overlaps) {
				return &ConflictError{Mapping: m, Holder: o.Holder}
			}
		}
	}
	return nil
}
