package kernel

import (
	"context"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

// unstable are the flags of addresses that come and go, or are not in use (yet):
// IFA_F_SECONDARY is also IFA_F_TEMPORARY.
const unstable = unix.IFA_F_SECONDARY | unix.IFA_F_DEPRECATED | unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED

// Interfaces returns what the choice of the uplink is made from: all interfaces
// with their addresses, the default routes of the main table, and by which
// interface each address of canReach is reached.
func (k *Kernel) Interfaces(ctx context.Context, canReach []netip.Addr) ([]overlay.Iface, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	out, err := k.conn.interfaces(ctx, canReach)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	return out, nil
}

func (c *conn) interfaces(ctx context.Context, canReach []netip.Addr) ([]overlay.Iface, error) {
	links, err := c.links(ctx, "")
	if err != nil {
		return nil, err
	}
	out := make([]overlay.Iface, len(links))
	byIndex := make(map[uint32]*overlay.Iface, len(links))
	for i, l := range links {
		out[i] = overlay.Iface{
			Name: l.Name, Index: int(l.index), MTU: l.MTU, MAC: l.MAC,
			Up: l.Up, Loopback: l.flags&unix.IFF_LOOPBACK != 0,
		}
		byIndex[l.index] = &out[i]
	}
	if err := c.addressesOf(ctx, byIndex); err != nil {
		return nil, err
	}
	if err := c.defaultRoutes(ctx, byIndex); err != nil {
		return nil, err
	}
	for _, a := range canReach {
		index, err := c.lookup(a)
		if err != nil {
			return nil, err
		}
		if i := byIndex[index]; i != nil {
			i.Reaches = append(i.Reaches, a)
		}
	}
	return out, nil
}

func (c *conn) addressesOf(ctx context.Context, byIndex map[uint32]*overlay.Iface) error {
	reset := func() {
		for _, i := range byIndex {
			i.Addrs = nil
		}
	}
	err := c.dump(ctx, func(e *encoder) { encodeAddrDump(e, 0) }, reset, func(_ header, body []byte) {
		a := decodeAddr(body)
		if i := byIndex[linkIndexOf(body)]; i != nil && a.prefix.IsValid() {
			i.Addrs = append(i.Addrs, overlay.IfaceAddr{Prefix: a.prefix, Unstable: a.flags&unstable != 0 || a.preferred == 0})
		}
	})
	if err != nil {
		return fmt.Errorf("addresses: %w", err)
	}
	return nil
}

// defaultRoutes notes the best default route of each interface.
func (c *conn) defaultRoutes(ctx context.Context, byIndex map[uint32]*overlay.Iface) error {
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		metric := func(i *overlay.Iface) **uint32 {
			if family == unix.AF_INET {
				return &i.Default4
			}
			return &i.Default6
		}
		reset := func() {
			for _, i := range byIndex {
				*metric(i) = nil
			}
		}
		err := c.dump(ctx, func(e *encoder) { encodeRouteDump(e, family) }, reset, func(_ header, body []byte) {
			r, ok := decodeRoute(body)
			if !ok || body[0] != family || r.Dst.Bits() != 0 || r.typ != unix.RTN_UNICAST {
				return
			}
			for _, oif := range r.oifs() {
				if i := byIndex[oif]; i != nil && (*metric(i) == nil || **metric(i) > r.Metric) {
					*metric(i) = &r.Metric
				}
			}
		})
		if err != nil && !absent(err) {
			return fmt.Errorf("routes: %w", err)
		}
	}
	return nil
}
