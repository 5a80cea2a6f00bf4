package portmap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

// A flow that the kernel tracks keeps the translation of its first packet. What a
// client sends on from the same port would go where it went before the rules
// changed, so the flows that a change is about are forgotten.

// flow is one of them. NAT shows in the reply: it comes from where the packets
// really went.
type flow struct {
	protocol   uint8
	dst, reply netip.AddrPort // destination as sent; source of the replies
	assured    bool           // both sides have spoken
	key        []byte         // family and attributes that name it to the kernel
}

// forgetGone deletes the flows that were sent to pods that have gone.
func forgetGone(entries []Entry) error {
	return forget(entries, func(f forward, x flow) bool { return x.reply == f.to && x.dst.Addr() != f.to.Addr() })
}

// forgetStray deletes the flows that the pods' rules came too late for: those to
// one of the node's own addresses that were sent to nobody else. A TCP or SCTP
// connection that stands is one of the node's own programs' and remains.
func forgetStray(entries []Entry) error {
	var own map[netip.Addr]bool
	return forget(entries, func(f forward, x flow) bool {
		if x.reply != x.dst || x.assured && x.protocol != unix.IPPROTO_UDP {
			return false
		}
		if own == nil {
			own = ownAddresses()
		}
		return x.dst.Addr().IsLoopback() || own[x.dst.Addr()]
	})
}

func ownAddresses() map[netip.Addr]bool {
	out := map[netip.Addr]bool{}
	addrs, _ := net.InterfaceAddrs() // without them no flow is deleted
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok {
			if ip, ok := netip.AddrFromSlice(n.IP); ok {
				out[ip.Unmap()] = true
			}
		}
	}
	return out
}

// service is what the kernel is asked for: the flows of one family, as they were
// sent.
type service struct {
	family   uint8 // AF_INET or AF_INET6; the kernel filters none else
	protocol uint8
	port     uint16
}

func protocolNumber(name string) uint8 {
	return map[string]uint8{"tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP, "sctp": unix.IPPROTO_SCTP}[name]
}

// forget deletes the flows to the entries' host ports for which stale is true of
// one of the forwards.
func forget(entries []Entry, stale func(forward, flow) bool) error {
	forwards := map[service][]forward{}
	for _, e := range entries {
		for _, family := range families() {
			for _, f := range e.forwards(family) {
				s := service{unix.AF_INET, protocolNumber(f.protocol), f.port}
				if family == overlay.IPv6 {
					s.family = unix.AF_INET6
				}
				forwards[s] = append(forwards[s], f)
			}
		}
	}
	for s, fs := range forwards {
		var found []flow
		err := s.dump(func(x flow) {
			for _, f := range fs {
				if (!f.host.IsValid() || f.host == x.dst.Addr()) && stale(f, x) {
					found = append(found, x)
					return
				}
			}
		})
		for _, x := range found {
			err = errors.Join(err, x.delete())
		}
		if err != nil {
			return fmt.Errorf("forget flows to port %d: %w", s.port, err)
		}
	}
	return nil
}

// From linux/netfilter/nfnetlink_conntrack.h and, for the flags, the kernel's
// nf_internals.h. The filter is known since Linux 5.8; kernels before ignore it
// and send all flows, so what comes is compared again.
const (
	ctaFilter          = 25
	ctaFilterOrigFlags = 1
	filterProtocol     = 1 << 3
	filterDstPort      = 1 << 5
	statusAssured      = 1 << 2 // IPS_ASSURED of linux/netfilter/nf_conntrack_common.h
	conntrackSubsystem = 1
)

func request(operation, flags int, family uint8) *nl.NetlinkRequest {
	r := nl.NewNetlinkRequest(conntrackSubsystem<<8|operation, flags)
	r.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: nl.NFNETLINK_V0})
	return r
}

// dump calls each for the flows of s.
func (s service) dump(each func(flow)) error {
	err := s.dumpFrom(s.request(true), each)
	if refused(err) {
		err = s.dumpFrom(s.request(false), each)
	}
	if refused(err) {
		return nil // without ctnetlink, no flow can be deleted
	}
	return err
}

func refused(err error) bool { return errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) }

func (s service) request(filtered bool) *nl.NetlinkRequest {
	r := request(nl.IPCTNL_MSG_CT_GET, unix.NLM_F_DUMP, s.family)
	if filtered {
		tuple := nl.NewRtAttr(unix.NLA_F_NESTED|nl.CTA_TUPLE_ORIG, nil)
		proto := tuple.AddRtAttr(unix.NLA_F_NESTED|nl.CTA_TUPLE_PROTO, nil)
		proto.AddRtAttr(nl.CTA_PROTO_NUM, []byte{s.protocol})
		proto.AddRtAttr(nl.CTA_PROTO_DST_PORT, nl.BEUint16Attr(s.port))
		filter := nl.NewRtAttr(unix.NLA_F_NESTED|ctaFilter, nil)
		filter.AddRtAttr(ctaFilterOrigFlags, nl.Uint32Attr(filterProtocol|filterDstPort))
		r.AddData(tuple)
		r.AddData(filter)
	}
	return r
}

func (s service) dumpFrom(r *nl.NetlinkRequest, each func(flow)) error {
	return r.ExecuteIter(unix.NETLINK_NETFILTER, 0, func(msg []byte) bool {
		if x, ok := parseFlow(msg); ok && x.protocol == s.protocol && x.dst.Port() == s.port {
			each(x)
		}
		return true
	})
}

// delete succeeds if the flow has ended meanwhile.
func (x flow) delete() error {
	r := request(nl.IPCTNL_MSG_CT_DELETE, unix.NLM_F_ACK, x.key[0])
	r.AddRawData(x.key[1:])
	if _, err := r.Execute(unix.NETLINK_NETFILTER, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

// parseFlow reads a message of ctnetlink: struct nfgenmsg and attributes.
func parseFlow(msg []byte) (flow, bool) {
	const header = 4
	if len(msg) < header {
		return flow{}, false
	}
	x := flow{key: []byte{msg[0]}}
	sent, answered := false, false
	for kind, value := range attributes(msg[header:]) {
		flags := 0
		switch kind {
		case nl.CTA_TUPLE_ORIG:
			_, x.dst, x.protocol, sent = parseTuple(value)
			flags = unix.NLA_F_NESTED
		case nl.CTA_TUPLE_REPLY:
			x.reply, _, _, answered = parseTuple(value)
			continue
		case nl.CTA_STATUS:
			x.assured = len(value) == 4 && binary.BigEndian.Uint32(value)&statusAssured != 0
			continue
		case nl.CTA_ZONE, nl.CTA_ID:
		default:
			continue
		}
		x.key = append(x.key, nl.NewRtAttr(flags|int(kind), value).Serialize()...)
	}
	return x, sent && answered
}

func parseTuple(b []byte) (src, dst netip.AddrPort, protocol uint8, ok bool) {
	var from, to netip.Addr
	var sport, dport uint16
	for part, nested := range attributes(b) {
		for kind, value := range attributes(nested) {
			switch {
			case part == nl.CTA_TUPLE_IP && (kind == nl.CTA_IP_V4_SRC || kind == nl.CTA_IP_V6_SRC):
				from, _ = netip.AddrFromSlice(value)
			case part == nl.CTA_TUPLE_IP && (kind == nl.CTA_IP_V4_DST || kind == nl.CTA_IP_V6_DST):
				to, _ = netip.AddrFromSlice(value)
			case part == nl.CTA_TUPLE_PROTO && kind == nl.CTA_PROTO_NUM && len(value) == 1:
				protocol = value[0]
			case part == nl.CTA_TUPLE_PROTO && kind == nl.CTA_PROTO_SRC_PORT && len(value) == 2:
				sport = binary.BigEndian.Uint16(value)
			case part == nl.CTA_TUPLE_PROTO && kind == nl.CTA_PROTO_DST_PORT && len(value) == 2:
				dport = binary.BigEndian.Uint16(value)
			}
		}
	}
	return netip.AddrPortFrom(from, sport), netip.AddrPortFrom(to, dport), protocol, from.IsValid() && to.IsValid() && protocol != 0
}

// attributes walks netlink attributes by kind; the flags of the kind are dropped.
func attributes(b []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= unix.SizeofNlAttr {
			n := int(binary.NativeEndian.Uint16(b))
			if n < unix.SizeofNlAttr || n > len(b) {
				return
			}
			if !yield(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofNlAttr:n]) {
				return
			}
			b = b[min((n+3)&^3, len(b)):]
		}
	}
}
