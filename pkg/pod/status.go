package pod

import (
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/twill-net/twill/pkg/ipam"
)

// Status returns an error if an ADD could not succeed now: in the daemon's words, if
// it runs and knows a reason.
func Status(args *skel.CmdArgs) error {
	c, err := readConf(args)
	if err != nil {
		return as(types.ErrPluginNotAvailable, err)
	}
	w, err := newWiring(c, types.ErrPluginNotAvailable)
	if err != nil {
		return as(types.ErrPluginNotAvailable, err)
	}
	// A daemon that does not run is no reason: pods are wired without it.
	if reason, err := askDaemon(c.HandoffFile, daemonStatus); err == nil && reason != answerOK {
		return fail(types.ErrPluginNotAvailable, "twilld: %s; see `netctl status`", reason)
	}
	if err := c.reservations().Free(ipam.Request{Sets: w.sets, CoolDown: c.IPAM.CoolDown}); err != nil {
		return as(types.ErrPluginNotAvailable, allocateError(attachment{}, err))
	}
	if c.Mode == Routed {
		return nil
	}
	h, err := openNetlink()
	if err != nil {
		return err
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
	addrs, err := w.readBridge(br)
	if err != nil {
		return as(types.ErrPluginNotAvailable, err)
	}
	if len(addrs.old) > 0 {
		return fail(types.ErrLimitedConnectivity, "bridge %s still has %s, of a subnet that this node had before: pods with addresses of it are reached from this node alone; delete them to have them made anew", c.Bridge, addrs.old[0])
	}
	return nil
}
