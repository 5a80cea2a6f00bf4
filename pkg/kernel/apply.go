package kernel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

// errNotOurs stops the removal of somebody else's link.
var errNotOurs = errors.New("the link does not bear the alias " + overlay.Alias)

// errNoDataPlane: a TUN without the program that carries its packets would be a
// hole, so that program makes it.
var errNoDataPlane = errors.New("the device is made by the data plane, which is not running")

// errRoutesLost: the next pass adds them.
var errRoutesLost = errors.New("was a group and is none now, or the other way round: made anew, and the kernel has dropped its routes")

// Apply makes the changes of a plan in its order and returns those that could
// not be made. One failure stops nothing else.
func (k *Kernel) Apply(ctx context.Context, plan overlay.Plan) []Failure {
	if len(plan) == 0 {
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	a := &applier{kernel: k, ctx: ctx, indexes: map[string]uint32{}, batch: batch{conn: k.conn}}
	a.batch.failed = a.answered
	for len(plan) > 0 {
		if ctx.Err() != nil {
			a.abandon(plan, ctx.Err())
			break
		}
		plan = plan[a.step(plan):]
	}
	a.send()
	a.writeLate()
	return a.failures
}

// applier works off a plan.
type applier struct {
	kernel   *Kernel
	ctx      context.Context
	batch    batch
	batched  []change // what is in batch, in order
	refused  []change // what is to be tried by a detour
	indexes  map[string]uint32
	late     []overlay.Op // sysctls of links that were not there yet
	failures []Failure
}

// change is an operation on its way to the kernel.
type change struct {
	op    overlay.Op
	index uint32 // of the link that its object is on
	echo  echo
}

func (a *applier) fail(op overlay.Op, err error) {
	if op.Verb == overlay.Delete && (absent(err) || wentWithNexthop(op.Object, err)) {
		return
	}
	a.failures = append(a.failures, Failure{Op: op, Err: err})
}

// wentWithNexthop reports whether err is how the kernel says that a route's nexthop
// object is gone, which took the route along.
func wentWithNexthop(o overlay.Object, err error) bool {
	r, ok := o.(overlay.Route)
	return ok && r.NH != 0 && errors.Is(err, unix.EINVAL)
}

func (a *applier) abandon(plan overlay.Plan, err error) {
	for _, op := range plan {
		a.failures = append(a.failures, Failure{Op: op, Err: err})
	}
}

// step does the first operation of plan, or the first few, and returns how many.
func (a *applier) step(plan overlay.Plan) int {
	op := plan[0]
	switch op.Object.(type) {
	case overlay.Link, overlay.Sysctl, overlay.Chain, overlay.WGPeer:
		a.send()
	default:
		a.enqueue(op)
		return 1
	}
	switch o := op.Object.(type) {
	case overlay.Link:
		if err := a.link(op, o); err != nil {
			a.fail(op, err)
		}
		clear(a.indexes)
	case overlay.Sysctl:
		err := writeSysctl(o)
		if errors.Is(err, fs.ErrNotExist) && unneeded(o.Key) {
			a.late = append(a.late, op)
		} else if err != nil {
			a.fail(op, err)
		}
	case overlay.WGPeer:
		return a.wgPeers(plan, o.Link)
	default:
		n := 1
		for ; n < len(plan); n++ {
			if _, ok := plan[n].Object.(overlay.Chain); !ok {
				break
			}
		}
		a.failures = append(a.failures, a.kernel.firewall.apply(a.ctx, plan[:n])...)
		return n
	}
	return 1
}

// writeLate writes the sysctls of links that this very plan has made. IPv6's are
// not missed where there is no IPv6.
func (a *applier) writeLate() {
	for _, op := range a.late {
		s := op.Object.(overlay.Sysctl)
		if err := writeSysctl(s); err != nil && !(errors.Is(err, fs.ErrNotExist) && missing("net/ipv6")) {
			a.fail(op, err)
		}
	}
}

func (a *applier) link(op overlay.Op, want overlay.Link) error {
	k := a.kernel
	if op.Verb == overlay.Add {
		return k.createLink(want)
	}
	have, ok := op.Before.(overlay.Link)
	switch {
	case !ok:
		return fmt.Errorf("not known what is there now")
	case op.Verb == overlay.Delete && !have.Ours():
		return errNotOurs
	case op.Verb == overlay.Delete:
		return k.conn.deleteLink(want.Name)
	case have.Recreate(want):
		if !have.Ours() {
			return errNotOurs
		}
		return k.recreateLink(want)
	}
	return k.changeLink(have, want)
}

// createLink makes a device. It comes up last, when it is complete and bears our
// alias. A crash in between leaves a device without alias that the next pass
// adopts.
func (k *Kernel) createLink(want overlay.Link) error {
	if want.Kind == overlay.KindTUN {
		return errNoDataPlane
	}
	if err := k.conn.newLink(want); err != nil {
		return err
	}
	made := want
	made.Alias, made.Up, made.WG = "", false, overlay.WireGuard{}
	return k.changeLink(made, want)
}

// changeLink turns a device that exists into want, without a gap for packets.
func (k *Kernel) changeLink(have, want overlay.Link) error {
	index, err := k.conn.linkIndex(want.Name)
	if err != nil {
		return err
	}
	if have.VXLAN != want.VXLAN || have.IPIP != want.IPIP {
		err := k.conn.setParameters(index, have, want)
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EAFNOSUPPORT) {
			// This kernel cannot change the parameter; the device is made anew as
			// flannel would.
			k.log.Info("link made anew", "link", want.Name, "reason", err)
			return k.recreateLink(want)
		}
		if err != nil {
			return err
		}
	}
	if have.WG != want.WG {
		if err := k.wireguard.setDevice(want.Name, have.WG, want.WG); err != nil {
			return err
		}
	}
	return k.conn.setLink(index, have, want)
}

func (k *Kernel) recreateLink(want overlay.Link) error {
	if err := k.conn.deleteLink(want.Name); err != nil && !absent(err) {
		return err
	}
	return k.createLink(want)
}

// enqueue puts an operation into the batch.
func (a *applier) enqueue(op overlay.Op) {
	index, err := a.index(linkOf(op.Object))
	if err != nil {
		a.fail(op, err)
		return
	}
	if n := len(a.batched); n > 0 && (a.batch.full() || waits(op, a.batched[n-1].op)) {
		a.send()
	}
	c := change{op: op, index: index}
	if c.echo, err = encode(&a.batch.enc, op, index); err != nil {
		a.fail(op, err)
		return
	}
	a.batch.added()
	a.batched = append(a.batched, c)
}

// waits reports whether op must find the result of before, also of one that needed
// a detour: a route its nexthop, a group its members; and the other way round the
// deletion of a nexthop, which would take along a route that still uses it.
func waits(op, before overlay.Op) bool { return rank(op) != rank(before) }

func rank(op overlay.Op) int {
	n, is := op.Object.(overlay.Nexthop)
	switch {
	case !is:
		return 0
	case n.Group == "":
		return 1
	}
	return 2
}

// encode writes the message that does op.
func encode(e *encoder, op overlay.Op, index uint32) (echo, error) {
	switch o := op.Object.(type) {
	case overlay.Addr:
		encodeAddr(e, op.Verb, o.Prefix, index)
		return addrEcho(op.Verb, o.Prefix, index), nil
	case overlay.Nexthop:
		return echo{}, encodeNexthop(e, op.Verb, o, index)
	case overlay.Route:
		encodeRoute(e, op.Verb, o, index)
		return echo{}, nil
	case overlay.Neigh:
		n := neighborOf(o, index)
		encodeNeighbor(e, op.Verb, n)
		return neighborEcho(op.Verb, n), nil
	case overlay.FDB:
		n := forwardingOf(o, index)
		encodeNeighbor(e, op.Verb, n)
		return neighborEcho(op.Verb, n), nil
	}
	return echo{}, fmt.Errorf("unknown kind of object %T", op.Object)
}

func (a *applier) send() {
	a.kernel.events.expect(a.batched)
	a.batch.send()
	a.batched = a.batched[:0]
	for _, c := range a.refused {
		if err := a.detour(c); err != nil {
			a.fail(c.op, err)
		}
	}
	a.refused = a.refused[:0]
}

// answered is told of each change in the batch that failed.
func (a *applier) answered(i int, err error) {
	c := a.batched[i]
	a.kernel.events.take(c.echo)
	g, onlink := gateway(c.op.Object)
	hidden := onlink && g.Is6() && c.op.Verb != overlay.Delete
	if errors.Is(err, unix.EINVAL) && (hidden || regrouped(c.op)) {
		a.refused = append(a.refused, c)
		return
	}
	a.fail(c.op, err)
}

// regrouped reports whether op makes a group of a single nexthop object or the
// other way round, which only a stranger's tampering calls for.
func regrouped(op overlay.Op) bool {
	have, ok := op.Before.(overlay.Nexthop)
	want, _ := op.Object.(overlay.Nexthop)
	return ok && op.Verb == overlay.Change && (have.Group == "") != (want.Group == "")
}

// gateway returns the gateway that an object leads to, and whether that is on
// its link by the object's own word.
func gateway(o overlay.Object) (netip.Addr, bool) {
	switch o := o.(type) {
	case overlay.Nexthop:
		return o.Gateway, o.OnLink
	case overlay.Route:
		return o.Gateway, o.OnLink
	}
	return netip.Addr{}, false
}

// detour makes a change that the kernel refused.
func (a *applier) detour(c change) error {
	if !regrouped(c.op) {
		return a.throughHostRoute(c)
	}
	for _, verb := range []overlay.Verb{overlay.Delete, overlay.Add} {
		op := overlay.Op{Verb: verb, Object: c.op.Object}
		if err := a.kernel.conn.request(func(e *encoder) { _, _ = encode(e, op, c.index) }, nil); err != nil {
			return fmt.Errorf("%s: %w", verb, err)
		}
	}
	return errRoutesLost
}

// throughHostRoute makes a change that IPv6 refuses as long as another route leads to the
// gateway by another link: a wider one, or the very route that is to change
// hands. For that moment the gateway gets a host route on its link; packets to
// the pods behind it do not notice.
func (a *applier) throughHostRoute(c change) error {
	g, _ := gateway(c.op.Object)
	host := overlay.Route{Dst: netip.PrefixFrom(g, g.BitLen()), Metric: 1, Link: linkOf(c.op.Object), Protocol: overlay.Protocol}
	conn := a.kernel.conn
	err := conn.request(func(e *encoder) { encodeRoute(e, overlay.Add, host, c.index) }, nil)
	if err != nil {
		return fmt.Errorf("add %s for a moment: %w", host, err)
	}
	err = conn.request(func(e *encoder) { _, _ = encode(e, c.op, c.index) }, nil)
	if last := conn.request(func(e *encoder) { encodeRoute(e, overlay.Delete, host, c.index) }, nil); last != nil && !absent(last) {
		err = errors.Join(err, fmt.Errorf("delete %s: %w", host, last))
	}
	return err
}

// linkOf returns the name of the link that an object is on.
func linkOf(o overlay.Object) string {
	switch o := o.(type) {
	case overlay.Addr:
		return o.Link
	case overlay.Nexthop:
		return o.Link
	case overlay.Route:
		return o.Link
	case overlay.Neigh:
		return o.Link
	case overlay.FDB:
		return o.Link
	}
	return ""
}

// index returns the index of a link by its name. A link that is absent is asked
// for once.
func (a *applier) index(name string) (uint32, error) {
	index, ok := a.indexes[name]
	if !ok {
		var err error
		if index, err = a.kernel.conn.linkIndex(name); err != nil && !absent(err) {
			return 0, err
		}
		a.indexes[name] = index
	}
	if index == 0 && name != "" {
		return 0, fmt.Errorf("find link %s: %w", name, unix.ENODEV)
	}
	return index, nil
}
