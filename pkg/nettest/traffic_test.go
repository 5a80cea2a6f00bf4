package nettest

import (
	"net/netip"
	"testing"
)

func TestProbeCountsLoss(t *testing.T) {
	CheckLeaks(t)
	_, hosts := NewHosts(t, 2)
	for _, addr := range []netip.Addr{hosts[1].IPv4, hosts[1].IPv6} {
		p, err := StartProbe(hosts[0].NS, hosts[1].NS, addr)
		if err != nil {
			t.Fatal(err)
		}
		// Two pings a fifth of a second apart: time for probes to pass.
		run(t, hosts[0].NS, "ping", "-i", "0.2", "-c", "2", addr.String())
		r, err := p.Stop()
		if err != nil {
			t.Fatal(err)
		}
		t.Log(r)
		if r.Sent == 0 || r.Lost != 0 || r.Received != r.Sent || r.LongestGap != 0 || len(r.LostAt) != 0 {
			t.Errorf("probe of %s: %+v", addr, r)
		}
	}
}

func TestProbeSeesCutCable(t *testing.T) {
	CheckLeaks(t)
	_, hosts := NewHosts(t, 2)
	p, err := StartProbe(hosts[0].NS, hosts[1].NS, hosts[1].IPv4)
	if err != nil {
		t.Fatal(err)
	}
	if err := hosts[1].Cut(); err != nil {
		t.Fatal(err)
	}
	if _, err := hosts[0].Run("ping", "-c", "1", "-W", "1", hosts[1].IPv4.String()); err == nil {
		t.Error("the cable is not cut")
	}
	if err := hosts[1].Restore(); err != nil {
		t.Fatal(err)
	}
	run(t, hosts[0].NS, "ping", "-i", "0.2", "-c", "2", hosts[1].IPv4.String())
	r, err := p.Stop()
	if err != nil {
		t.Fatal(err)
	}
	t.Log(r)
	if r.Lost == 0 || r.Lost != len(r.LostAt) || r.Lost+r.Received != r.Sent || r.LongestGap == 0 || r.Received == 0 {
		t.Errorf("probe across a cut cable: %+v", r)
	}
}

func TestTransfer(t *testing.T) {
	CheckLeaks(t)
	_, hosts := NewHosts(t, 2)
	const size = 5_000_001
	for _, addr := range []netip.Addr{hosts[1].IPv4, hosts[1].IPv6} {
		r, err := Transfer(hosts[0].NS, hosts[1].NS, addr, size)
		if err != nil {
			t.Fatal(err)
		}
		if r.Bytes != size || r.MbitPS <= 0 {
			t.Errorf("transfer to %s: %+v", addr, r)
		}
	}
}
