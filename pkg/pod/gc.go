package pod

import (
	"errors"
	"slices"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/ipam"
)

// GC removes the attachments that the runtime does not know any more.
func GC(args *skel.CmdArgs) error {
	c, err := ParseConfig(args.StdinData)
	if err != nil {
		return err
	}
	if !c.ValidGiven {
		// cnitool does so, having called DEL for what it knows. To take "no list" for
		// "none" would cut every pod off when a runtime forgets the key.
		return nil
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return ioFail("open netlink socket", err)
	}
	defer h.Close()
	stuck, err := c.collectLinks(h)
	if err != nil {
		err = ioFail("delete links of dead containers", err)
	}
	_, sweep := c.reservations().Sweep(func(o ipam.Owner) bool { return c.valid(o) || slices.Contains(stuck, o) })
	if sweep != nil && err == nil {
		err = ioFail("release addresses of dead containers", sweep)
	}
	return err
}

// valid reports whether the attachment stays. A reservation without an interface's
// name stays for any interface of its container.
func (c *Config) valid(o ipam.Owner) bool {
	return slices.ContainsFunc(c.Valid, func(v ipam.Owner) bool {
		return v == o || o.IfName == "" && v.ContainerID == o.ContainerID
	})
}

// collectLinks deletes our ports of the bridge whose attachments are not valid.
// It returns those it could not delete: they must keep their addresses.
func (c *Config) collectLinks(h *netlink.Handle) (stuck []ipam.Owner, errs error) {
	br, err := h.LinkByName(c.Bridge)
	if isNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	all, err := complete(h.LinkList)
	if err != nil {
		return nil, err
	}
	for _, l := range all {
		o, ours := ownerOf(l.Attrs().Alias)
		if !ours || l.Attrs().MasterIndex != br.Attrs().Index || c.valid(o) {
			continue
		}
		if err := deleteLink(h, l); err != nil {
			stuck, errs = append(stuck, o), errors.Join(errs, err)
		}
	}
	return stuck, errs
}

// Status returns an error if an ADD could not succeed now.
func Status(args *skel.CmdArgs) error {
	c, err := ParseConfig(args.StdinData)
	if err != nil {
		return err
	}
	w, err := newWiring(c, types.ErrPluginNotAvailable)
	if err != nil {
		return as(types.ErrPluginNotAvailable, err)
	}
	for i, subnet := range w.subnets {
		if err := c.reservations().Free(subnet, i); err != nil {
			return fail(types.ErrPluginNotAvailable, "%v", err)
		}
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return ioFail("open netlink socket", err)
	}
	defer h.Close()
	br, err := h.LinkByName(c.Bridge)
	if isNotFound(err) {
		return nil // the first pod makes it
	}
	if err != nil {
		return ioFail("look up bridge "+c.Bridge, err)
	}
	if err := w.checkBridge(br); err != nil {
		return as(types.ErrPluginNotAvailable, err)
	}
	// The pods there have addresses that other nodes do not send to this one.
	if _, err := w.missingGateways(h, br); err != nil {
		return as(types.ErrLimitedConnectivity, err)
	}
	return nil
}

// as gives an error the code that STATUS must answer with.
func as(code uint, err error) error {
	var e *types.Error
	if errors.As(err, &e) {
		return types.NewError(code, e.Msg, e.Details)
	}
	return fail(code, "%v", err)
}
