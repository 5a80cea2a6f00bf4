package kernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

// FirewallChanged is what Watch says when somebody changed a rule, a chain or a table.
const FirewallChanged = "firewall rules changed"

// Legacy tables send no events and are asked each pollInterval whether they
// changed. Up to pollLimit, about 1000 rules, their contents are compared too.
const (
	pollInterval = 500 * time.Millisecond
	pollLimit    = 256 << 10 // bytes
)

// eventSocket receives the notifications of nftables. It belongs to the
// namespace of the thread that made it, and is silent until watch joins it to
// the group.
type eventSocket struct{ file *os.File }

// eventBuffer holds the notifications of a large transaction of another program,
// as kube-proxy's, in bytes.
const eventBuffer = 8 << 20

func newEventSocket() (*eventSocket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open netfilter socket: %w", err)
	}
	// The size only spares needless rings; the kernel tells what it drops.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, eventBuffer)
	// Without an address, nftables takes the socket for the one that made the
	// change and tells it nothing.
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("bind netfilter socket: %w", err)
	}
	return &eventSocket{os.NewFile(uintptr(fd), "nfnetlink")}, nil
}

func (s *eventSocket) close() error { return s.file.Close() }

// set joins (NETLINK_ADD_MEMBERSHIP) or leaves (NETLINK_DROP_MEMBERSHIP) the group.
func (s *eventSocket) set(membership int) error {
	raw, err := s.file.SyscallConn()
	if err != nil {
		return err
	}
	var refused error
	err = raw.Control(func(fd uintptr) {
		refused = unix.SetsockoptInt(int(fd), unix.SOL_NETLINK, membership, unix.NFNLGRP_NFTABLES)
	})
	return errors.Join(err, refused)
}

// drain throws away what has been received. After an overflow the kernel drops
// all that happens until the queue has been emptied, without a further word.
func (s *eventSocket) drain() error {
	raw, err := s.file.SyscallConn()
	if err != nil {
		return err
	}
	var buffer [1]byte
	var failed error
	err = raw.Control(func(fd uintptr) {
		for failed == nil || errors.Is(failed, unix.ENOBUFS) || errors.Is(failed, unix.EINTR) {
			_, _, failed = unix.Recvfrom(int(fd), buffer[:], unix.MSG_DONTWAIT)
		}
	})
	if errors.Is(failed, unix.EAGAIN) {
		return err
	}
	return errors.Join(err, failed)
}

// watch rings the bell when somebody changes our chains or those that jump to
// them, until ctx ends. It rings once at the start, when it begins to listen. Our
// own changes may ring it too.
func (f *firewall) watch(ctx context.Context, bell func(reason string)) error {
	if err := f.events.set(unix.NETLINK_ADD_MEMBERSHIP); err != nil {
		return fmt.Errorf("watch firewall: %w", err)
	}
	defer f.events.set(unix.NETLINK_DROP_MEMBERSHIP) // fails only on a closed socket
	if err := f.events.drain(); err != nil {         // what an earlier watch left unread
		return fmt.Errorf("watch firewall: %w", err)
	}
	first, err := f.legacyTables()
	if err != nil {
		return fmt.Errorf("watch firewall: %w", err)
	}
	bell("listening to the firewall begins")
	group, groupCtx := errgroup.WithContext(ctx)
	group.Go(func() error { return f.events.listen(groupCtx, bell) })
	if f.mayBeLegacy() {
		group.Go(func() error { return f.poll(groupCtx, first, bell) })
	}
	if err := group.Wait(); ctx.Err() == nil {
		return fmt.Errorf("watch firewall: %w", err)
	}
	return ctx.Err()
}

func (s *eventSocket) listen(ctx context.Context, bell func(reason string)) error {
	if err := s.file.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(woken)
		s.file.SetReadDeadline(time.Unix(1, 0)) // ends the read
	})
	defer func() {
		if !stop() {
			<-woken // else it could end a read of the next watch
		}
	}()
	buffer := make([]byte, 1<<16)
	for {
		n, err := s.file.Read(buffer)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, unix.ENOBUFS):
			if err := s.drain(); err != nil {
				return fmt.Errorf("read nftables events: %w", err)
			}
			bell("more happened in the firewall than could be listened to")
			continue
		case err != nil:
			return fmt.Errorf("read nftables events: %w", err)
		}
		concerned := false
		whole := messages(buffer[:n], func(h header, body []byte) { concerned = concerned || concernsUs(h, body) })
		if concerned || !whole { // cut off: we cannot know what it was about
			bell(FirewallChanged)
		}
	}
}

// concernsUs reports whether an nftables notification is about our table, our
// chains, the chains that jump to them, or the end of the tables that hold those.
func concernsUs(h header, body []byte) bool {
	if h.typ>>8 != unix.NFNL_SUBSYS_NFTABLES || len(body) < nfgenmsgLen {
		return false
	}
	if family := body[0]; family != unix.NFPROTO_IPV4 && family != unix.NFPROTO_IPV6 {
		return false
	}
	kind := h.typ & 0xff
	var chainAttribute uint16
	switch kind {
	case unix.NFT_MSG_NEWTABLE, unix.NFT_MSG_DELTABLE:
	case unix.NFT_MSG_NEWCHAIN, unix.NFT_MSG_DELCHAIN:
		chainAttribute = unix.NFTA_CHAIN_NAME
	case unix.NFT_MSG_NEWRULE, unix.NFT_MSG_DELRULE:
		chainAttribute = unix.NFTA_RULE_CHAIN
	default:
		return false
	}
	var table, chain string
	for attribute, value := range attrs(body, nfgenmsgLen) {
		switch attribute {
		case unix.NFTA_TABLE_NAME: // of the same number in all three
			table = stringOf(value)
		case chainAttribute:
			chain = stringOf(value)
		}
	}
	switch {
	case table == overlay.NftTable:
		return true
	case table != "nat" && table != "filter":
		return false
	case kind == unix.NFT_MSG_DELTABLE, strings.HasPrefix(chain, "TWILL-"):
		return true
	}
	return chain == map[string]string{"nat": "POSTROUTING", "filter": "FORWARD"}[table]
}

// poll watches legacy iptables, which sends no events. What keeps the shape of a
// table above pollLimit waits for the next observe.
func (f *firewall) poll(ctx context.Context, last [4]legacyTable, bell func(reason string)) error {
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
		now, err := f.legacyTables()
		if err != nil {
			return err
		}
		if now != last {
			last = now
			bell(FirewallChanged)
		}
	}
}

// mayBeLegacy: also if it is not now, for Kubernetes may say so later.
func (f *firewall) mayBeLegacy() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.legacy || f.flavours.both
}

func (f *firewall) legacyTables() ([4]legacyTable, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.legacy {
		return [4]legacyTable{}, nil
	}
	now, err := f.printer.read(pollLimit)
	return now.tables, err
}
