package overlay

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

func TestParseKey(t *testing.T) {
	for _, key := range []string{
		"10.5.52.0-24", "10.5.52.0-24&fd00:5:0:34::-64", "10.0.0.0-8", "128.0.0.0-1", "10.5.52.2-31",
		"10.5.52.0-24&fd00:5:0:34::2-127", "10.5.52.0-24&8000::-1", "10.5.52.4-30&fd00::4-126",
	} {
		n, err := ParseKey(key)
		if err != nil || n.Key() != key {
			t.Errorf("%s: %v, %v", key, n, err)
		}
	}
	n, _ := ParseKey("10.5.52.0-24&fd00:5:0:34::-64")
	if want := (Subnets{pfx("10.5.52.0/24"), pfx("fd00:5:0:34::/64")}); n != want {
		t.Errorf("got %v, want %v", n, want)
	}
}

func TestParseKeyRejects(t *testing.T) {
	var b strings.Builder
	for _, key := range []string{
		"", "config", "10.5.52.0", "10.5.52.0/24", "10.5.52.0-", "10.5.52.0-24 ", "x10.5.52.0-24", "10.5.52.0-24/x",
		"10.5.52.0-0", "10.5.52.0-32", "0.0.0.0-0", "10.5.52-24", "10.5.52.256-24", "10.5.52.1-24", "10.5.53.0-22", "10.5.52.0--24", "10.5.52.0-99999999999999999999",
		"fd00:5:0:34::-64", "10.5.52.0-24&", "10.5.52.0-24&fd00::", "10.5.52.0-24&fd00::-0", "10.5.52.0-24&fd00::-128", "10.5.52.0-24&fd00::1-64",
		"10.5.52.0-24&::ffff:a05:3400-120", "10.5.52.0-24&10.6.0.0-24", "10.5.52.0-24&ab-64", "10.5.52.0-24&fd00::%eth0-64", "10.5.52.0-24&fd00:::-64", "10.5.52.0-24&fd00::-64&fd01::-64",
		// Other spellings of a good key.
		"10.5.52.0-024", "010.5.52.0-24", "10.5.52.0-24&fd00:5:0:34:0:0:0:0-64", "10.5.52.0-24&fd00:0005:0:34::-64", "10.5.52.0-24&FD00:5:0:34::-64", "10.5.52.0-24&fd00::-064",
	} {
		n, err := ParseKey(key)
		if err == nil || n != (Subnets{}) {
			t.Errorf("%q is read as %v, %v", key, n, err)
		}
		fmt.Fprintf(&b, "%v\n", err)
	}
	golden(t, "key-errors", b.String())
}

func FuzzParseKey(f *testing.F) {
	for _, s := range []string{"10.5.52.0-24", "10.5.52.0-24&fd00:5:0:34::-64", "0.0.0.0-1", "1.2.3.4-31&::-127", "&", "10.5.52.0-24&::ffff:0:0-96"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, key string) {
		n, err := ParseKey(key)
		if err != nil {
			if n != (Subnets{}) {
				t.Fatalf("%q: %v with error %v", key, n, err)
			}
			return
		}
		if n.Key() != key {
			t.Fatalf("%q is written back as %q", key, n.Key())
		}
		for _, p := range n.All() {
			if p != p.Masked() || p.IsSingleIP() || p.Bits() < 1 {
				t.Fatalf("%q: bad subnet %s", key, p)
			}
		}
		if n.V4.Addr().Is6() || n.V6.IsValid() && FamilyOf(n.V6.Addr()) != IPv6 {
			t.Fatalf("%q: families mixed: %v", key, n)
		}
	})
}

// What flanneld writes, byte for byte: LeaseAttrs of its pkg/lease, marshalled.
func TestFlannelValues(t *testing.T) {
	for _, c := range []struct {
		name, value string
		want        Attrs
	}{
		{"vxlan", `{"PublicIP":"198.51.100.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:2a:00:00:00:01"}}`, Attrs{
			PublicIP: ip("198.51.100.1"), Backend: "vxlan", Data: `{"VNI":1,"VtepMAC":"0e:2a:00:00:00:01"}`, VTEP: VTEP{1, mac("0e:2a:00:00:00:01")},
		}},
		{"vxlan dual stack", `{"PublicIP":"198.51.100.1","PublicIPv6":"2001:db8::1","BackendType":"vxlan","BackendData":{"VNI":4096,"VtepMAC":"0e:2a:00:00:00:01"},"BackendV6Data":{"VNI":4096,"VtepMAC":"0e:2a:00:00:00:06"}}`, Attrs{
			PublicIP: ip("198.51.100.1"), PublicIPv6: ip("2001:db8::1"), Backend: "vxlan",
			Data: `{"VNI":4096,"VtepMAC":"0e:2a:00:00:00:01"}`, DataV6: `{"VNI":4096,"VtepMAC":"0e:2a:00:00:00:06"}`,
			VTEP: VTEP{4096, mac("0e:2a:00:00:00:01")}, VTEPv6: VTEP{4096, mac("0e:2a:00:00:00:06")},
		}},
		{"vxlan IPv6 alone", `{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::1","BackendType":"vxlan","BackendV6Data":{"VNI":1,"VtepMAC":"0e:2a:00:00:00:06"}}`, Attrs{
			PublicIPv6: ip("2001:db8::1"), Backend: "vxlan", DataV6: `{"VNI":1,"VtepMAC":"0e:2a:00:00:00:06"}`, VTEPv6: VTEP{1, mac("0e:2a:00:00:00:06")},
		}},
		{"host-gw", `{"PublicIP":"198.51.100.1","PublicIPv6":null,"BackendType":"host-gw"}`, Attrs{PublicIP: ip("198.51.100.1"), Backend: "host-gw"}},
		{"wireguard", `{"PublicIP":"198.51.100.1","PublicIPv6":"2001:db8::1","BackendType":"wireguard","BackendData":{"PublicKey":"yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=","Port":51820},"BackendV6Data":{"PublicKey":"yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=","Port":51821}}`, Attrs{
			PublicIP: ip("198.51.100.1"), PublicIPv6: ip("2001:db8::1"), Backend: "wireguard",
			Data: `{"PublicKey":"yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=","Port":51820}`, DataV6: `{"PublicKey":"yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=","Port":51821}`,
			WireGuard: WireGuardNode{wgKey("yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk="), 51820}, WireGuardV6: WireGuardNode{wgKey("yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk="), 51821},
		}},
		{"udp", `{"PublicIP":"198.51.100.1","PublicIPv6":null}`, Attrs{PublicIP: ip("198.51.100.1")}},
		{"ipip", `{"PublicIP":"198.51.100.1","PublicIPv6":null,"BackendType":"ipip"}`, Attrs{PublicIP: ip("198.51.100.1"), Backend: "ipip"}},
		{"extension", `{"PublicIP":"198.51.100.1","PublicIPv6":null,"BackendType":"extension","BackendData":"key \u003ca\u0026b\u003e \"q\""}`, Attrs{
			PublicIP: ip("198.51.100.1"), Backend: "extension", Data: `"key \u003ca\u0026b\u003e \"q\""`,
		}},
	} {
		got, err := ParseAttrs([]byte(c.value))
		if err != nil || got != c.want {
			t.Errorf("%s: got %+v, error %v\nwant %+v", c.name, got, err, c.want)
		}
		if v := string(c.want.Value()); v != c.value {
			t.Errorf("%s:\nwrites %s\n  want %s", c.name, v, c.value)
		}
	}
}

// Values that flannel would read and write differently mean the same.
func TestParseAttrsLenient(t *testing.T) {
	plain := `{"PublicIP":"198.51.100.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:2a:00:00:00:0a"}}`
	want, err := ParseAttrs([]byte(plain))
	if err != nil {
		t.Fatal(err)
	}
	for _, value := range []string{
		` { "publicip" : "198.51.100.1" , "BackendType":"vxlan", "BackendData": { "VNI" : 1, "VtepMAC" : "0e:2a:00:00:00:0a" } , "BackendV6Data": null, "Extra": 1 }`,
		`{"PublicIP":"::ffff:198.51.100.1","PublicIPv6":"","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:2a:00:00:00:0a"}}`,
		`{"PublicIP":"198.51.100.1","PublicIPv6":"::","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:2a:00:00:00:0a"}}`,
	} {
		if got, err := ParseAttrs([]byte(value)); err != nil || got != want {
			t.Errorf("%s: got %+v, error %v", value, got, err)
		}
	}
	upper, err := ParseAttrs([]byte(strings.Replace(plain, "0e:2a:00:00:00:0a", "0E:2A:00:00:00:0A", 1)))
	if err != nil || upper.VTEP != want.VTEP {
		t.Errorf("upper case MAC: %+v, %v", upper, err)
	}
	noData, err := ParseAttrs([]byte(`{"PublicIP":"198.51.100.1","BackendType":"vxlan"}`))
	if err != nil || noData.VTEP != (VTEP{}) {
		t.Errorf("vxlan without data: %+v, %v", noData, err)
	}
}

func TestParseAttrsRejects(t *testing.T) {
	var b strings.Builder
	for _, value := range []string{
		``, `garbage`, `null`, `[]`, `{}`, `{"PublicIP":7}`, `{"PublicIP":"x"}`, `{"PublicIP":"0.0.0.0"}`, `{"PublicIP":"2001:db8::1"}`, `{"PublicIPv6":"198.51.100.1"}`,
		`{"PublicIP":"224.0.0.1"}`, `{"PublicIP":"127.0.0.1"}`, `{"PublicIP":"255.255.255.255"}`, `{"PublicIPv6":"::1"}`, `{"PublicIPv6":"ff02::1"}`, `{"PublicIPv6":"fe80::1"}`, `{"PublicIPv6":"fe80::1%eth0"}`,
		`{"PublicIP":"198.51.100.1","PublicIPv6":"x"}`, `{"PublicIP":"198.51.100.1","BackendType":3}`,
		`{"PublicIP":"198.51.100.1","BackendType":"vxlan","BackendData":"x"}`,
		`{"PublicIP":"198.51.100.1","BackendType":"vxlan","BackendData":{"VNI":-1,"VtepMAC":"0e:2a:00:00:00:01"}}`,
		`{"PublicIP":"198.51.100.1","BackendType":"vxlan","BackendData":{"VNI":1}}`,
		`{"PublicIP":"198.51.100.1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"00:00:00:00:00:00"}}`,
		`{"PublicIP":"198.51.100.1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"01:00:5e:00:00:01"}}`,
		`{"PublicIP":"198.51.100.1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"ff:ff:ff:ff:ff:ff"}}`,
		`{"PublicIP":"198.51.100.1","BackendType":"vxlan","BackendV6Data":{"VNI":1,"VtepMAC":"0e-2a-00-00-00-01"}}`,
		`{"PublicIP":"198.51.100.1","BackendType":"vxlan"} x`,
	} {
		a, err := ParseAttrs([]byte(value))
		if err == nil || a != (Attrs{}) {
			t.Errorf("%s is read as %+v, %v", value, a, err)
		}
		fmt.Fprintf(&b, "%s\n    %v\n", value, err)
	}
	golden(t, "value-errors", b.String())
}

func TestParseMAC(t *testing.T) {
	if m, err := ParseMAC("0E:2a:FF:00:9b:01"); err != nil || m != (MAC{0x0e, 0x2a, 0xff, 0, 0x9b, 1}) || m.String() != "0e:2a:ff:00:9b:01" {
		t.Errorf("%v, %v", m, err)
	}
	for _, s := range []string{
		"", "0e:2a:00:00:00", "0e:2a:00:00:00:01:02", "0e2a00000001", "0e-2a-00-00-00-01", "0g:2a:00:00:00:01", ":::::0e2a00000001", "0e2a0:00:0:00:0:01",
		"00:00:00:00:00:00", "01:00:00:00:00:00", "ff:ff:ff:ff:ff:ff",
	} {
		if m, err := ParseMAC(s); err == nil {
			t.Errorf("%q is read as %s", s, m)
		}
	}
}

func TestMACInJSON(t *testing.T) {
	type doc struct{ A, B MAC }
	in := doc{A: mac("0e:2a:00:00:00:01")}
	b, err := json.Marshal(in)
	if err != nil || string(b) != `{"A":"0e:2a:00:00:00:01","B":"00:00:00:00:00:00"}` {
		t.Errorf("%s, %v", b, err)
	}
	var out doc
	if err := json.Unmarshal(b, &out); err != nil || out != in {
		t.Errorf("%v, %v", out, err)
	}
	if json.Unmarshal([]byte(`{"A":"x"}`), &out) == nil {
		t.Error("x is read as a MAC")
	}
}

func FuzzParseAttrs(f *testing.F) {
	for _, s := range []string{
		`{"PublicIP":"198.51.100.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:2a:00:00:00:01"}}`,
		`{"PublicIP":"198.51.100.1","BackendType":"extension","BackendData":"<&>\u2028"}`,
		`{"PublicIPv6":"2001:db8::1","BackendData":[1, 2 ],"BackendV6Data":null}`, `null`, `{"BackendType":"\ud800","PublicIP":"10.0.0.1"}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		a, err := ParseAttrs(value)
		if err != nil {
			if a != (Attrs{}) {
				t.Fatalf("%+v with error %v", a, err)
			}
			return
		}
		written := a.Value()
		again, err := ParseAttrs(written)
		if err != nil || again != a {
			t.Fatalf("%q -> %+v -> %q -> %+v, %v", value, a, written, again, err)
		}
		if !bytes.Equal(again.Value(), written) {
			t.Fatalf("%q is written as %q, then as %q", value, written, again.Value())
		}
	})
}

func wgKey(s string) WGKey {
	k, err := ParseWGKey(s)
	if err != nil {
		panic(err)
	}
	return k
}
