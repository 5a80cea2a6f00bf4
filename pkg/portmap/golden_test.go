package portmap

import (
	"encoding/json"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/xtables"
)

var updateGolden = flag.Bool("update", false, "rewrite the golden files")

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name+".golden")
	if *updateGolden {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs; got:\n%s", file, got)
	}
}

// goldenEntries are all kinds of need: ports on all addresses and on one, in each
// family, two networks, a pod of its own link, masquerade with and without exception.
func goldenEntries() []Entry {
	p, a := netip.MustParsePrefix, netip.MustParseAddr
	web := (&pod{number: 1, addr: "198.18.1.2", ipv6: "fd00:18:0:1::2"}).entry(
		tcp(8080, 80), Mapping{HostPort: 5353, ContainerPort: 53, Protocol: "udp"},
		Mapping{HostPort: 8443, ContainerPort: 443, Protocol: "tcp", HostIP: a(hostAddr)},
		Mapping{HostPort: 8444, ContainerPort: 443, Protocol: "tcp", HostIP: a("0.0.0.0")},
	)
	routed := (&pod{number: 2, addr: "198.18.1.3", ipv6: "fd00:18:0:1::3"}).entry(
		Mapping{HostPort: 3868, ContainerPort: 3868, Protocol: "sctp"},
		Mapping{HostPort: 8443, ContainerPort: 8443, Protocol: "tcp", HostIP: a(otherHostAddr)},
		Mapping{HostPort: 8443, ContainerPort: 8443, Protocol: "tcp", HostIP: a("::")},
	)
	routed.Local = []netip.Prefix{p("198.18.1.3/32"), p("fd00:18:0:1::3/128")}
	masqueraded := (&pod{number: 3, addr: "198.18.1.4", ipv6: "fd00:18:0:1::4"}).entry()
	masqueraded.Masquerade = []netip.Prefix{p("198.18.1.0/24"), p("198.18.0.0/16"), p("fd00:18::/48")}
	v4only := Entry{Attachment: "other:c4:eth0", Holder: "container c4", HostLink: "veth4", Addrs: []netip.Addr{a("198.19.0.4")}, Masquerade: []netip.Prefix{}}
	return []Entry{web, routed, masqueraded, v4only}
}

func TestGolden(t *testing.T) {
	entries := goldenEntries()
	for _, tt := range []struct {
		name          string
		before, after []Entry
		exact         bool
	}{
		{"all", nil, entries, false},
		{"one-more", entries[1:], entries, false},
		{"one-less", entries, entries[1:], false},
		{"last", entries[:1], nil, false},
		{"masquerade-only", nil, entries[3:], false},
		{"anew", nil, entries[:1], true},
	} {
		cs := changes(tt.before, tt.after, slices.Concat(tt.before, tt.after), tt.exact)
		golden(t, tt.name+".nft", nftDocument(cs))
		if tt.exact {
			continue // depends on what is there
		}
		var doc strings.Builder
		for _, c := range cs {
			doc.WriteString("# " + xtables.Plain(c.after.family) + "-restore\n")
			doc.WriteString(iptablesDocument(iptablesChains(c.before), iptablesChains(c.after), nil))
		}
		golden(t, tt.name+".iptables", doc.String())
	}
}

// The rules depend on the set of entries, not on the order that they were read in.
func TestOrder(t *testing.T) {
	entries := goldenEntries()
	want := nftDocument(changes(nil, entries, entries, false))
	slices.Reverse(entries)
	if got := nftDocument(changes(nil, entries, entries, false)); got != want {
		t.Errorf("reversed:\n%s", got)
	}
}

func TestParseMappings(t *testing.T) {
	for _, tt := range []struct {
		raw  string
		want []Mapping
		err  string
	}{
		{``, nil, ""},
		{`null`, nil, ""},
		{`[]`, nil, ""},
		{
			`[{"hostPort":8080,"containerPort":80,"protocol":"TCP"},{"hostPort":0,"containerPort":81},{"hostPort":53,"containerPort":53,"protocol":"udp","hostIP":"::ffff:198.51.100.1"},{"hostPort":1,"containerPort":1}]`,
			[]Mapping{tcp(8080, 80), {HostPort: 53, ContainerPort: 53, Protocol: "udp", HostIP: netip.MustParseAddr(hostAddr)}, tcp(1, 1)},
			"",
		},
		{`[{"hostPort":80,"containerPort":80,"hostIP":"0.0.0.0"},{"hostPort":80,"containerPort":80,"hostIP":"::"}]`, []Mapping{
			{HostPort: 80, ContainerPort: 80, Protocol: "tcp", HostIP: netip.IPv4Unspecified()},
			{HostPort: 80, ContainerPort: 80, Protocol: "tcp", HostIP: netip.IPv6Unspecified()},
		}, ""},
		{`{}`, nil, "must be a list of {hostPort"},
		{`[{"hostPort":"x"}]`, nil, "must be a list of {hostPort"},
		{`[{"hostPort":70000,"containerPort":80}]`, nil, "portMappings[0]: hostPort: 70000: must be a port"},
		{`[{"hostPort":80}]`, nil, "portMappings[0]: containerPort: 0: must be a port"},
		{`[{"hostPort":80,"containerPort":80,"protocol":"icmp"}]`, nil, "portMappings[0]: protocol: icmp: must be tcp, udp or sctp"},
		{`[{"hostPort":80,"containerPort":80,"hostIP":"localhost"}]`, nil, "portMappings[0]: hostIP: localhost: must be an address"},
		{`[{"hostPort":80,"containerPort":80,"hostIP":"fe80::1%eth0"}]`, nil, "without zone"},
		{`[{"hostPort":80,"containerPort":80},{"hostPort":80,"containerPort":81,"hostIP":"198.51.100.1"}]`, nil, "portMappings[1]: host port 198.51.100.1:80/tcp is mapped twice"},
	} {
		got, err := ParseMappings(json.RawMessage(tt.raw))
		if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
			t.Errorf("%s: error %v, want %q", tt.raw, err, tt.err)
		}
		if !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: %v, want %v", tt.raw, got, tt.want)
		}
	}
}

// Whatever is parsed can be an entry, if the pod has addresses of both families.
func FuzzParseMappings(f *testing.F) {
	f.Add([]byte(`[{"hostPort":8080,"containerPort":80,"protocol":"TCP","hostIP":"198.51.100.1"}]`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		ms, err := ParseMappings(raw)
		if err != nil {
			return
		}
		e := (&pod{addr: "198.18.1.2", ipv6: "fd00:18:0:1::2"}).entry(ms...)
		if err := e.Validate(); err != nil {
			t.Errorf("%s: %v", raw, err)
		}
		var back Entry
		text, err := json.Marshal(e)
		if err == nil {
			err = json.Unmarshal(text, &back)
		}
		if err != nil || !reflect.DeepEqual(e, back) {
			t.Errorf("%s: %v, read back %v", raw, err, back)
		}
	})
}
