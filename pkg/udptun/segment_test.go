package udptun

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

func TestSum(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for n := range 400 {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(r.Uint32() | r.Uint32()) // many ones: many carries
		}
		var want uint64
		for i := 0; i+1 < n; i += 2 {
			want += uint64(binary.NativeEndian.Uint16(b[i:]))
		}
		if n%2 == 1 {
			want += uint64(binary.NativeEndian.Uint16([]byte{b[n-1], 0}))
		}
		if got := fold(sum(0, b)); got != fold(want) {
			t.Fatalf("sum of %d bytes is %#x, want %#x", n, got, fold(want))
		}
	}
}

// shape is a packet as a device with offloads gives it.
type shape struct {
	v6, udp bool
	options int // bytes of TCP options
	payload int
	size    int // of segments
	flags   byte
}

func (s shape) build(r *rand.Rand) (packet, vnet) {
	ip, proto, transport, offset := ipv4Len, byte(protoTCP), tcpLen+s.options, 16
	gso := byte(unix.VIRTIO_NET_HDR_GSO_TCPV4)
	if s.v6 {
		ip, gso = ipv6Len, unix.VIRTIO_NET_HDR_GSO_TCPV6
	}
	if s.udp {
		proto, transport, offset, gso = protoUDP, udpLen, 6, unix.VIRTIO_NET_HDR_GSO_UDP_L4
	}
	p := make(packet, ip+transport+s.payload)
	for i := range p {
		p[i] = byte(r.Uint32())
	}
	if s.v6 {
		p[0], p[6], p[7] = 0x60, proto, 64
	} else {
		p[0], p[6], p[7], p[8], p[9] = 0x45, dontFragment, 0, 64, proto
	}
	p.setLength(len(p))
	t := p[ip:]
	if s.udp {
		binary.BigEndian.PutUint16(t[4:], uint16(len(t)))
	} else {
		t[12], t[13] = byte(transport/4)<<4, s.flags
	}
	binary.NativeEndian.PutUint16(t[offset:], fold(pseudo(p.addrs(), proto, len(t))))
	return p, vnet{needsSum: true, gso: gso, headerLen: uint16(ip + transport), size: uint16(s.size), sumStart: uint16(ip), sumOffset: uint16(offset)}
}

// wellSummed verifies all checksums of a packet, as flannel's end would.
func wellSummed(p packet) bool {
	if _, ok := parse(p); !ok {
		return false
	}
	header, proto := ipv6Len, p[6]
	if !p.isV6() {
		header, proto = int(p[0]&15)*4, p[9]
		if fold(sum(0, p[:header])) != 0xffff {
			return false
		}
	}
	return fold(sum(pseudo(p.addrs(), proto, len(p)-header), p[header:])) == 0xffff
}

func joined(r *run) []byte {
	var out []byte
	for _, io := range r.finish()[1:] {
		out = append(out, unsafe.Slice(io.Base, int(io.Len))...)
	}
	return out
}

// TestSegmentAndCoalesce: what one end cuts the other joins to the same packet.
func TestSegmentAndCoalesce(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	c := &coalescer{udp: true}
	for range 2000 {
		s := shape{v6: r.IntN(2) == 0, udp: r.IntN(3) == 0, flags: tcpACK | byte(r.IntN(2))*tcpPSH, options: 4 * r.IntN(11)}
		s.size = 1 + r.IntN(1400)
		s.payload = s.size + 1 + r.IntN(min(60000, (maxSegments-1)*s.size))
		p, v := s.build(r)
		seg, ok := newSegmenter(p, v)
		if !ok {
			t.Fatalf("%+v refused", s)
		}
		c.n = 0
		for i := range seg.n {
			header, payload := seg.segment(i, make([]byte, maxHeader))
			one := packet(slices.Concat(header, payload))
			if !wellSummed(one) || len(one) != seg.length(i) {
				t.Fatalf("%+v: segment %d is wrong: %x", s, i, one[:len(header)])
			}
			if !c.add(one) {
				t.Fatalf("%+v: no room for segment %d", s, i)
			}
		}
		if c.n != 1 {
			t.Fatalf("%+v: %d segments became %d packets", s, seg.n, c.n)
		}
		got := joined(&c.runs[0])
		if !bytes.Equal(got, p) {
			t.Fatalf("%+v: came back as\n%x, was\n%x", s, got[:60], p[:60])
		}
		if back := readVnet(c.runs[0].vnet[:]); back != v {
			t.Fatalf("%+v: virtio header %+v, was %+v", s, back, v)
		}
	}
}

// TestCoalesceKeepsOrder mixes flows and packets that must go alone, and cuts the
// result again: each flow has the same packets in the same order.
func TestCoalesceKeepsOrder(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	c := &coalescer{udp: true}
	for range 300 {
		sent, got := map[string][]string{}, map[string][]string{}
		c.n = 0
		mixed := mixFlows(r)
		for _, p := range mixed {
			f := flowName(p)
			sent[f] = append(sent[f], string(p))
			if !c.add(slices.Clone(p)) {
				t.Fatal("no room")
			}
		}
		for i := range c.runs[:c.n] {
			whole := packet(joined(&c.runs[i]))
			f := flowName(whole)
			v := readVnet(c.runs[i].vnet[:])
			if v.gso == 0 {
				got[f] = append(got[f], string(whole))
				continue
			}
			seg, ok := newSegmenter(whole, v)
			if !ok {
				t.Fatalf("joined packet %x cannot be cut", whole[:40])
			}
			for j := range seg.n {
				h, payload := seg.segment(j, make([]byte, maxHeader))
				got[f] = append(got[f], string(h)+string(payload))
			}
		}
		for f := range sent {
			if !slices.Equal(sent[f], got[f]) {
				t.Fatalf("flow %x: %d packets became %d, or others", f, len(sent[f]), len(got[f]))
			}
		}
		if len(mixed) > 20 && c.n == len(mixed) {
			t.Error("nothing was joined")
		}
	}
}

func flowName(p packet) string {
	if p.isV6() {
		return string(p.addrs()) + string(p[ipv6Len:][:4])
	}
	return string(p.addrs()) + string(p[ipv4Len:][:4])
}

// mixFlows returns up to 60 packets of up to four flows.
func mixFlows(r *rand.Rand) []packet {
	var queues [][]packet
	for range 1 + r.IntN(4) {
		size := 100 + r.IntN(500)
		s := shape{v6: r.IntN(2) == 0, udp: r.IntN(2) == 0, flags: tcpACK | tcpPSH, options: 12, size: size, payload: size*(2+r.IntN(12)) + r.IntN(100)}
		p, v := s.build(r)
		seg, _ := newSegmenter(p, v)
		var q []packet
		for i := range seg.n {
			h, payload := seg.segment(i, make([]byte, maxHeader))
			q = append(q, slices.Concat(h, payload))
		}
		if i := r.IntN(len(q)); !s.udp && r.IntN(2) == 0 {
			q[i] = withFlags(q[i], tcpACK|tcpFIN|tcpCWR)
		}
		queues = append(queues, q)
	}
	var out []packet
	for len(queues) > 0 {
		i := r.IntN(len(queues))
		out = append(out, queues[i][0])
		if queues[i] = queues[i][1:]; len(queues[i]) == 0 {
			queues = slices.Delete(queues, i, i+1)
		}
	}
	return out
}

func withFlags(p packet, flags byte) packet {
	t, proto := p[ipv4Len:], p[9]
	if p.isV6() {
		t, proto = p[ipv6Len:], p[6]
	}
	t[13], t[16], t[17] = flags, 0, 0
	putSum(t[16:], sum(pseudo(p.addrs(), proto, len(t)), t))
	return p
}

func TestHop(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	for ttl := range 256 {
		p, _ := shape{payload: 10, size: 10}.build(r)
		p[8] = byte(ttl)
		p.sumHeader()
		before := slices.Clone(p)
		if ok := p.hop(); ok != (ttl > 1) {
			t.Errorf("hop of %d: %t", ttl, ok)
		} else if ok && (int(p[8]) != ttl-1 || fold(sum(0, p[:ipv4Len])) != 0xffff) || !ok && !bytes.Equal(p, before) {
			t.Errorf("after hop of %d: %x", ttl, p[:ipv4Len])
		}
	}
}

// FuzzReceive feeds the receiver's path: nothing may fail, and what has been
// joined can be cut again.
func FuzzReceive(f *testing.F) {
	r := rand.New(rand.NewPCG(9, 10))
	for _, s := range []shape{{payload: 300, size: 100, flags: tcpACK}, {v6: true, udp: true, payload: 300, size: 100}} {
		p, v := s.build(r)
		seg, _ := newSegmenter(p, v)
		var all []byte
		for i := range seg.n {
			h, payload := seg.segment(i, make([]byte, maxHeader))
			all = slices.Concat(all, h, payload)
		}
		f.Add(all, uint16(seg.length(0)))
	}
	f.Add([]byte{}, uint16(0))
	f.Fuzz(func(t *testing.T, b []byte, size uint16) {
		c := &coalescer{udp: true}
		for len(b) > 0 {
			n := min(max(1, int(size)), len(b))
			if p, ok := parse(b[:n:n]); ok && p.hop() {
				answerable(p)
				if !c.add(p) {
					break
				}
			}
			b = b[n:]
		}
		for i := range c.runs[:c.n] {
			whole := packet(joined(&c.runs[i]))
			if v := readVnet(c.runs[i].vnet[:]); v.gso != 0 {
				if seg, ok := newSegmenter(whole, v); !ok || seg.n != c.runs[i].n {
					t.Errorf("joined packet %x of %d cannot be cut", whole, c.runs[i].n)
				}
			}
		}
	})
}

// FuzzTransmit feeds the sender's path with a virtio header and a packet.
func FuzzTransmit(f *testing.F) {
	r := rand.New(rand.NewPCG(11, 12))
	for _, s := range []shape{{payload: 300, size: 100, flags: tcpACK}, {v6: true, udp: true, payload: 300, size: 100}} {
		p, v := s.build(r)
		b := make([]byte, vnetLen)
		v.put(b)
		f.Add(append(b, p...))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < vnetLen {
			return
		}
		v := readVnet(b)
		p, ok := parse(b[vnetLen:])
		if !ok || !p.hop() {
			return
		}
		if v.gso == 0 {
			finishSum(p, v)
			return
		}
		seg, ok := newSegmenter(p, v)
		if !ok {
			return
		}
		total := 0
		for i := range seg.n {
			h, payload := seg.segment(i, make([]byte, maxHeader))
			total += len(payload)
			if _, ok := parse(slices.Concat(h, payload)); !ok {
				t.Fatalf("segment %x is no packet", h)
			}
		}
		if total != len(p)-seg.header {
			t.Errorf("%d bytes of payload became %d", len(p)-seg.header, total)
		}
	})
}

func BenchmarkSum(b *testing.B) {
	buf := make([]byte, 65000)
	b.SetBytes(int64(len(buf)))
	for b.Loop() {
		sum(0, buf)
	}
}

func BenchmarkSegment(b *testing.B) {
	p, v := shape{payload: 45 * 1420, size: 1420, options: 12, flags: tcpACK}.build(rand.New(rand.NewPCG(1, 1)))
	b.SetBytes(int64(len(p)))
	hdr := make([]byte, maxHeader)
	for b.Loop() {
		seg, _ := newSegmenter(p, v)
		for i := range seg.n {
			seg.segment(i, hdr)
		}
	}
}

func BenchmarkCoalesce(b *testing.B) {
	p, v := shape{payload: 45 * 1400, size: 1400, options: 12, flags: tcpACK}.build(rand.New(rand.NewPCG(1, 1)))
	seg, _ := newSegmenter(p, v)
	var parts []packet
	for i := range seg.n {
		h, payload := seg.segment(i, make([]byte, maxHeader))
		parts = append(parts, slices.Concat(h, payload))
	}
	c := &coalescer{}
	first := slices.Clone(parts[0])
	b.SetBytes(int64(len(p)))
	for b.Loop() {
		c.n = 0
		copy(parts[0], first)
		for _, q := range parts {
			c.add(q)
		}
		c.runs[0].finish()
	}
}
