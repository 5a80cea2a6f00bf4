package speaker

import (
	"fmt"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/overlay"
)

var both = []overlay.Family{overlay.IPv4, overlay.IPv6}

// mesh gives host i the others of n as nodes.
func (r *rig) mesh(i, n int) overlay.BGP {
	b := r.base(i, both...)
	for j := range n {
		for _, f := range both {
			if i != j {
				b.Neighbors = append(b.Neighbors, r.node(i, j, f))
			}
		}
	}
	return b
}

// via is the route to host j's pods.
func (r *rig) via(j int, f overlay.Family) string {
	return fmt.Sprintf("%s via %s", pods(j, f), r.addr(j, f))
}

// TestMesh: two speakers, a BIRD and an FRR in one mesh, in both families.
func TestMesh(t *testing.T) {
	r := newRig(t, 4)
	var speakers []*speakerProcess
	for i := range 2 {
		b := r.mesh(i, 4)
		b.Communities = []overlay.Community{64512<<16 | 7}
		speakers = append(speakers, r.speaker(i, b))
	}
	var peers string
	var frrPeers []frrPeer
	for _, f := range both {
		for _, j := range []int{0, 1, 3} {
			peers += birdPeer(fmt.Sprintf("h%dv%d", j, f), r.addr(2, f), r.addr(j, f), asn, asn, "direct;", "")
		}
		for j := range 3 {
			frrPeers = append(frrPeers, frrPeer{addr: r.addr(j, f), says: []string{"remote-as 64512"}})
		}
	}
	bird := r.bird(2, birdRoutes("10.5.2.0/24", "fd00:5:0:2::/64")+peers)
	frr := r.frr(3, frrConf(asn, r.hosts[3].IPv4, nil, []string{"10.5.3.0/24", "fd00:5:0:3::/64"}, frrPeers...))
	for i, s := range speakers {
		var want []string
		for j := range 4 {
			for _, f := range both {
				if i != j {
					want = append(want, r.via(j, f))
				}
			}
		}
		s.learns(want...)
	}
	for _, f := range both {
		bird.says("show route all "+pods(0, f).String(), "BGP.next_hop: "+r.addr(0, f).String(), "(64512,7)")
		frr.says(fmt.Sprintf("show bgp ipv%d unicast %s", f, pods(1, f)), r.addr(1, f).String(), "64512:7", "valid, internal")
	}
	r.settlesAndCounts(speakers[0])

	// Withdrawals both ways: one announcement, then those of a BIRD that says goodbye.
	b := speakers[0].want
	b.Own = b.Own[1:]
	speakers[0].set(b)
	if err := bird.Term(); err != nil {
		t.Error(err)
	}
	v6 := overlay.IPv6
	speakers[1].learns(r.via(0, v6), r.via(3, overlay.IPv4), r.via(3, v6))
	frr.says("show bgp ipv4 unicast", "!10.5.0.0/24", "10.5.1.0/24")
	// The orderly end withdraws the rest.
	speakers[0].post("/withdraw")
	speakers[1].learns(r.via(3, overlay.IPv4), r.via(3, v6))
	frr.says("show bgp ipv6 unicast", "!fd00:5::/64", "fd00:5:0:1::/64")
	if got := speakers[0].report(); got.RIB != nil || got.Settled || len(got.Status.Sessions) > 0 {
		t.Errorf("after the end: %+v", got)
	}
}

// settlesAndCounts checks what a speaker with six sessions says of them, and that
// nothing moves when nothing changes.
func (r *rig) settlesAndCounts(s *speakerProcess) {
	r.t.Helper()
	eventually(r.t, "settled", func() error {
		if !s.report().Settled {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	before := s.report()
	s.set(s.want)
	after := s.report()
	if after.Pointers != before.Pointers {
		r.t.Error("Routes is another after Set with the same wish")
	}
	st := after.Status
	if st.Speaker != "gobgp" || st.ASNumber != asn || st.RouterID != r.hosts[0].IPv4 || len(st.Sessions) != 6 || len(st.Received) != 6 || len(st.Announced) != 2 {
		r.t.Errorf("status %+v", st)
	}
	for i, x := range st.Sessions {
		was := before.Status.Sessions[i]
		if x.State != "established" || x.Since != was.Since || x.Uptime <= 0 || x.Received != 1 || x.Accepted != 1 || x.Announced != 1 ||
			x.MessagesIn == 0 || x.MessagesOut == 0 || x.Flaps != 0 || x.Error != "" {
			r.t.Errorf("session %+v", x)
		}
	}
}

// TestReflector: a speaker reflects between a BIRD, an FRR and a speaker, which do not
// speak to each other, and tells a router outside of all their pods.
func TestReflector(t *testing.T) {
	r := newRig(t, 5)
	const v4 = overlay.IPv4
	b := r.mesh(0, 4)
	b.ClusterID = ip("192.0.2.1")
	for i := range b.Neighbors {
		b.Neighbors[i].Client = true
	}
	b.Neighbors = append(b.Neighbors, r.router(0, 4, v4, 65001))
	reflector := r.speaker(0, b)
	var peers string
	var frrPeers []frrPeer
	client := r.base(3, both...)
	for _, f := range both {
		peers += birdPeer(fmt.Sprintf("t%d", f), r.addr(1, f), r.addr(0, f), asn, asn, "direct;", "")
		frrPeers = append(frrPeers, frrPeer{addr: r.addr(0, f), says: []string{"remote-as 64512"}})
		client.Neighbors = append(client.Neighbors, r.node(3, 0, f))
	}
	bird := r.bird(1, birdRoutes("10.5.1.0/24", "fd00:5:0:1::/64", "192.168.7.0/24")+peers)
	frr := r.frr(2, frrConf(asn, r.hosts[2].IPv4, nil, []string{"10.5.2.0/24", "fd00:5:0:2::/64"}, frrPeers...))
	node := r.speaker(3, client)
	outside := r.bird(4, birdPeer("t", r.addr(4, v4), r.addr(0, v4), 65001, asn, "", ""))

	all := []string{r.via(1, v4), r.via(1, overlay.IPv6), r.via(2, v4), r.via(2, overlay.IPv6), "192.168.7.0/24 via 198.51.100.12"}
	node.learns(append(all, r.via(0, v4), r.via(0, overlay.IPv6))...)
	reflector.learns(append(all, r.via(3, v4), r.via(3, overlay.IPv6))...)
	for _, f := range both {
		bird.says("show route all "+pods(3, f).String(), "BGP.next_hop: "+r.addr(3, f).String(), "BGP.originator_id: 198.51.100.14", "BGP.cluster_list: 192.0.2.1")
		frr.says(fmt.Sprintf("show bgp ipv%d unicast %s", f, pods(1, f)), r.addr(1, f).String(), "Originator: 198.51.100.12", "Cluster list: 192.0.2.1")
	}
	outside.says("show route all", "10.5.0.0/24", "10.5.1.0/24", "10.5.3.0/24", "BGP.next_hop: 198.51.100.13", "!192.168.7.0")

	// The reflector goes away for a moment: nobody forgets anything.
	reflector.post("/close")
	node.learns("10.5.0.0/24 via 198.51.100.11 stale", "10.5.1.0/24 via 198.51.100.12 stale", "10.5.2.0/24 via 198.51.100.13 stale", "192.168.7.0/24 via 198.51.100.12 stale",
		"fd00:5::/64 via 2001:db8:51::11 stale", "fd00:5:0:1::/64 via 2001:db8:51::12 stale", "fd00:5:0:2::/64 via 2001:db8:51::13 stale")
	if err := reflector.Kill9(); err != nil {
		t.Fatal(err)
	}
	reflector.restart()
	node.learns(append(all, r.via(0, v4), r.via(0, overlay.IPv6))...)
	log, err := bird.Output()
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(log, "removed") {
		t.Errorf("BIRD has removed a route while the reflector restarted")
	}
}

// TestReflected: BIRD and FRR are the reflectors, two of them for two speakers.
func TestReflected(t *testing.T) {
	r := newRig(t, 4)
	var peers string
	var frrPeers []frrPeer
	for _, f := range both {
		for _, j := range []int{2, 3} {
			peers += birdPeer(fmt.Sprintf("h%dv%d", j, f), r.addr(0, f), r.addr(j, f), asn, asn, "direct; rr client; rr cluster id 192.0.2.1;", "next hop keep;")
			frrPeers = append(frrPeers, frrPeer{addr: r.addr(j, f), says: []string{"remote-as 64512"}, in: []string{"route-reflector-client"}})
		}
	}
	r.bird(0, strings.ReplaceAll(peers, "next hop self; next hop keep;", "next hop keep;"))
	r.frr(1, frrConf(asn, r.hosts[1].IPv4, []string{"bgp cluster-id 192.0.2.2"}, nil, frrPeers...))
	var speakers []*speakerProcess
	for _, i := range []int{2, 3} {
		b := r.base(i, both...)
		for _, f := range both {
			b.Neighbors = append(b.Neighbors, r.router(i, 0, f, asn), r.router(i, 1, f, asn))
		}
		speakers = append(speakers, r.speaker(i, b))
	}
	for k, j := range []int{3, 2} {
		twice := func(f overlay.Family) string { return fmt.Sprintf("%s via %s", r.via(j, f), r.addr(j, f)) }
		speakers[k].learns(twice(overlay.IPv4), twice(overlay.IPv6))
		for _, x := range speakers[k].report().RIB.Routes {
			if x.Paths[0].From == x.Paths[1].From {
				t.Errorf("%s is twice from %s", x.Prefix, x.Paths[0].From)
			}
		}
	}
}
