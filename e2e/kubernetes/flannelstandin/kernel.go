package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	core "k8s.io/api/core/v1"
)

// flannel is a node's flanneld.
type flannel struct {
	conf     netConf
	host     string
	node     string
	overlays []overlay
	peers    map[string][]peer // by node
}

// overlay is one family of the own node.
type overlay struct {
	network, subnet netip.Prefix
	public          netip.Addr
	link            int
	mac             string
}

func (p peer) String() string { return fmt.Sprintf("%s by %s, %s", p.subnet, p.public, p.mac) }

func (o overlay) String() string { return fmt.Sprintf("%s by %s, %s", o.subnet, o.public, o.mac) }

// peer is one family of another node.
type peer struct {
	link   int
	subnet netip.Prefix
	public netip.Addr
	mac    string
}

func (f *flannel) setUp(node *core.Node, masq bool) error {
	uplink, err := uplink()
	if err != nil {
		return err
	}
	mtu := uplink.Attrs().MTU - 50
	env := ""
	for _, network := range []netip.Prefix{f.conf.Network, f.conf.IPv6Network} {
		if !network.IsValid() || network.Addr().Is6() && !f.conf.EnableIPv6 {
			continue
		}
		o := overlay{network: network}
		if o.subnet, err = subnetOf(node, network.Addr().Is6()); err != nil {
			return err
		}
		if err := f.addDevice(&o, uplink, mtu); err != nil {
			return fmt.Errorf("add VXLAN device: %w", err)
		}
		if err := f.addRules(o, masq); err != nil {
			return err
		}
		f.overlays = append(f.overlays, o)
		v6 := map[bool]string{true: "IPV6_"}[network.Addr().Is6()]
		env += fmt.Sprintf("FLANNEL_%[1]sNETWORK=%[2]s\nFLANNEL_%[1]sSUBNET=%[3]s/%[4]d\n", v6, network, o.subnet.Addr().Next(), o.subnet.Bits())
	}
	env += fmt.Sprintf("FLANNEL_MTU=%d\nFLANNEL_IPMASQ=%t\n", mtu, masq)
	const file = "/run/flannel/subnet.env"
	if err := os.WriteFile(file+".tmp", []byte(env), 0o644); err != nil {
		return err
	}
	return os.Rename(file+".tmp", file)
}

// uplink is the interface of the default route.
func uplink() (netlink.Link, error) {
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	for _, r := range routes {
		if (r.Dst == nil || r.Dst.IP.IsUnspecified()) && r.LinkIndex > 0 {
			return netlink.LinkByIndex(r.LinkIndex)
		}
	}
	return nil, errors.Join(errors.New("find uplink: there is no default route"), err)
}

// addDevice finds the device as it should be, or makes it anew.
func (f *flannel) addDevice(o *overlay, uplink netlink.Link, mtu int) error {
	family, name := netlink.FAMILY_V4, fmt.Sprintf("flannel.%d", f.conf.Backend.VNI)
	if o.subnet.Addr().Is6() {
		family, name = netlink.FAMILY_V6, fmt.Sprintf("flannel-v6.%d", f.conf.Backend.VNI)
	}
	addrs, err := netlink.AddrList(uplink, family)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		if a.IP.IsGlobalUnicast() && !o.public.IsValid() {
			public, _ := netip.AddrFromSlice(a.IP)
			o.public = public.Unmap()
		}
	}
	want := &netlink.Vxlan{
		LinkAttrs: netlink.LinkAttrs{Name: name, MTU: mtu}, VxlanId: f.conf.Backend.VNI, VtepDevIndex: uplink.Attrs().Index,
		SrcAddr: net.IP(o.public.AsSlice()), Port: cmp.Or(f.conf.Backend.Port, 8472),
	}
	link, err := netlink.LinkByName(name)
	have, _ := link.(*netlink.Vxlan)
	if err == nil && (have == nil || have.VxlanId != want.VxlanId || have.VtepDevIndex != want.VtepDevIndex ||
		!have.SrcAddr.Equal(want.SrcAddr) || have.Port != want.Port) {
		err = errors.Join(netlink.LinkDel(link), os.ErrNotExist)
	}
	if err != nil {
		if err := netlink.LinkAdd(want); err != nil {
			return err
		}
	}
	if link, err = netlink.LinkByName(name); err != nil {
		return err
	}
	_ = os.WriteFile(f.host+"/proc/sys/net/ipv6/conf/"+name+"/accept_ra", []byte("0"), 0) // no IPv6: no matter
	addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(o.subnet.Addr(), o.subnet.Addr().BitLen()))}
	if err := netlink.AddrReplace(link, addr); err != nil {
		return err
	}
	o.link, o.mac = link.Attrs().Index, link.Attrs().HardwareAddr.String()
	forward := map[bool]string{true: "ipv6/conf/all/forwarding", false: "ipv4/ip_forward"}[o.subnet.Addr().Is6()]
	if err := os.WriteFile(f.host+"/proc/sys/net/"+forward, []byte("1"), 0); err != nil {
		return err
	}
	return netlink.LinkSetUp(link)
}

func (p peer) neigh() *netlink.Neigh {
	return &netlink.Neigh{LinkIndex: p.link, State: netlink.NUD_PERMANENT, Type: unix.RTN_UNICAST, IP: p.subnet.Addr().AsSlice(), HardwareAddr: p.hardware()}
}

func (p peer) fdb() *netlink.Neigh {
	return &netlink.Neigh{LinkIndex: p.link, State: netlink.NUD_PERMANENT, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF, IP: p.public.AsSlice(), HardwareAddr: p.hardware()}
}

func (p peer) route() *netlink.Route {
	return &netlink.Route{LinkIndex: p.link, Dst: ipNet(p.subnet), Gw: p.subnet.Addr().AsSlice(), Flags: int(netlink.FLAG_ONLINK)}
}

func (p peer) hardware() net.HardwareAddr {
	mac, _ := net.ParseMAC(p.mac)
	return mac
}

func (p peer) add() error {
	if err := netlink.NeighSet(p.neigh()); err != nil {
		return fmt.Errorf("add ARP entry: %w", err)
	}
	if err := netlink.NeighSet(p.fdb()); err != nil {
		return fmt.Errorf("add FDB entry: %w", err)
	}
	if err := netlink.RouteReplace(p.route()); err != nil {
		return fmt.Errorf("add route: %w", err)
	}
	return nil
}

// remove goes on after errors, as flanneld does.
func (p peer) remove() {
	_ = netlink.NeighDel(p.neigh())
	_ = netlink.NeighDel(p.fdb())
	_ = netlink.RouteDel(p.route())
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// addRules clears flannel's chains and fills them again. They stay when it ends.
func (f *flannel) addRules(o overlay, masq bool) error {
	command, multicast := "iptables", "224.0.0.0/4"
	if o.subnet.Addr().Is6() {
		command, multicast = "ip6tables", "ff00::/8"
	}
	var doc strings.Builder
	if masq {
		doc.WriteString("*nat\n:FLANNEL-POSTRTG - [0:0]\n")
		for _, rule := range []string{
			"-m mark --mark 0x4000/0x4000 {} -j RETURN",
			"-s SUBNET -d NETWORK {} -j RETURN", "-s NETWORK -d SUBNET {} -j RETURN", "! -s NETWORK -d SUBNET {} -j RETURN",
			"-s NETWORK ! -d MULTICAST {} -j MASQUERADE --random-fully", "! -s NETWORK -d NETWORK {} -j MASQUERADE --random-fully",
		} {
			fmt.Fprintf(&doc, "-A FLANNEL-POSTRTG %s\n", strings.ReplaceAll(rule, "{}", `-m comment --comment "flanneld masq"`))
		}
		doc.WriteString("COMMIT\n")
	}
	doc.WriteString("*filter\n:FLANNEL-FWD - [0:0]\n")
	for _, rule := range []string{"-s NETWORK", "-d NETWORK"} {
		fmt.Fprintf(&doc, "-A FLANNEL-FWD %s -m comment --comment \"flanneld forward\" -j ACCEPT\n", rule)
	}
	doc.WriteString("COMMIT\n")
	rules := strings.NewReplacer("SUBNET", o.subnet.String(), "NETWORK", o.network.String(), "MULTICAST", multicast).Replace(doc.String())
	if err := f.onHost(rules, command+"-restore", "--wait", "--noflush"); err != nil {
		return err
	}
	jump := func(table, chain, to, comment string) error {
		rule := []string{chain, "-m", "comment", "--comment", comment, "-j", to}
		if f.onHost("", command, append([]string{"--wait", "-t", table, "-C"}, rule...)...) == nil {
			return nil
		}
		return f.onHost("", command, append([]string{"--wait", "-t", table, "-A"}, rule...)...)
	}
	if err := jump("filter", "FORWARD", "FLANNEL-FWD", "flanneld forward"); err != nil || !masq {
		return err
	}
	return jump("nat", "POSTROUTING", "FLANNEL-POSTRTG", "flanneld masq")
}

// onHost runs one of the node's own programs.
func (f *flannel) onHost(stdin, name string, args ...string) error {
	cmd := exec.Command("/usr/sbin/"+name, args...)
	cmd.Dir, cmd.Stdin = "/", strings.NewReader(stdin)
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: f.host}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("run %s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}
