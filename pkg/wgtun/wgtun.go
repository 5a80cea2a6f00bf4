// Package wgtun is a WireGuard device in user space, for kernels that have none:
// wireguard-go on a TUN of the same name. It serves the cross-platform userspace
// API (wireguard.com/xplatform), so that wgctrl and wg(8) configure it like a
// device of the kernel; key, port and peers are not known here.
package wgtun

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
)

// Options of a Device.
type Options struct {
	Name string
	MTU  int // bytes of the largest inner packet
	Log  *slog.Logger
}

// The MTUs that a TUN can have and WireGuard can fill.
const minMTU, maxMTU = 576, device.MaxContentSize

// Device carries the packets of one TUN. The TUN outlives it, with its addresses
// and routes; while no Device reads it, it has no carrier and drops packets.
type Device struct {
	name string
	wg   *device.Device
	stop context.CancelFunc
	done chan struct{}
	err  error // of closing; valid once done is closed
}

// Open makes the TUN, or attaches to the one that is there, and carries packets
// once somebody sets the link up and gives it a key and peers.
func Open(o Options) (*Device, error) {
	d, err := open(o)
	if err != nil {
		return nil, fmt.Errorf("open WireGuard device %s: %w", o.Name, err)
	}
	return d, nil
}

func open(o Options) (*Device, error) {
	if o.MTU < minMTU || o.MTU > maxMTU {
		return nil, fmt.Errorf("MTU %d is not between %d and %d", o.MTU, minMTU, maxMTU)
	}
	// Only one process can hold the TUN: from here on the socket is ours to replace.
	file, err := openTUN(o.Name)
	if err != nil {
		return nil, err
	}
	s, err := listen(o.Name)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	t, err := tun.CreateTUNFromFile(file, o.MTU)
	if err != nil {
		return nil, errors.Join(err, s.close(), file.Close())
	}
	if err := persist(file); err != nil {
		return nil, errors.Join(err, s.close(), t.Close())
	}
	ctx, stop := context.WithCancel(context.Background())
	d := &Device{
		name: o.Name, stop: stop, done: make(chan struct{}),
		wg: device.NewDevice(t, conn.NewDefaultBind(), logger(o.Log.With("link", o.Name))),
	}
	go d.run(ctx, s)
	return d, nil
}

// Done is closed when the device carries no packets any more: after Close, when
// somebody deleted the link, or removed the socket (which is how one ends a
// WireGuard device in user space), or when reading the TUN failed.
func (d *Device) Done() <-chan struct{} { return d.done }

// Close ends the device and leaves the TUN. It may be called again.
func (d *Device) Close() error {
	d.stop()
	<-d.done
	if d.err != nil {
		return fmt.Errorf("close WireGuard device %s: %w", d.name, d.err)
	}
	return nil
}

func (d *Device) run(ctx context.Context, s *socket) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var tasks sync.WaitGroup
	tasks.Go(func() { d.answer(ctx, s) })
	removed := make(chan struct{})
	tasks.Go(func() {
		s.waitRemoved()
		close(removed)
	})
	select {
	case <-ctx.Done():
	case <-d.wg.Wait():
	case <-removed:
	}
	stop()
	d.err = s.close()
	tasks.Wait()
	d.wg.Close()
	close(d.done)
}

// answer serves each client of the socket until it hangs up.
func (d *Device) answer(ctx context.Context, s *socket) {
	var clients sync.WaitGroup
	defer clients.Wait()
	for {
		c, err := s.listener.Accept()
		if err != nil { // closed
			return
		}
		clients.Go(func() {
			defer context.AfterFunc(ctx, func() { c.Close() })()
			d.wg.IpcHandle(c)
		})
	}
}
