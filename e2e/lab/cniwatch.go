package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// linkWatch notes when the links of a network namespace went, as the kernel tells
// everybody (RTM_DELLINK, rtnetlink(7)): after they can be found no more and the
// first grace period is over.
type linkWatch struct {
	socket *os.File
	ended  chan struct{}

	mu   sync.Mutex
	gone map[int32]time.Time // by index, which a namespace gives only once
	err  error
}

// watchLinks listens in the calling thread's network namespace.
func watchLinks() (*linkWatch, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("watch links: %w", err)
	}
	const room = 32 << 20 // for what hundreds of ADDs tell while nobody reads
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, room),
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: unix.RTMGRP_LINK}),
	)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("watch links: %w", err), unix.Close(fd))
	}
	w := &linkWatch{socket: os.NewFile(uintptr(fd), "rtnetlink"), ended: make(chan struct{}), gone: map[int32]time.Time{}}
	go w.run()
	return w, nil
}

func (w *linkWatch) run() {
	defer close(w.ended)
	buf := make([]byte, 64<<10)
	for {
		n, err := w.socket.Read(buf)
		now := time.Now()
		var messages []syscall.NetlinkMessage
		if err == nil {
			messages, err = syscall.ParseNetlinkMessage(buf[:n])
		}
		w.mu.Lock()
		for _, m := range messages {
			// That a bridge has lost a port is told with its own family.
			if m.Header.Type == unix.RTM_DELLINK && len(m.Data) >= unix.SizeofIfInfomsg && m.Data[0] == unix.AF_UNSPEC {
				w.gone[int32(binary.NativeEndian.Uint32(m.Data[4:]))] = now
			}
		}
		w.err = err
		w.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// await returns when the link went. It is an error if it is there after 30 s.
func (w *linkWatch) await(ctx context.Context, index int32) (time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		w.mu.Lock()
		at, ok := w.gone[index]
		err := w.err
		w.mu.Unlock()
		switch {
		case ok:
			return at, nil
		case err != nil:
			return at, fmt.Errorf("watch links: %w", err)
		}
		select {
		case <-ctx.Done():
			return at, fmt.Errorf("wait until link %d is gone: %w", index, ctx.Err())
		case <-time.After(500 * time.Microsecond):
		}
	}
}

func (w *linkWatch) close() error {
	err := w.socket.Close()
	<-w.ended
	return err
}
