package kernel

import (
	"context"
	"fmt"
	"net/netip"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

// Watch rings the bell when somebody else changed what Observe would look at, by
// the scope of the last Observe: with a reason in plain words, from more than one
// goroutine, and sometimes once too often. What the node does all day long (pods
// that come and go, ARP on other links, routes of others) stays silent, and so
// does what Apply does here, but for changes of a link: the kernel does not say
// whose those are, nor whose is what it drops with a link. It rings once at the
// start, when it begins to listen, and returns when ctx ends or a socket breaks.
// Only one Watch may run at a time.
func (k *Kernel) Watch(ctx context.Context, bell func(reason string)) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return k.watchNetlink(ctx, bell) })
	group.Go(func() error { return k.firewall.watch(ctx, bell) })
	return group.Wait()
}

func (k *Kernel) watchNetlink(ctx context.Context, bell func(string)) error {
	if err := k.events.start(); err != nil {
		return err
	}
	defer k.events.stop()
	w := watcher{kernel: k, bell: bell}
	if err := w.list(ctx); err != nil {
		return err
	}
	bell("listening begins")
	err := k.events.read(ctx, func(b []byte, lost bool) error {
		if lost {
			// What is ours and what is not can no longer be told apart.
			k.events.forget()
			bell("more happened than could be listened to")
			return w.list(ctx)
		}
		messages(b, w.event)
		return nil
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return fmt.Errorf("watch network: %w", err)
}

// watcher tells which events are news.
type watcher struct {
	kernel *Kernel
	bell   func(string)
	links  map[uint32]link // all, as last seen
}

// list learns which links there are.
func (w *watcher) list(ctx context.Context) error {
	w.kernel.mu.Lock()
	defer w.kernel.mu.Unlock()
	all, err := w.kernel.conn.links(ctx, "")
	if err != nil {
		return fmt.Errorf("watch %w", err)
	}
	w.links = make(map[uint32]link, len(all))
	for _, l := range all {
		w.remember(l)
	}
	return nil
}

// remember keeps a link and reports whether it has news.
func (w *watcher) remember(l link) bool {
	before := w.links[l.index]
	// Promiscuity and the like come and go. Without carrier the kernel drops all
	// nexthop objects of a link, without a word, so that its return matters.
	l.flags &= unix.IFF_LOWER_UP
	w.links[l.index] = l
	return l != before && (w.matters(l) || w.matters(before))
}

func (w *watcher) matters(l link) bool {
	return l.candidate() || l.Name != "" && l.Name == w.kernel.scope.Load().Uplink
}

// own returns the link of that index if it is an overlay's.
func (w *watcher) own(index uint32) (link, bool) {
	l, ok := w.links[index]
	return l, ok && l.candidate()
}

func (w *watcher) event(h header, body []byte) {
	mine := h.pid == w.kernel.conn.portid
	reason := ""
	switch h.typ {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK: // seen even if mine, to know the link
		reason = w.link(h, body)
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		reason = w.addr(h, body)
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		reason = w.route(h, body)
	case unix.RTM_NEWNEXTHOP, unix.RTM_DELNEXTHOP:
		reason = w.nexthop(h, body)
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		reason = w.neighbor(h, body)
	case unix.RTM_NEWNETCONF:
		reason = forwardingOff(body)
	}
	if reason != "" && !mine {
		w.bell(reason)
	}
}

func (w *watcher) link(h header, body []byte) string {
	if len(body) == 0 || body[0] == unix.AF_BRIDGE { // about a port, not a link
		return ""
	}
	l := decodeLink(body)
	if h.typ == unix.RTM_DELLINK {
		delete(w.links, l.index)
		if w.matters(l) {
			return fmt.Sprintf("link %s deleted", l.Name)
		}
		return ""
	}
	if w.remember(l) {
		return fmt.Sprintf("link %s changed", l.Name)
	}
	return ""
}

func (w *watcher) addr(h header, body []byte) string {
	l := w.links[linkIndexOf(body)]
	p := decodeAddr(body).prefix
	verb := verbOf(h, unix.RTM_DELADDR)
	if !w.matters(l) || !p.IsValid() || p.Addr().IsLinkLocalUnicast() || w.kernel.events.take(addrEcho(verb, p, l.index)) {
		return ""
	}
	return fmt.Sprintf("address %s on %s %s", p, l.Name, past(verb))
}

func (w *watcher) route(h header, body []byte) string {
	r, ok := decodeRoute(body)
	if !ok || r.Protocol == unix.RTPROT_KERNEL {
		return ""
	}
	_, own := w.own(r.oif)
	if r.leadsToPod(own) {
		return ""
	}
	verb := verbOf(h, unix.RTM_DELROUTE)
	if own || r.Protocol == overlay.Protocol || r.Dst.Bits() == 0 || w.atOurPlace(r.Dst) && (verb == overlay.Delete || h.flags&unix.NLM_F_REPLACE != 0) {
		return fmt.Sprintf("route %s proto %d %s", r.Dst, r.Protocol, past(verb))
	}
	return ""
}

// atOurPlace reports whether a stranger's route may stand where one of ours does
// or should. A route to one pod does not.
func (w *watcher) atOurPlace(dst netip.Prefix) bool {
	if dst.IsSingleIP() {
		return false
	}
	scope := w.kernel.scope.Load()
	if scope.Places[dst] {
		return true
	}
	for _, n := range scope.Networks {
		if n.Overlaps(dst) {
			return true
		}
	}
	return false
}

func (w *watcher) nexthop(h header, body []byte) string {
	n := decodeNexthop(body)
	if _, own := w.own(n.oif); !own && n.protocol != overlay.Protocol {
		return ""
	}
	where := "dev " + w.links[n.oif].Name
	switch {
	case n.Group != "":
		where = "group " + n.Group
	case n.Gateway.IsValid():
		where = "via " + n.Gateway.String()
	}
	return fmt.Sprintf("nexthop %d %s %s", n.ID, where, past(verbOf(h, unix.RTM_DELNEXTHOP)))
}

// neighbor tells of ARP, NDP and forwarding entries on the overlay's links.
func (w *watcher) neighbor(h header, body []byte) string {
	l, own := w.own(linkIndexOf(body))
	if !own {
		return ""
	}
	n := decodeNeighbor(body)
	verb := verbOf(h, unix.RTM_DELNEIGH)
	if w.kernel.events.take(neighborEcho(verb, n)) {
		return ""
	}
	if n.family == unix.AF_BRIDGE {
		if !n.permanent() { // learned from a packet
			return ""
		}
		return fmt.Sprintf("fdb %s dst %s on %s %s", n.mac, n.dst, l.Name, past(verb))
	}
	if n.state&(unix.NUD_NOARP|unix.NUD_INCOMPLETE) != 0 { // multicast; a question that is still open
		return ""
	}
	return fmt.Sprintf("neighbour %s on %s %s", n.dst, l.Name, past(verb))
}

func verbOf(h header, deletion uint16) overlay.Verb {
	if h.typ == deletion {
		return overlay.Delete
	}
	return overlay.Add
}

func past(v overlay.Verb) string {
	if v == overlay.Delete {
		return "deleted"
	}
	return "added or changed"
}
