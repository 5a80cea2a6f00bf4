package pod

import (
	"errors"
	"net/netip"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Del detaches a container. What is gone already, be it the namespace, is no
// error. It needs neither the hand-off nor a configuration that ADD would accept.
func Del(args *skel.CmdArgs) error {
	c, f, err := parseBasics(args.StdinData)
	if err != nil {
		return err
	}
	// Without a readable prevResult the reservations are searched.
	_ = f.prevResult(c)
	at := attachment{netns: args.Netns}
	at.ContainerID, at.IfName = args.ContainerID, args.IfName

	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return ioFail("open netlink socket", err)
	}
	defer h.Close()
	// The link first: an address is free when no pod can use it any more.
	if err := unplug(at, h); err != nil {
		return err
	}
	if err := c.reservations().Release(at.Owner, resultAddrs(c.PrevResult)); err != nil {
		return ioFail("release the addresses of "+at.String(), err)
	}
	return nil
}

// unplug deletes the attachment's veth: by the host's end if that is ours, else,
// for a pod that another plugin wired, by the pod's end.
func unplug(at attachment, h *netlink.Handle) error {
	l, err := h.LinkByName(at.hostLink())
	if err == nil && mayDelete(at, l) {
		return deleteLink(h, l)
	}
	if err != nil && !isNotFound(err) {
		return ioFail("look up link "+at.hostLink(), err)
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
	l, err = s.nl.LinkByName(at.IfName)
	if isNotFound(err) || err == nil && l.Type() != "veth" {
		return nil
	}
	if err != nil {
		return ioFail("look up link "+at.IfName+" in the pod", err)
	}
	return deleteLink(s.nl, l)
}

// mayDelete tells our host's end from a stranger's that has the same name. An ADD
// that was killed may have left it without alias.
func mayDelete(at attachment, l netlink.Link) bool {
	return l.Type() == "veth" && (l.Attrs().Alias == "" || l.Attrs().Alias == at.alias())
}

func deleteLink(h *netlink.Handle, l netlink.Link) error {
	if err := h.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
		return ioFail("delete link "+l.Attrs().Name, err)
	}
	return nil
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
