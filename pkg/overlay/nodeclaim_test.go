package overlay

import (
	"net/netip"
	"strings"
	"testing"
)

func kubeConfig(t *testing.T, text string) Config {
	t.Helper()
	c, _, err := ParseConfig([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	c.V4.Assigned, c.V6.Assigned = true, true
	return c
}

func TestNodeClaim(t *testing.T) {
	dual := kubeConfig(t, `{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/56","Backend":{"Type":"host-gw"}}`)
	only6 := kubeConfig(t, `{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/56","Backend":{"Type":"host-gw"}}`)
	attrs := Attrs{PublicIP: netip.MustParseAddr("198.51.100.11"), Backend: "host-gw"}
	lease := func(node, v4, v6 string, a Attrs) *Lease {
		l := &Lease{Node: node, Attrs: a}
		if v4 != "" {
			l.V4 = netip.MustParsePrefix(v4)
		}
		if v6 != "" {
			l.V6 = netip.MustParsePrefix(v6)
		}
		return l
	}
	other := lease("n2", "10.244.1.0/24", "fd00:10:244:1::/64", Attrs{PublicIP: netip.MustParseAddr("198.51.100.12"), Backend: "host-gw"})
	claim := NodeClaim{Node: "n1", Attrs: attrs}
	ready, allocate := claim, claim
	ready.Ready, allocate.Allocate = true, true
	former := allocate
	former.Prefer = Subnets{V4: netip.MustParsePrefix("10.244.9.0/24"), V6: netip.MustParsePrefix("fd00:10:244:1::/64")}
	for _, x := range []struct {
		name  string
		claim NodeClaim
		cfg   Config
		snap  Snapshot
		want  string // act and subnets, or part of the error
	}{
		{"the very first subnet of the network", claim, dual, Snapshot{Leases: []*Lease{lease("n1", "10.244.0.0/24", "fd00:10:244::/64", attrs), other}}, "hold 10.244.0.0-24&fd00:10:244::-64"},
		{"another length than the configuration's", claim, dual, Snapshot{Leases: []*Lease{lease("n1", "10.244.2.0/26", "fd00:10:244:2::/64", attrs)}}, "hold 10.244.2.0-26&fd00:10:244:2::-64"},
		{"nothing published yet", claim, dual, Snapshot{Leases: []*Lease{lease("n1", "10.244.0.0/24", "fd00:10:244::/64", Attrs{})}}, "update 10.244.0.0-24&fd00:10:244::-64"},
		{"another node's address", claim, dual, Snapshot{Leases: []*Lease{lease("n3", "10.244.3.0/24", "fd00:10:244:3::/64", attrs), other}}, "node n1 has no podCIDR"},
		{"not ready, unavailable", claim, dual, Snapshot{Node: NodeFacts{Unavailable: true}, Leases: []*Lease{lease("n1", "10.244.0.0/24", "fd00:10:244::/64", attrs)}}, "hold 10.244.0.0-24&fd00:10:244::-64"},
		{"ready, unavailable", ready, dual, Snapshot{Node: NodeFacts{Unavailable: true}, Leases: []*Lease{lease("n1", "10.244.0.0/24", "fd00:10:244::/64", attrs)}}, "announce 10.244.0.0-24&fd00:10:244::-64"},
		{"ready, known", ready, dual, Snapshot{Leases: []*Lease{lease("n1", "10.244.0.0/24", "fd00:10:244::/64", attrs)}}, "hold 10.244.0.0-24&fd00:10:244::-64"},
		{"no node", claim, dual, Snapshot{Node: NodeFacts{Missing: true}}, `no node "n1" in the API`},
		{"no podCIDR", claim, dual, Snapshot{Leases: []*Lease{other}}, "--cluster-cidr=10.244.0.0/16,fd00:10:244::/56"},
		{"outside", claim, dual, Snapshot{Leases: []*Lease{lease("n1", "10.9.0.0/24", "fd00:10:244::/64", attrs)}}, "subnet 10.9.0.0/24 does not lie in network 10.244.0.0/16"},
		{"as wide as the network", claim, dual, Snapshot{Leases: []*Lease{lease("n1", "10.244.0.0/16", "fd00:10:244::/64", attrs)}}, "does not lie in"},
		{"one family is missing", claim, dual, Snapshot{Leases: []*Lease{lease("n1", "10.244.0.0/24", "", attrs)}}, "there is no subnet of network fd00:10:244::/56"},
		{"IPv6 alone", claim, only6, Snapshot{Leases: []*Lease{lease("n1", "", "fd00:10:244:1::/64", attrs)}}, "hold fd00:10:244:1::-64"},
		{"allocate", allocate, dual, Snapshot{Leases: []*Lease{other}, Taken: []Subnets{{V4: netip.MustParsePrefix("10.244.2.0/24")}}}, "create 10.244.3.0-24&fd00:10:244:2::-64"},
		{"allocate what is preferred, if it is free", former, dual, Snapshot{Leases: []*Lease{other}}, "create 10.244.9.0-24&fd00:10:244:2::-64"},
		{"allocate nothing to who has", allocate, dual, Snapshot{Leases: []*Lease{lease("n1", "10.244.7.0/24", "fd00:10:244:7::/64", attrs)}}, "hold 10.244.7.0-24&fd00:10:244:7::-64"},
	} {
		t.Run(x.name, func(t *testing.T) {
			step, err := x.claim.Next(x.cfg, &x.snap, func(int) int { return 0 })
			got := step.Act.String() + " " + step.Lease.Key()
			if err != nil {
				got = err.Error()
			}
			if err == nil && got != x.want || !strings.Contains(got, x.want) {
				t.Errorf("%s, want %s", got, x.want)
			}
			if err == nil && step.Act != Hold && (step.Lease.Attrs != attrs || step.Lease.Node != "n1") {
				t.Errorf("writes %+v for %q", step.Lease.Attrs, step.Lease.Node)
			}
		})
	}
}

func TestFields(t *testing.T) {
	want := Fields{PublicIP: "198.51.100.11", PublicIPv6: "2001:db8::11", Backend: "vxlan", Data: `{"VNI":1,"VtepMAC":"0e:2a:00:00:00:01"}`, DataV6: `{"VNI":1,"VtepMAC":"0e:2a:00:00:00:02"}`}
	a, err := ParseFields(want)
	if err != nil || a.VTEP.VNI != 1 || a.VTEPv6.MAC.String() != "0e:2a:00:00:00:02" || a.Fields() != want {
		t.Errorf("%+v, %v; back: %+v", a, err, a.Fields())
	}
	// As flannel annotates a node of backend host-gw.
	if a, err := ParseFields(Fields{PublicIP: "198.51.100.11", Backend: "host-gw", Data: "null"}); err != nil || a.Fields() != (Fields{PublicIP: "198.51.100.11", Backend: "host-gw"}) {
		t.Errorf("%+v, %v", a, err)
	}
	for f, why := range map[Fields]string{
		{PublicIP: "198.51.100.11", Backend: "vxlan", Data: `{"VNI":`}:        "BackendData: \"{\\\"VNI\\\":\" is not JSON",
		{PublicIP: "nowhere", Backend: "vxlan"}:                               "PublicIP",
		{Backend: "vxlan"}:                                                    "neither PublicIP nor PublicIPv6",
		{PublicIP: "198.51.100.11", Backend: "vxlan", DataV6: `"` + "no MAC"}: "BackendV6Data",
	} {
		if a, err := ParseFields(f); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%+v: %+v, %v; want %q", f, a, err, why)
		}
	}
}
