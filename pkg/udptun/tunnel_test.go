package udptun_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/udptun"
)

// open starts a tunnel of node i in this process; the test closes it at the latest.
func (p *pair) open(t testing.TB, i, via int, more ...func(*udptun.Options)) *udptun.Tunnel {
	t.Helper()
	o := udptun.Options{Device: device, Port: port, Own: own(i), Peers: p.peers(i, via), Queues: 2}
	for _, f := range more {
		f(&o)
	}
	var tun *udptun.Tunnel
	err := p.ns[i].Do(func() (err error) {
		tun, err = udptun.Open(o)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tun.Close() })
	return tun
}

// openBoth makes the devices and the tunnels of both nodes.
func (p *pair) openBoth(t testing.TB, via int) [2]*udptun.Tunnel {
	t.Helper()
	var out [2]*udptun.Tunnel
	for i := range p.ns {
		p.addDevice(t, i)
		out[i] = p.open(t, i, via)
	}
	return out
}

func TestPackets(t *testing.T) {
	nettest.CheckLeaks(t)
	for via, outer := range []string{"IPv4", "IPv6"} {
		t.Run("over "+outer, func(t *testing.T) {
			p := newPair(t)
			tuns := p.openBoth(t, via)
			for _, to := range inner(1) {
				for _, size := range []string{"0", "56", "1400", "1424", "1425", "9000", "60000"} {
					p.run(t, 0, "ping", "-c", "1", "-W", "5", "-s", size, to.String())
				}
				for _, dir := range [][2]int{{0, 1}, {1, 0}} {
					at := inner(dir[1])[0]
					if to.Is6() {
						at = inner(dir[1])[1]
					}
					if _, err := nettest.Transfer(p.ns[dir[0]], p.ns[dir[1]], at, 50_000_001); err != nil {
						t.Error(err)
					}
				}
			}
			for i, tun := range tuns {
				s := tun.Stats()
				if s.Sent.Packets == 0 || s.Received.Packets == 0 || s.Received.Drops != (udptun.Drops{}) || s.Sent.Drops.Malformed+s.Sent.Drops.Refused != 0 {
					t.Errorf("node %d: %+v", i, s)
				}
			}
		})
	}
}

// TestAllSizes sends payloads of many sizes each way by TCP and by UDP, in
// datagrams that are fragmented and that UDP_SEGMENT cuts.
func TestAllSizes(t *testing.T) {
	nettest.CheckLeaks(t)
	p := newPair(t)
	p.openBoth(t, 0)
	var sizes []int
	for n := 1; n <= 65535; n += 1 + n/40 {
		sizes = append(sizes, n)
	}
	for mss := 1388; mss < 65535; mss += 1388 { // around full segments
		sizes = append(sizes, mss-12, mss-1, mss, mss+1, mss+12)
	}
	sizes = append(sizes, 65535)
	for f, at := range inner(1) {
		t.Run("tcp "+at.String(), func(t *testing.T) { p.tcpSizes(t, f, sizes) })
		t.Run("udp "+at.String(), func(t *testing.T) { p.udpSizes(t, f, sizes) })
		t.Run("udp segments "+at.String(), func(t *testing.T) { p.udpSegments(t, f) })
	}
}

func random(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	return b
}

func (p *pair) tcpSizes(t *testing.T, family int, sizes []int) {
	var l net.Listener
	err := p.ns[1].Do(func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(inner(1)[family], 0).String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		_, _ = io.Copy(c, c)
	}()
	c, err := p.ns[0].DialContext(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
	data, back := random(65535), make([]byte, 65535)
	for _, n := range sizes {
		if _, err := c.Write(data[:n]); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, back[:n]); err != nil {
			t.Fatalf("%d bytes: %v", n, err)
		}
		if !bytes.Equal(back[:n], data[:n]) {
			t.Fatalf("%d bytes came back changed", n)
		}
	}
}

// listenUDP opens a socket in node 1 and one in node 0 that is connected to it.
func (p *pair) listenUDP(t *testing.T, family int) (near, far *net.UDPConn) {
	t.Helper()
	err := p.ns[1].Do(func() (err error) {
		far, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(inner(1)[family], 0)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { far.Close() })
	c, err := p.ns[0].DialContext(t.Context(), "udp", far.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = far.SetReadDeadline(time.Now().Add(time.Minute))
	return c.(*net.UDPConn), far
}

func (p *pair) udpSizes(t *testing.T, family int, sizes []int) {
	near, far := p.listenUDP(t, family)
	data, got := random(65535), make([]byte, 65536)
	for _, n := range sizes {
		if n > 65507 {
			continue
		}
		if _, err := near.Write(data[:n]); err != nil {
			t.Fatalf("%d bytes: %v", n, err)
		}
		if m, err := far.Read(got); err != nil || !bytes.Equal(got[:m], data[:n]) {
			t.Fatalf("of %d bytes came %d: %v", n, m, err)
		}
	}
}

func (p *pair) udpSegments(t *testing.T, family int) {
	near, far := p.listenUDP(t, family)
	raw, err := near.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{100, 999, 1300} {
		const udpSegment = 103
		_ = raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, udpSegment, size) })
		if err != nil {
			t.Fatal(err)
		}
		data, got := random(40*size+7), make([]byte, 65536)
		if _, err := near.Write(data); err != nil {
			t.Fatal(err)
		}
		for len(data) > 0 {
			n := min(size, len(data))
			if m, err := far.Read(got); err != nil || !bytes.Equal(got[:m], data[:n]) {
				t.Fatalf("of a segment of %d bytes came %d: %v", n, m, err)
			}
			data = data[n:]
		}
	}
}

// TestErrorsReachTheSender looks at what ping is told.
func TestErrorsReachTheSender(t *testing.T) {
	nettest.CheckLeaks(t)
	p := newPair(t)
	tuns := p.openBoth(t, 0)
	// The path to the peer is smaller than the device believes.
	p.ip(t, 0, "route add 198.51.100.2/32 dev eth0 mtu lock 1400")
	tests := []struct{ name, args, want string }{
		{"no peer", "10.5.9.9", "Destination Net Unreachable"},
		{"no peer v6", "fd00:5:9::9", "No route"},
		{"over here", "-t 1 10.5.2.1", "Time to live exceeded"},
		{"over there", "-t 2 10.5.2.1", "Time to live exceeded"},
		{"over here v6", "-t 1 fd00:5:2::1", "Hop limit"},
		{"over there v6", "-t 2 fd00:5:2::1", "Hop limit"},
		{"enough", "-t 3 10.5.2.1", "1 received"},
		{"too big", "-M do -s 1400 10.5.2.1", "Frag needed and DF set (mtu = 1372)"},
		{"too big v6", "-M do -s 1380 fd00:5:2::1", "Packet too big: mtu=1372"},
		{"may be fragmented", "-M dont -s 1400 10.5.2.1", "1 received"},
	}
	for _, tt := range tests {
		// Again, for the neighbour table is the whole machine's, and other tests
		// may have filled it.
		var out string
		var err error
		for range 5 {
			out, err = p.ns[0].Run("ping", append([]string{"-c", "1", "-W", "2"}, strings.Fields(tt.args)...)...)
			if strings.Contains(out, tt.want) {
				break
			}
		}
		if !strings.Contains(out, tt.want) {
			t.Errorf("%s: ping does not say %q:\n%s%v", tt.name, tt.want, out, err)
		}
	}
	s, far := tuns[0].Stats(), tuns[1].Stats()
	if d := s.Sent.Drops; d.NoPeer < 2 || d.TTL < 2 || d.TooBig < 2 {
		t.Errorf("here: %+v", d)
	}
	if d := far.Received.Drops; d.TTL < 2 {
		t.Errorf("there: %+v", d)
	}
	// TCP finds the size of the path.
	if _, err := nettest.Transfer(p.ns[0], p.ns[1], inner(1)[0], 5_000_000); err != nil {
		t.Error(err)
	}
}

// TestForeignPackets: what is not for this node does not enter it.
func TestForeignPackets(t *testing.T) {
	nettest.CheckLeaks(t)
	p := newPair(t)
	tuns := p.openBoth(t, 0)
	tuns[1].SetOwn([]netip.Prefix{netip.MustParsePrefix("10.5.77.0/24")})
	if out, err := p.ns[0].Run("ping", "-c", "1", "-W", "1", inner(1)[0].String()); err == nil {
		t.Errorf("answered: %s", out)
	}
	if s := tuns[1].Stats(); s.Received.Drops.Foreign == 0 {
		t.Errorf("%+v", s.Received)
	}
	tuns[1].SetOwn(own(1))
	p.run(t, 0, "ping", "-c", "1", "-W", "1", inner(1)[0].String())
}

// TestWithFlannelsEnd: the far end knows of no offload, and verifies checksums.
func TestWithFlannelsEnd(t *testing.T) {
	nettest.CheckLeaks(t)
	for via, outer := range []string{"IPv4", "IPv6"} {
		t.Run("over "+outer, func(t *testing.T) {
			p := newPair(t)
			p.addDevice(t, 0)
			p.open(t, 0, via)
			p.ip(t, 1, "tuntap add mode tun name "+device)
			p.configureDevice(t, 1)
			var far *udptun.Proxy
			err := p.ns[1].Do(func() (err error) {
				far, err = udptun.NewProxy(device, netip.AddrPortFrom(p.addrs[1][via], port), netip.AddrPortFrom(p.addrs[0][via], port))
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(far.Close)
			for f, to := range inner(1) {
				p.run(t, 0, "ping", "-c", "1", "-W", "5", "-s", "5000", to.String())
				p.run(t, 1, "ping", "-c", "1", "-W", "5", "-s", "1400", inner(0)[f].String())
				p.udpSegments(t, f)
				if _, err := nettest.Transfer(p.ns[0], p.ns[1], to, 5_000_001); err != nil {
					t.Error(err)
				}
				if _, err := nettest.Transfer(p.ns[1], p.ns[0], inner(0)[f], 5_000_001); err != nil {
					t.Error(err)
				}
			}
			if far.Bad.Load() > 0 || far.Packets.Load() < 2*5_000_000/1452 {
				t.Errorf("%d of %d packets are wrong", far.Bad.Load(), far.Packets.Load())
			}
		})
	}
}

// TestSetPeersUnderTraffic replaces the table a thousand times.
func TestSetPeersUnderTraffic(t *testing.T) {
	nettest.CheckLeaks(t)
	p := newPair(t)
	tuns := p.openBoth(t, 0)
	probe, err := nettest.StartProbe(p.ns[0], p.ns[1], inner(1)[0])
	if err != nil {
		t.Fatal(err)
	}
	for i := range 1000 {
		for n, tun := range tuns {
			peers := p.peers(n, 0)
			for j := range i % 100 {
				peers = append(peers, udptun.Peer{Subnet: netip.PrefixFrom(addr("10.6.%d.0", j), 24), Addr: netip.MustParseAddrPort("198.51.100.77:8285")})
			}
			tun.SetPeers(peers)
		}
		time.Sleep(time.Millisecond / 2)
	}
	r, err := probe.Stop()
	if err != nil {
		t.Fatal(err)
	}
	if r.Lost > 0 || r.Sent < 100 {
		t.Error(r)
	}
}

// TestHandover replaces the tunnel of a node under traffic, with its descriptors
// and without.
func TestHandover(t *testing.T) {
	nettest.CheckLeaks(t)
	p := newPair(t)
	tun := p.openBoth(t, 0)[1]
	probe, err := nettest.StartProbe(p.ns[0], p.ns[1], inner(1)[0])
	if err != nil {
		t.Fatal(err)
	}
	var pauses []time.Duration
	for range 10 {
		files, err := tun.Files()
		if err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if err := tun.Close(); err != nil {
			t.Fatal(err)
		}
		tun = p.open(t, 1, 0, func(o *udptun.Options) { o.Files = files })
		pauses = append(pauses, time.Since(begin))
		for _, f := range files {
			f.Close()
		}
		time.Sleep(20 * time.Millisecond)
	}
	r, err := probe.Stop()
	if err != nil {
		t.Fatal(err)
	}
	if r.Lost > 0 || r.Sent < 100 {
		t.Error(r)
	}
	t.Logf("handed over: pauses %v, %v", pauses, r)

	if probe, err = nettest.StartProbe(p.ns[0], p.ns[1], inner(1)[0]); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := tun.Close(); err != nil {
		t.Fatal(err)
	}
	p.open(t, 1, 0)
	pause := time.Since(begin)
	time.Sleep(100 * time.Millisecond)
	if r, err = probe.Stop(); err != nil {
		t.Fatal(err)
	}
	t.Logf("opened anew: pause %v, %v", pause, r)
}

func TestOpenErrors(t *testing.T) {
	nettest.CheckLeaks(t)
	p := newPair(t)
	p.addDevice(t, 0)
	p.ip(t, 0, "tuntap add mode tun name plain0")
	var taken net.PacketConn
	err := p.ns[0].Do(func() (err error) {
		taken, err = net.ListenPacket("udp4", "198.51.100.1:9999")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	tests := []struct {
		o    udptun.Options
		want string
	}{
		{udptun.Options{Device: "absent0", Port: port}, "no such device: make it with `ip tuntap add"},
		{udptun.Options{Device: "plain0", Port: port}, "virtio headers: delete it and make it with"},
		{udptun.Options{Device: "eth0", Port: port}, "virtio headers: delete it and make it with"},
		{udptun.Options{Device: "much-too-long-a-name", Port: port}, "not a device name"},
		{udptun.Options{Device: device, Port: 9999}, "UDP port 9999 is in use by another program"},
		{udptun.Options{Device: device, Port: port, Local: []netip.Addr{addr("203.0.113.9")}}, "no interface has the address"},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%s %d", tt.o.Device, tt.o.Port), func(t *testing.T) {
			err := p.ns[0].Do(func() error {
				tun, err := udptun.Open(tt.o)
				if err == nil {
					_ = tun.Close()
				}
				return err
			})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}

// TestDeviceDeleted: somebody else removes the device.
func TestDeviceDeleted(t *testing.T) {
	nettest.CheckLeaks(t)
	p := newPair(t)
	tun := p.openBoth(t, 0)[0]
	if err := tun.Err(); err != nil {
		t.Error(err)
	}
	p.ip(t, 0, "link set "+device+" down")
	p.ip(t, 0, "link set "+device+" up")
	p.ip(t, 0, "route add 10.5.0.0/16 dev "+device)
	p.run(t, 0, "ping", "-c", "1", "-W", "2", inner(1)[0].String())
	p.ip(t, 0, "link del "+device)
	select {
	case <-tun.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("goes on without a device")
	}
	if err := tun.Err(); err == nil || !strings.Contains(err.Error(), "deleted") {
		t.Error(err)
	}
}
