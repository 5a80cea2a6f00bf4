package kernel

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"testing"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// inNode runs fn in a namespace of its own with two underlay interfaces, eth0 and
// eth1.
func inNode(t testing.TB, fn func(k *Kernel)) {
	t.Helper()
	t.Setenv("XTABLES_LOCKFILE", t.TempDir()+"/lock")
	err := nettest.NewNS(t).Do(func() error {
		sh(t, `
			for i in 0 1; do
				ip link add eth$i type veth peer name far$i
				ip link set far$i up
				ip link set eth$i up
				ip -6 addr add 2001:db8:$i::1/64 dev eth$i nodad
				ip -6 addr add 2001:db8:$i::2/64 dev eth$i nodad
			done
			ip addr add 198.51.100.1/24 dev eth0
			ip addr add 198.51.100.2/24 dev eth0
			ip addr add 203.0.113.1/24 dev eth1
			ip addr add 203.0.113.2/24 dev eth1`)
		k, err := Open(Options{Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			return err
		}
		defer func() {
			if err := k.Close(); err != nil {
				t.Error(err)
			}
		}()
		fn(k)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func testScope() Scope {
	return Scope{
		Networks: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00:5::/32")},
		Sysctls:  []string{"net/ipv4/ip_forward"},
		Uplink:   "eth0",
	}
}

func observe(t testing.TB, k *Kernel) overlay.State {
	t.Helper()
	s, err := k.Observe(context.Background(), testScope())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// plan returns what is left to do.
func plan(t testing.TB, k *Kernel, want overlay.State) overlay.Plan {
	t.Helper()
	p, problems := overlay.Diff(observe(t, k), want)
	if len(problems) > 0 {
		t.Fatalf("problems: %v", problems)
	}
	return p
}

// reconcile makes the kernel hold want and returns what it did for that.
func reconcile(t testing.TB, k *Kernel, want overlay.State) overlay.Plan {
	t.Helper()
	p := plan(t, k, want)
	if f := k.Apply(context.Background(), p); len(f) > 0 {
		t.Fatalf("%d failures, the first: %v\nplan:\n%s", len(f), f[0], p)
	}
	if left := plan(t, k, want); len(left) > 0 {
		t.Fatalf("the second plan is not empty:\n%s\nthe first was:\n%s", left, p)
	}
	return p
}

// world says in a few numbers what a node's state is.
type world struct {
	families  []overlay.Family
	peers     []int
	nexthops  bool
	blackhole bool
	forward   string

	vni            uint32
	port           uint16
	gbp, learning  bool
	parent, host   int // eth<parent>, and which of its addresses
	mtu            int
	mac            byte
	moved          int  // peers below it have other VTEPs
	direct         int  // peers below it are reached without encapsulation
	tunnelled      int  // of the others those below it lead into flannel0
	encrypted      int  // of the others those below it lead into flannel-wg
	grouped        int  // of the others those below it lead to a group of nexthops
	extraAddresses bool // addresses beside the usual one
}

func dualWorld(peers int) world {
	w := world{
		families: []overlay.Family{overlay.IPv4, overlay.IPv6},
		nexthops: true, forward: "1", vni: 1, port: 8472, mtu: 1430, mac: 1, host: 1,
	}
	for i := range peers {
		w.peers = append(w.peers, i+1)
	}
	return w
}

func (w world) link(f overlay.Family) overlay.Link {
	name, local := fmt.Sprintf("flannel.%d", w.vni), fmt.Sprintf("%s.%d", []string{"198.51.100", "203.0.113"}[w.parent], w.host)
	if f == overlay.IPv6 {
		name, local = fmt.Sprintf("flannel-v6.%d", w.vni), fmt.Sprintf("2001:db8:%d::%d", w.parent, w.host)
	}
	return overlay.Link{
		Name: name, Alias: overlay.Alias, Up: true, MTU: w.mtu, Kind: overlay.KindVXLAN, MAC: overlay.MAC{0x0e, byte(f), 0, 0, 0, w.mac},
		VXLAN: overlay.VXLAN{
			VNI: w.vni, Port: w.port, Local: netip.MustParseAddr(local), Parent: fmt.Sprintf("eth%d", w.parent),
			GBP: w.gbp, Learning: w.learning,
		},
	}
}

// subnet returns that of a peer; 0 is the node itself.
func subnet(f overlay.Family, peer int) netip.Prefix {
	if f == overlay.IPv4 {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(peer >> 8), byte(peer), 0}), 24)
	}
	return netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 0, 0, 5, 4: byte(peer >> 8), 5: byte(peer)}), 64)
}

func (w world) state() overlay.State {
	s := overlay.State{Sysctls: []overlay.Sysctl{{Key: "net/ipv4/ip_forward", Value: w.forward}}}
	w.tunnels(&s)
	for _, f := range w.families {
		l := w.link(f)
		s.Links = append(s.Links, l)
		own := subnet(f, 0)
		s.Addrs = append(s.Addrs, overlay.Addr{Link: l.Name, Prefix: netip.PrefixFrom(own.Addr(), own.Addr().BitLen())})
		if w.extraAddresses {
			s.Addrs = append(s.Addrs, overlay.Addr{Link: l.Name, Prefix: netip.PrefixFrom(own.Addr().Next(), own.Addr().BitLen()-8)})
		}
		if w.blackhole {
			s.Routes = append(s.Routes, overlay.Route{Dst: own, Blackhole: true, Metric: 0xfffffffe, Protocol: overlay.Protocol})
		}
		for _, p := range w.peers {
			w.peer(&s, f, p)
		}
	}
	s.Normalize()
	return s
}

func metric(f overlay.Family) uint32 {
	if f == overlay.IPv6 {
		return 1024
	}
	return 0
}

// underlayHost returns the address of a peer.
func underlayHost(f overlay.Family, p int) netip.Addr {
	if f == overlay.IPv6 {
		return netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 5: 0x18, 14: byte(p >> 8), 15: byte(p)})
	}
	return netip.AddrFrom4([4]byte{198, 18, byte(p >> 8), byte(p)})
}

// underlayGateway returns the address of a router on eth0.
func underlayGateway(f overlay.Family, n byte) netip.Addr {
	if f == overlay.IPv6 {
		return netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 15: 9 + n})
	}
	return netip.AddrFrom4([4]byte{198, 51, 100, 9 + n})
}

func (w world) peer(s *overlay.State, f overlay.Family, p int) {
	dst := subnet(f, p)
	r := overlay.Route{Dst: dst, Metric: metric(f), Protocol: overlay.Protocol}
	nh := overlay.Nexthop{ID: uint32(f)<<24 | uint32(p)}
	switch {
	case p < w.direct:
		nh.Gateway, nh.Link = underlayGateway(f, 0), "eth0"
	case p < w.tunnelled:
		nh.Link, nh.Family = overlay.UDPLink, f
	case p < w.encrypted:
		nh.Link, nh.Family = overlay.WireGuardLink, f
		w.wgPeer(s, f, p)
	case p < w.grouped && w.nexthops:
		nh = w.group(s, f, p)
	default:
		nh.Gateway, nh.Link, nh.OnLink = dst.Addr(), w.link(f).Name, true
		mac, host := overlay.MAC{0x0a, byte(f), 0, 0, byte(p >> 8), byte(p)}, underlayHost(f, p)
		if p < w.moved {
			host, mac[2] = host.Next(), 1
		}
		s.Neighs = append(s.Neighs, overlay.Neigh{Link: nh.Link, IP: dst.Addr(), MAC: mac})
		s.FDB = append(s.FDB, overlay.FDB{Link: nh.Link, MAC: mac, Dst: host})
	}
	if w.nexthops {
		if !contains(s.Nexthops, nh) {
			s.Nexthops = append(s.Nexthops, nh)
		}
		r.NH = nh.ID
	} else {
		r.Gateway, r.Link, r.OnLink = nh.Gateway, nh.Link, nh.OnLink
	}
	s.Routes = append(s.Routes, r)
}

// kinds counts the operations of a plan: "route add" → 3.
func kinds(p overlay.Plan) map[string]int {
	out := map[string]int{}
	for _, op := range p {
		out[fmt.Sprintf("%T %s", op.Object, op.Verb)]++
	}
	return out
}

func without[T any](s []T, drop func(T) bool) []T { return slices.DeleteFunc(slices.Clone(s), drop) }
