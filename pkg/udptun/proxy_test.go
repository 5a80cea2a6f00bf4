package udptun

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Proxy is the far end as flannel's proxy is: one packet per system call, a device
// without offloads, no look at anything but the IP header. It also verifies every
// checksum of what comes from the tunnel.
type Proxy struct {
	Packets, Bad atomic.Int64

	tun, sock int
	to        netip.AddrPort
	stop      *stopper
	wg        sync.WaitGroup
}

// NewProxy attaches to a device without virtio headers and binds the address.
func NewProxy(name string, local, to netip.AddrPort) (*Proxy, error) {
	p := &Proxy{to: to}
	var err error
	if p.tun, err = unix.Open(cloneDevice, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0); err != nil {
		return nil, err
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return nil, err
	}
	ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(p.tun, unix.TUNSETIFF, ifr); err != nil {
		return nil, err
	}
	domain := unix.AF_INET
	if local.Addr().Is6() {
		domain = unix.AF_INET6
	}
	if p.sock, err = unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
		return nil, err
	}
	if err := unix.Bind(p.sock, sockaddr(local)); err != nil {
		return nil, err
	}
	if p.stop, err = newStopper(); err != nil {
		return nil, err
	}
	p.wg.Go(p.run)
	return p, nil
}

func (p *Proxy) run() {
	buf := make([]byte, 65536)
	fds := p.stop.pollFds(unix.POLLIN, p.tun, p.sock)
	for p.stop.wait(fds) {
		if n, err := unix.Read(p.tun, buf); err == nil {
			if pkt, ok := parse(buf[:n]); ok && pkt.hop() {
				_ = unix.Sendto(p.sock, pkt, 0, sockaddr(p.to)) // flannel does not care either
			}
		}
		n, _, err := unix.Recvfrom(p.sock, buf, 0)
		if err != nil {
			continue
		}
		p.Packets.Add(1)
		pkt, ok := parse(buf[:n])
		if !ok || !p.verify(pkt) {
			p.Bad.Add(1)
			continue
		}
		if pkt.hop() {
			if _, err := unix.Write(p.tun, pkt); err != nil && !errors.Is(err, unix.EIO) {
				fmt.Println("write to device:", err)
			}
		}
	}
}

// verify looks at the checksums of TCP, UDP and ICMPv6 packets that are no fragments.
func (p *Proxy) verify(pkt packet) bool {
	proto := pkt[6]
	if !pkt.isV6() {
		proto = pkt[9]
		if fold(sum(0, pkt[:int(pkt[0]&15)*4])) != 0xffff {
			return false
		}
		if pkt[6]&0x3f|pkt[7] != 0 {
			return true
		}
	}
	switch proto {
	case protoTCP, protoUDP, protoICMPv6:
		return wellSummed(pkt)
	}
	return true
}

// Close ends it.
func (p *Proxy) Close() {
	p.stop.stop()
	p.wg.Wait()
	for _, fd := range []int{p.tun, p.sock, p.stop.fd} {
		unix.Close(fd)
	}
}
