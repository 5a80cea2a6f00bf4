package kernel

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

// resolveBatch is how many addresses are looked up with one system call: their
// answers must all fit in receiveBuffer.
const resolveBatch = 256

// Resolve returns where the kernel would send packets for each address now. An
// address is left out if there is no way to it, if it is the node's own, or if the
// way leads into an overlay link or by a route of ours: what Twill programs from
// the answer must not lead to itself.
func (k *Kernel) Resolve(ctx context.Context, addrs []netip.Addr) (map[netip.Addr]overlay.Hop, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	out := make(map[netip.Addr]overlay.Hop, len(addrs))
	if len(addrs) == 0 {
		return out, nil
	}
	names := map[uint32]string{0: ""}
	for chunk := range slices.Chunk(addrs, resolveBatch) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		ways, err := k.conn.ways(chunk)
		if err != nil {
			return nil, fmt.Errorf("resolve: %w", err)
		}
		for i, w := range ways {
			name, known := names[w.oif]
			if !known {
				if name, err = k.conn.underlayLink(w.oif); err != nil {
					return nil, fmt.Errorf("resolve: %w", err)
				}
				names[w.oif] = name
			}
			if name != "" && w.typ == unix.RTN_UNICAST && w.protocol != overlay.Protocol {
				out[chunk[i]] = overlay.Hop{Gateway: w.gateway, Link: name}
			}
		}
	}
	return out, nil
}

// underlayLink returns the name of a link, but none if it is an overlay's or gone.
func (c *conn) underlayLink(index uint32) (string, error) {
	l, err := c.linkAt(index)
	if err != nil || l.candidate() {
		return "", err
	}
	return l.Name, nil
}

// way is where packets for an address go.
type way struct {
	typ      uint8
	protocol uint8 // of the route that they take
	gateway  netip.Addr
	oif      uint32 // 0: nowhere
}

// ways looks up a way per address. It asks twice each: for the hop, chosen among
// several if need be, and for the route, which IPv4 does not name in the answer.
func (c *conn) ways(addrs []netip.Addr) ([]way, error) {
	out := make([]way, len(addrs))
	lost := make([]bool, len(addrs))
	var failed error
	b := batch{conn: c, failed: func(i int, err error) {
		if lost[i/2] = true; !unreachable(err) {
			failed = errors.Join(failed, fmt.Errorf("look up route to %s: %w", addrs[i/2], err))
		}
	}}
	b.each = func(i int, _ header, body []byte) {
		w := decodeWay(body)
		if i%2 == 1 {
			out[i/2].protocol = w.protocol
			return
		}
		out[i/2] = w
	}
	for _, a := range addrs {
		for _, flags := range []uint32{0, unix.RTM_F_FIB_MATCH} {
			encodeLookup(&b.enc, a, flags)
			b.added()
		}
	}
	b.send()
	for i := range out {
		if lost[i] {
			out[i] = way{}
		}
	}
	return out, failed
}

// lookup returns the index of the interface by which packets to a leave; 0 if
// there is no route.
func (c *conn) lookup(a netip.Addr) (uint32, error) {
	var w way
	err := c.request(func(e *encoder) { encodeLookup(e, a, 0) }, func(_ header, body []byte) { w = decodeWay(body) })
	if err != nil && !unreachable(err) {
		return 0, fmt.Errorf("look up route to %s: %w", a, err)
	}
	return w.oif, nil
}

func encodeLookup(e *encoder, a netip.Addr, flags uint32) {
	b := e.begin(unix.RTM_GETROUTE, 0, unix.SizeofRtMsg)
	b[0], b[1] = familyNumber(a), uint8(a.BitLen())
	native.PutUint32(b[8:], flags)
	e.addr(unix.RTA_DST, a)
}

func decodeWay(body []byte) (w way) {
	if len(body) < unix.SizeofRtMsg {
		return w
	}
	w.protocol, w.typ = body[5], body[7]
	for typ, v := range attrs(body, unix.SizeofRtMsg) {
		switch typ {
		case unix.RTA_OIF:
			w.oif = u32Of(v)
		case unix.RTA_GATEWAY:
			w.gateway = addrOf(v)
		case unix.RTA_VIA: // a gateway of the other family, behind that family's number
			w.gateway = addrOf(v[min(2, len(v)):])
		}
	}
	return w
}

// unreachable reports whether a look-up's error means that packets would go
// nowhere: so do unreachable, prohibit and blackhole routes look, and no IPv6.
func unreachable(err error) bool {
	for _, errno := range []unix.Errno{unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EINVAL, unix.EAFNOSUPPORT, unix.EOPNOTSUPP} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}
