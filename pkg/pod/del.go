package pod

import (
	"context"
	"errors"
	"net/netip"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"

	"github.com/twill-net/twill/pkg/ipam"
)

// Del detaches a container. What is gone already, be it the namespace, is no
// error. It needs neither the hand-off nor a configuration that ADD would accept.
func Del(args *skel.CmdArgs) error {
	c, f, err := readBasics(args)
	if err != nil {
		return err
	}
	// Without a readable prevResult the record or the reservations say the addresses.
	_ = f.prevResult(c)
	at := attachment{netns: args.Netns}
	at.ContainerID, at.IfName = args.ContainerID, args.IfName

	h, err := openNetlink()
	if err != nil {
		return err
	}
	defer h.Close()
	rec, err := c.records().find(c.Name, at.Owner)
	if err != nil {
		return ioFail("detach "+at.String(), err)
	}
	if rec == nil {
		// Wired by flannel's plugin, or by a Twill before there were records.
		if err := c.takeBack(h, at, Record{Owner: at.Owner, Addrs: resultAddrs(c.PrevResult)}, later); err != nil {
			return err
		}
		return c.leaveFlannel(args)
	}
	defer rec.release()
	if len(rec.Addrs) == 0 {
		rec.Addrs = resultAddrs(c.PrevResult)
	}
	if err := c.takeBack(h, at, rec.Record, later); err != nil {
		return err
	}
	if err := rec.remove(); err != nil {
		return ioFail("detach "+at.String(), err)
	}
	return nil
}

// takeBack removes whatever there is of an attachment, but for its record. The link
// goes first: an address is free when no pod can use it any more.
func (c *Config) takeBack(h *netlink.Handle, at attachment, rec Record, when deletion) error {
	if err := c.unplug(h, at, when); err != nil {
		return err
	}
	if err := c.deleteHostRoutes(h, rec); err != nil {
		return err
	}
	if err := c.portmap().Remove(context.Background(), c.portEntry(at.Owner)); err != nil {
		return ioFail("remove the host ports of "+at.String(), err)
	}
	if err := c.release(rec); err != nil {
		return ioFail("release the addresses of "+at.String(), err)
	}
	if err := c.dropScratch(rec); err != nil {
		return ioFail("detach "+at.String(), err)
	}
	return nil
}

// release frees the addresses. Without record or prevResult all reservations must be
// searched, unless it is known that each has a record: containerd calls DEL twice for
// each pod.
func (c *Config) release(rec Record) error {
	unrecorded := rec.Network == ""
	if unrecorded && len(rec.Addrs) == 0 && c.records().marked(c.Name) {
		return nil
	}
	return c.reservations().Release(rec.Owner, rec.Addrs, ipam.ReleaseOptions{Pod: rec.Pod, Sticky: rec.Sticky, CoolDown: rec.coolDown()})
}

// unplug deletes the attachment's links: by the host's end if that is ours, else,
// for a pod that another plugin wired, by the pod's end.
func (c *Config) unplug(h *netlink.Handle, at attachment, when deletion) error {
	var ours []netlink.Link
	for _, name := range []string{at.hostLink(), ifbName(at.hostLink())} {
		l, err := h.LinkByName(name)
		if err == nil && mayDelete(at, l) {
			ours = append(ours, l)
		}
		if err != nil && !isNotFound(err) {
			return ioFail("look up link "+name, err)
		}
	}
	if len(ours) > 0 {
		return c.dispose(h, ours, when)
	}
	if at.netns == "" {
		return nil
	}
	s, err := openSandbox(at.netns)
	var e *types.Error
	if errors.As(err, &e) && (e.Code == types.ErrUnknownContainer || e.Code == types.ErrInvalidNetNS) {
		return nil // gone, and the veth with it
	}
	if err != nil {
		return err
	}
	defer s.close()
	l, err := s.nl.LinkByName(at.IfName)
	if isNotFound(err) {
		return nil
	}
	if err != nil {
		return ioFail("look up link "+at.IfName+" in the pod", err)
	}
	if foreign, err := c.isForeign(h, l); foreign || err != nil {
		return err
	}
	return deleteLink(s.nl, l)
}

// isForeign reports whether a pod's link was not made by flannel's plugin for our
// bridge: an attachment that Twill has nothing of must not cost one of another
// network's.
func (c *Config) isForeign(h *netlink.Handle, inner netlink.Link) (bool, error) {
	if inner.Type() != "veth" {
		return true, nil
	}
	outer, err := h.LinkByIndex(inner.Attrs().ParentIndex)
	if isNotFound(err) {
		return true, nil
	}
	if err != nil {
		return false, ioFail("look up the host's end of "+inner.Attrs().Name, err)
	}
	br, err := h.LinkByName(c.Bridge)
	if isNotFound(err) {
		return true, nil
	}
	if err != nil {
		return false, ioFail("look up bridge "+c.Bridge, err)
	}
	a := outer.Attrs()
	_, ours := ownerOf(a.Alias)
	return a.MasterIndex != br.Attrs().Index || ours, nil
}

// mayDelete tells our links from a stranger's that have the same name. An ADD that
// was killed may have left one without alias.
func mayDelete(at attachment, l netlink.Link) bool {
	return (l.Type() == "veth" || l.Type() == "ifb") && (l.Attrs().Alias == "" || l.Attrs().Alias == at.alias())
}

func resultAddrs(r *types100.Result) []netip.Addr {
	if r == nil {
		return nil
	}
	var out []netip.Addr
	for _, ip := range r.IPs {
		out = append(out, prefixOf(ip.Address).Addr())
	}
	return out
}
