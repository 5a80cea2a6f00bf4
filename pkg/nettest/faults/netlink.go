//go:build linux && amd64

package faults

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"
)

// protocol names a netlink family.
func protocol(p uint64) string {
	switch p {
	case unix.NETLINK_ROUTE:
		return "route"
	case unix.NETLINK_NETFILTER:
		return "netfilter"
	case unix.NETLINK_GENERIC:
		return "generic"
	}
	return fmt.Sprintf("protocol %d", p)
}

// netlinkEffect says what the messages of one system call are.
func netlinkEffect(proto uint64, data []byte) effect {
	var e effect
	var names []string
	times := map[string]int{}
	for len(data) >= unix.SizeofNlMsghdr {
		size := int(binary.NativeEndian.Uint32(data))
		if size < unix.SizeofNlMsghdr || size > len(data) {
			break
		}
		typ, body := binary.NativeEndian.Uint16(data[4:]), data[unix.SizeofNlMsghdr:size]
		name, changes := message(proto, typ, body)
		e.changes = e.changes || changes
		if times[name]++; times[name] == 1 {
			names = append(names, name)
		}
		data = data[min(align(size), len(data)):]
	}
	for i, n := range names {
		if times[n] > 1 {
			names[i] = fmt.Sprintf("%d×%s", times[n], n)
		}
	}
	if e.what = strings.Join(names, ", "); e.what == "" {
		return effect{what: "netlink " + protocol(proto), changes: true}
	}
	return e
}

func align(n int) int { return (n + 3) &^ 3 }

func message(proto uint64, typ uint16, body []byte) (name string, changes bool) {
	switch {
	case proto == unix.NETLINK_ROUTE && typ >= unix.RTM_BASE:
		return routeMessage(typ, body)
	case proto == unix.NETLINK_NETFILTER:
		return filterMessage(typ)
	}
	return fmt.Sprintf("%s message %d", protocol(proto), typ), true
}

// routeObject is how a kind of rtnetlink message reads.
type routeObject struct {
	name   string
	header int // length of the fixed part
	detail func(header []byte, attrs map[uint16][]byte) string
}

const (
	sizeofTcMsg = 20     // struct tcmsg
	nlaTypeMask = 0x3fff // without NLA_F_NESTED and NLA_F_NET_BYTEORDER
)

func routeMessage(typ uint16, body []byte) (string, bool) {
	// Messages are numbered by fours, rtnetlink(7): NEW, DEL, GET, SET.
	o, ok := map[uint16]routeObject{
		unix.RTM_NEWLINK:    {"LINK", unix.SizeofIfInfomsg, linkDetail},
		unix.RTM_NEWADDR:    {"ADDR", unix.SizeofIfAddrmsg, addrDetail},
		unix.RTM_NEWROUTE:   {"ROUTE", unix.SizeofRtMsg, routeDetail},
		unix.RTM_NEWNEIGH:   {"NEIGH", unix.SizeofNdMsg, neighDetail},
		unix.RTM_NEWRULE:    {"RULE", unix.SizeofRtMsg, nil},
		unix.RTM_NEWQDISC:   {"QDISC", sizeofTcMsg, trafficDetail},
		unix.RTM_NEWTCLASS:  {"TCLASS", sizeofTcMsg, trafficDetail},
		unix.RTM_NEWTFILTER: {"TFILTER", sizeofTcMsg, trafficDetail},
	}[typ&^3]
	if !ok {
		o.name = fmt.Sprintf("%d", typ)
	}
	op := [...]string{"NEW", "DEL", "GET", "SET"}[typ&3]
	name := "RTM_" + op + o.name
	if o.detail != nil && len(body) >= o.header {
		if d := o.detail(body, attributes(body[o.header:])); d != "" {
			name += " " + d
		}
	}
	return name, op != "GET"
}

func attributes(b []byte) map[uint16][]byte {
	out := map[uint16][]byte{}
	for len(b) >= 4 {
		size, typ := int(binary.NativeEndian.Uint16(b)), binary.NativeEndian.Uint16(b[2:])&nlaTypeMask
		if size < 4 || size > len(b) {
			break
		}
		out[typ] = b[4:size]
		b = b[min(align(size), len(b)):]
	}
	return out
}

func text(b []byte) string { return strings.TrimRight(string(b), "\x00") }

func index(header []byte) string {
	if i := binary.NativeEndian.Uint32(header[4:]); i != 0 {
		return fmt.Sprintf("link %d", i)
	}
	return ""
}

func linkDetail(h []byte, attrs map[uint16][]byte) string {
	words := []string{index(h)}
	if info := attributes(attrs[unix.IFLA_LINKINFO]); len(info) > 0 {
		words = append(words, text(info[unix.IFLA_INFO_KIND]))
	}
	for _, a := range []struct {
		typ  uint16
		name string
	}{
		{unix.IFLA_IFNAME, ""},
		{unix.IFLA_ALT_IFNAME, ""},
		{unix.IFLA_IFALIAS, "alias"},
		{unix.IFLA_ADDRESS, "MAC"},
		{unix.IFLA_MASTER, "master"},
		{unix.IFLA_MTU, "MTU"},
		{unix.IFLA_AF_SPEC, "family options"},
		{unix.IFLA_PROTINFO, "port options"},
		{unix.IFLA_PROMISCUITY, "promiscuity"},
	} {
		v, ok := attrs[a.typ]
		if !ok {
			continue
		}
		if a.name != "" {
			words = append(words, a.name)
		}
		switch a.typ {
		case unix.IFLA_IFNAME, unix.IFLA_ALT_IFNAME, unix.IFLA_IFALIAS:
			words = append(words, text(v))
		case unix.IFLA_ADDRESS:
			words = append(words, net.HardwareAddr(v).String())
		}
	}
	flags, change := binary.NativeEndian.Uint32(h[8:]), binary.NativeEndian.Uint32(h[12:])
	if change&unix.IFF_UP != 0 && flags&unix.IFF_UP != 0 {
		words = append(words, "up")
	}
	return strings.TrimSpace(strings.Join(words, " "))
}

// address reads an address; "" if there is none.
func address(b []byte) string {
	a, ok := netip.AddrFromSlice(b)
	if !ok {
		return ""
	}
	return a.String()
}

func addrDetail(h []byte, attrs map[uint16][]byte) string {
	a := address(attrs[unix.IFA_LOCAL])
	if a == "" {
		a = address(attrs[unix.IFA_ADDRESS])
	}
	return strings.TrimSpace(index(h) + " " + a)
}

func routeDetail(h []byte, attrs map[uint16][]byte) string {
	dst := "default"
	if a := address(attrs[unix.RTA_DST]); a != "" {
		dst = fmt.Sprintf("%s/%d", a, h[1])
	}
	if gw := address(attrs[unix.RTA_GATEWAY]); gw != "" {
		dst += " via " + gw
	}
	return dst
}

func neighDetail(h []byte, attrs map[uint16][]byte) string {
	return strings.TrimSpace(index(h) + " " + address(attrs[unix.NDA_DST]))
}

func trafficDetail(h []byte, attrs map[uint16][]byte) string {
	return strings.TrimSpace(index(h) + " " + text(attrs[unix.TCA_KIND]))
}

// filterMessage names messages of nftables and of connection tracking.
func filterMessage(typ uint16) (string, bool) {
	var names []string
	sub, n := typ>>8, int(typ&0xff)
	switch {
	case sub == 0 && n == unix.NFNL_MSG_BATCH_BEGIN:
		return "batch", false
	case sub == 0 && n == unix.NFNL_MSG_BATCH_END:
		return "commit", true
	case sub == unix.NFNL_SUBSYS_NFTABLES:
		names = strings.Fields("NEWTABLE GETTABLE DELTABLE NEWCHAIN GETCHAIN DELCHAIN NEWRULE GETRULE DELRULE NEWSET GETSET DELSET " +
			"NEWSETELEM GETSETELEM DELSETELEM NEWGEN GETGEN TRACE NEWOBJ GETOBJ DELOBJ GETOBJ_RESET NEWFLOWTABLE GETFLOWTABLE " +
			"DELFLOWTABLE GETRULE_RESET DESTROYTABLE DESTROYCHAIN DESTROYRULE DESTROYSET DESTROYSETELEM DESTROYOBJ DESTROYFLOWTABLE")
	case sub == unix.NFNL_SUBSYS_NFT_COMPAT:
		return "extension's revision", false
	case sub == unix.NFNL_SUBSYS_CTNETLINK:
		names = strings.Fields("NEWCONNTRACK GETCONNTRACK DELCONNTRACK GETCONNTRACK_CTRZERO")
	}
	if n >= len(names) {
		return fmt.Sprintf("netfilter message %d", typ), true
	}
	return names[n], !strings.HasPrefix(names[n], "GET")
}
