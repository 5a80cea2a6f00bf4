package pod

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/twill-net/twill/pkg/ipam"
)

func TestConfigDefaults(t *testing.T) {
	c, err := ParseConfig([]byte(`{"cniVersion":"1.0.0","name":"cbr0","type":"twill","capabilities":{"portMappings":true},"args":{},"runtimeConfig":{},"unheard-of":1,"mtu":null}`))
	if err != nil {
		t.Fatal(err)
	}
	got := fmt.Sprintf("%+v", *c)
	want := "{CNIVersion:1.0.0 Name:cbr0 HandoffFile:/run/flannel/twill.json DataDir:/var/lib/cni/networks Mode:bridged Bridge:cni0 DefaultGateway:true MTU:0 " +
		"Hairpin:true Isolated:false Promisc:false PodPromisc:false IPMasq:false Routes:[] DNS:{Nameservers:[] Domain: Search:[] Options:[]} Firewall: Sysctls:[] " +
		"IPAM:{Ranges:[] Exclude:[] Sticky:false CoolDown:0s} MAC: Wanted:[] Ports:[] Bandwidth:<nil> legacy:<nil> PrevResult:<nil> Valid:[] ValidGiven:false}"
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestConfigErrors(t *testing.T) {
	for _, tt := range []struct{ conf, want string }{
		{`"mtu":"big"`, `mtu: "big": must be a whole number`},
		{`"mtu":67`, `mtu: 67: must be`},
		{`"mtu":65536`, `mtu: 65536: must be`},
		{`"mtu":1400.5`, `mtu: 1400.5: must be`},
		{`"hairpinMode":"yes"`, `hairpinMode: "yes": must be true or false`},
		{`"promiscMode":1`, `promiscMode: 1: must be`},
		{`"isDefaultGateway":"true"`, `isDefaultGateway: "true": must be`},
		{`"handoffFile":"run/x"`, `handoffFile: "run/x": must be an absolute path`},
		{`"dataDir":""`, `dataDir: "": must be an absolute path`},
		{`"dataDir":[]`, `dataDir: []: must be`},
		{`"bridge":"a-name-too-long0"`, `bridge: "a-name-too-long0": must be a link's name`},
		{`"bridge":"a b"`, `bridge: "a b": must`},
		{`"bridge":""`, `bridge: "": must`},
		{`"name":"a/b"`, `name: "a/b": must`},
		{`"name":".."`, `name: "..": must`},
		{`"routes":{}`, `routes: {}: must be a list`},
		{`"routes":[{"gw":"198.18.1.1"}]`, `routes: `},
		{`"routes":[null]`, `routes: [null]: must`},
		{`"routes":[{"dst":"203.0.113.0/24","gw":"fd00::1"}]`, `gw of dst's family`},
		{`"routes":[{"dst":"203.0.113.1/24"}]`, `bits beyond its length`},
		{`"routes":[{"dst":"203.0.113.0/24","mtu":-1}]`, `must not be negative`},
		{`"dns":[]`, `dns: []: must`},
		{`"prevResult":[]`, `prevResult: []: must be the result of ADD in version 1.1.0`},
		{`"prevResult":{"ips":"x"}`, `prevResult: `},
		{`"cni.dev/valid-attachments":{}`, `cni.dev/valid-attachments: {}: must`},
		{`"cni.dev/valid-attachments":[{"containerID":"a"}]`, `cni.dev/valid-attachments: `},
	} {
		conf := `{"cniVersion":"1.1.0","name":"cbr0",` + tt.conf + `}`
		if strings.HasPrefix(tt.conf, `"name"`) {
			conf = `{` + tt.conf + `}`
		}
		_, err := ParseConfig([]byte(conf))
		var e *types.Error
		if !errors.As(err, &e) || e.Code != types.ErrInvalidNetworkConfig || !strings.Contains(e.Msg, tt.want) {
			t.Errorf("%s: %v, want code 7 and %q", tt.conf, err, tt.want)
		}
	}
	var e *types.Error
	if _, err := ParseConfig([]byte(`{`)); !errors.As(err, &e) || e.Code != types.ErrDecodingFailure {
		t.Errorf("no JSON: %v, want code 6", err)
	}
}

func TestArgs(t *testing.T) {
	for _, tt := range []struct{ args, want, err string }{
		{"", "container c1 interface eth0", ""},
		{"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_UID=x;OTHER=1", "pod default/web-0 (container c1 interface eth0)", ""},
		{"IgnoreUnknown=true;IP=198.18.1.9", "container c1 interface eth0", ""},
		{"IP=198.18.1.9,fd00::9;MAC=02:00:00:00:00:01", "container c1 interface eth0", ""},
		{"IgnoreUnknown=0;COLOUR=red", "", "unknown key COLOUR"},
		{"IP=198.18.1", "", "IP=198.18.1: must be addresses"},
		{"MAC=01:00:00:00:00:01", "", "MAC=01:00:00:00:00:01: must be the MAC of one interface"},
		{"K8S_POD_NAME", "", `"K8S_POD_NAME" is not KEY=VALUE`},
	} {
		at, err := parseArgs(&skel.CmdArgs{ContainerID: "c1", IfName: "eth0", Args: tt.args})
		if tt.err == "" {
			if err != nil || at.String() != tt.want {
				t.Errorf("%s: %s, %v, want %s", tt.args, at, err, tt.want)
			}
			continue
		}
		var e *types.Error
		if !errors.As(err, &e) || e.Code != types.ErrInvalidEnvironmentVariables || !strings.Contains(e.Msg, tt.err) {
			t.Errorf("%s: %v, want code 4 and %q", tt.args, err, tt.err)
		}
	}
	if _, err := parseArgs(&skel.CmdArgs{ContainerID: strings.Repeat("c", 231), IfName: "eth0"}); err == nil {
		t.Error("a container id that no alias can hold was taken")
	}
}

func TestAlias(t *testing.T) {
	at := attachment{Owner: ipam.Owner{ContainerID: "c.1_x-y", IfName: "eth0"}}
	if o, ok := ownerOf(at.alias()); !ok || o != at.Owner {
		t.Errorf("%s gives %v, %t", at.alias(), o, ok)
	}
	for _, s := range []string{"", "twill", "twill:", "twill:c", "twill:/eth0", "twill:c/", "other:c/eth0"} {
		if o, ok := ownerOf(s); ok {
			t.Errorf("%q gives %v", s, o)
		}
	}
	if got := at.hostLink(); len(got) != 12 || got != at.hostLink() {
		t.Errorf("host link %s", got)
	}
}

func FuzzConfig(f *testing.F) {
	for _, s := range []string{
		`{"cniVersion":"1.1.0","name":"cbr0","type":"twill","mtu":1400,"bridge":"cni0","routes":[{"dst":"203.0.113.0/24","gw":"198.18.1.1"}]}`,
		`{"cniVersion":"0.3.1","name":"cbr0","prevResult":{"ips":[{"version":"4","address":"198.18.1.2/24"}],"interfaces":[{"name":"x"}]}}`,
		`{"cniVersion":"0.2.0","name":"cbr0","prevResult":{"ip4":{"ip":"198.18.1.2/24"}}}`,
		`{"name":"a","prevResult":{"cniVersion":"1.0.0","routes":[null],"interfaces":[null],"ips":[null]}}`,
		`{"cniVersion":"1.1.0","name":"cbr0","prevResult":{"interfaces":[null],"ips":[null],"routes":[null]}}`,
		`{"cniVersion":"1.1.0","name":"cbr0","cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}]}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := ParseConfig(b)
		if err != nil {
			var e *types.Error
			if !errors.As(err, &e) || e.Code == 0 {
				t.Errorf("%s: %v is no CNI error", b, err)
			}
			return
		}
		if c.Name == "" || c.Bridge == "" || c.DataDir[0] != '/' || c.HandoffFile[0] != '/' {
			t.Errorf("%s: %+v", b, c)
		}
		for _, r := range c.Routes {
			_ = kernelRoute(r)
		}
		for _, a := range resultAddrs(c.PrevResult) {
			_ = c.reservations().Path(a)
		}
		if _, _, err := parseBasics(b); err != nil {
			t.Errorf("%s: good for ADD, not for DEL: %v", b, err)
		}
	})
}
