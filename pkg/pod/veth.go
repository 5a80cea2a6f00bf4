package pod

import (
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// loopbackLink is lo, which has the first index in every namespace.
func loopbackLink() netlink.Link {
	return &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "lo", Index: 1}}
}

func hostLinkTaken(at attachment, l netlink.Link) error {
	if owner, ok := ownerOf(l.Attrs().Alias); ok && owner == at.Owner || l.Attrs().Alias == "" {
		return fail(types.ErrInvalidEnvironmentVariables, "CNI_CONTAINERID, CNI_IFNAME: %s is attached already, by link %s; the runtime must call DEL before it calls ADD again", at, at.hostLink())
	}
	return fail(types.ErrTryAgainLater, "link %s, which %s would get, belongs to %q; try again with a new sandbox", at.hostLink(), at, l.Attrs().Alias)
}

func ifNameTaken(at attachment) error {
	return fail(types.ErrInvalidEnvironmentVariables, "CNI_IFNAME: the network namespace %s has a link %s already; use another name, or call DEL of the network that made it", at.netns, at.IfName)
}

// makeVeth makes the pod's link: one end on the host, the other in the pod with
// its final name. Either both exist afterwards, or none. The host's end of a routed pod
// is set up last of all: when a link comes up without a carrier, and then gets one, the
// kernel goes over all routes of the node twice. A port of a bridge is up before the
// pod's end is, so that the bridge forwards from the first packet on.
func makeVeth(at attachment, h *netlink.Handle, s *sandbox, host, pod end) (*netlink.Veth, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = host.name, host.mtu, host.mac
	if host.bridge != "" {
		attrs.Flags = net.FlagUp
	}
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerMTU, veth.PeerHardwareAddr, veth.PeerNamespace = pod.name, uint32(pod.mtu), pod.mac, netlink.NsFd(s.ns)
	err := h.LinkAdd(veth)
	if errors.Is(err, unix.EEXIST) {
		// Somebody was faster since checkFree.
		if l, err := h.LinkByName(host.name); err == nil {
			return nil, hostLinkTaken(at, l)
		}
		return nil, ifNameTaken(at)
	}
	if err != nil {
		return nil, ioFail("add link "+attrs.Name, err)
	}
	return veth, nil
}

// awaitUp returns the link once the kernel passes packets through it. A veth's
// carrier comes from a kernel thread, mostly within a millisecond; asking for the
// link makes that happen at once on newer kernels.
func awaitUp(h *netlink.Handle, index int) (netlink.Link, error) {
	const limit = 5 * time.Second
	for begin, pause := time.Now(), time.Millisecond; ; pause *= 2 {
		l, err := h.LinkByIndex(index)
		if err != nil {
			return nil, err
		}
		if l.Attrs().OperState == netlink.OperUp {
			return l, nil
		}
		if time.Since(begin) > limit {
			return nil, fmt.Errorf("link %s has no carrier after %s", l.Attrs().Name, limit)
		}
		time.Sleep(pause)
	}
}
