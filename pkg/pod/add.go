package pod

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/vishvananda/netlink"

	"github.com/twill-net/twill/pkg/ipam"
	"github.com/twill-net/twill/pkg/portmap"
)

// Add attaches a container to the network and prints the result in the version
// asked for. If it fails, nothing of the attachment remains; the bridge does.
func Add(args *skel.CmdArgs) error {
	c, err := readConf(args)
	if err != nil {
		return err
	}
	at, err := parseArgs(args)
	if err != nil {
		return err
	}
	if c.Wanted == nil {
		c.Wanted = at.wanted
	}
	if c.MAC == nil {
		c.MAC = at.mac
	}
	w, err := newWiring(c, types.ErrTryAgainLater)
	if err != nil {
		return err
	}
	return w.add(at)
}

func (w *wiring) add(at attachment) (err error) {
	s, err := openSandbox(at.netns)
	if err != nil {
		return err
	}
	defer s.close()
	h, err := openNetlink()
	if err != nil {
		return err
	}
	defer h.Close()
	rec, err := w.records().hold(w.Name, at.Owner)
	if err != nil {
		return ioFail("attach "+at.String(), err)
	}
	defer rec.release()
	if err := w.makeWay(at, h, s, rec); err != nil {
		return err
	}
	defer func() {
		if err == nil {
			return
		}
		left := w.takeBack(h, at, rec.Record, now)
		if left == nil {
			left = rec.remove()
		}
		err = withCause(err, left)
	}()
	rec.Record = w.record(at, s)
	if err := rec.write(); err != nil {
		return ioFail("attach "+at.String(), err)
	}
	if err := w.keepScratch(rec.Record); err != nil {
		return ioFail("attach "+at.String(), err)
	}
	addrs, err := w.allocate(at)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		rec.Addrs = append(rec.Addrs, a.Prefix.Addr())
	}
	if err := rec.write(); err != nil {
		return ioFail("attach "+at.String(), err)
	}
	res, err := w.wire(at, s, h, addrs)
	if err != nil {
		return err
	}
	rec.Complete = true
	if err := rec.write(); err != nil {
		return ioFail("attach "+at.String(), err)
	}
	return w.print(res)
}

// print tells the runtime. What it is not told of, it will not use.
func (w *wiring) print(res *types100.Result) error {
	if newer, err := version.GreaterThanOrEqualTo(w.CNIVersion, "1.1.0"); err == nil && !newer {
		dropNewKeys(res)
	}
	out, err := res.GetAsVersion(w.CNIVersion)
	if err != nil {
		return fail(types.ErrIncompatibleCNIVersion, "convert result to version %s: %v", w.CNIVersion, err)
	}
	if err := out.PrintTo(os.Stdout); err != nil {
		return ioFail("print the result", err)
	}
	return nil
}

// dropNewKeys takes out what results have since version 1.1.0. The library leaves it
// in.
func dropNewKeys(res *types100.Result) {
	for _, i := range res.Interfaces {
		i.Mtu = 0
	}
	for i, r := range res.Routes {
		res.Routes[i] = &types.Route{Dst: r.Dst, GW: r.GW}
	}
}

// makeWay returns an error if the attachment exists, or either end's name is taken,
// before anything is made. What an ADD that was killed has left is taken back.
func (w *wiring) makeWay(at attachment, h *netlink.Handle, s *sandbox, rec *heldRecord) error {
	err := w.checkFree(at, h, s, rec.found && !rec.Complete)
	if err != nil {
		if !rec.found {
			err = withCause(err, rec.remove())
		}
		return err
	}
	if !rec.found {
		return nil
	}
	return w.takeBack(h, at, rec.Record, now)
}

// checkFree looks at both ends' names. leftover says that what is there of ours is
// of an ADD that was killed.
func (w *wiring) checkFree(at attachment, h *netlink.Handle, s *sandbox, leftover bool) error {
	l, err := h.LinkByName(at.hostLink())
	if err == nil && mayDelete(at, l) && (leftover || isDoomed(l)) {
		err = deleteLink(h, l)
	} else if err == nil {
		err = hostLinkTaken(at, l)
	}
	if err != nil && !isNotFound(err) {
		return ioFail("look up link "+at.hostLink(), err)
	}
	inner, err := s.nl.LinkByName(at.IfName)
	if isNotFound(err) {
		return nil
	}
	if err != nil {
		return ioFail("look up link "+at.IfName+" in the pod", err)
	}
	// The pod before it in this namespace may still wait to be deleted.
	if outer, err := h.LinkByIndex(inner.Attrs().ParentIndex); err == nil && inner.Type() == "veth" && isDoomed(outer) {
		return deleteLink(h, outer)
	}
	return ifNameTaken(at)
}

// record is what is known of the attachment before anything is made.
func (w *wiring) record(at attachment, s *sandbox) Record {
	r := Record{
		Owner: at.Owner, Network: w.Name, Pod: at.pod, Boot: bootID(), Namespace: s.identity(),
		Sticky: w.IPAM.Sticky, CoolDown: int(w.IPAM.CoolDown / time.Second), Scratch: w.scratchDir(),
	}
	if w.Mode == Bridged {
		r.Bridge = w.Bridge
	}
	return r
}

func (w *wiring) allocate(at attachment) ([]ipam.Address, error) {
	addrs, err := w.reservations().Allocate(ipam.Request{
		Owner: at.Owner, Sets: w.sets, Wanted: w.Wanted, Pod: at.pod, Sticky: w.IPAM.Sticky, CoolDown: w.IPAM.CoolDown,
	})
	if err != nil {
		return nil, allocateError(at, err)
	}
	return addrs, nil
}

// allocateError gives the error of an allocation its code.
func allocateError(at attachment, err error) error {
	var full *ipam.ExhaustedError
	var taken *ipam.TakenError
	var outside *ipam.OutOfRangeError
	var badRange *ipam.RangeError
	switch {
	case errors.As(err, &full):
		return fail(types.ErrTryAgainLater, "%v; remove pods, or call GC to free what dead ones left", full)
	case errors.As(err, &taken):
		return fail(ErrTaken, "%v; or remove that pod first", taken)
	case errors.As(err, &outside):
		return fail(types.ErrInvalidNetworkConfig, "%v", outside)
	case errors.As(err, &badRange):
		return fail(types.ErrInvalidNetworkConfig, "network configuration: %v", badRange)
	}
	return ioFail("reserve an address for "+at.String(), err)
}

// wire makes links, addresses, routes and rules. It returns when packets flow.
func (w *wiring) wire(at attachment, s *sandbox, h *netlink.Handle, addrs []ipam.Address) (*types100.Result, error) {
	hostEnd, podEnd := w.ends(at, lease{addrs: addrs, routes: w.routes, mtu: w.mtu})
	if w.Mode == Bridged {
		if err := w.ensureBridge(h); err != nil {
			return nil, err
		}
	}
	outer, err := makeVeth(at, h, s, hostEnd, podEnd)
	if err != nil {
		return nil, err
	}
	if err := hostEnd.attach(host(h), outer); err != nil {
		return nil, err
	}
	inner, err := s.nl.LinkByName(at.IfName)
	if err != nil {
		return nil, ioFail("look up link "+at.IfName+" in the pod", err)
	}
	if err := s.nl.LinkSetUp(loopbackLink()); err != nil {
		return nil, ioFail("set the pod's loopback up", err)
	}
	if err := podEnd.configure(s.place(), inner); err != nil {
		return nil, err
	}
	if err := hostEnd.configure(host(h), outer); err != nil {
		return nil, err
	}
	if err := w.shape(at, h, outer); err != nil {
		return nil, err
	}
	if err := w.openPorts(at, addrs, hostEnd.name); err != nil {
		return nil, err
	}
	links, err := w.read(h, s, outer, inner)
	if err != nil {
		return nil, err
	}
	if w.Mode == Routed {
		if err := w.answerForRouted(h, plain(podEnd.addrs)); err != nil {
			return nil, err
		}
	}
	if err := w.introduce(h, s, links, podEnd.addrs); err != nil {
		return nil, ioFail("announce the pod", err)
	}
	return w.result(at, links, addrs), nil
}

// read returns the links as they are in the end: the bridge, if there is one, has taken
// its first port's MTU; the pod's ends are up. The pod's own is the last.
func (w *wiring) read(h *netlink.Handle, s *sandbox, outer, inner netlink.Link) ([]netlink.Link, error) {
	var links []netlink.Link
	if w.Mode == Bridged {
		br, err := h.LinkByName(w.Bridge)
		if err != nil {
			return nil, ioFail("look up bridge "+w.Bridge, err)
		}
		links = append(links, br)
	}
	for _, l := range []struct {
		nl   *netlink.Handle
		link netlink.Link
	}{{h, outer}, {s.nl, inner}} {
		up, err := awaitUp(l.nl, l.link.Attrs().Index)
		if err != nil {
			return nil, ioFail("set the pod's links up", err)
		}
		links = append(links, up)
	}
	return links, nil
}

// plain are addresses without their lengths.
func plain(list []netip.Prefix) []netip.Addr {
	var out []netip.Addr
	for _, p := range list {
		out = append(out, p.Addr())
	}
	return out
}

func (w *wiring) shape(at attachment, h *netlink.Handle, outer netlink.Link) error {
	if w.Bandwidth == nil {
		return nil
	}
	if err := w.Bandwidth.check(outer); err != nil {
		return fail(types.ErrInvalidNetworkConfig, "runtimeConfig.bandwidth: %v", err)
	}
	if err := w.Bandwidth.apply(h, outer, at.alias()); err != nil {
		return ioFail("limit the bandwidth of "+at.String(), err)
	}
	return nil
}

// portEntryOf is what the attachment needs of the firewall. It reports false if that
// is nothing.
func (w *wiring) portEntryOf(at attachment, addrs []netip.Addr) (portmap.Entry, bool) {
	e := portmap.Entry{
		Attachment: w.portEntry(at.Owner), Holder: at.String(), HostLink: at.hostLink(), Addrs: addrs,
		Mappings: w.Ports, Local: w.subnets,
	}
	if w.Mode == Routed { // all but the pod itself come from elsewhere, and go back there
		e.Local = nil
		for _, a := range addrs {
			e.Local = append(e.Local, fullLength(a))
		}
	}
	if w.IPMasq {
		e.Masquerade = w.networks
	}
	return e, len(e.Mappings) > 0 || w.IPMasq
}

func (w *wiring) openPorts(at attachment, addrs []ipam.Address, link string) error {
	var own []netip.Addr
	for _, a := range addrs {
		own = append(own, a.Prefix.Addr())
	}
	e, needed := w.portEntryOf(at, own)
	if !needed {
		return nil
	}
	if err := e.Validate(); err != nil {
		return fail(types.ErrInvalidNetworkConfig, "runtimeConfig.portMappings: %v", err)
	}
	if err := writeSysctls(host(nil), w.localnet(link)); err != nil {
		return err
	}
	err := w.portmap().Add(context.Background(), e)
	var conflict *portmap.ConflictError
	if errors.As(err, &conflict) {
		return fail(ErrTaken, "%v; use another port, or remove that pod first", conflict)
	}
	if err != nil {
		return ioFail("open the host ports of "+at.String(), err)
	}
	return nil
}

// localnet lets 127.0.0.1 on the host reach pods, which a host port of every IPv4
// address includes.
func (w *wiring) localnet(link string) []sysctl {
	if w.Mode == Bridged {
		link = w.Bridge
	}
	return []sysctl{{"ipv4/conf/" + link + "/route_localnet", "1"}}
}

// result tells the runtime what was made. The pod's own link is the last.
func (w *wiring) result(at attachment, links []netlink.Link, addrs []ipam.Address) *types100.Result {
	res := &types100.Result{CNIVersion: types100.ImplementedSpecVersion, Routes: w.routes, DNS: w.DNS}
	for _, l := range links {
		a := l.Attrs()
		res.Interfaces = append(res.Interfaces, &types100.Interface{Name: a.Name, Mac: a.HardwareAddr.String(), Mtu: a.MTU})
	}
	last := len(links) - 1
	res.Interfaces[last].Sandbox = at.netns
	for _, a := range addrs {
		p := a.Prefix
		if w.Mode == Routed {
			p = fullLength(p.Addr())
		}
		ip := &types100.IPConfig{Interface: types100.Int(last), Address: ipNet(p)}
		if gw, ok := w.gateway(p.Addr().Is4()); ok {
			ip.Gateway = gw.AsSlice()
		}
		res.IPs = append(res.IPs, ip)
	}
	return res
}
