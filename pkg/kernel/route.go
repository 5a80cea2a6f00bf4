package kernel

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

const rtaNexthopID = 30 // RTA_NH_ID, which package unix lacks

// route is an overlay.Route as RTM_NEWROUTE describes it, its device by index.
type route struct {
	overlay.Route
	oif uint32
	typ uint8
	// hops holds the devices of a route that spreads its packets over several.
	hops []uint32
}

// leadsToPod reports whether the CNI plugin made the route: to one address, by a link
// that is no overlay's, as own says. The overlay has no part in it.
func (r *route) leadsToPod(own bool) bool {
	return r.Protocol == overlay.Protocol && r.typ == unix.RTN_UNICAST && r.Dst.IsSingleIP() &&
		!own && !r.Gateway.IsValid() && r.NH == 0 && r.hops == nil
}

func (r *route) oifs() []uint32 {
	if r.hops != nil {
		return r.hops
	}
	return []uint32{r.oif}
}

// decodeRoute reads a route of the main table that packets may take; of any other
// it returns false.
func decodeRoute(body []byte) (r route, ok bool) {
	if len(body) < unix.SizeofRtMsg {
		return r, false
	}
	family, bits, table := body[0], int(body[1]), uint32(body[4])
	r.Protocol, r.typ = body[5], body[7]
	flags := native.Uint32(body[8:])
	if table != unix.RT_TABLE_MAIN || flags&unix.RTM_F_CLONED != 0 {
		return r, false
	}
	var dst netip.Addr
	switch family {
	case unix.AF_INET:
		dst = netip.IPv4Unspecified()
	case unix.AF_INET6:
		dst = netip.IPv6Unspecified()
	default:
		return r, false
	}
	switch r.typ {
	case unix.RTN_UNICAST:
		r.OnLink = flags&unix.RTNH_F_ONLINK != 0
	case unix.RTN_BLACKHOLE:
		r.Blackhole = true
	case unix.RTN_UNREACHABLE, unix.RTN_PROHIBIT, unix.RTN_THROW:
	default:
		return r, false
	}
	for typ, v := range attrs(body, unix.SizeofRtMsg) {
		switch typ {
		case unix.RTA_DST:
			dst = addrOf(v)
		case unix.RTA_PRIORITY:
			r.Metric = u32Of(v)
		case unix.RTA_OIF:
			r.oif = u32Of(v)
		case unix.RTA_GATEWAY:
			r.Gateway = addrOf(v)
		case rtaNexthopID:
			r.NH = u32Of(v)
		case unix.RTA_MULTIPATH:
			r.hops = decodeHops(v)
		}
	}
	r.Dst = netip.PrefixFrom(dst, bits)
	return r, true
}

// decodeHops returns the devices in a list of rtnexthop.
func decodeHops(b []byte) (out []uint32) {
	for len(b) >= unix.SizeofRtNexthop {
		n := int(native.Uint16(b))
		if n < unix.SizeofRtNexthop || n > len(b) {
			break
		}
		out = append(out, native.Uint32(b[4:]))
		b = b[min(align(n), len(b)):]
	}
	return out
}

// encodeRouteDump asks for the main table of one family.
func encodeRouteDump(e *encoder, family uint8) {
	b := e.begin(unix.RTM_GETROUTE, 0, unix.SizeofRtMsg)
	b[0], b[4] = family, unix.RT_TABLE_MAIN
}

// encodeRoute writes a change of the main table. Add fails if the place, which
// is destination and metric, is taken, whoever took it; Change swaps what is
// there in one step, so that each packet finds the old or the new route. A route
// is deleted only as exactly what it was seen to be.
func encodeRoute(e *encoder, verb overlay.Verb, r overlay.Route, oif uint32) {
	typ, flags := uint16(unix.RTM_NEWROUTE), uint16(unix.NLM_F_CREATE)
	switch verb {
	case overlay.Add:
		flags |= unix.NLM_F_EXCL
	case overlay.Change:
		flags |= unix.NLM_F_REPLACE
	case overlay.Delete:
		typ, flags = unix.RTM_DELROUTE, 0
	}
	b := e.begin(typ, flags, unix.SizeofRtMsg)
	b[0], b[1] = familyNumber(r.Dst.Addr()), uint8(r.Dst.Bits())
	b[4], b[5], b[6], b[7] = unix.RT_TABLE_MAIN, r.Protocol, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST
	switch {
	case verb == overlay.Delete:
		b[6] = unix.RT_SCOPE_NOWHERE // any
	case r.NH == 0 && !r.Gateway.IsValid() && !r.Blackhole:
		b[6] = unix.RT_SCOPE_LINK
	}
	if r.Blackhole {
		b[7] = unix.RTN_BLACKHOLE
	}
	if r.OnLink {
		native.PutUint32(b[8:], unix.RTNH_F_ONLINK)
	}
	e.addr(unix.RTA_DST, r.Dst.Addr())
	if r.Metric != 0 {
		e.u32(unix.RTA_PRIORITY, r.Metric)
	}
	if r.NH != 0 {
		e.u32(rtaNexthopID, r.NH)
		return
	}
	if r.Gateway.IsValid() {
		e.addr(unix.RTA_GATEWAY, r.Gateway)
	}
	if oif != 0 {
		e.u32(unix.RTA_OIF, oif)
	}
}

// nexthop is an overlay.Nexthop as RTM_NEWNEXTHOP describes it.
type nexthop struct {
	overlay.Nexthop
	oif      uint32
	protocol uint8
}

func decodeNexthop(body []byte) (n nexthop) {
	if len(body) < unix.SizeofNhmsg {
		return n
	}
	n.protocol = body[2]
	n.OnLink = native.Uint32(body[4:])&unix.RTNH_F_ONLINK != 0
	for typ, v := range attrs(body, unix.SizeofNhmsg) {
		switch typ {
		case unix.NHA_ID:
			n.ID = u32Of(v)
		case unix.NHA_OIF:
			n.oif = u32Of(v)
		case unix.NHA_GATEWAY:
			n.Gateway = addrOf(v)
		case unix.NHA_GROUP:
			n.Group = decodeGroup(v)
		}
	}
	if !n.Gateway.IsValid() && n.oif != 0 {
		n.Family = familyOf(body[0])
	}
	return n
}

// decodeGroup reads a list of struct nexthop_grp. A member that takes more than one
// share of the flows, which ours never do, has it behind its id, as in ip(8).
func decodeGroup(b []byte) string {
	type member struct{ id, weight uint32 }
	var members []member
	for ; len(b) >= unix.SizeofNexthopGrp; b = b[unix.SizeofNexthopGrp:] {
		members = append(members, member{native.Uint32(b), uint32(b[4]) + 1})
	}
	slices.SortFunc(members, func(a, b member) int { return cmp.Compare(a.id, b.id) })
	var out strings.Builder
	for i, m := range members {
		if i > 0 {
			out.WriteByte('/')
		}
		fmt.Fprint(&out, m.id)
		if m.weight != 1 {
			fmt.Fprintf(&out, ",%d", m.weight)
		}
	}
	return out.String()
}

// encodeGroup writes the members with one share each.
func encodeGroup(e *encoder, group string) error {
	var b []byte
	for _, s := range strings.Split(group, "/") {
		id, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			return fmt.Errorf("read group %q: %w", group, err)
		}
		b = native.AppendUint32(b, uint32(id))
		b = append(b, 0, 0, 0, 0) // weight - 1; reserved
	}
	e.bytes(unix.NHA_GROUP, b)
	return nil
}

func encodeNexthopDump(e *encoder) { e.begin(unix.RTM_GETNEXTHOP, 0, unix.SizeofNhmsg) }

// encodeNexthop writes a change of one nexthop object. Change moves all routes
// that use it at once.
func encodeNexthop(e *encoder, verb overlay.Verb, n overlay.Nexthop, oif uint32) error {
	if verb == overlay.Delete {
		e.begin(unix.RTM_DELNEXTHOP, 0, unix.SizeofNhmsg)
		e.u32(unix.NHA_ID, n.ID)
		return nil
	}
	flags := uint16(unix.NLM_F_CREATE | unix.NLM_F_EXCL)
	if verb == overlay.Change {
		flags = unix.NLM_F_CREATE | unix.NLM_F_REPLACE
	}
	b := e.begin(unix.RTM_NEWNEXTHOP, flags, unix.SizeofNhmsg)
	b[2] = overlay.Protocol
	if n.OnLink {
		native.PutUint32(b[4:], unix.RTNH_F_ONLINK)
	}
	switch {
	case n.Group != "": // of no family
	case n.Family == overlay.IPv4 || n.Gateway.Is4():
		b[0] = unix.AF_INET
	default:
		b[0] = unix.AF_INET6
	}
	e.u32(unix.NHA_ID, n.ID)
	if n.Group != "" {
		return encodeGroup(e, n.Group)
	}
	e.u32(unix.NHA_OIF, oif)
	if n.Gateway.IsValid() {
		e.addr(unix.NHA_GATEWAY, n.Gateway)
	}
	return nil
}
