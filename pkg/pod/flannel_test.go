package pod

import (
	"encoding/json"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const envBoth = `FLANNEL_NETWORK=198.18.0.0/16
FLANNEL_SUBNET=198.18.5.1/24
FLANNEL_IPV6_NETWORK=fd00:18::/48
FLANNEL_IPV6_SUBNET=fd00:18:0:5::1/64
FLANNEL_MTU=1450
FLANNEL_IPMASQ=true
`

const envOne = "FLANNEL_NETWORK=198.18.0.0/16\nFLANNEL_SUBNET=198.18.5.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"

// flannelNets are configurations of flannel's plugin, what that plugin (v1.9.1)
// makes of each for its delegate, and what it is in Twill's keys.
var flannelNets = []struct{ name, stdin, env, delegate, native string }{
	{
		name:     "kube-flannel's conflist, as the runtime hands it over",
		stdin:    `{"cniVersion":"0.3.1","name":"cbr0","type":"flannel","delegate":{"hairpinMode":true,"isDefaultGateway":true}}`,
		env:      envBoth,
		delegate: `{"cniVersion":"0.3.1","hairpinMode":true,"ipMasq":false,"ipam":{"ranges":[[{"subnet":"198.18.5.0/24"}],[{"subnet":"fd00:18:0:5::/64"}]],"routes":[{"dst":"198.18.0.0/16"},{"dst":"fd00:18::/48"}],"type":"host-local"},"isDefaultGateway":true,"isGateway":true,"mtu":1450,"name":"cbr0","type":"bridge"}`,
		native:   `{"cniVersion":"0.3.1","name":"cbr0","type":"twill","mode":"bridged","isDefaultGateway":true,"hairpinMode":true,"promiscMode":false,"portIsolation":false,"mtu":1450,"ipMasq":false,"ipam":{"ranges":[[{"subnet":"198.18.5.0/24"}],[{"subnet":"fd00:18:0:5::/64"}]],"routes":[{"dst":"198.18.0.0/16"},{"dst":"fd00:18::/48"}]}}`,
	},
	{
		name:     "nothing said: no default route, no hairpin, and flanneld does not masquerade",
		stdin:    `{"name":"cbr0","type":"flannel"}`,
		env:      envOne,
		delegate: `{"ipMasq":true,"ipam":{"ranges":[[{"subnet":"198.18.5.0/24"}]],"routes":[{"dst":"198.18.0.0/16"}],"type":"host-local"},"isGateway":true,"mtu":1450,"name":"cbr0","type":"bridge"}`,
		native:   `{"name":"cbr0","type":"twill","mode":"bridged","isDefaultGateway":false,"hairpinMode":false,"promiscMode":false,"portIsolation":false,"mtu":1450,"ipMasq":true,"ipam":{"ranges":[[{"subnet":"198.18.5.0/24"}]],"routes":[{"dst":"198.18.0.0/16"}]}}`,
	},
	{
		name: "everything said, in the wrong case too, with what the runtime adds",
		stdin: `{"cniVersion":"1.0.0","name":"n2","type":"flannel","capabilities":{"mac":true},"SubnetFile":"/run/other.env","dataDir":"/srv/scratch",
			"runtimeConfig":{"mac":"02:00:00:00:00:07","portMappings":[{"hostPort":8080,"containerPort":80,"protocol":"tcp"}]},
			"prevResult":{"cniVersion":"1.0.0","ips":[{"address":"198.18.5.9/24"}]},
			"ipam":{"dataDir":"/srv/networks","routes":[{"dst":"0.0.0.0/0"},{"dst":"203.0.113.0/24","gw":"198.18.5.1"}],"type":"host-local"},
			"delegate":{"type":"bridge","bridge":"br7","mtu":1400,"ipMasq":true,"ipMasqBackend":"nftables","isGateway":true,"forceAddress":true,"portIsolation":true,
				"HairpinMode":true,"vlan":0,"vlanTrunk":[],"macspoofchk":false,"preserveDefaultVlan":false,"enabledad":false,"dns":{"nameservers":["203.0.113.53"]},"ofNobody":1}}`,
		env:      strings.Replace(envOne, "198.18.0.0/16", "198.18.0.0/16,198.19.0.0/16", 1),
		delegate: `{"HairpinMode":true,"bridge":"br7","cniVersion":"1.0.0","dns":{"nameservers":["203.0.113.53"]},"enabledad":false,"forceAddress":true,"ipMasq":true,"ipMasqBackend":"nftables","ipam":{"dataDir":"/srv/networks","ranges":[[{"subnet":"198.18.5.0/24"}]],"routes":[{"dst":"0.0.0.0/0"},{"dst":"203.0.113.0/24","gw":"198.18.5.1"},{"dst":"198.18.0.0/16"},{"dst":"198.19.0.0/16"}],"type":"host-local"},"isGateway":true,"macspoofchk":false,"mtu":1400,"name":"n2","ofNobody":1,"portIsolation":true,"preserveDefaultVlan":false,"runtimeConfig":{"mac":"02:00:00:00:00:07","portMappings":[{"containerPort":80,"hostPort":8080,"protocol":"tcp"}]},"type":"bridge","vlan":0,"vlanTrunk":[]}`,
		native:   `{"cniVersion":"1.0.0","name":"n2","type":"twill","mode":"bridged","bridge":"br7","isDefaultGateway":false,"hairpinMode":true,"promiscMode":false,"portIsolation":true,"mtu":1400,"ipMasq":true,"firewall":"nftables","dns":{"nameservers":["203.0.113.53"]},"ipam":{"dataDir":"/srv/networks","ranges":[[{"subnet":"198.18.5.0/24"}]],"routes":[{"dst":"0.0.0.0/0"},{"dst":"203.0.113.0/24","gw":"198.18.5.1"},{"dst":"198.18.0.0/16"},{"dst":"198.19.0.0/16"}]},"runtimeConfig":{"mac":"02:00:00:00:00:07","portMappings":[{"containerPort":80,"hostPort":8080,"protocol":"tcp"}]},"prevResult":{"cniVersion":"1.0.0","ips":[{"address":"198.18.5.9/24"}]}}`,
	},
	{
		name:     "ptp is routed; what only a bridge has is passed over, as ptp does",
		stdin:    `{"cniVersion":"1.1.0","name":"cbr0","type":"flannel","delegate":{"type":"ptp","hairpinMode":true,"isDefaultGateway":true,"ipMasq":false},"cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}]}`,
		env:      "# ours\n\nFLANNEL_IPV6_NETWORK=fd00:18::/48\nFLANNEL_IPV6_SUBNET=\"fd00:18:0:5::1/64\"\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\nFLANNEL_OTHER=x\n",
		delegate: `{"cniVersion":"1.1.0","hairpinMode":true,"ipMasq":false,"ipam":{"ranges":[[{"subnet":"fd00:18:0:5::/64"}]],"routes":[{"dst":"fd00:18::/48"}],"type":"host-local"},"isDefaultGateway":true,"mtu":1450,"name":"cbr0","type":"ptp"}`,
		native:   `{"cniVersion":"1.1.0","name":"cbr0","type":"twill","mode":"routed","isDefaultGateway":false,"hairpinMode":false,"promiscMode":false,"portIsolation":false,"mtu":1450,"ipMasq":false,"ipam":{"ranges":[[{"subnet":"fd00:18:0:5::/64"}]],"routes":[{"dst":"fd00:18::/48"}]},"cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}]}`,
	},
}

// envOf parses a subnet.env through a file.
func envOf(t testing.TB, content string) (SubnetEnv, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "subnet.env")
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return ReadSubnetEnv(path)
}

func TestFlannelNet(t *testing.T) {
	for _, c := range flannelNets {
		t.Run(c.name, func(t *testing.T) {
			env, err := envOf(t, c.env)
			if err != nil {
				t.Fatal(err)
			}
			n, err := parseFlannel([]byte(c.stdin))
			if err != nil {
				t.Fatal(err)
			}
			delegate, err := n.delegate(env)
			if err != nil || string(delegate) != c.delegate {
				t.Errorf("delegate: error %v\ngot  %s\nwant %s", err, delegate, c.delegate)
			}
			// Whoever reads the scratch file finds nothing to take back.
			scratch, err := scratchConf(delegate)
			if want := strings.Replace(c.delegate, `"ipMasq":true`, `"ipMasq":false`, 1); err != nil || string(scratch) != want {
				t.Errorf("scratch file: error %v\ngot  %s\nwant %s", err, scratch, want)
			}
			native, err := n.addConf(delegate)
			if err != nil || string(native) != c.native {
				t.Errorf("native: error %v\ngot  %s\nwant %s", err, native, c.native)
			}
		})
	}
}

func TestFlannelFiles(t *testing.T) {
	n, err := parseFlannel([]byte(flannelNets[0].stdin))
	if err != nil || n.SubnetFile != "/run/flannel/subnet.env" || n.ScratchDir != "/var/lib/cni/flannel" {
		t.Errorf("defaults: %+v, %v", n, err)
	}
	n, err = parseFlannel([]byte(flannelNets[2].stdin))
	if err != nil || n.SubnetFile != "/run/other.env" || n.ScratchDir != "/srv/scratch" {
		t.Errorf("given: %+v, %v", n, err)
	}
}

func TestFlannelRefusals(t *testing.T) {
	env, err := envOf(t, envBoth)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ stdin, words string }{
		{`{`, "unexpected end of JSON input"},
		{`{"name":5}`, "name"},
		{`{"delegate":7}`, "delegate"},
		{`{"subnetFile":"subnet.env"}`, `subnetFile: "subnet.env": must be an absolute path`},
		{`{"dataDir":""}`, `dataDir: "": must be an absolute path`},
		{`{"delegate":{"name":"x"}}`, "delegate.name: must not be given"},
		{`{"delegate":{"ipam":{}}}`, "delegate.ipam: must not be given"},
		{`{"delegate":{"type":5}}`, "delegate.type: 5: must be a text"},
		{`{"delegate":{"type":null}}`, "delegate.type: <nil>: must be a text"},
		{`{"delegate":{"type":"macvlan"}}`, `delegate.type: "macvlan": must be "bridge" or "ptp"`},
		{`{"delegate":{"mtu":"1400"}}`, "mtu"},
		{`{"delegate":{"vlan":7}}`, "vlan, vlanTrunk: 7: Twill has no VLANs"},
		{`{"delegate":{"vlanTrunk":[{"id":7}]}}`, "Twill has no VLANs"},
		{`{"delegate":{"macspoofchk":true,"enabledad":true}}`, "delegate.macspoofchk: true: Twill does not check the pods' MAC addresses: remove it; delegate.enabledad: true"},
		{`{"delegate":{"disableContainerInterface":true}}`, "delegate.disableContainerInterface"},
		{`{"delegate":{"isGateway":false}}`, "delegate.isGateway: false"},
		{`{"delegate":{"ipMasqBackend":"pf"}}`, "delegate.ipMasqBackend: pf"},
		{`{"ipam":{"type":"dhcp"}}`, "ipam.type: dhcp"},
		{`{"ipam":{"subnet":"198.18.5.0/24"}}`, "ipam.subnet: 198.18.5.0/24: is what subnet.env says"},
		{`{"ipam":{"resolvConf":"/etc/resolv.conf"}}`, "ipam.resolvConf"},
		{`{"ipam":{"routes":[{"dst":"x"}]}}`, "ipam.routes"},
	} {
		n, err := parseFlannel([]byte(c.stdin))
		if err == nil {
			var delegate []byte
			if delegate, err = n.delegate(env); err == nil {
				_, err = n.addConf(delegate)
			}
		}
		if err == nil || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: error %v, want %q", c.stdin, err, c.words)
		}
	}
}

// DEL takes the pod as the day of ADD left it, and never refuses what ADD would.
func TestFlannelDel(t *testing.T) {
	const stdin = `{"cniVersion":"1.0.0","name":"new","type":"flannel","ipam":{"dataDir":"/srv/new"},"delegate":{"bridge":"br1","vlan":7},"prevResult":{"ips":[]}}`
	const now = `{"cniVersion":"1.0.0","name":"new","type":"twill","mode":"bridged","bridge":"br1","isDefaultGateway":false,"hairpinMode":false,"promiscMode":false,"portIsolation":false,"ipMasq":false,"ipam":{"dataDir":"/srv/new"},"prevResult":{"ips":[]}}`
	for _, c := range []struct{ name, scratch, want string }{
		{
			"flannel's scratch file", `{"bridge":"br0","ipam":{"dataDir":"/srv/old","type":"host-local"},"name":"old","type":"bridge","vlan":7}`,
			`{"cniVersion":"1.0.0","name":"old","type":"twill","mode":"bridged","bridge":"br0","isDefaultGateway":false,"hairpinMode":false,"promiscMode":false,"portIsolation":false,"ipMasq":false,"ipam":{"dataDir":"/srv/old"},"prevResult":{"ips":[]}}`,
		},
		{
			"ptp then, bridge now", `{"ipam":{},"name":"old","type":"ptp"}`,
			`{"cniVersion":"1.0.0","name":"old","type":"twill","mode":"routed","isDefaultGateway":false,"hairpinMode":false,"promiscMode":false,"portIsolation":false,"ipMasq":false,"ipam":{},"prevResult":{"ips":[]}}`,
		},
		{"no scratch file", "", now},
		{"cut off by a loss of power", `{"bridge":"br0","ipam":{"da`, now},
		{"not flannel's", `{}`, now},
		{"of other types", `{"name":"old","bridge":7}`, now},
	} {
		n, err := parseFlannel([]byte(stdin))
		if err != nil {
			t.Fatal(err)
		}
		got, err := n.delConf([]byte(c.scratch))
		if err != nil || string(got) != c.want {
			t.Errorf("%s: error %v\ngot  %s\nwant %s", c.name, err, got, c.want)
		}
	}
}

func TestReadSubnetEnv(t *testing.T) {
	p := netip.MustParsePrefix
	got, err := envOf(t, strings.Replace(envBoth, "fd00:18::/48", "fd00:18::/48, fd00:19::7/48,fd00:18::/48", 1))
	if err != nil || got.MTU != 1450 || !got.IPMasq ||
		!slices.Equal(got.Networks, []netip.Prefix{p("198.18.0.0/16"), p("fd00:18::/48"), p("fd00:19::/48")}) ||
		!slices.Equal(got.Subnets, []netip.Prefix{p("198.18.5.0/24"), p("fd00:18:0:5::/64")}) {
		t.Errorf("got %+v, %v", got, err)
	}
	if _, err := ReadSubnetEnv(filepath.Join(t.TempDir(), "subnet.env")); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "twilld") {
		t.Errorf("absent: %v", err)
	}
	without := func(key string) string {
		var kept []string
		for line := range strings.Lines(envBoth) {
			if !strings.HasPrefix(line, key+"=") {
				kept = append(kept, line)
			}
		}
		return strings.Join(kept, "")
	}
	for _, c := range []struct{ env, words string }{
		{"", "FLANNEL_SUBNET and FLANNEL_IPV6_SUBNET are missing"},
		{without("FLANNEL_SUBNET"), "FLANNEL_NETWORK is there, FLANNEL_SUBNET is missing"},
		{without("FLANNEL_IPV6_NETWORK"), "FLANNEL_IPV6_SUBNET is there, FLANNEL_IPV6_NETWORK is missing"},
		{without("FLANNEL_MTU"), "FLANNEL_MTU is missing"},
		{without("FLANNEL_IPMASQ"), "FLANNEL_IPMASQ is missing"},
		{envBoth + "FLANNEL_MTU", `line 7: "FLANNEL_MTU": must be KEY=VALUE`},
		{envBoth + "FLANNEL_MTU=0", `line 7: FLANNEL_MTU: "0": must be a whole number from 68 to 65535`},
		{envBoth + "FLANNEL_MTU=big", `line 7: FLANNEL_MTU: "big"`},
		{envBoth + "FLANNEL_IPMASQ=yes", `line 7: FLANNEL_IPMASQ: "yes": must be true or false`},
		{envBoth + "FLANNEL_SUBNET=fd00:18::/64", `line 7: FLANNEL_SUBNET: "fd00:18::/64": must be a prefix of 32-bit addresses`},
		{envBoth + "FLANNEL_NETWORK=198.18.0.0/16,", `line 7: FLANNEL_NETWORK: ""`},
		{envBoth + "FLANNEL_IPV6_SUBNET=::ffff:198.18.0.0/120", "line 7: FLANNEL_IPV6_SUBNET"},
	} {
		if _, err := envOf(t, c.env); err == nil || !strings.Contains(err.Error(), c.words) || !strings.Contains(err.Error(), "subnet.env") {
			t.Errorf("%q: error %v, want %q", c.env, err, c.words)
		}
	}
}

func TestScratch(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "flannel")
	if b, err := readScratch(dir, "a"); b != nil || err != nil {
		t.Errorf("before ADD: %s, %v", b, err)
	}
	if err := removeScratch(dir, "a"); err != nil {
		t.Errorf("remove before ADD: %v", err)
	}
	if err := sweepScratch(dir, "cbr0", func(string) bool { return false }); err != nil {
		t.Errorf("sweep before ADD: %v", err)
	}
	for _, id := range []string{"../a", "", ".", "a/b"} {
		if err := writeScratch(dir, id, []byte("{}")); err == nil {
			t.Errorf("container %q was taken", id)
		}
	}
	for _, id := range []string{"a", "b", "c"} {
		for _, conf := range []string{`{"name":"old"}`, `{"name":"cbr0"}`} {
			if err := writeScratch(dir, id, []byte(conf)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := writeScratch(dir, "d", []byte(`{"name":"other"}`)); err != nil {
		t.Fatal(err)
	}
	// A killed ADD leaves a part of a file, which must neither be read nor stay.
	if err := os.WriteFile(filepath.Join(dir, ".a.tmp"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if b, err := readScratch(dir, "a"); string(b) != `{"ipMasq":false,"name":"cbr0"}` || err != nil {
		t.Errorf("read: %s, %v", b, err)
	}
	for range 2 {
		if err := removeScratch(dir, "a"); err != nil {
			t.Fatal(err)
		}
	}
	if err := sweepScratch(dir, "cbr0", func(id string) bool { return id == "b" }); err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 2 || files[0].Name() != "b" || files[1].Name() != "d" {
		t.Errorf("left %v, %v; want b, which is kept, and d of another network", files, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writeScratch(filepath.Join(dir, "file"), "a", []byte("{}")); err == nil {
		t.Error("a file was taken for the directory")
	}
}

func FuzzSubnetEnv(f *testing.F) {
	f.Add(envBoth)
	f.Add(envOne)
	f.Add("FLANNEL_NETWORK=198.18.0.0/16,198.19.0.0/16\nFLANNEL_SUBNET='198.18.5.1/24'\nFLANNEL_MTU=1\n#\nFLANNEL_IPMASQ")
	f.Fuzz(func(t *testing.T, text string) {
		env, err := parseEnv(strings.NewReader(text))
		if err != nil {
			return
		}
		if len(env.Subnets) == 0 || len(env.Subnets) > 2 || len(env.Networks) < len(env.Subnets) || env.MTU < 68 || env.MTU > 65535 {
			t.Errorf("%q: %+v", text, env)
		}
		for _, p := range append(env.Networks, env.Subnets...) {
			if !p.IsValid() || p != p.Masked() {
				t.Errorf("%q: prefix %s", text, p)
			}
		}
	})
}

// Whatever the configuration is, what comes out is one that JSON can carry, with
// the network's name in it, and DEL works on it.
func FuzzFlannelNet(f *testing.F) {
	for _, c := range flannelNets {
		f.Add(c.stdin, c.delegate)
	}
	f.Add(`{"ipam":{"routes":null},"delegate":{"type":"bridge","mtu":1e9}}`, `{"name":"x","ipam":{"dataDir":1}}`)
	env, err := envOf(f, envBoth)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, stdin, scratch string) {
		n, err := parseFlannel([]byte(stdin))
		if err != nil {
			return
		}
		del, err := n.delConf([]byte(scratch))
		if err != nil || !json.Valid(del) {
			t.Errorf("DEL: %v: %s", err, del)
		}
		delegate, err := n.delegate(env)
		if err != nil {
			return
		}
		native, err := n.addConf(delegate)
		if err != nil {
			return
		}
		var got struct{ Name, Type string }
		if err := json.Unmarshal(native, &got); err != nil || got.Name != n.conf.Name || got.Type != "twill" {
			t.Errorf("%v: %s", err, native)
		}
	})
}
