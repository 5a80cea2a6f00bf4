package daemon

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/twill-net/twill/pkg/overlay"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil || string(got) != string(want) {
		t.Errorf("%s: %v\ngot:\n%swant:\n%s", name, err, got, want)
	}
}

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

var (
	networks = overlay.Config{V4: overlay.Pool{Network: prefix("10.5.0.0/16")}, V6: overlay.Pool{Network: prefix("fd00:5::/48")}}
	subnets  = overlay.Subnets{V4: prefix("10.5.7.0/24"), V6: prefix("fd00:5:0:7::/64")}
)

func TestRenderSubnetEnv(t *testing.T) {
	for name, e := range map[string]subnetEnv{
		"subnet-ipv4.env": {config: overlay.Config{V4: networks.V4}, subnets: overlay.Subnets{V4: subnets.V4}, mtu: 1450, ipMasq: true},
		"subnet-dual.env": {config: networks, subnets: subnets, mtu: 1430},
		"subnet-ipv6.env": {config: overlay.Config{V6: networks.V6}, subnets: overlay.Subnets{V6: subnets.V6}, mtu: 1430},
	} {
		got := e.render()
		golden(t, name, got)
		if back := parseSubnetEnv(got); back != e.subnets {
			t.Errorf("%s reads back as %v", name, back)
		}
	}
}

func TestParseSubnetEnv(t *testing.T) {
	v4 := overlay.Subnets{V4: subnets.V4}
	for _, x := range []struct {
		content string
		want    overlay.Subnets
	}{
		{"", overlay.Subnets{}},
		{"FLANNEL_SUBNET=10.5.7.1/24", v4},
		{"# mine\r\n  FLANNEL_SUBNET=\"10.5.7.1/24\"\r\nFLANNEL_MTU=x\n", v4},
		{"FLANNEL_SUBNET='10.5.7.9/24'\nFLANNEL_IPV6_SUBNET=fd00:5:0:7::1/64\n", subnets},
		{"FLANNEL_SUBNET=10.5.7.1\n", overlay.Subnets{}},
		{"FLANNEL_SUBNET=fd00:5:0:7::1/64\nFLANNEL_IPV6_SUBNET=10.5.7.1/24\n", overlay.Subnets{}},
		{"FLANNEL_NETWORK=10.5.0.0/16\nXFLANNEL_SUBNET=10.5.7.1/24\n", overlay.Subnets{}},
		{"FLANNEL_SUBNET\n=\n\x00\nFLANNEL_SUBNET=10.5.7.1/24", v4},
	} {
		if got := parseSubnetEnv([]byte(x.content)); got != x.want {
			t.Errorf("%q: %v, want %v", x.content, got, x.want)
		}
	}
	if got := formerSubnets(filepath.Join(t.TempDir(), "absent")); got != (overlay.Subnets{}) {
		t.Errorf("no file: %v", got)
	}
}

func FuzzParseSubnetEnv(f *testing.F) {
	for _, s := range []string{
		"", "FLANNEL_SUBNET=10.5.7.1/24\nFLANNEL_IPV6_SUBNET=fd00::1/64\n", "FLANNEL_SUBNET=\"::ffff:10.0.0.1/120\"", "FLANNEL_SUBNET=0.0.0.0/0",
		"FLANNEL_IPV6_SUBNET=fe80::1%eth0/64", "FLANNEL_SUBNET=10.5.7.1/24=\n=\r",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		n := parseSubnetEnv(content)
		if n.V4.IsValid() && (!n.V4.Addr().Is4() || n.V4 != n.V4.Masked()) || n.V6.IsValid() && (!n.V6.Addr().Is6() || n.V6 != n.V6.Masked()) {
			t.Fatalf("%q: %v", content, n)
		}
		// What is remembered can be written and remembered again. (The all-ones
		// address has no next one; no lease can be there.)
		for _, p := range n.All() {
			if !p.Addr().Next().IsValid() || p.IsSingleIP() {
				return
			}
		}
		e := subnetEnv{subnets: n}
		e.config.V4.Network, e.config.V6.Network = n.V4, n.V6
		if again := parseSubnetEnv(e.render()); again != n {
			t.Fatalf("%v is remembered as %v", n, again)
		}
	})
}
