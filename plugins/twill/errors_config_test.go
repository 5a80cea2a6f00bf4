//go:build linux && amd64

package main

import (
	"encoding/json"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
)

// environmentErrors are those of CNI_*. The message names the variable.
func environmentErrors() (out []failure) {
	for _, e := range []struct {
		name  string
		edit  func(*call)
		words string
	}{
		{"CNI_CONTAINERID absent", func(c *call) { c.id = "" }, "CNI_CONTAINERID"},
		{"CNI_CONTAINERID with a slash", func(c *call) { c.id = "a/b" }, "CNI_CONTAINERID|a/b"},
		{"CNI_CONTAINERID too long", func(c *call) { c.id = strings.Repeat("x", 231) }, "CNI_CONTAINERID|231 characters|at most 230"},
		{"CNI_IFNAME too long", func(c *call) { c.ifname = "eth0123456789012" }, "CNI_IFNAME"},
		{"CNI_IFNAME with a slash", func(c *call) { c.ifname = "a/b" }, "CNI_IFNAME"},
		{"CNI_NETNS absent", func(c *call) { c.netns = "" }, "CNI_NETNS"},
		{"CNI_PATH absent", func(c *call) { c.env = []string{"CNI_PATH="} }, "CNI_PATH"},
		{"CNI_ARGS no pair", func(c *call) { c.env = []string{"CNI_ARGS=IgnoreUnknown"} }, `CNI_ARGS: "IgnoreUnknown" is not KEY=VALUE`},
		{"CNI_ARGS unknown key", func(c *call) { c.env = []string{"CNI_ARGS=COLOUR=red"} }, "CNI_ARGS|unknown key COLOUR|IgnoreUnknown=1"},
		{"CNI_ARGS no address", func(c *call) { c.env = []string{"CNI_ARGS=IP=10.5.1.900"} }, `CNI_ARGS: IP=10.5.1.900: must be addresses, like "10.5.1.9"`},
		{"CNI_ARGS no MAC", func(c *call) { c.env = []string{"CNI_ARGS=MAC=01:00:5e:10:00:01"} }, `CNI_ARGS: MAC=01:00:5e:10:00:01: must be the MAC of one interface, like "02:00:5e:10:00:01"`},
	} {
		out = append(out, failure{
			name: e.name, verbs: "ADD CHECK", code: types.ErrInvalidEnvironmentVariables, words: strings.Split(e.words, "|"),
			call: func(_ *host, p *namespace) call {
				c := call{id: "c"}.on(p).with("prevResult", emptyResult())
				e.edit(&c)
				return c
			},
		})
	}
	return append(out, failure{
		name: "verb unknown", code: types.ErrInvalidEnvironmentVariables, words: []string{"CNI_COMMAND", "PAINT"},
		call: func(*host, *namespace) call { return call{verb: "PAINT"} },
	})
}

// emptyResult is one that CHECK finds everything missing for.
func emptyResult() any { return map[string]any{"cniVersion": "1.1.0"} }

// configErrors are those of the network configuration. Each names the key and the
// value, and what is right.
func configErrors() (out []failure) {
	for _, e := range []struct{ conf, words string }{
		{`{"mtu":"big"}`, `mtu: "big": must be a whole number from 68 to 65535, or 0`},
		{`{"mtu":67}`, `mtu: 67: must be a whole number`},
		{`{"mtu":1000}`, `mtu: 1000: must be at least 1280, as IPv6 is on`},
		{`{"mode":"bridge"}`, `mode: "bridge": must be "bridged" or "routed"`},
		{`{"isDefaultGateway":"yes"}`, `isDefaultGateway: "yes": must be true or false`},
		{`{"hairpinMode":1}`, `hairpinMode: 1: must be true or false`},
		{`{"ipam":{"sticky":"db"}}`, `sticky: "db": must be true or false`},
		{`{"ipam":{"coolDown":"1y"}}`, `coolDown: "1y": must be how long a released address rests, like "90s"`},
		{`{"ipam":{"coolDown":90}}`, `coolDown: 90: must be`},
		{`{"ipam":{"exclude":["198.18.1.0-9"]}}`, `exclude: ["198.18.1.0-9"]: must be a list of addresses or prefixes`},
		{`{"ipam":{"exclude":"198.18.1.9"}}`, `exclude: "198.18.1.9": must be a list`},
		{`{"ipam":{"ranges":[[]]}}`, `ranges: [[]]: an inner list is empty`},
		{`{"ipam":{"ranges":[[{"subnet":"198.18.1"}]]}}`, `ranges: [[{"subnet":"198.18.1"}]]|"198.18.1"|must be a list of lists of {subnet`},
		{`{"ipam":{"ranges":[[{"subnet":"198.18.1.0/24","rangeEnd":"x"}]]}}`, `"x"|must be a list of lists`},
		{`{"ipam":{"ranges":{"subnet":"198.18.1.0/24"}}}`, `ranges: {"subnet":"198.18.1.0/24"}: must be a list of lists`},
		{`{"ipam":{"ranges":[[{"subnet":"198.18.2.0/24"}]]}}`, `ranges: "198.18.2.0/24": is not within this node's subnets|leave ranges out|netctl leases`},
		{`{"ipam":{"routes":[{"dst":"here"}]}}`, `routes: [{"dst":"here"}]: must be a list of {dst, gw`},
		{`{"routes":[{"dst":"203.0.113.0/24","gw":"fd00::1"}]}`, `routes: [{"dst":"203.0.113.0/24","gw":"fd00::1"}]: must be|gw of dst's family`},
		{`{"routes":[{"dst":"203.0.113.9/24"}]}`, `routes: |203.0.113.9/24 has bits beyond its length`},
		{`{"routes":[{"dst":"203.0.113.0/24","mtu":-1}]}`, `routes: |numbers must not be negative`},
		{`{"sysctl":{"kernel.hostname":"x"}}`, `sysctl: {"kernel.hostname":"x"}: kernel.hostname: must be|below net. alone`},
		{`{"sysctl":[1]}`, `sysctl: [1]: must be an object like`},
		{`{"dns":"198.18.0.10"}`, `dns: "198.18.0.10": must be an object of nameservers`},
		{`{"mac":"red"}`, `mac: "red": must be the MAC of one interface`},
		{`{"args":7}`, `args: 7: must be an object`},
		{`{"args":{"cni":{"ips":7}}}`, `args.cni.ips: 7: must be addresses, like`},
		{`{"args":{"cni":{"mac":7}}}`, `args.cni.mac: 7: must be the MAC`},
		{`{"prevResult":{"cniVersion":"1.1.0","ips":[{"gateway":"198.18.1.1"}]}}`, `prevResult: |must be the result of ADD in version 1.1.0|an address is missing`},
		{`{"prevResult":[1]}`, `prevResult: [1]: must be the result of ADD in version 1.1.0`},
		{`{"prevResult":{"cniVersion":"1.1.0","ips":[{"address":"x"}]}}`, `prevResult: |must be the result of ADD in version 1.1.0: invalid CIDR address: x`},
		{`{"runtimeConfig":{"portMappings":[{"hostPort":80}]}}`, `runtimeConfig.portMappings: |containerPort: 0: must be a port, 1 to 65535`},
		{`{"runtimeConfig":{"bandwidth":"fast"}}`, `runtimeConfig.bandwidth: "fast": must be an object of ingressRate`},
		{`{"runtimeConfig":{"bandwidth":{"egressBurst":9}}}`, `runtimeConfig.bandwidth: |egressBurst is 9, but there is no egressRate: give both`},
		{`{"runtimeConfig":{"ipRanges":[[]]}}`, `ipRanges: [[]]: an inner list is empty`},
		{`{"runtimeConfig":{"dns":7}}`, `dns: 7: must be an object of servers`},
		{`{"runtimeConfig":{"ips":["198.18.1.900"]}}`, `runtimeConfig.ips: ["198.18.1.900"]: must be addresses`},
		{`{"runtimeConfig":{"mac":"00:00:00:00:00:00"}}`, `runtimeConfig.mac: "00:00:00:00:00:00": must be the MAC`},
		{`{"runtimeConfig":{"io.kubernetes.cri.pod-annotations":7}}`, `io.kubernetes.cri.pod-annotations: 7: must be an object of texts`},
		{`{"runtimeConfig":{"io.kubernetes.cri.pod-annotations":{"twill.net/addresses":"x"}}}`, `annotation twill.net/addresses: "x": must be addresses`},
		{`{"runtimeConfig":{"io.kubernetes.cri.pod-annotations":{"twill.net/mac":"x"}}}`, `annotation twill.net/mac: "x": must be the MAC`},
	} {
		out = append(out, badConfig("ADD CHECK STATUS", e.conf, types.ErrInvalidNetworkConfig, e.words))
	}
	// What every verb needs, DEL too.
	for _, e := range []struct{ conf, words string }{
		{`{"name":".."}`, `network configuration: name: |..|must name the network`},
		{`{"name":""}`, `network configuration: name: |must name the network`},
		{`{"name":"a/b"}`, `network configuration: name: |a/b|must name the network`},
		{`{"handoffFile":"twill.json"}`, `handoffFile: "twill.json": must be an absolute path`},
		{`{"handoffFile":7}`, `handoffFile: 7: must be an absolute path`},
		{`{"dataDir":"here"}`, `dataDir: "here": must be an absolute path`},
		{`{"ipam":"host-local"}`, `ipam: "host-local": must be an object`},
		{`{"ipam":{"dataDir":"here"}}`, `dataDir: "here": must be an absolute path`},
		{`{"bridge":"a/b"}`, `bridge: "a/b": must be a link's name: 1 to 15 characters`},
		{`{"firewall":"pf"}`, `firewall: "pf": must be "iptables" or "nftables"`},
	} {
		out = append(out, badConfig("ADD CHECK STATUS DEL GC", e.conf, types.ErrInvalidNetworkConfig, e.words))
	}
	const bad, decoding, incompatible = types.ErrInvalidNetworkConfig, types.ErrDecodingFailure, types.ErrIncompatibleCNIVersion
	return append(out,
		badConfig("ADD GC", `{"cni.dev/valid-attachments":7}`, bad, `cni.dev/valid-attachments: 7: must be a list of {containerID, ifname}`),
		badConfig("ADD GC", `{"cni.dev/valid-attachments":[{}]}`, bad, `cni.dev/valid-attachments: [{}]: must be a list of`),
		badConfig("CHECK", `{"prevResult":null}`, bad, "prevResult: |must be the result of ADD"),
		badConfig("ADD CHECK STATUS DEL GC", `{"cniVersion":7}`, decoding, "cniVersion"),
		badConfig("ADD CHECK STATUS DEL GC", `{"name":7}`, decoding, "name"),
		badConfig("ADD CHECK STATUS DEL GC", `{"cniVersion":"9.9.9"}`, incompatible, "9.9.9|1.1.0"),
		badConfig("CHECK", `{"cniVersion":"0.3.1"}`, incompatible, "CHECK|0.3.1|0.4.0"),
		badConfig("STATUS", `{"cniVersion":"1.0.0"}`, incompatible, "STATUS|1.0.0|1.1.0"),
		badConfig("GC", `{"cniVersion":"1.0.0"}`, incompatible, "GC|1.0.0|1.1.0"),
	)
}

// badConfig is the failure of verbs with these keys. words are parted by "|".
func badConfig(verbs, conf string, code uint, words string) failure {
	return failure{
		name: conf, verbs: verbs, code: code, words: strings.Split(words, "|"),
		call: func(_ *host, p *namespace) call {
			keys := map[string]any{}
			if err := json.Unmarshal([]byte(conf), &keys); err != nil {
				p.t.Fatal(err)
			}
			c := call{id: "c"}.on(p).with("prevResult", emptyResult())
			for key, value := range keys {
				c = c.with(key, value)
			}
			return c
		},
	}
}
