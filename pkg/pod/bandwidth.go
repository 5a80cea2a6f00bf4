package pod

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Bandwidth is the limits of one pod (CNI conventions, "bandwidth"), seen from
// the pod: what comes in, and what goes out. Rates are in bits per second, bursts,
// which may go faster at once, in bits. A rate of 0 is no limit.
type Bandwidth struct {
	IngressRate, IngressBurst uint64
	EgressRate, EgressBurst   uint64
}

// defaultBurst is what a rate without burst gets: what it lets through in that time.
// The bandwidth plugin refuses it; for a limit on the average, any burst is right.
const defaultBurst = 100 * time.Millisecond

// parseBandwidth reads runtimeConfig.bandwidth. It returns nil if nothing is limited.
func parseBandwidth(raw json.RawMessage) (*Bandwidth, error) {
	const rule = "must be an object of ingressRate, ingressBurst, egressRate and egressBurst, whole numbers of bits (per second), not negative"
	if len(raw) == 0 || string(raw) == "null" {
		return nil, nil
	}
	var b Bandwidth
	if json.Unmarshal(raw, &b) != nil {
		return nil, errors.New(rule)
	}
	for _, d := range []struct {
		name        string
		rate, burst *uint64
	}{{"ingress", &b.IngressRate, &b.IngressBurst}, {"egress", &b.EgressRate, &b.EgressBurst}} {
		switch {
		case *d.rate == 0 && *d.burst != 0:
			return nil, fmt.Errorf("%sBurst is %d, but there is no %sRate: give both, or none for no limit", d.name, *d.burst, d.name)
		case *d.burst == 0:
			*d.burst = *d.rate / uint64(time.Second/defaultBurst)
		}
	}
	if b.IngressRate == 0 && b.EgressRate == 0 {
		return nil, nil
	}
	return &b, nil
}

// ifbName is the name of the device that what a pod sends is queued at, made from
// that of the host's end of its veth.
func ifbName(hostLink string) string {
	sum := sha256.Sum256([]byte(hostLink))
	return "ifb" + hex.EncodeToString(sum[:6])
}

// maxBurst is how much of its rate a bucket holds: the kernel counts it in
// nanoseconds of 32 bits.
const maxBurst = 4 * time.Second

// packetOf is the largest packet of a link, with its Ethernet header.
func packetOf(link netlink.Link) int { return link.Attrs().MTU + 14 }

// tbf is the token bucket (tc-tbf(8)) that lets rate bits a second and burst bits
// at once through link.
func tbf(link netlink.Link, rate, burst uint64) *netlink.Tbf {
	const (
		tick     = 64 // nanoseconds, of the kernel's (PSCHED_SHIFT)
		latency  = 25 * time.Millisecond
		maxQueue = 128 << 10
	)
	perSecond := rate / 8
	// Runtimes give 512 MB for Kubernetes' pods. A burst below one packet would
	// never let it through.
	bytes := max(min(burst/8, perSecond*uint64(maxBurst/time.Second)), uint64(packetOf(link)))
	// What exceeds the burst waits for at most the latency, or, since the sender
	// may hand over a large packet at once, in a queue of that size.
	limit := perSecond/uint64(time.Second/latency) + min(bytes, maxQueue)
	return &netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
		Rate:       perSecond,
		Limit:      uint32(min(limit, 1<<31)),
		Buffer:     uint32(float64(bytes) * float64(time.Second) / tick / float64(perSecond)),
	}
}

// ingress is where what a pod sends comes in on the host.
func ingress(host netlink.Link) *netlink.Ingress {
	return &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: host.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS,
	}}
}

// redirect sends all that comes in to be queued at ifb, from where it comes in again.
func redirect(host, ifb netlink.Link) *netlink.U32 {
	return &netlink.U32{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: host.Attrs().Index, Parent: netlink.MakeHandle(0xffff, 0), Priority: 1, Protocol: unix.ETH_P_ALL,
		},
		Actions: []netlink.Action{netlink.NewMirredAction(ifb.Attrs().Index)},
	}
}

// apply limits a new pod at the host's end of its veth: all, or nothing in case of
// an error. The ifb has the veth's alias.
func (b *Bandwidth) apply(h *netlink.Handle, host netlink.Link, alias string) (err error) {
	if err := b.check(host); err != nil {
		return err
	}
	if b.IngressRate != 0 {
		if err := h.QdiscReplace(tbf(host, b.IngressRate, b.IngressBurst)); err != nil {
			return fmt.Errorf("add tbf to %s: %w", host.Attrs().Name, needsModule(err, "sch_tbf"))
		}
	}
	if b.EgressRate == 0 {
		return nil
	}
	made := false
	defer func() {
		if err == nil {
			return
		}
		err = errors.Join(err, clearQueues(h, host))
		if made {
			err = errors.Join(err, removeIfb(h, ifbName(host.Attrs().Name), alias))
		}
	}()
	ifb, err := addIfb(h, host, alias)
	if err != nil {
		return err
	}
	made = true
	if err := setUpIfb(h, ifb, alias); err != nil {
		return fmt.Errorf("set up link %s: %w", ifb.Name, err)
	}
	if err := h.QdiscReplace(tbf(ifb, b.EgressRate, b.EgressBurst)); err != nil {
		return fmt.Errorf("add tbf to %s: %w", ifb.Name, needsModule(err, "sch_tbf"))
	}
	if err := h.QdiscAdd(ingress(host)); err != nil {
		return fmt.Errorf("add ingress queue to %s: %w", host.Attrs().Name, needsModule(err, "sch_ingress"))
	}
	if err := h.FilterAdd(redirect(host, ifb)); err != nil {
		return fmt.Errorf("redirect %s to %s: %w", host.Attrs().Name, ifb.Name, needsModule(err, "cls_u32 or act_mirred"))
	}
	return nil
}

func needsModule(err error, name string) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("%w: load the kernel module %s", err, name)
	}
	return err
}

// check refuses a rate that would let no whole packet through, however long the pod
// waits: the kernel's bucket never holds more than 4.3 s of the rate.
func (b *Bandwidth) check(host netlink.Link) error {
	least := uint64(packetOf(host)) * 8 / uint64(maxBurst/time.Second)
	for _, d := range []struct {
		name string
		rate uint64
	}{{"ingressRate", b.IngressRate}, {"egressRate", b.EgressRate}} {
		if d.rate != 0 && d.rate < least {
			return fmt.Errorf("%s is %d bit/s: must be at least %d to let a packet of the pod's MTU, %d bytes, through", d.name, d.rate, least, host.Attrs().MTU)
		}
	}
	return nil
}

// addIfb makes the device, or makes it anew if a call that was killed left it.
func addIfb(h *netlink.Handle, host netlink.Link, alias string) (*netlink.Ifb, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = ifbName(host.Attrs().Name), host.Attrs().MTU
	// The queue behind tbf's tokens is limited in bytes; the length only must not
	// be 0, which the kernel warns of.
	attrs.TxQLen = 1000
	ifb := &netlink.Ifb{LinkAttrs: attrs}
	err := h.LinkAdd(ifb)
	if errors.Is(err, unix.EEXIST) {
		if err := removeIfb(h, attrs.Name, alias); err != nil {
			return nil, err
		}
		err = h.LinkAdd(ifb)
	}
	if err != nil {
		return nil, fmt.Errorf("add link %s: %w", attrs.Name, needsModule(err, "ifb"))
	}
	return ifb, nil
}

func setUpIfb(h *netlink.Handle, ifb netlink.Link, alias string) error {
	if err := h.LinkSetAlias(ifb, alias); err != nil {
		return err
	}
	// No address: nothing is ever sent to the device itself.
	err := h.LinkSetIP6AddrGenMode(ifb, nl.IN6_ADDR_GEN_MODE_NONE)
	if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
		return err
	}
	return h.LinkSetUp(ifb)
}

// clearQueues takes the limits off a link.
func clearQueues(h *netlink.Handle, host netlink.Link) error {
	var errs []error
	for _, q := range []netlink.Qdisc{ingress(host), tbf(host, 8, 8)} {
		// EINVAL or ENOENT: there is none.
		if err := h.QdiscDel(q); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("delete queue of %s: %w", host.Attrs().Name, err))
		}
	}
	return errors.Join(errs...)
}

// removeIfb deletes the device if it is ours. A call that was killed may have left it
// without alias.
func removeIfb(h *netlink.Handle, name, alias string) error {
	l, err := h.LinkByName(name)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look up link %s: %w", name, err)
	}
	if a := l.Attrs().Alias; l.Type() != "ifb" || a != "" && a != alias {
		return fmt.Errorf("link %s, a %s, belongs to %q: rename or delete it", name, l.Type(), a)
	}
	if err := h.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete link %s: %w", name, err)
	}
	return nil
}

// differences says what of the limits is not there, in words.
func (b *Bandwidth) differences(h *netlink.Handle, host netlink.Link, alias string) []string {
	var out []string
	if b.IngressRate != 0 {
		out = append(out, tbfDifferences(h, host, tbf(host, b.IngressRate, b.IngressBurst))...)
	}
	if b.EgressRate == 0 {
		return out
	}
	name := ifbName(host.Attrs().Name)
	ifb, err := h.LinkByName(name)
	if err != nil {
		return append(out, fmt.Sprintf("link %s, which the pod's packets are queued at: %v", name, err))
	}
	a := ifb.Attrs()
	if ifb.Type() != "ifb" || a.Alias != alias {
		return append(out, fmt.Sprintf("link %s is a %s with alias %q, not the ifb of %q", name, ifb.Type(), a.Alias, alias))
	}
	if a.Flags&net.FlagUp == 0 || a.MTU != host.Attrs().MTU {
		out = append(out, fmt.Sprintf("link %s has flags %s and MTU %d, must be up and have %d", name, a.Flags, a.MTU, host.Attrs().MTU))
	}
	out = append(out, tbfDifferences(h, ifb, tbf(ifb, b.EgressRate, b.EgressBurst))...)
	if !redirected(h, host, a.Index) {
		out = append(out, fmt.Sprintf("link %s does not redirect what the pod sends to %s", host.Attrs().Name, name))
	}
	return out
}

func tbfDifferences(h *netlink.Handle, link netlink.Link, want *netlink.Tbf) []string {
	all, err := h.QdiscList(link)
	for _, q := range all {
		if got, ok := q.(*netlink.Tbf); ok && q.Attrs().Parent == netlink.HANDLE_ROOT {
			if got.Rate == want.Rate && got.Limit == want.Limit && got.Buffer == want.Buffer {
				return nil
			}
			return []string{fmt.Sprintf("link %s is limited to %d bit/s, limit %d bytes, buffer %d ticks; must be %d, %d and %d",
				link.Attrs().Name, got.Rate*8, got.Limit, got.Buffer, want.Rate*8, want.Limit, want.Buffer)}
		}
	}
	if err != nil {
		return []string{fmt.Sprintf("list queues of %s: %v", link.Attrs().Name, err)}
	}
	return []string{fmt.Sprintf("link %s is not limited to %d bit/s", link.Attrs().Name, want.Rate*8)}
}

func redirected(h *netlink.Handle, host netlink.Link, ifb int) bool {
	filters, _ := h.FilterList(host, netlink.MakeHandle(0xffff, 0))
	for _, f := range filters {
		u32, ok := f.(*netlink.U32)
		if !ok {
			continue
		}
		for _, a := range u32.Actions {
			if m, ok := a.(*netlink.MirredAction); ok && m.Ifindex == ifb {
				return true
			}
		}
	}
	return false
}
