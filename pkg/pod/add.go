package pod

import (
	"errors"
	"net/netip"
	"os"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/ipam"
)

// Add attaches a container to the network and prints the result in the version
// asked for. If it fails, nothing of the attachment remains; the bridge does.
func Add(args *skel.CmdArgs) error {
	c, err := ParseConfig(args.StdinData)
	if err != nil {
		return err
	}
	at, err := parseArgs(args)
	if err != nil {
		return err
	}
	w, err := newWiring(c, types.ErrTryAgainLater)
	if err != nil {
		return err
	}
	res, err := w.add(at)
	if err != nil {
		return err
	}
	out, err := res.GetAsVersion(c.CNIVersion)
	if err != nil {
		return fail(types.ErrIncompatibleCNIVersion, "convert result to version %s: %v", c.CNIVersion, err)
	}
	return out.PrintTo(os.Stdout)
}

// undo is what a failed ADD takes back, last first.
type undo []func() error

func (u undo) run() error {
	var err error
	for i := len(u) - 1; i >= 0; i-- {
		err = errors.Join(err, u[i]())
	}
	return err
}

func (w *wiring) add(at attachment) (res *types100.Result, err error) {
	s, err := openSandbox(at.netns)
	if err != nil {
		return nil, err
	}
	defer s.close()
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, ioFail("open netlink socket", err)
	}
	defer h.Close()
	if err := checkFree(at, h, s); err != nil {
		return nil, err
	}

	var back undo
	defer func() {
		if err != nil {
			err = withCause(err, back.run())
		}
	}()
	addrs, err := w.allocate(at)
	if err != nil {
		return nil, err
	}
	back = append(back, func() error { return w.reservations().Release(at.Owner, addresses(addrs)) })

	br, err := w.ensureBridge(h)
	if err != nil {
		return nil, err
	}
	port, err := w.makeVeth(at, h, s)
	if err != nil {
		return nil, err
	}
	back = append(back, func() error { return h.LinkDel(port) })
	if err := w.plug(at, h, port, br); err != nil {
		return nil, err
	}
	return w.finish(at, s, h, links{bridge: br, port: port, addrs: addrs})
}

// withCause adds to the error of an ADD that what it left behind.
func withCause(err, left error) error {
	if left == nil {
		return err
	}
	var e *types.Error
	if !errors.As(err, &e) {
		return errors.Join(err, left)
	}
	return types.NewError(e.Code, e.Msg, "not all could be taken back, DEL must: "+left.Error())
}

func (w *wiring) allocate(at attachment) ([]netip.Prefix, error) {
	addrs, err := w.reservations().Allocate(at.Owner, w.subnets)
	var full *ipam.ExhaustedError
	if errors.As(err, &full) {
		return nil, fail(types.ErrTryAgainLater, "%v; remove pods, or call GC to free what dead ones left", full)
	}
	if err != nil {
		return nil, ioFail("reserve an address for "+at.String(), err)
	}
	return addrs, nil
}

func addresses(ps []netip.Prefix) []netip.Addr {
	out := make([]netip.Addr, len(ps))
	for i, p := range ps {
		out[i] = p.Addr()
	}
	return out
}

// links is an attachment on its way.
type links struct {
	bridge, port netlink.Link
	addrs        []netip.Prefix
}

// finish sets the pod's end up and returns the result, when packets flow.
func (w *wiring) finish(at attachment, s *sandbox, h *netlink.Handle, l links) (*types100.Result, error) {
	inner, err := s.nl.LinkByName(at.IfName)
	if err != nil {
		return nil, ioFail("look up link "+at.IfName+" in the pod", err)
	}
	if err := w.configure(s, inner, l.addrs); err != nil {
		return nil, err
	}
	if inner, err = awaitUp(s.nl, inner.Attrs().Index); err != nil {
		return nil, ioFail("set the pod's link up", err)
	}
	port, err := awaitUp(h, l.port.Attrs().Index)
	if err != nil {
		return nil, ioFail("set the port up", err)
	}
	if err := s.announce(inner, l.addrs); err != nil {
		return nil, ioFail("announce the pod", err)
	}

	res := &types100.Result{CNIVersion: types100.ImplementedSpecVersion, Routes: w.routes, DNS: w.DNS}
	for _, x := range []netlink.Link{l.bridge, port, inner} {
		a := x.Attrs()
		res.Interfaces = append(res.Interfaces, &types100.Interface{Name: a.Name, Mac: a.HardwareAddr.String(), Mtu: a.MTU})
	}
	res.Interfaces[2].Sandbox = at.netns
	for _, p := range l.addrs {
		gw, _ := w.gateway(p.Addr().Is4())
		res.IPs = append(res.IPs, &types100.IPConfig{Interface: types100.Int(2), Address: ipNet(p), Gateway: gw.Addr().AsSlice()})
	}
	return res, nil
}
