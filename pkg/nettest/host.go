package nettest

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Host is a machine of the lab: a network namespace whose eth0 is plugged into
// the switch, and its own mount namespace, in which the directories of Twill, CNI,
// containerd, WireGuard, BIRD and FRR are empty at first, so that all programs run
// with their default paths. The default routes lead to a gateway that does not exist.
type Host struct {
	*NS
	IPv4, IPv6 netip.Addr // of eth0
}

// netSwitch is a namespace with a bridge that has no address and no uplink.
type netSwitch struct {
	*NS
	bridge int // interface index
}

// firstEtcd is n of the first etcd member: 198.51.100.200.
const (
	firstHost = 10
	firstEtcd = 200
)

// NewHost makes the next host: h1 with 198.51.100.11/24 and 2001:db8:51::11/64,
// then h2 with …12, up to h189.
func (l *Lab) NewHost() (*Host, error) {
	l.mu.Lock()
	n := l.hosts + 1
	if firstHost+n >= firstEtcd {
		l.mu.Unlock()
		return nil, fmt.Errorf("make host %d: no address left", n)
	}
	l.hosts = n
	l.mu.Unlock()
	return l.newHost(fmt.Sprintf("h%d", n), firstHost+n)
}

// NewHosts makes the next n hosts.
func (l *Lab) NewHosts(n int) ([]*Host, error) {
	var hosts []*Host
	for range n {
		h, err := l.NewHost()
		if err != nil {
			return nil, err
		}
		hosts = append(hosts, h)
	}
	return hosts, nil
}

func (l *Lab) newHost(name string, n int) (*Host, error) {
	h := &Host{
		IPv4: netip.MustParseAddr(fmt.Sprintf("198.51.100.%d", n)),
		IPv6: netip.MustParseAddr(fmt.Sprintf("2001:db8:51::%d", n)),
	}
	h.NS = &NS{Name: name, Path: netnsPath(l.ID, name), lab: l, mnt: mntPath(l.ID, name), env: l.environ}
	if err := h.boot(); err != nil {
		return nil, fmt.Errorf("make host %s: %w", name, err)
	}
	return h, nil
}

// boot makes the host's namespaces and plugs its cable in.
func (h *Host) boot() error {
	sw, err := h.lab.netSwitch()
	if err == nil {
		err = newNetNS(h.Path)
	}
	if err == nil {
		err = sw.plug(h.NS, h.lab.opts.MTU)
	}
	if err == nil {
		err = h.Do(h.configure)
	}
	if err == nil {
		err = newMountNS(h.mnt, h.Path, filepath.Join(h.lab.Dir, h.Name+".xtables.lock"))
	}
	return err
}

// configure gives eth0 its addresses and default routes.
func (h *Host) configure() error {
	// Duplicate address detection costs a second and finds nothing here.
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/eth0/accept_dad", []byte("0"), 0); err != nil {
		return err
	}
	eth0, err := netlink.LinkByName("eth0")
	if err != nil {
		return fmt.Errorf("find eth0: %w", err)
	}
	if err := netlink.LinkSetUp(eth0); err != nil {
		return fmt.Errorf("set eth0 up: %w", err)
	}
	gateways := []netip.Addr{netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("2001:db8:51::1")}
	for i, p := range []netip.Prefix{netip.PrefixFrom(h.IPv4, 24), netip.PrefixFrom(h.IPv6, 64)} {
		a := &netlink.Addr{IPNet: ipNet(p), Flags: unix.IFA_F_NODAD}
		if err := netlink.AddrAdd(eth0, a); err != nil {
			return fmt.Errorf("add address %s: %w", p, err)
		}
		r := &netlink.Route{LinkIndex: eth0.Attrs().Index, Gw: gateways[i].AsSlice()}
		if err := netlink.RouteAdd(r); err != nil {
			return fmt.Errorf("add default route via %s: %w", gateways[i], err)
		}
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// NewPodNS makes the namespace of a pod on this host, with nothing but loopback:
// wiring it is the CNI plugin's work. Commands in it see the host's files.
func (h *Host) NewPodNS(name string) (*NS, error) {
	if !namePattern.MatchString(name) {
		return nil, fmt.Errorf("make pod %q: name must match %s", name, namePattern)
	}
	n, err := h.lab.newNS(h.Name + "-" + name)
	if err != nil {
		return nil, err
	}
	n.mnt = h.mnt
	return n, nil
}

// Cut pulls the host's cable at the switch: eth0 loses its carrier and keeps its
// configuration.
func (h *Host) Cut() error { return h.cable(netlink.LinkSetDown, "cut") }

// Restore plugs the cable in again.
func (h *Host) Restore() error { return h.cable(netlink.LinkSetUp, "restore") }

func (h *Host) cable(set func(netlink.Link) error, verb string) error {
	sw, err := h.lab.netSwitch()
	if err == nil {
		err = sw.Do(func() error {
			port, err := netlink.LinkByName(h.Name)
			if err != nil {
				return err
			}
			return set(port)
		})
	}
	if err != nil {
		return fmt.Errorf("%s cable of %s: %w", verb, h.Name, err)
	}
	return nil
}

// netSwitch returns the lab's switch and makes it first if need be.
func (l *Lab) netSwitch() (*netSwitch, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.sw != nil {
		return l.sw, nil
	}
	n := &NS{Name: "sw", Path: netnsPath(l.ID, "sw"), lab: l, env: l.environ}
	if err := newNetNS(n.Path); err != nil {
		return nil, fmt.Errorf("make switch: %w", err)
	}
	sw := &netSwitch{NS: n}
	if err := sw.Do(sw.addBridge); err != nil {
		return nil, fmt.Errorf("make switch: %w", err)
	}
	l.sw = sw
	return sw, nil
}

func (s *netSwitch) addBridge() error {
	// The switch itself says nothing on the wire, so captures show hosts only.
	for _, dev := range []string{"all", "default"} {
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+dev+"/disable_ipv6", []byte("1"), 0); err != nil {
			return err
		}
	}
	// Snooping would drop neighbour solicitations of hosts that it has not heard.
	snooping := false
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}, MulticastSnooping: &snooping}
	if err := netlink.LinkAdd(br); err != nil {
		return fmt.Errorf("add br0: %w", err)
	}
	s.bridge = br.Index
	if err := netlink.LinkSetUp(br); err != nil {
		return fmt.Errorf("set br0 up: %w", err)
	}
	return nil
}

// plug makes the cable: a veth pair whose ends are born in their namespaces, so
// that no name on the machine is taken for a moment.
func (s *netSwitch) plug(n *NS, mtu int) error {
	to, err := os.Open(n.Path)
	if err != nil {
		return err
	}
	defer to.Close()
	if mtu == 0 {
		mtu = 1500
	}
	return s.Do(func() error {
		port := &netlink.Veth{
			LinkAttrs:     netlink.LinkAttrs{Name: n.Name, MTU: mtu, MasterIndex: s.bridge},
			PeerName:      "eth0",
			PeerMTU:       uint32(mtu),
			PeerNamespace: netlink.NsFd(to.Fd()),
		}
		if err := netlink.LinkAdd(port); err != nil {
			return fmt.Errorf("add cable to %s: %w", n.Name, err)
		}
		if err := netlink.LinkSetUp(port); err != nil {
			return fmt.Errorf("set port %s up: %w", n.Name, err)
		}
		return nil
	})
}
