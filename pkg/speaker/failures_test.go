package speaker

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// TestRefusals: neighbours with which no session can be, and the words for it.
func TestRefusals(t *testing.T) {
	r := newRig(t, 4)
	const v4 = overlay.IPv4
	b := r.base(0, v4)
	none := r.router(0, 0, v4, 65009)
	none.Address = ip("198.51.100.99") // there is no such host
	elsewhere := r.router(0, 3, v4, 65003)
	elsewhere.Local = ip("198.51.100.77")
	b.Neighbors = []overlay.BGPNeighbor{r.router(0, 1, v4, 65001), r.router(0, 2, v4, 65002), elsewhere, none}
	s := r.speaker(0, b)
	r.bird(1, birdPeer("t", r.addr(1, v4), r.addr(0, v4), 65000, asn, "", ""))
	frr := r.frr(2, frrConf(65002, r.hosts[2].IPv4, nil, nil, frrPeer{addr: r.addr(0, v4), says: []string{"remote-as 64999"}}))
	s.fails(r.addr(1, v4), "198.51.100.12 says it is in another AS than the configured 65001: correct ASNumber in Backend.Peers 198.51.100.12, or its own")
	s.fails(r.addr(2, v4), "198.51.100.13 rejects this node's OPEN")
	s.fails(none.Address, "no ")
	s.fails(elsewhere.Address, "cannot assign requested address")
	if err := frr.Kill9(); err != nil {
		t.Fatal(err)
	}
	s.fails(r.addr(2, v4), "refuses TCP port 179: is its BGP daemon running?")

	// The operator corrects it.
	b.Neighbors = []overlay.BGPNeighbor{r.router(0, 1, v4, 65000)}
	s.set(b)
	s.established(r.addr(1, v4))
	eventually(t, "settled", func() error {
		if !s.report().Settled {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	if got := s.report().Status.Sessions; len(got) != 1 {
		t.Errorf("sessions %+v", got)
	}
}

// TestPortTaken: somebody else listens on the port; then he is gone.
func TestPortTaken(t *testing.T) {
	r := newRig(t, 1)
	bird := r.bird(0, birdPeer("t", r.addr(0, overlay.IPv4), ip("198.51.100.99"), asn, asn, "direct;", ""))
	s := r.idleSpeaker(0)
	err := s.trySet(r.base(0, both...))
	const want = "TCP port 179 is in use by another program (bird? bgpd?); stop it, or let it speak with --bgp-router, or set Backend.Port"
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Fatalf("got %v, want %q", err, want)
	}
	if got := s.report(); got.RIB != nil || got.Status.Speaker != "gobgp" {
		t.Errorf("after it %+v", got)
	}
	if err := bird.Term(); err != nil {
		t.Fatal(err)
	}
	s.set(s.want)
}

// TestChanges: the AS number, the port and the reflector role change under way; a
// neighbour comes and goes.
func TestChanges(t *testing.T) {
	r := newRig(t, 2)
	const v4 = overlay.IPv4
	b, c := r.base(0, v4), r.base(1, v4)
	s, o := r.speaker(0, b), r.speaker(1, c)
	if got := s.report(); got.RIB == nil || len(got.RIB.Routes) > 0 || !got.Settled {
		t.Errorf("without neighbours: %+v", got)
	}
	step := func(as0, as1 uint32, port uint16, cluster netip.Addr) {
		t.Helper()
		b.ASNumber, c.ASNumber, b.Port, c.Port, b.ClusterID = as0, as1, port, port, cluster
		n, m := r.node(0, 1, v4), r.node(1, 0, v4)
		n.ASNumber, n.Port, n.Client = as1, port, cluster.IsValid()
		m.ASNumber, m.Port = as0, port
		b.Neighbors, c.Neighbors = []overlay.BGPNeighbor{n}, []overlay.BGPNeighbor{m}
		s.set(b)
		o.set(c)
		s.established(n.Address)
		o.established(m.Address)
		s.learns(r.via(1, v4))
		o.learns(r.via(0, v4))
	}
	step(asn, asn, 179, netip.Addr{})
	step(asn, asn, 179, ip("192.0.2.1"))
	step(asn, 65001, 1790, netip.Addr{})
	b.Neighbors = nil
	s.set(b)
	s.learns("")
	o.learns("")
	o.fails(r.addr(0, v4), "198.51.100.11")
	s.post("/withdraw")
	s.set(b)
}

// TestRefused: what no speaker can do is refused before anything is done.
func TestRefused(t *testing.T) {
	good := overlay.BGP{ASNumber: asn, RouterID: ip("192.0.2.1"), Port: 179}
	for want, change := range map[string]func(*overlay.BGP){
		"AS number is 0": func(b *overlay.BGP) { b.ASNumber = 0 },
		"router id":      func(b *overlay.BGP) { b.RouterID = ip("2001:db8::1") },
		"port is 0":      func(b *overlay.BGP) { b.Port = 0 },
	} {
		b := good
		change(&b)
		if err := New(Options{}).Set(t.Context(), b); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

// TestLeaks: a speaker that has ended leaves no goroutine and no socket.
func TestLeaks(t *testing.T) {
	nettest.CheckLeaks(t)
	s := New(Options{})
	b := overlay.BGP{
		ASNumber: asn, RouterID: ip("127.0.0.1"), Port: 17900, HoldTime: 90 * time.Second, RestartTime: 120 * time.Second,
		Neighbors: []overlay.BGPNeighbor{{Name: "nobody", Address: ip("127.0.0.2"), Local: ip("127.0.0.1"), ASNumber: asn, Port: 17901, Password: "x", Node: true}},
	}
	for _, end := range []func(){func() { s.Close(t.Context()) }, func() { s.Withdraw(t.Context()) }} {
		if err := s.Set(t.Context(), b); err != nil {
			t.Fatal(err)
		}
		if st := s.Status(); len(st.Sessions) != 1 {
			t.Errorf("%+v", st)
		}
		end()
		end()
	}
}

// TestSettled: who is waited for, and for how long.
func TestSettled(t *testing.T) {
	start := time.Now()
	for name, tt := range map[string]struct {
		s     session
		after time.Duration
		want  bool
	}{
		"told":                         {session{up: true, marks: true, told: true}, time.Second, true},
		"telling":                      {session{up: true, marks: true}, 29 * time.Second, false},
		"telling for too long":         {session{up: true, marks: true}, 31 * time.Second, true},
		"never says that it has told":  {session{up: true, since: start.Add(time.Second)}, 7 * time.Second, true},
		"has just come, says nothing":  {session{up: true, since: start.Add(4 * time.Second)}, 7 * time.Second, false},
		"refuses at first":             {session{refused: true}, 9 * time.Second, false},
		"refuses":                      {session{refused: true}, 11 * time.Second, true},
		"does not answer":              {session{}, 29 * time.Second, false},
		"does not answer for too long": {session{}, 31 * time.Second, true},
	} {
		p := sessions{started: start, all: map[netip.Addr]*session{
			ip("192.0.2.1"): {up: true, told: true, marks: true}, ip("192.0.2.2"): &tt.s,
		}}
		if got := p.settled(start.Add(tt.after)); got != tt.want {
			t.Errorf("%s: settled is %t after %s", name, got, tt.after)
		}
	}
}
