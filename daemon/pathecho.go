package daemon

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

// icmpKind is what differs between ICMP (RFC 792, 1191) and ICMPv6 (RFC 4443).
type icmpKind struct {
	network, any string // as of net.ListenPacket
	header       int    // bytes of the IP header
	protocol     byte   // of ICMP
	next, dst    int    // where protocol and destination stand in the IP header
	request      icmp.Type
	asked, reply byte // types of request and reply
	tooBig, code byte // "fragmentation needed", "packet too big"
	options      func(fd int) error
	source       func(net.IP) []byte // control message
}

func icmpOf(f overlay.Family) icmpKind {
	if f == overlay.IPv4 {
		return icmpKind{
			network: "ip4:icmp", any: "0.0.0.0", header: 20, protocol: unix.IPPROTO_ICMP, next: 9, dst: 16,
			request: ipv4.ICMPTypeEcho, asked: byte(ipv4.ICMPTypeEcho), reply: byte(ipv4.ICMPTypeEchoReply),
			tooBig: byte(ipv4.ICMPTypeDestinationUnreachable), code: 4,
			options: optionsV4,
			source:  func(ip net.IP) []byte { return (&ipv4.ControlMessage{Src: ip}).Marshal() },
		}
	}
	return icmpKind{
		network: "ip6:ipv6-icmp", any: "::", header: 40, protocol: unix.IPPROTO_ICMPV6, next: 6, dst: 24,
		request: ipv6.ICMPTypeEchoRequest, asked: byte(ipv6.ICMPTypeEchoRequest), reply: byte(ipv6.ICMPTypeEchoReply),
		tooBig: byte(ipv6.ICMPTypePacketTooBig), code: 0,
		options: optionsV6,
		source:  func(ip net.IP) []byte { return (&ipv6.ControlMessage{Src: ip}).Marshal() },
	}
}

// Both sockets send each packet whole or not at all, whatever path MTU the kernel
// has learned before, and hear no ICMP messages but the two that answer it.
func optionsV4(fd int) error {
	return errors.Join(
		unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE),
		unix.SetsockoptInt(fd, unix.SOL_RAW, unix.ICMP_FILTER,
			^(1<<ipv4.ICMPTypeEchoReply|1<<ipv4.ICMPTypeDestinationUnreachable)),
	)
}

func optionsV6(fd int) error {
	var block unix.ICMPv6Filter // a bit for each type (RFC 3542)
	for i := range block.Data {
		block.Data[i] = ^uint32(0)
	}
	for _, pass := range []ipv6.ICMPType{ipv6.ICMPTypePacketTooBig, ipv6.ICMPTypeEchoReply} {
		block.Data[pass/32] &^= 1 << (pass % 32)
	}
	return errors.Join(
		unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE),
		unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_DONTFRAG, 1),
		unix.SetsockoptICMPv6Filter(fd, unix.IPPROTO_ICMPV6, unix.ICMPV6_FILTER, &block),
	)
}

// echoSocket sends echo requests of one family and matches what comes back.
type echoSocket struct {
	icmpKind
	conn *net.IPConn
	id   uint16

	mu      sync.Mutex
	seq     uint16
	waiting map[uint16]echoWaiter
}

type echoWaiter struct {
	addr    netip.Addr
	answers chan echoAnswer
}

// echoAnswer is what became of an echo request. The zero value: no answer.
type echoAnswer struct {
	arrived bool
	tooBig  bool
	mtu     int // what a router on the path says that it carries; 0: it does not say
}

// openEcho opens the socket; read must run until close.
func openEcho(f overlay.Family) (*echoSocket, error) {
	s := &echoSocket{icmpKind: icmpOf(f), id: uint16(rand.Uint32()), waiting: map[uint16]echoWaiter{}}
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var failed error
		if err := raw.Control(func(fd uintptr) { failed = s.options(int(fd)) }); err != nil {
			return err
		}
		return failed
	}}
	c, err := lc.ListenPacket(context.Background(), s.network, s.any)
	if err != nil {
		return nil, fmt.Errorf("open ICMP socket: %w; needs CAP_NET_RAW", err)
	}
	s.conn = c.(*net.IPConn)
	return s, nil
}

// least is the size of a packet that every path carries.
func (s *echoSocket) least() int { return s.header + 64 }

func (s *echoSocket) close() error { return s.conn.Close() }

// read hands out answers until the socket is closed.
func (s *echoSocket) read(ctx context.Context) {
	buf := make([]byte, 64<<10)
	for {
		n, from, err := s.conn.ReadFromIP(buf) // without the IPv4 header
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // of the network, not of the socket
			sleep(ctx, time.Second)
			continue
		}
		addr, ok := netip.AddrFromSlice(from.IP)
		if !ok {
			continue
		}
		id, seq, about, answer, ok := s.parse(buf[:n])
		if !ok || id != s.id {
			continue
		}
		if answer.arrived {
			about = addr.Unmap()
		}
		s.mu.Lock()
		if w, ok := s.waiting[seq]; ok && w.addr == about {
			select {
			case w.answers <- answer:
			default: // a duplicate
			}
		}
		s.mu.Unlock()
	}
}

// parse reads an echo reply, or a message that says of one of our requests, which
// it quotes with its IP header, that it was too big for the way to about.
func (k icmpKind) parse(b []byte) (id, seq uint16, about netip.Addr, a echoAnswer, ok bool) {
	const head = 8 // of each ICMP message
	switch {
	case len(b) < head:
		return
	case b[0] == k.reply:
		return binary.BigEndian.Uint16(b[4:]), binary.BigEndian.Uint16(b[6:]), about, echoAnswer{arrived: true}, true
	case b[0] != k.tooBig || b[1] != k.code:
		return
	}
	a = echoAnswer{tooBig: true, mtu: int(binary.BigEndian.Uint16(b[6:]))} // of the 32 bits in ICMPv6 the lower ones
	packet := b[head:]
	if len(packet) < k.header {
		return
	}
	header := k.header
	if k.protocol == unix.IPPROTO_ICMP {
		header = int(packet[0]&15) * 4 // there may be options
	}
	if header < k.header || len(packet) < header+head || packet[k.next] != k.protocol {
		return
	}
	about, _ = netip.AddrFromSlice(packet[k.dst:k.header]) // 4 or 16 bytes
	request := packet[header:]
	if request[0] != k.asked {
		return
	}
	return binary.BigEndian.Uint16(request[4:]), binary.BigEndian.Uint16(request[6:]), about, a, true
}

// ping sends a request that makes an IP packet of size bytes and waits for what
// comes back.
func (s *echoSocket) ping(ctx context.Context, t pathTarget, size int) (echoAnswer, error) {
	w := echoWaiter{t.Addr, make(chan echoAnswer, 1)}
	s.mu.Lock()
	s.seq++
	seq := s.seq
	s.waiting[seq] = w
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.waiting, seq)
		s.mu.Unlock()
	}()

	const head = 8
	m := icmp.Message{Type: s.request, Body: &icmp.Echo{
		ID: int(s.id), Seq: int(seq), Data: make([]byte, size-s.header-head),
	}}
	b, err := m.Marshal(nil) // of ICMPv6 the kernel fills in the checksum
	if err != nil {
		return echoAnswer{}, fmt.Errorf("make echo request: %w", err)
	}
	var control []byte
	if t.Local.IsValid() {
		control = s.source(t.Local.AsSlice())
	}
	_, _, err = s.conn.WriteMsgIP(b, control, &net.IPAddr{IP: t.Addr.AsSlice(), Zone: t.Addr.Zone()})
	if errors.Is(err, unix.EMSGSIZE) { // already for our own device
		return echoAnswer{tooBig: true}, nil
	}
	if err != nil {
		return echoAnswer{}, fmt.Errorf("send echo request: %w", err)
	}
	select {
	case a := <-w.answers:
		return a, nil
	case <-ctx.Done():
		return echoAnswer{}, nil
	}
}
