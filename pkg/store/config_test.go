package store

import (
	"context"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestBadEtcdConfig(t *testing.T) {
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte("no PEM"), 0o600); err != nil {
		t.Fatal(err)
	}
	one := []string{"http://127.0.0.1:2379"}
	tests := []struct {
		cfg  EtcdConfig
		want string
	}{
		{EtcdConfig{}, "there are none; give --etcd-endpoints"},
		{EtcdConfig{Endpoints: []string{"ftp://h:1"}}, `etcd endpoint "ftp://h:1": scheme "ftp" is unknown`},
		{EtcdConfig{Endpoints: []string{"http://h"}}, "must be a host and a port"},
		{EtcdConfig{Endpoints: []string{"http://:2379"}}, "must be a host and a port"},
		{EtcdConfig{Endpoints: []string{"http://h:2379/v2"}}, "must be a host and a port"},
		{EtcdConfig{Endpoints: []string{"http://h:99999"}}, "not in 1..65535"},
		{EtcdConfig{Endpoints: []string{"http://h:x"}}, "is not a URL"},
		{EtcdConfig{Endpoints: []string{""}}, "must be a host and a port"},
		{EtcdConfig{Endpoints: []string{"http://u:secret@h:2379"}}, `"http://…@h:2379": it holds a user`},
		{EtcdConfig{Endpoints: []string{"http://h:1", "https://h:2"}}, `"http://h:1" would be spoken to in clear, but https://h:2 is https`},
		{EtcdConfig{Endpoints: one, CAFile: text}, "in clear, but TLS files are given; write https://"},
		{EtcdConfig{Endpoints: []string{"https://h:1"}, CAFile: text}, "holds no PEM certificate"},
		{EtcdConfig{Endpoints: []string{"https://h:1"}, CAFile: text + "-not"}, "no such file"},
		{EtcdConfig{Endpoints: []string{"https://h:1"}, CertFile: text}, "give both --etcd-certfile and --etcd-keyfile"},
		{EtcdConfig{Endpoints: []string{"https://h:1"}, KeyFile: text}, "give both --etcd-certfile and --etcd-keyfile"},
		{EtcdConfig{Endpoints: []string{"https://h:1"}, CertFile: text, KeyFile: text}, "read --etcd-certfile"},
		{EtcdConfig{Endpoints: one, Username: "u"}, "give both --etcd-username and --etcd-password"},
		{EtcdConfig{Endpoints: one, Password: "p"}, "give both --etcd-username and --etcd-password"},
		{EtcdConfig{Endpoints: one, Prefix: "/"}, "names no directory"},
		{EtcdConfig{Endpoints: one, TTL: time.Millisecond}, "at least 1s"},
	}
	for _, tt := range tests {
		if _, err := OpenEtcd(tt.cfg); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v; want %q", tt.cfg, err, tt.want)
		}
	}
}

func TestEtcdConfigDefaults(t *testing.T) {
	e, err := OpenEtcd(EtcdConfig{Endpoints: []string{"127.0.0.1:4001", "http://[::1]:2379/"}, Prefix: "/a/b/"})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	want := []string{"http://127.0.0.1:4001", "http://[::1]:2379"}
	s := e.Status()
	if !slices.Equal(s.Endpoints, want) || s.Prefix != "/a/b" || e.cfg.TTL != 24*time.Hour || s.Connected || s.Error == "" {
		t.Errorf("%+v, TTL %v", s, e.cfg.TTL)
	}
}

// FuzzEndpoint: what is accepted is an URL of a host and a port, and its secret is
// in no error.
func FuzzEndpoint(f *testing.F) {
	for _, s := range []string{"http://127.0.0.1:2379", "https://[::1]:1/", "h:1", "http://u:p@h:1", "://", "http://%41:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := EtcdConfig{Endpoints: []string{s}}.endpoints()
		if err != nil {
			return
		}
		u, err := url.Parse(got[0])
		if err != nil || u.Hostname() == "" || u.Port() == "" || u.User != nil || u.Path != "" {
			t.Errorf("%q became %q: %v", s, got[0], err)
		}
	})
}

func dialTo(r *rig, addr string) func(context.Context, string) (net.Conn, error) {
	return func(ctx context.Context, _ string) (net.Conn, error) { return r.host.DialContext(ctx, "tcp", addr) }
}
