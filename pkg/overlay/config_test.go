package overlay

import (
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestParseConfigPools(t *testing.T) {
	for _, c := range []struct{ json, want string }{
		// SubnetLen: 24 if the network is /22 or wider, else two more.
		{`"Network":"10.5.0.0/16"`, "10.5.0.0/16 /24 10.5.1.0 10.5.255.0"},
		{`"Network":"10.0.0.0/8"`, "10.0.0.0/8 /24 10.0.1.0 10.255.255.0"},
		{`"Network":"10.5.0.0/22"`, "10.5.0.0/22 /24 10.5.1.0 10.5.3.0"},
		{`"Network":"10.5.0.0/23"`, "10.5.0.0/23 /25 10.5.0.128 10.5.1.128"},
		{`"Network":"10.5.0.0/28"`, "10.5.0.0/28 /30 10.5.0.4 10.5.0.12"},
		{`"Network":"10.5.7.9/16"`, "10.5.0.0/16 /24 10.5.1.0 10.5.255.0"},
		{`"Network":"10.5.0.0/16","SubnetLen":0`, "10.5.0.0/16 /24 10.5.1.0 10.5.255.0"},
		{`"Network":"10.5.0.0/16","SubnetLen":null`, "10.5.0.0/16 /24 10.5.1.0 10.5.255.0"},
		{`"Network":"10.5.0.0/16","SubnetLen":18`, "10.5.0.0/16 /18 10.5.64.0 10.5.192.0"},
		{`"Network":"10.5.0.0/16","SubnetLen":30`, "10.5.0.0/16 /30 10.5.0.4 10.5.255.252"},
		{`"Network":"255.255.0.0/16"`, "255.255.0.0/16 /24 255.255.1.0 255.255.255.0"},
		// SubnetMin and SubnetMax.
		{`"Network":"10.5.0.0/16","SubnetMin":"10.5.0.0"`, "10.5.0.0/16 /24 10.5.0.0 10.5.255.0"},
		{`"Network":"10.5.0.0/16","SubnetMin":"10.5.10.0","SubnetMax":"10.5.99.0"`, "10.5.0.0/16 /24 10.5.10.0 10.5.99.0"},
		{`"Network":"10.5.0.0/16","SubnetMin":"10.5.10.0","SubnetMax":"10.5.10.0"`, "10.5.0.0/16 /24 10.5.10.0 10.5.10.0"},
		{`"network":"10.5.0.0/16","SUBNETMIN":"10.5.10.0","subnetlen":25`, "10.5.0.0/16 /25 10.5.10.0 10.5.255.128"},
		// IPv6, with IPv4 and alone.
		{`"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48"`, "10.5.0.0/16 /24 10.5.1.0 10.5.255.0; fd00:5::/48 /64 fd00:5:0:1:: fd00:5:0:ffff::"},
		{`"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/62"`, "fd00:5::/62 /64 fd00:5:0:1:: fd00:5:0:3::"},
		{`"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/63"`, "fd00:5::/63 /65 fd00:5:0:0:8000:: fd00:5:0:1:8000::"},
		{`"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/124"`, "fd00:5::/124 /126 fd00:5::4 fd00:5::c"},
		{`"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/48","IPv6SubnetLen":126`, "fd00:5::/48 /126 fd00:5::4 fd00:5:0:ffff:ffff:ffff:ffff:fffc"},
		{`"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/48","IPv6SubnetMin":"fd00:5:0:8::","IPv6SubnetMax":"fd00:5:0:9::"`, "fd00:5::/48 /64 fd00:5:0:8:: fd00:5:0:9::"},
		{`"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"ffff:ffff::/32"`, "ffff:ffff::/32 /64 ffff:ffff:0:1:: ffff:ffff:ffff:ffff::"},
		// A family that is off has no pool, whatever else is said of it.
		{`"Network":"10.5.0.0/16","IPv6Network":"fd00:5::/48"`, "10.5.0.0/16 /24 10.5.1.0 10.5.255.0"},
		{`"Network":"10.5.0.0/29","EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/62"`, "fd00:5::/62 /64 fd00:5:0:1:: fd00:5:0:3::"},
	} {
		got, warnings, err := ParseConfig([]byte("{" + c.json + "}"))
		if err != nil || len(warnings) > 0 {
			t.Errorf("%s: warnings %q, error %v", c.json, warnings, err)
			continue
		}
		var pools []string
		for _, f := range got.families() {
			p := got.Pool(f)
			pools = append(pools, fmt.Sprintf("%s /%d %s %s", p.Network, p.SubnetLen, p.Min, p.Max))
		}
		if s := strings.Join(pools, "; "); s != c.want {
			t.Errorf("%s:\n got %s\nwant %s", c.json, s, c.want)
		}
	}
}

func TestParseConfigBackends(t *testing.T) {
	wireguard := WireGuardConfig{ListenPort: 51820, ListenPortV6: 51821, Mode: "separate"}
	const proposal = "aes128gcm16-sha256-prfsha256-ecp256"
	psk := strings.Repeat("x", 96)
	base := BackendConfig{UDPPort: 8285, VXLAN: VXLANConfig{VNI: 1}, WireGuard: wireguard, IPsec: IPsecConfig{ESPProposal: proposal}}
	for _, c := range []struct {
		json string
		want func(*BackendConfig)
	}{
		{`"Type":"vxlan"`, func(b *BackendConfig) { b.Type, b.VXLAN.Port = "vxlan", 8472 }},
		{`"type":"VXLAN","port":0`, func(b *BackendConfig) { b.Type, b.VXLAN.Port = "vxlan", 8472 }},
		{`"Type":"vxlan","VNI":16777215,"Port":4789,"MTU":1400,"GBP":true,"Learning":true,"DirectRouting":true,"MacPrefix":"0E-2A","Name":"x"`, func(b *BackendConfig) {
			b.Type, b.VXLAN = "vxlan", VXLANConfig{VNI: 16777215, Port: 4789, MTU: 1400, GBP: true, Learning: true, DirectRouting: true}
		}},
		{`"Type":"vxlan","MTU":626,"Port":65535`, func(b *BackendConfig) { b.Type, b.VXLAN = "vxlan", VXLANConfig{VNI: 1, Port: 65535, MTU: 626} }},
		{`"Type":"host-gw"`, func(b *BackendConfig) { b.Type = "host-gw" }},
		{`"Type":"alloc"`, func(b *BackendConfig) { b.Type = "alloc" }},
		{`"Type":"udp"`, func(b *BackendConfig) { b.Type = "udp" }},
		{`"Type":"udp","Port":9000`, func(b *BackendConfig) { b.Type, b.UDPPort = "udp", 9000 }},
		{`"Type":"wireguard"`, func(b *BackendConfig) { b.Type = "wireguard" }},
		{`"Type":"wireguard","ListenPort":1,"ListenPortV6":2,"MTU":1300,"PSK":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=","PersistentKeepaliveInterval":25,"Mode":"auto"`, func(b *BackendConfig) {
			b.Type, b.WireGuard = "wireguard", WireGuardConfig{1, 2, 1300, "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=", 25 * time.Second, "auto"}
		}},
		{`"Type":"ipip"`, func(b *BackendConfig) { b.Type = "ipip" }},
		{`"Type":"ipip","DirectRouting":true`, func(b *BackendConfig) { b.Type, b.IPIP.DirectRouting = "ipip", true }},
		{`"Type":"ipsec","PSK":"` + psk + `"`, func(b *BackendConfig) { b.Type, b.IPsec.PSK = "ipsec", psk }},
		{`"Type":"ipsec","PSK":"` + psk + `","UDPEncap":true,"ESPProposal":"p"`, func(b *BackendConfig) { b.Type, b.IPsec = "ipsec", IPsecConfig{true, "p", psk} }},
		{`"Type":"extension","PreStartupCommand":"a","PostStartupCommand":"b","SubnetAddCommand":"c","SubnetRemoveCommand":"d"`, func(b *BackendConfig) {
			b.Type, b.Extension = "extension", ExtensionConfig{"a", "b", "c", "d"}
		}},
		{`"Type":"tencent-vpc","AccessKeyID":"a","AccessKeySecret":"b"`, func(b *BackendConfig) { b.Type, b.Tencent = "tencent-vpc", TencentConfig{"a", "b"} }},
	} {
		want := base
		c.want(&want)
		got := config(t, `{"Network":"10.5.0.0/16","Backend":{`+c.json+`}}`)
		if !reflect.DeepEqual(got.Backend, want) {
			t.Errorf("%s:\n got %+v\nwant %+v", c.json, got.Backend, want)
		}
	}
}

func TestParseConfigTool(t *testing.T) {
	for json, want := range map[string]Tool{"": Iptables, `,"EnableNFTables":false`: Iptables, `,"enablenftables":true`: Nftables} {
		if got := config(t, `{"Network":"10.5.0.0/16"`+json+`}`).Tool(); got != want {
			t.Errorf("%q: %s, want %s", json, got, want)
		}
	}
}

// An absent Backend is udp, as in flannel's code. A backend that Twill does not
// have is named with what to store instead.
func TestAbsentBackend(t *testing.T) {
	c := config(t, `{"Network":"10.5.0.0/16"}`)
	if c.Backend.Type != "udp" || c.Backend.UDPPort != 8285 {
		t.Errorf("backend is %q, port %d", c.Backend.Type, c.Backend.UDPPort)
	}
	err := config(t, `{"Network":"10.5.0.0/16","Backend":{"Type":"tencent-vpc"}}`).CheckBackend()
	if err == nil || !strings.Contains(err.Error(), `Backend.Type: tencent-vpc`) || !strings.Contains(err.Error(), "use vxlan") {
		t.Errorf("CheckBackend: %v", err)
	}
	if err := config(t, v4JSON).CheckBackend(); err != nil {
		t.Errorf("CheckBackend of vxlan: %v", err)
	}
}

func TestParseConfigWarnings(t *testing.T) {
	_, got, err := ParseConfig([]byte(`{"Network":"10.5.0.0/16","Zeta":1,"Alpha":{},"Backend":{"Type":"host-gw","VNI":7,"type2":"x"}}`))
	want := []string{"unknown key Alpha is ignored", "unknown key Zeta is ignored", "unknown key Backend.VNI is ignored", "unknown key Backend.type2 is ignored"}
	if err != nil || strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got %q, error %v", got, err)
	}
}

func TestParseConfigErrors(t *testing.T) {
	dual := func(s string) string {
		return `{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48",` + s + `}`
	}
	pool := func(s string) string { return `{"Network":"10.5.0.0/16",` + s + `}` }
	vx := func(s string) string { return pool(`"Backend":{"Type":"vxlan",` + s + `}`) }
	of := func(typ, s string) string { return pool(`"Backend":{"Type":"` + typ + `",` + s + `}`) }
	cases := []string{
		``, `x`, `[]`, `null`, `{`, `{} {}`, `"Network"`,
		`{}`,
		`{"Network":7}`, `{"Network":""}`, `{"Network":"10.5.0.0"}`, `{"Network":"10.5.0.0/33"}`, `{"Network":"10.5.0.0/29"}`, `{"Network":"0.0.0.0/0"}`,
		`{"Network":"fd00::/48"}`, `{"Network":"::ffff:10.5.0.0/112"}`,
		`{"Network":"10.5.0.0/16","network":"10.6.0.0/16"}`,
		`{"Network":"10.5.0.0/16","EnableIPv4":"yes"}`, `{"Network":"10.5.0.0/16","EnableIPv4":false}`, `{"Network":"10.5.0.0/16","EnableNFTables":1}`,
		pool(`"SubnetLen":17`), pool(`"SubnetLen":31`), pool(`"SubnetLen":-1`), pool(`"SubnetLen":24.5`), pool(`"SubnetLen":"24"`),
		pool(`"SubnetMin":"10.5.1.1"`), pool(`"SubnetMin":"10.4.255.0"`), pool(`"SubnetMin":"ten"`), pool(`"SubnetMin":7`), pool(`"SubnetMin":"fd00::"`),
		pool(`"SubnetMax":"10.5.1.128"`), pool(`"SubnetMax":"10.6.0.0"`), pool(`"SubnetMax":"10.5.9.0","SubnetMin":"10.5.10.0"`), pool(`"SubnetMax":"10.5.0.0"`),
		pool(`"EnableIPv6":true`), pool(`"EnableIPv6":true,"IPv6Network":"10.6.0.0/16"`), pool(`"EnableIPv6":true,"IPv6Network":"fd00:5::/125"`), pool(`"EnableIPv6":true,"IPv6Network":"::/0"`),
		dual(`"IPv6SubnetLen":49`), dual(`"IPv6SubnetLen":127`), dual(`"IPv6SubnetMin":"fd00:5:0:1::1"`), dual(`"IPv6SubnetMin":"fd00:6::"`), dual(`"IPv6SubnetMax":"fd00:5::"`), dual(`"IPv6SubnetMax":"fd00:5:0:1::%eth0"`),
		pool(`"Backend":"vxlan"`), pool(`"Backend":[]`), pool(`"Backend":null`), pool(`"Backend":{}`), pool(`"Backend":{"Type":7}`), pool(`"Backend":{"Type":"geneve"}`),
		vx(`"VNI":0`), vx(`"VNI":16777216`), vx(`"VNI":"1"`), vx(`"VNI":1.5`), vx(`"Port":65536`), vx(`"Port":-1`), vx(`"MTU":-1`), vx(`"MTU":65536`), vx(`"MTU":625`), vx(`"GBP":1`), vx(`"Learning":"no"`), vx(`"DirectRouting":"yes"`), vx(`"vni":1,"VNI":2`),
		dual(`"Backend":{"Type":"vxlan","MTU":1349}`),
		of("udp", `"Port":70000`),
		of("wireguard", `"Mode":"both"`), of("wireguard", `"ListenPort":70000`), of("wireguard", `"ListenPortV6":-1`), of("wireguard", `"PersistentKeepaliveInterval":-5`), of("wireguard", `"PSK":123456789`), of("wireguard", `"MTU":70000`),
		of("ipip", `"DirectRouting":3`),
		of("ipsec", `"PSK":"`+strings.Repeat("s", 95)+`"`), of("ipsec", `"UDPEncap":"x"`), of("ipsec", `"ESPProposal":1`),
		of("extension", `"PreStartupCommand":["ls"]`), of("extension", `"SubnetRemoveCommand":1`),
		of("tencent-vpc", `"AccessKeySecret":1234567`),
	}
	var b strings.Builder
	for _, json := range cases {
		c, warnings, err := ParseConfig([]byte(json))
		if err == nil {
			t.Errorf("%s: accepted as %+v", json, c)
			continue
		}
		if !c.Equal(Config{}) || warnings != nil {
			t.Errorf("%s: half a configuration comes with the error", json)
		}
		for _, secret := range []string{"123456789", "1234567", "ssss"} {
			if strings.Contains(err.Error(), secret) {
				t.Errorf("%s: the error shows the secret: %v", json, err)
			}
		}
		fmt.Fprintf(&b, "%s\n    %v\n", json, err)
	}
	golden(t, "config-errors", b.String())
}

// The boundary of Backend.MTU in dual stack is IPv6's.
func TestLeastMTU(t *testing.T) {
	config(t, `{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan","MTU":1350}}`)
}

func TestCheckTransition(t *testing.T) {
	c := config(t, v4JSON)
	own := subnetsOf("10.5.7.0-24")
	peer, odd := peerLease("10.5.200.0-24", 2), peerLease("10.9.0.0-24", 3)
	for _, x := range []struct{ next, want string }{
		{v4JSON, ""},
		{`{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","VNI":9}}`, ""},
		{`{"Network":"10.5.0.0/16","SubnetMax":"10.5.7.0","Backend":{"Type":"vxlan"}}`, ""},
		{`{"Network":"10.5.0.0/16","SubnetMax":"10.5.6.0","Backend":{"Type":"vxlan"}}`, "does not fit"},
		{`{"Network":"10.5.0.0/16","SubnetMin":"10.5.8.0","Backend":{"Type":"vxlan"}}`, "does not fit"},
		{`{"Network":"10.5.0.0/16","SubnetLen":25,"Backend":{"Type":"vxlan"}}`, "prefix length 25"},
		{`{"Network":"10.5.0.0/17","Backend":{"Type":"vxlan"}}`, "network shrinks from 10.5.0.0/16 to 10.5.0.0/17 under the live lease 10.5.200.0-24 of 198.51.100.2"},
		{`{"Network":"10.4.0.0/15","Backend":{"Type":"vxlan"}}`, ""},
		{`{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}`, ""},
		{`{"Network":"10.6.0.0/16","Backend":{"Type":"vxlan"}}`, "does not fit"},
		{`{"Network":"10.5.0.0/16","Backend":{"Type":"tencent-vpc"}}`, "Backend.Type: tencent-vpc"},
		{dualJSON, "no subnet of network fd00:5::/48"},
	} {
		err := c.CheckTransition(config(t, x.next), own, []*Lease{&peer, &odd})
		if x.want == "" && err != nil || x.want != "" && (err == nil || !strings.Contains(err.Error(), x.want)) {
			t.Errorf("%s: %v, want %q", x.next, err, x.want)
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	for _, s := range []string{
		v4JSON, dualJSON, `{}`, `null`, `{"Network":"10.5.0.0/28","SubnetLen":30}`, `{"network":"255.255.255.0/24","SubnetMin":"255.255.255.0"}`,
		`{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"ffff::/124"}`, `{"Network":"1.0.0.0/1","SubnetLen":3}`, `{"Network":"10.0.0.0/8","SubnetLen":30}`,
		`{"Network":"10.5.0.0/16","Backend":{"Type":"wireguard","Mode":"auto","PersistentKeepaliveInterval":1}}`,
		`{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"8000::/1","IPv6SubnetLen":126}`,
	} {
		f.Add([]byte(s), uint8(0))
	}
	f.Fuzz(func(t *testing.T, data []byte, pick uint8) {
		c, _, err := ParseConfig(data)
		if err != nil {
			if !c.Equal(Config{}) || err.Error() == "" {
				t.Fatalf("error %q with %+v", err, c)
			}
			return
		}
		if len(c.families()) == 0 {
			t.Fatal("accepted without a family")
		}
		for _, fam := range c.families() {
			checkPool(t, c.Pool(fam), int(pick))
		}
	})
}

// checkPool checks what everybody relies on in a validated pool.
func checkPool(t *testing.T, p Pool, pick int) {
	t.Helper()
	for _, a := range []netip.Addr{p.Min, p.Max} {
		if !p.Network.Contains(a) || netip.PrefixFrom(a, p.SubnetLen).Masked().Addr() != a {
			t.Fatalf("%s is not a subnet's address in %+v", a, p)
		}
	}
	if p.Max.Less(p.Min) || p.SubnetLen < p.Network.Bits()+2 || p.Network != p.Network.Masked() {
		t.Fatalf("bad pool %+v", p)
	}
	seen := map[uint32]bool{}
	free := p.free(nil, 300)
	if len(free) == 0 {
		t.Fatalf("an empty pool has nothing free: %+v", p)
	}
	for _, s := range free {
		if err := p.Check(s); err != nil {
			t.Fatalf("free subnet %s: %v", s, err)
		}
		if n, ok := p.number(s); ok && seen[n] {
			t.Fatalf("index %d of %s is given twice", n, s)
		} else if ok {
			seen[n] = true
		}
	}
	taken := free[pick%len(free)]
	for _, s := range p.free([]netip.Prefix{taken}, 300) {
		if s.Overlaps(taken) {
			t.Fatalf("%s is free although %s is taken", s, taken)
		}
	}
}
