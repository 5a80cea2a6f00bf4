// Package pod wires the pods of one node: it is what the CNI plugin does for each
// verb. In bridged mode a pod has a veth whose other end is a port of cni0, an
// address of each of the node's subnets, and the bridge as its gateway.
//
// Everything is done in this process, on one netlink socket per namespace. The
// plugin keeps no state but the reservations (package ipam): links are found by
// names that follow from the attachment, and told apart by their alias.
package pod

import (
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"

	"github.com/twill-net/twill/pkg/ipam"
)

// wiring is what every pod of this node gets: the configuration and the hand-off
// put together.
type wiring struct {
	*Config
	subnets []netip.Prefix
	mtu     int
	routes  []*types.Route // of the pod, gateways filled in
}

// newWiring reads the hand-off. notYet is the code of the error when there is none.
func newWiring(c *Config, notYet uint) (*wiring, error) {
	h, err := ReadHandoff(c.HandoffFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fail(notYet, "%s is missing: twilld has not finished its first pass on this node; see `netctl status`", c.HandoffFile)
	}
	if err != nil {
		return nil, fail(types.ErrDecodingFailure, "%v", err)
	}
	w := &wiring{Config: c, subnets: h.Subnets, mtu: h.MTU}
	if c.MTU != 0 {
		w.mtu = c.MTU
	}
	if low := minMTU(h.Subnets); w.mtu < low {
		return nil, fail(types.ErrInvalidNetworkConfig, "network configuration: mtu: %d: must be at least %d, as IPv6 is on", w.mtu, low)
	}
	dsts := h.Networks
	if c.DefaultGateway {
		dsts = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
	}
	for _, dst := range dsts {
		if gw, ok := w.gateway(dst.Addr().Is4()); ok {
			w.routes = append(w.routes, &types.Route{Dst: ipNet(dst), GW: gw.Addr().AsSlice()})
		}
	}
	for _, r := range c.Routes {
		if err := w.addRoute(*r); err != nil {
			return nil, err
		}
	}
	return w, nil
}

// addRoute adds a route of the configuration, in place of one of Twill's own to
// the same destination.
func (w *wiring) addRoute(r types.Route) error {
	if r.GW == nil && r.Scope == nil {
		gw, ok := w.gateway(isV4(r.Dst.IP))
		if !ok {
			return fail(types.ErrInvalidNetworkConfig, "network configuration: routes: %s: this node has no subnet of that family", &r.Dst)
		}
		r.GW = gw.Addr().AsSlice()
	}
	w.routes = slices.DeleteFunc(w.routes, func(own *types.Route) bool {
		return own.Dst.String() == r.Dst.String() && r.Table == nil
	})
	w.routes = append(w.routes, &r)
	return nil
}

// gateway returns the node's address in its IPv4 or IPv6 subnet.
func (w *wiring) gateway(v4 bool) (netip.Prefix, bool) {
	for _, p := range w.subnets {
		if p.Addr().Is4() == v4 {
			return netip.PrefixFrom(ipam.Gateway(p), p.Bits()), true
		}
	}
	return netip.Prefix{}, false
}

func (c *Config) reservations() ipam.Dir { return ipam.NewDir(c.DataDir, c.Name) }

func ipNet(p netip.Prefix) net.IPNet {
	return net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func prefixOf(n net.IPNet) netip.Prefix {
	a, _ := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), bits)
}

// complete repeats a dump that changed under the kernel's hands: what it gave may
// be short of entries.
func complete[T any](dump func() (T, error)) (T, error) {
	for range 20 {
		v, err := dump()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return v, err
		}
	}
	return dump()
}

func isNotFound(err error) bool {
	var missing netlink.LinkNotFoundError
	return errors.As(err, &missing)
}
