package router

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func community(t testing.TB, s string) overlay.Community {
	c, err := overlay.ParseCommunity(s)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// alone is a node of a dual-stack cluster without neighbours.
func alone() overlay.BGP {
	return overlay.BGP{
		ASNumber: 64512, RouterID: ip("198.51.100.11"), Port: 179,
		Own: []overlay.BGPOwn{
			{Prefix: pfx("10.5.1.0/24"), NextHop: ip("198.51.100.11")},
			{Prefix: pfx("fd00:5:0:1::/64"), NextHop: ip("2001:db8:51::11")},
		},
		Networks: []netip.Prefix{pfx("10.5.0.0/16"), pfx("fd00:5::/48")},
		HoldTime: 90 * time.Second, RestartTime: 120 * time.Second,
	}
}

func meshNeighbor(address, local, lease string) overlay.BGPNeighbor {
	return overlay.BGPNeighbor{
		Name: "lease " + lease, Address: ip(address), Local: ip(local), ASNumber: 64512, Port: 179, Node: true,
	}
}

// mesh is one of three nodes.
func mesh() overlay.BGP {
	b := alone()
	for _, n := range []struct{ v4, v6, lease string }{
		{"198.51.100.12", "2001:db8:51::12", "10.5.2.0-24&fd00:5:0:2::-64"},
		{"198.51.100.13", "2001:db8:51::13", "10.5.3.0-24&fd00:5:0:3::-64"},
	} {
		b.Neighbors = append(b.Neighbors, meshNeighbor(n.v4, "198.51.100.11", n.lease), meshNeighbor(n.v6, "2001:db8:51::11", n.lease))
	}
	return b
}

// reflector has another reflector of the same cluster, a client, and a router
// outside without rules.
func reflector() overlay.BGP {
	b := mesh()
	b.ClusterID = ip("192.0.2.1")
	b.Neighbors[0].Client, b.Neighbors[1].Client = true, true
	b.Neighbors = append(b.Neighbors, overlay.BGPNeighbor{
		Name: "Backend.Peers 198.51.100.1", Address: ip("198.51.100.1"), Local: ip("198.51.100.11"), ASNumber: 65001, Port: 179,
	})
	return b
}

func client() overlay.BGP {
	b := mesh()
	b.Neighbors = b.Neighbors[:2]
	b.Neighbors[0].Multihop, b.Neighbors[1].Multihop = 255, 255
	return b
}

// external has routers outside with all that can be asked of them.
func external(t testing.TB) overlay.BGP {
	b := alone()
	b.Port = 1179
	b.Communities = []overlay.Community{community(t, "64512:100"), community(t, "64512:101")}
	rules4 := []overlay.BGPRule{
		{Prefix: pfx("10.5.0.0/16"), MinLen: 24, MaxLen: 24, Accept: true},
		{Prefix: pfx("203.0.113.0/24"), MinLen: 24, MaxLen: 32},
		{Prefix: pfx("0.0.0.0/0"), MinLen: 0, MaxLen: 0, Accept: true},
		{Prefix: pfx("198.18.0.0/15"), MinLen: 15, MaxLen: 28, Accept: true},
	}
	rules6 := []overlay.BGPRule{
		{Prefix: pfx("fd00:5::/48"), MinLen: 64, MaxLen: 64, Accept: true},
		{Prefix: pfx("::/0"), MinLen: 0, MaxLen: 128},
	}
	b.Neighbors = []overlay.BGPNeighbor{
		{
			Name: "Backend.Peers 198.51.100.1", Address: ip("198.51.100.1"), Local: ip("198.51.100.11"), ASNumber: 65001, Port: 1790,
			Password: `s3cret\+/=!#?`, TTLSecurity: 1, Import: rules4, Export: rules4[:1], Communities: []overlay.Community{community(t, "65001:7")},
		},
		{
			Name: "Backend.Peers 203.0.113.1", Address: ip("203.0.113.1"), Local: ip("198.51.100.11"), ASNumber: 4200000000, Port: 179,
			Multihop: 4, Password: "x",
		},
		{Name: "Backend.Peers 198.51.100.2", Address: ip("198.51.100.2"), ASNumber: 64512, Port: 179, Export: rules4},
		{
			Name: "Backend.Peers 2001:db8:51::1", Address: ip("2001:db8:51::1"), Local: ip("2001:db8:51::11"), ASNumber: 65001, Port: 179,
			TTLSecurity: 3, Import: rules6, Export: rules6, Communities: []overlay.Community{community(t, "65535:65281")},
		},
	}
	return b
}

func v4only() overlay.BGP {
	b := mesh()
	b.Own, b.Networks, b.Neighbors = b.Own[:1], b.Networks[:1], []overlay.BGPNeighbor{b.Neighbors[0]}
	return b
}

// TestGolden renders, and lets Set check by the real parsers, what is in testdata.
func TestGolden(t *testing.T) {
	for name, b := range map[string]overlay.BGP{
		"alone": alone(), "mesh": mesh(), "reflector": reflector(), "client": client(), "external": external(t), "v4": v4only(),
	} {
		for _, k := range []string{"bird", "frr"} {
			t.Run(name+"."+k, func(t *testing.T) {
				file := filepath.Join(t.TempDir(), "conf")
				r := newRouter(t, Options{Kind: k, Config: file, Reload: []string{"true"}})
				if changed, err := r.Set(t.Context(), b); !changed || err != nil {
					t.Errorf("Set: changed %v, error %v", changed, err)
				}
				got, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				golden := filepath.Join("testdata", name+"."+k+".golden")
				if *update {
					if err := os.WriteFile(golden, got, 0o644); err != nil {
						t.Fatal(err)
					}
				}
				want, err := os.ReadFile(golden)
				if err != nil {
					t.Fatal(err)
				}
				if string(got) != string(want) {
					t.Errorf("%s differs; got:\n%s", golden, got)
				}
			})
		}
	}
}

func newRouter(t testing.TB, o Options) *Router {
	t.Helper()
	r, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}
