package pod

import (
	"encoding/json"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func dualHandoff() Handoff {
	return Handoff{
		Version:  1,
		Networks: []netip.Prefix{netip.MustParsePrefix("198.18.0.0/16"), netip.MustParsePrefix("fd00:18::/48")},
		Subnets:  []netip.Prefix{netip.MustParsePrefix("198.18.1.0/24"), netip.MustParsePrefix("fd00:18:0:1::/64")},
		MTU:      1450,
		IPMasq:   true,
	}
}

func TestHandoffFile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made", "on", "demand")
	path := filepath.Join(dir, "twill.json")
	if _, err := ReadHandoff(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	want := dualHandoff()
	for range 2 {
		if err := WriteHandoff(path, want); err != nil {
			t.Fatal(err)
		}
		got, err := ReadHandoff(path)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("read %+v, %v; want %+v", got, err, want)
		}
	}
	bad := want
	bad.MTU = 0
	if err := WriteHandoff(path, bad); err == nil {
		t.Error("wrote a hand-off without MTU")
	}
	if got, err := ReadHandoff(path); err != nil || got.MTU != want.MTU {
		t.Errorf("after a refused write: %+v, %v", got, err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("left beside the hand-off: %v, %v", entries, err)
	}
}

func TestHandoffErrors(t *testing.T) {
	for _, tt := range []struct{ json, want string }{
		{``, "unexpected end"},
		{`[]`, "cannot unmarshal"},
		{`{}`, "version 0"},
		{`{"version":2,"subnets":7}`, "version 2: this release of Twill knows version 1"},
		{`{"version":1,"subnets":[],"mtu":1450}`, "subnets: empty"},
		{`{"version":1,"subnets":["198.18.1.0/24"],"mtu":1450}`, "networks: empty"},
		{`{"version":1,"subnets":["198.18.1.1/24"],"networks":["198.18.0.0/16"],"mtu":1450}`, "subnets"},
		{`{"version":1,"subnets":["::ffff:198.18.1.0/120"],"networks":["198.18.0.0/16"],"mtu":1450}`, "subnets"},
		{`{"version":1,"subnets":[""],"networks":["198.18.0.0/16"],"mtu":1450}`, "subnets"},
		{`{"version":1,"subnets":["198.18.1.0/31"],"networks":["198.18.0.0/16"],"mtu":1450}`, "too small"},
		{`{"version":1,"subnets":["198.18.1.0/24","198.18.2.0/24"],"networks":["198.18.0.0/16"],"mtu":1450}`, "second of its family"},
		{`{"version":1,"subnets":["198.18.1.0/24"],"networks":["198.18.1.0/8"],"mtu":1450}`, "networks"},
		{`{"version":1,"subnets":["198.18.1.0/24"],"networks":["198.18.0.0/16"],"mtu":67}`, "mtu: 67"},
		{`{"version":1,"subnets":["fd00::/64"],"networks":["198.18.0.0/16"],"mtu":1279}`, "must be from 1280"},
		{`{"version":1,"subnets":["198.18.1.0/24"],"networks":["198.18.0.0/16"],"mtu":65536}`, "mtu"},
	} {
		if _, err := parseHandoff([]byte(tt.json)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.json, err, tt.want)
		}
	}
}

func FuzzHandoff(f *testing.F) {
	good, err := json.Marshal(dualHandoff())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"version":1,"subnets":[null,"fd00::/0"],"mtu":1e3}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := parseHandoff(b)
		if err != nil {
			return
		}
		again, err := json.Marshal(h)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := parseHandoff(again); err != nil || !reflect.DeepEqual(got, h) {
			t.Errorf("%s: read %+v, written and read %+v, %v", b, h, got, err)
		}
	})
}
