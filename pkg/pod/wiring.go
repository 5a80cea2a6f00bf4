// Package pod wires the pods of one node: it is what the CNI plugin does for each
// verb. A bridged pod has a veth whose other end is a port of cni0, an address of
// each of the node's subnets, and the bridge as its gateway. A routed pod has a veth
// of its own and a route on the host.
//
// Everything is done in this process, on one netlink socket per namespace. What an
// attachment consists of is said once, by (*Config).ends: ADD makes it, CHECK compares
// it. What takes it apart is one function too, (*Config).takeBack: DEL, GC, the
// daemon's sweep and an ADD that failed call it.
package pod

import (
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/ipam"
	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/portmap"
)

// wiring is what every pod of this node gets: the configuration and the hand-off
// put together.
type wiring struct {
	*Config
	networks []netip.Prefix
	subnets  []netip.Prefix
	sets     [][]ipam.Range
	mtu      int
	routes   []*types.Route // of the pod, gateways filled in
}

// newWiring reads the hand-off. notYet is the code of the error when there is none.
func newWiring(c *Config, notYet uint) (*wiring, error) {
	h, err := c.handoff()
	if errors.Is(err, fs.ErrNotExist) {
		return nil, noHandoff(c, notYet)
	}
	if err != nil {
		return nil, badFile(err)
	}
	w := &wiring{Config: c, networks: h.Networks, subnets: h.Subnets, mtu: h.MTU}
	if c.MTU != 0 {
		w.mtu = c.MTU
	}
	if low := minMTU(h.Subnets); w.mtu < low {
		return nil, fail(types.ErrInvalidNetworkConfig, "network configuration: mtu: %d: must be at least %d, as IPv6 is on", w.mtu, low)
	}
	if c.leavesFirewall(h) {
		c.Firewall = h.Firewall
	}
	if w.sets, err = w.rangeSets(); err != nil {
		return nil, err
	}
	dsts := h.Networks
	if c.DefaultGateway {
		dsts = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
	}
	for _, dst := range dsts {
		if gw, ok := w.gateway(dst.Addr().Is4()); ok {
			w.routes = append(w.routes, &types.Route{Dst: ipNet(dst), GW: gw.AsSlice()})
		}
	}
	for _, r := range c.Routes {
		if err := w.addRoute(*r); err != nil {
			return nil, err
		}
	}
	return w, nil
}

// noHandoff says why there is no hand-off: in the daemon's own words, if it runs.
func noHandoff(c *Config, code uint) error {
	why := "twilld has not finished its first pass on this node, or does not run"
	if reason, err := askDaemon(c.HandoffFile, daemonStatus); err == nil && reason != answerOK {
		why = "twilld: " + reason
	}
	return fail(code, "%s is missing: %s; see `netctl status`", c.HandoffFile, why)
}

// addRoute adds a route of the configuration, in place of one of Twill's own to
// the same destination.
func (w *wiring) addRoute(r types.Route) error {
	if r.GW == nil && r.Scope == nil {
		gw, ok := w.gateway(isV4(r.Dst.IP))
		if !ok {
			return fail(types.ErrInvalidNetworkConfig, "network configuration: routes: %s: this node has no subnet of that family: remove it", &r.Dst)
		}
		r.GW = gw.AsSlice()
	}
	w.routes = slices.DeleteFunc(w.routes, func(own *types.Route) bool {
		return own.Dst.String() == r.Dst.String() && r.Table == nil
	})
	w.routes = append(w.routes, &r)
	return nil
}

// gateway returns what pods send to in the IPv4 or IPv6 network, if they have an
// address there: a routed pod to an address on its link, a bridged one to the bridge.
func (w *wiring) gateway(v4 bool) (netip.Addr, bool) {
	for _, set := range w.sets {
		switch p := set[0].Subnet; {
		case p.Addr().Is4() != v4:
		case w.Mode == Bridged:
			return ipam.Gateway(p), true
		case v4:
			return gateway4, true
		default:
			return gateway6, true
		}
	}
	return netip.Addr{}, false
}

// bridgeAddrs are the gateway addresses of the bridge.
func (w *wiring) bridgeAddrs() []netip.Prefix {
	var out []netip.Prefix
	for _, p := range w.subnets {
		out = append(out, netip.PrefixFrom(ipam.Gateway(p), p.Bits()))
	}
	return out
}

func (c *Config) reservations() ipam.Dir { return ipam.NewDir(c.DataDir, c.Name) }
func (c *Config) records() records       { return recordsIn(c.DataDir) }

// portmap is the host ports of the node's pods. Without a word of the daemon's they
// are where the node has a tool for.
func (c *Config) portmap() portmap.Dir {
	tool := c.Firewall
	if tool == "" || tool == overlay.Iptables {
		if h, err := c.handoff(); err == nil && c.leavesFirewall(h) {
			tool = h.Firewall
		}
	}
	if tool == "" {
		tool = overlay.Iptables
		if _, err := exec.LookPath("iptables-restore"); err != nil {
			tool = overlay.Nftables
		}
	}
	return portmap.NewDir(filepath.Join(c.DataDir, ".twill", "ports"), tool)
}

// leavesFirewall: the configuration names no tool, or iptables and no flavour of it,
// which is the daemon's to choose. Both must use one.
func (c *Config) leavesFirewall(h Handoff) bool {
	return c.Firewall == "" || c.Firewall == overlay.Iptables && h.Firewall != "" && h.Firewall != overlay.Nftables
}

// portEntry names the attachment among the host ports of the node.
func (c *Config) portEntry(o ipam.Owner) string {
	return c.Name + ":" + o.ContainerID + ":" + o.IfName
}

func openNetlink() (*netlink.Handle, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, ioFail("open netlink socket", err)
	}
	return h, nil
}

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
