package store

import (
	"fmt"
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

func TestTLS(t *testing.T) {
	nettest.CheckLeaks(t)
	r := newRig(t, nettest.EtcdOptions{TLS: true})
	r.put(t, "config", goodConfig)
	p := r.PKI
	plain := strings.Replace(r.Endpoints()[0], "https", "http", 1)
	tests := []struct {
		name   string
		change func(*EtcdConfig)
		want   string // part of the error
	}{
		{"all", func(c *EtcdConfig) { c.CAFile, c.CertFile, c.KeyFile = p.CA, p.ClientCert, p.ClientKey }, ""},
		{"CA only", func(c *EtcdConfig) { c.CAFile = p.CA }, ""},
		{"IPv6", func(c *EtcdConfig) { c.CAFile, c.Endpoints = p.CA, []string{r.Members[0].ClientURLv6} }, ""},
		{"no scheme", func(c *EtcdConfig) {
			c.CAFile, c.Endpoints = p.CA, []string{strings.TrimPrefix(c.Endpoints[0], "https://")}
		}, ""},
		{"wrong CA", func(c *EtcdConfig) { c.CAFile = p.WrongCA }, "certificate signed by unknown authority; --etcd-cafile must name"},
		{"system's CAs", func(*EtcdConfig) {}, "certificate signed by unknown authority; --etcd-cafile must name"},
		{"wrong name", func(c *EtcdConfig) {
			c.CAFile, c.Endpoints = p.CA, []string{"https://etcd.example:2379"}
			c.Dial = dialTo(r, r.Members[0].IPv4.String()+":2379")
		}, "--etcd-endpoints must use a name or address that stands in etcd's certificate"},
		{"http to https", func(c *EtcdConfig) { c.Endpoints = []string{plain} }, "does this endpoint want https?"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { checkOpen(t, r.open(t, tt.change), tt.want) })
	}
}

func TestTLSClientCertificate(t *testing.T) {
	nettest.CheckLeaks(t)
	r := newRig(t, nettest.EtcdOptions{TLS: true, ClientAuth: true})
	r.put(t, "config", goodConfig)
	p := r.PKI
	for name, tt := range map[string]struct {
		change func(*EtcdConfig)
		want   string
	}{
		"good": {func(c *EtcdConfig) { c.CAFile, c.CertFile, c.KeyFile = p.CA, p.ClientCert, p.ClientKey }, ""},
		"none": {func(c *EtcdConfig) { c.CAFile = p.CA }, "--etcd-certfile and --etcd-keyfile"},
		"wrong": {
			func(c *EtcdConfig) { c.CAFile, c.CertFile, c.KeyFile = p.CA, p.WrongClientCert, p.WrongClientKey },
			"--etcd-certfile and --etcd-keyfile",
		},
	} {
		t.Run(name, func(t *testing.T) { checkOpen(t, r.open(t, tt.change), tt.want) })
	}
}

// TestUser lets etcd forget all tokens by a new start: the same as when they run
// out.
func TestUser(t *testing.T) {
	nettest.CheckLeaks(t)
	r := newRig(t, nettest.EtcdOptions{TLS: true, Auth: true})
	r.put(t, "config", goodConfig)
	grantRole(t, r, "narrow", func(c *clientv3.Client) error {
		for key, end := range map[string]string{
			defaultPrefix + "/config":   "",
			defaultPrefix + "/subnets/": clientv3.GetPrefixRangeEnd(defaultPrefix + "/subnets/"),
		} {
			if _, err := c.RoleGrantPermission(t.Context(), "narrow", key, end, clientv3.PermissionType(clientv3.PermReadWrite)); err != nil {
				return err
			}
		}
		return nil
	})
	grantRole(t, r, "nobody", func(*clientv3.Client) error { return nil })
	user := func(name, password string) func(*EtcdConfig) {
		return func(c *EtcdConfig) { c.CAFile, c.Username, c.Password = r.PKI.CA, name, password }
	}

	for name, tt := range map[string]struct {
		change func(*EtcdConfig)
		want   string
	}{
		"good":           {user(nettest.EtcdUser, nettest.EtcdUserPassword), ""},
		"wrong password": {user(nettest.EtcdUser, "wrong"), `wrong password, or there is no user "flannel"`},
		"no user":        {func(c *EtcdConfig) { c.CAFile = r.PKI.CA }, "etcd wants a user name and a password; give --etcd-username"},
		"no right": {
			user("nobody", "secret"),
			`read /coreos.com/network/config: permission denied: user "nobody" has no right to it; grant it: etcdctl role grant-permission ROLE readwrite --prefix /coreos.com/network/config`,
		},
	} {
		t.Run(name, func(t *testing.T) { checkOpen(t, r.open(t, tt.change), tt.want) })
	}

	e := r.open(t, user("narrow", "secret"))
	f := follow(t, e)
	l := mustClaim(t, e, f, overlay.Claim{Attrs: node(t, 1)})
	if err := r.Stop(); err != nil {
		t.Fatal(err)
	}
	eventually(t, disconnected(e, "connection refused"))
	if err := r.Members[0].Start(); err != nil {
		t.Fatal(err)
	}
	var root *clientv3.Client // the old one's token is lost, too
	eventually(t, func() string {
		var err error
		if root, err = r.NewClient(nettest.EtcdRoot, nettest.EtcdRootPassword); err != nil {
			return err.Error()
		}
		return ""
	})
	defer root.Close()
	p, err := root.Put(t.Context(), defaultPrefix+"/subnets/10.5.200.0-24", nodeValue(200))
	if err != nil {
		t.Fatal(err)
	}
	f.reach(t, p.Header.Revision)
	eventually(t, connected(e))
	l.Attrs = node(t, 2)
	if done, err := e.Do(t.Context(), overlay.Step{Act: overlay.Update, Lease: l}); !done || err != nil {
		t.Errorf("update with an old token: %v, %v", done, err)
	}
	if _, err := e.Renew(t.Context(), l); err != nil {
		t.Errorf("renew with an old token: %v", err)
	}
	f.wait(t, "the update", func(s *overlay.Snapshot) bool {
		got := s.Lease(l.Subnets)
		return got != nil && got.PublicIP == l.PublicIP
	})

	// The right is taken away while the watch stands.
	if _, err := root.RoleRevokePermission(t.Context(), "narrow", defaultPrefix+"/config", ""); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Snapshot(t.Context(), overlay.Config{}); err == nil || !strings.Contains(err.Error(), "permission denied") {
		t.Errorf("read without the right: %v", err)
	}
}

// checkOpen reads once and watches, and expects the error in both.
func checkOpen(t *testing.T, e *Etcd, want string) {
	t.Helper()
	_, err := e.Snapshot(t.Context(), overlay.Config{})
	if fmt.Sprint(err) != "<nil>" && want == "" || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
		t.Errorf("Snapshot: %v; want %q", err, want)
	}
	f := follow(t, e)
	if want == "" {
		f.reach(t, 1)
		return
	}
	eventually(t, disconnected(e, want))
	if f.count() != 0 {
		t.Error("emitted something")
	}
}

// grantRole makes a role and a user of the same name with the password "secret".
func grantRole(t *testing.T, r *rig, name string, grant func(*clientv3.Client) error) {
	t.Helper()
	c, ctx := r.Client(), t.Context()
	_, err := c.RoleAdd(ctx, name)
	if err == nil {
		err = grant(c)
	}
	if err == nil {
		_, err = c.UserAdd(ctx, name, "secret")
	}
	if err == nil {
		_, err = c.UserGrantRole(ctx, name, name)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestUserBeforeAuth gives a user to an etcd that asks for none, and then does.
func TestUserBeforeAuth(t *testing.T) {
	nettest.CheckLeaks(t)
	r := newRig(t, nettest.EtcdOptions{})
	r.put(t, "config", goodConfig)
	e := r.open(t, func(c *EtcdConfig) { c.Username, c.Password = "root", "secret" })
	f := follow(t, e)
	f.reach(t, r.put(t, "subnets/10.5.1.0-24", nodeValue(1)))
	grantRole(t, r, "root", func(*clientv3.Client) error { return nil })
	if _, err := r.Client().AuthEnable(t.Context()); err != nil {
		t.Fatal(err)
	}
	l := mustClaim(t, e, f, overlay.Claim{Attrs: node(t, 2)})
	if _, err := e.Renew(t.Context(), l); err != nil {
		t.Error(err)
	}
}
