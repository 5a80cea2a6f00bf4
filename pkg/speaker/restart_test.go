package speaker

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
)

// never fails the test if a daemon has logged one of the texts.
func (d *daemon) never(texts ...string) {
	d.t.Helper()
	log, err := d.Output()
	if err != nil {
		d.t.Fatal(err)
	}
	for line := range strings.Lines(log) {
		for _, x := range texts {
			if strings.Contains(line, x) {
				d.t.Errorf("has logged %s", line)
			}
		}
	}
}

// TestRestart: the speaker is killed, or closed as at an upgrade, and comes back. BIRD,
// FRR and a speaker keep its routes and see no withdrawal.
func TestRestart(t *testing.T) {
	for _, how := range []string{"kill", "close"} {
		t.Run(how, func(t *testing.T) {
			r := newRig(t, 4)
			const v4 = overlay.IPv4
			b := r.mesh(0, 4)
			var birdPeers string
			var frrPeers []frrPeer
			other := r.base(3, both...)
			for _, f := range both {
				other.Neighbors = append(other.Neighbors, r.node(3, 0, f))
				birdPeers += birdPeer(fmt.Sprintf("t%d", f), r.addr(1, f), r.addr(0, f), asn, asn, "direct;", "")
				frrPeers = append(frrPeers, frrPeer{addr: r.addr(0, f), says: []string{"remote-as 64512"}})
			}
			s := r.speaker(0, b)
			bird := r.bird(1, birdRoutes("10.5.1.0/24")+birdPeers)
			frr := r.frr(2, frrConf(asn, r.hosts[2].IPv4, nil, []string{"10.5.2.0/24"}, frrPeers...))
			o := r.speaker(3, other)
			o.learns(r.via(0, v4), r.via(0, overlay.IPv6))
			s.learns(r.via(1, v4), r.via(2, v4), r.via(3, v4), r.via(3, overlay.IPv6))
			for _, f := range both {
				bird.says("show route "+pods(0, f).String(), r.addr(0, f).String())
				frr.says(fmt.Sprintf("show bgp ipv%d unicast %s", f, pods(0, f)), r.addr(0, f).String())
			}
			if how == "close" {
				s.post("/close")
				if got := s.report(); got.routes() == "none" || len(strings.Split(got.routes(), ", ")) != 4 {
					t.Errorf("after Close the routes are %s", got.routes())
				}
			}
			if err := s.Kill9(); err != nil {
				t.Fatal(err)
			}
			o.learns(r.via(0, v4)+" stale", r.via(0, overlay.IPv6)+" stale")
			frr.says("show bgp ipv4 unicast 10.5.0.0/24", "stale")
			s.restart()
			s.learns(r.via(1, v4), r.via(2, v4), r.via(3, v4), r.via(3, overlay.IPv6))
			o.learns(r.via(0, v4), r.via(0, overlay.IPv6))
			for _, f := range both {
				bird.says("show route "+pods(0, f).String(), r.addr(0, f).String())
				frr.says(fmt.Sprintf("show bgp ipv%d unicast %s", f, pods(0, f)), r.addr(0, f).String(), "!stale")
			}
			eventually(t, "settled", func() error {
				if !s.report().Settled {
					return fmt.Errorf("not yet")
				}
				return nil
			})
			bird.never("removed", "withdrawn")
			if x := o.session(r.addr(0, v4)); x.Flaps != 1 {
				t.Errorf("session %+v", x)
			}
		})
	}
}

// TestRouterRestarts: a BIRD and an FRR are killed and come back: their routes stay,
// stale meanwhile. One that does not come back in its restart time is forgotten.
func TestRouterRestarts(t *testing.T) {
	r := newRig(t, 3)
	const v4 = overlay.IPv4
	b := r.base(0, v4)
	b.Neighbors = []overlay.BGPNeighbor{r.router(0, 1, v4, 65001), r.router(0, 2, v4, 65002)}
	s := r.speaker(0, b)
	bird := r.bird(1, birdRoutes("192.168.1.0/24")+birdPeer("t", r.addr(1, v4), r.addr(0, v4), 65001, asn, "graceful restart time 12;", ""))
	frr := r.frr(2, frrConf(65002, r.hosts[2].IPv4, []string{"bgp graceful-restart preserve-fw-state"}, []string{"192.168.2.0/24"}, frrPeer{addr: r.addr(0, v4), says: []string{"remote-as 64512"}}))
	const viaBIRD, viaFRR = "192.168.1.0/24 via 198.51.100.12", "192.168.2.0/24 via 198.51.100.13"
	s.learns(viaBIRD, viaFRR)
	if err := bird.Kill9(); err != nil {
		t.Fatal(err)
	}
	s.learns(viaBIRD+" stale", viaFRR)
	bells := s.report().Bells
	if err := bird.Start(); err != nil {
		t.Fatal(err)
	}
	s.learns(viaBIRD, viaFRR)
	// An orderly end is none of that: what it told is gone.
	if err := bird.Term(); err != nil {
		t.Fatal(err)
	}
	s.learns(viaFRR)
	if log, err := s.Output(); err != nil || !strings.Contains(log, "code 6(cease) subcode 2(administrative shutdown) was received from it") {
		t.Errorf("the log does not say why the session ended (%v)", err)
	}
	if err := bird.Start(); err != nil {
		t.Fatal(err)
	}
	s.learns(viaBIRD, viaFRR)
	if s.report().Bells == bells {
		t.Error("no bell when the stale route was told again")
	}
	if err := frr.Kill9(); err != nil {
		t.Fatal(err)
	}
	s.learns(viaBIRD, viaFRR+" stale")
	if err := bird.Kill9(); err != nil {
		t.Fatal(err)
	}
	s.learns(viaBIRD+" stale", viaFRR+" stale")
	s.learns(viaFRR + " stale")
	s.fails(r.addr(1, v4), "198.51.100.12 refuses TCP port 179: is its BGP daemon running?")
}

// TestSilence: a neighbour whose host loses its cable is noticed by the hold timer; by
// the way of graceful restart its routes stay for a while.
func TestSilence(t *testing.T) {
	r := newRig(t, 2)
	const v4 = overlay.IPv4
	b := r.base(0, v4)
	b.HoldTime, b.RestartTime = 3*time.Second, 5*time.Second
	b.Neighbors = []overlay.BGPNeighbor{r.node(0, 1, v4)}
	s := r.speaker(0, b)
	c := r.base(1, v4)
	c.HoldTime, c.RestartTime = b.HoldTime, b.RestartTime
	c.Neighbors = []overlay.BGPNeighbor{r.node(1, 0, v4)}
	o := r.speaker(1, c)
	s.learns(r.via(1, v4))
	if err := r.hosts[1].Cut(); err != nil {
		t.Fatal(err)
	}
	s.learns(r.via(1, v4) + " stale")
	s.learns("")
	s.fails(r.addr(1, v4), "no ")
	if err := r.hosts[1].Restore(); err != nil {
		t.Fatal(err)
	}
	s.learns(r.via(1, v4))
	o.learns(r.via(0, v4))
}
