// Package udptun is the data plane of flannel's backend udp: a TUN device on one
// side, a UDP port on the other, and the bare IP packet as the whole of a
// datagram. flannel's proxy does one packet per system call; here the kernel's
// offloads carry up to 64 KiB on both sides, and user space only exchanges the
// headers: payload is never copied.
//
//	pod ─▶ flannel0 ─▶ sender:   cut by segmenter, packed by outbox ─▶ UDP socket ─▶ peer
//	pod ◀─ flannel0 ◀─ receiver: joined by coalescer                ◀─ UDP socket ◀─ peer
//
// Each packet loses one of its time to live at each end, as in flannel.
package udptun

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Peer is another node: packets for Subnet go to Addr. A node with several
// subnets is several Peers.
type Peer struct {
	Subnet netip.Prefix
	Addr   netip.AddrPort
}

// Options of a Tunnel.
type Options struct {
	// Device is an existing TUN device with several queues and virtio headers:
	// `ip tuntap add mode tun multi_queue vnet_hdr name flannel0`.
	Device string
	Port   uint16
	// Local addresses to bind, at most one of each family; empty: any of both.
	Local []netip.Addr
	// Own are the subnets of this node. Packets from the tunnel for other
	// destinations are dropped: the kernel would only send them back into it.
	// Empty: all packets are for this node.
	Own []netip.Prefix
	// Peers to begin with: what the kernel has queued in Files is sent at once.
	Peers []Peer
	// Queues of the device, each with a socket per family and a thread. 0: as many as
	// there are processors, at most 8.
	Queues int
	Log    *slog.Logger
	// Files are those of an earlier Tunnel, also of another process. The ones
	// that fit the other options are used, by duplicates: the caller closes his.
	Files []*os.File
}

const maxQueues = 8

// Tunnel is a running data path.
type Tunnel struct {
	opts  Options
	table atomic.Pointer[table]
	setMu sync.Mutex // of those who replace the table
	icmp  *icmp
	paths *paths
	stop  *stopper

	tuns      []int
	socks     [][]endpoint // of each queue: one per family
	senders   []*sender
	receivers []*receiver
	lost      []uint64 // overflows of the sockets before our time

	threads sync.WaitGroup
	done    chan struct{}
	fail    sync.Once
	err     error
	closed  sync.Once
}

// Open starts the data path, in the network namespace of the calling thread.
func Open(o Options) (*Tunnel, error) {
	if o.Queues == 0 {
		o.Queues = min(runtime.NumCPU(), maxQueues)
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	t := &Tunnel{opts: o, done: make(chan struct{})}
	t.table.Store(newTable(o.Own, o.Peers))
	if err := t.open(); err != nil {
		t.release()
		return nil, fmt.Errorf("open tunnel %s: %w", o.Device, err)
	}
	t.start()
	return t, nil
}

func (t *Tunnel) open() (err error) {
	if t.stop, err = newStopper(); err != nil {
		return os.NewSyscallError("eventfd", err)
	}
	if t.icmp, err = newICMP(); err != nil {
		return err
	}
	if t.paths, err = newPaths(); err != nil {
		return err
	}
	h, err := adopt(t.opts.Files, t.opts.Device)
	defer h.close()
	if err != nil {
		return err
	}
	if err := t.openQueues(&h); err != nil {
		return err
	}
	return t.openSockets(&h)
}

func (t *Tunnel) openQueues(h *handed) error {
	// All that were handed over: a queue that nobody reads swallows packets.
	for len(t.tuns) < t.opts.Queues || len(h.tuns) > 0 {
		fd := h.tun()
		if fd < 0 {
			var err error
			if fd, err = attach(t.opts.Device); err != nil {
				return err
			}
		}
		t.tuns = append(t.tuns, fd)
	}
	t.opts.Queues = len(t.tuns)
	return nil
}

func (t *Tunnel) openSockets(h *handed) error {
	locals := t.opts.Local
	anyAddr := len(locals) == 0
	if anyAddr {
		locals = []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
	}
	t.socks = make([][]endpoint, t.opts.Queues)
	for i := range t.socks {
		for _, local := range locals {
			at := netip.AddrPortFrom(local.Unmap(), t.opts.Port)
			e, err := h.socket(at)
			if anyAddr && at.Addr().Is6() && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL)) {
				continue // IPv6 is off
			}
			if err != nil {
				return fmt.Errorf("listen on %s: %w", at, err)
			}
			t.socks[i] = append(t.socks[i], e)
			t.lost = append(t.lost, overflow(e.fd))
		}
	}
	return nil
}

func (t *Tunnel) start() {
	udp := false
	for _, fd := range t.tuns {
		var err error
		if udp, err = setOffloads(fd); err != nil {
			t.opts.Log.Warn("tunnel without offloads", "device", t.opts.Device, "err", err)
		}
	}
	for i, tun := range t.tuns {
		var fds []int
		var boxes [2]*outbox
		for _, e := range t.socks[i] {
			family := 0
			if e.v6 {
				family = 1
			}
			boxes[family] = &outbox{endpoint: e}
			fds = append(fds, e.fd)
		}
		r := newReceiver(t, tun, fds, udp)
		s := &sender{t: t, tun: tun, boxes: boxes, other: r, count: &counters{}, mem: make([]byte, readSlots*slotLen)}
		t.senders, t.receivers = append(t.senders, s), append(t.receivers, r)
		q := &queue{sender: s, receiver: r, stop: t.stop}
		t.threads.Go(func() { t.failed(q.run()) })
	}
}

// failed ends the data path for an error: the device was deleted.
func (t *Tunnel) failed(err error) {
	if err == nil {
		return
	}
	t.fail.Do(func() {
		t.err = fmt.Errorf("tunnel %s: %w", t.opts.Device, err)
		t.stop.stop()
		close(t.done)
	})
}

// Done is closed when the data path has ended without Close, as when somebody
// deletes the device. Err then says why.
func (t *Tunnel) Done() <-chan struct{} { return t.done }

// Err is nil until Done is closed.
func (t *Tunnel) Err() error {
	select {
	case <-t.done:
		return t.err
	default:
		return nil
	}
}

// SetPeers replaces all peers at once. No packet sees half a table.
func (t *Tunnel) SetPeers(peers []Peer) {
	t.setMu.Lock()
	defer t.setMu.Unlock()
	t.table.Store(newTable(t.table.Load().own, peers))
}

// SetOwn replaces the subnets of this node: see Options.Own.
func (t *Tunnel) SetOwn(own []netip.Prefix) {
	t.setMu.Lock()
	defer t.setMu.Unlock()
	t.table.Store(t.table.Load().withOwn(own))
}

// Stats may be called at any time before Close.
func (t *Tunnel) Stats() Stats {
	var s Stats
	for i := range t.senders {
		s.Sent.add(t.senders[i].count)
		s.Received.add(t.receivers[i].count)
	}
	i := 0
	for _, socks := range t.socks {
		for _, e := range socks {
			s.Received.Drops.Overflow += overflow(e.fd) - t.lost[i]
			i++
		}
	}
	return s
}

// Close ends the data path. The device and its addresses and routes stay.
func (t *Tunnel) Close() error {
	t.closed.Do(func() {
		t.stop.stop()
		t.threads.Wait()
		t.release()
	})
	return nil
}

func (t *Tunnel) release() {
	for _, fd := range t.tuns {
		unix.Close(fd)
	}
	for _, socks := range t.socks {
		for _, e := range socks {
			unix.Close(e.fd)
		}
	}
	if t.icmp != nil {
		t.icmp.close()
	}
	if t.paths != nil {
		t.paths.close()
	}
	if t.stop != nil {
		unix.Close(t.stop.fd)
	}
}
