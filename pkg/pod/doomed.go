package pod

import (
	"errors"
	"fmt"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// doomedGroup is the link group of links that are cut off and wait to be deleted.
// The kernel takes 16 to 20 ms for one veth, of which it holds the lock on all links
// most of the time, but hardly more for thirty of a group. The group is all that is
// kept of the wish: a daemon that was killed finds it when it comes back.
const doomedGroup = 0x5457

// deletion says when links are deleted.
type deletion int

const (
	now   deletion = iota
	later          // by the daemon, if it runs
)

// dispose deletes links, or cuts them off from everything at once and leaves the
// deletion to the daemon.
func (c *Config) dispose(h *netlink.Handle, links []netlink.Link, when deletion) error {
	if when == later && c.handOver(h, links) == nil {
		return nil
	}
	for _, l := range links {
		if err := deleteLink(h, l); err != nil {
			return err
		}
	}
	return nil
}

func (c *Config) handOver(h *netlink.Handle, links []netlink.Link) error {
	daemon, err := dialDaemon(c.HandoffFile)
	if err != nil {
		return err
	}
	defer daemon.close()
	for _, l := range links {
		err := h.LinkSetGroup(l, doomedGroup)
		if err == nil {
			// In this order: any change of a link has the bridge enable a port again
			// that has a carrier.
			err = cutOff(l)
		}
		// With the group it may go at once, when the daemon collects another pod's.
		if err != nil && !errors.Is(err, unix.ENODEV) {
			return err
		}
	}
	answer, err := daemon.ask(daemonCollect)
	if err == nil && answer != answerOK {
		err = errors.New(answer)
	}
	return err
}

// cutOff stops all packets from and to a pod. To set its link down would do it, too,
// but waits for a grace period.
func cutOff(l netlink.Link) error {
	if l.Attrs().MasterIndex != 0 {
		return disablePort(l.Attrs().Index)
	}
	for _, family := range []string{"ipv4", "ipv6"} {
		err := sysctl{family + "/conf/" + l.Attrs().Name + "/forwarding", "0"}.write()
		if err != nil && !absent(err) {
			return err
		}
	}
	return nil
}

// disablePort sets a bridge port's state to disabled (IEEE 802.1D, BR_STATE_DISABLED).
func disablePort(index int) error {
	req := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_BRIDGE)
	msg.Index = int32(index)
	req.AddData(msg)
	port := nl.NewRtAttr(unix.IFLA_PROTINFO|unix.NLA_F_NESTED, nil)
	port.AddRtAttr(nl.IFLA_BRPORT_STATE, []byte{0})
	req.AddData(port)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

func deleteLink(h *netlink.Handle, l netlink.Link) error {
	if err := h.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
		return ioFail("delete link "+l.Attrs().Name, err)
	}
	return nil
}

// DeleteDoomed deletes the links that DEL handed over, all in one request.
func DeleteDoomed() error {
	h, err := openNetlink()
	if err != nil {
		return err
	}
	defer h.Close()
	all, err := complete(h.LinkList)
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	var ours []netlink.Link
	foreign := false
	for _, l := range all {
		if l.Attrs().Group != doomedGroup {
			continue
		}
		if strings.HasPrefix(l.Attrs().Alias, aliasPrefix) {
			ours = append(ours, l)
		} else {
			foreign = true
		}
	}
	if len(ours) == 0 {
		return nil
	}
	if !foreign {
		return deleteGroup(doomedGroup)
	}
	// Somebody else uses the number, too.
	var errs error
	for _, l := range ours {
		errs = errors.Join(errs, deleteLink(h, l))
	}
	return errs
}

func deleteGroup(group uint32) error {
	req := nl.NewNetlinkRequest(unix.RTM_DELLINK, unix.NLM_F_ACK)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(group)))
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete links of group %d: %w", group, err)
	}
	return nil
}

// isDoomed reports whether a link is ours and only waits to be deleted.
func isDoomed(l netlink.Link) bool {
	return l.Attrs().Group == doomedGroup && strings.HasPrefix(l.Attrs().Alias, aliasPrefix)
}

// deleteHostRoutes deletes the routes that lead to a pod's addresses, as long as these
// are the pod's: a DEL that was killed and is done again must not take the next pod's.
func (c *Config) deleteHostRoutes(h *netlink.Handle, rec Record) error {
	for _, a := range rec.Addrs {
		o, err := c.reservations().Owner(a)
		if absent(err) || err == nil && !o.Holds(rec.Owner) {
			continue
		}
		if err != nil {
			return ioFail("look up whose "+a.String()+" is", err)
		}
		r := hostRoute(fullLength(a))
		if err := h.RouteDel(r); err != nil && !errors.Is(err, unix.ESRCH) {
			return ioFail("delete route "+r.Dst.String(), err)
		}
		if rec.Bridge != "" || rec.Network == "" {
			continue // a bridged pod answers for itself
		}
		if err := c.stopAnswering(h, a); err != nil {
			return err
		}
	}
	return nil
}
