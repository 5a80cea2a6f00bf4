package nettest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"os"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func TestEtcdOneMember(t *testing.T) {
	CheckLeaks(t)
	l, hosts := NewHosts(t, 1)
	e := startEtcd(t, l, EtcdOptions{})
	ctx, c := t.Context(), e.Client()
	put(t, c, "a")

	// A host of the lab reaches it by both families.
	for _, url := range []string{e.Members[0].ClientURL, e.Members[0].ClientURLv6} {
		hc, err := clientv3.New(clientv3.Config{Endpoints: []string{url}, DialOptions: hosts[0].GRPCDialer()})
		if err != nil {
			t.Fatal(err)
		}
		r, err := hc.Get(ctx, "a")
		if err != nil || len(r.Kvs) != 1 {
			t.Errorf("get from %s by %s: %v, %v", hosts[0].Name, url, r, err)
		}
		if err := hc.Close(); err != nil {
			t.Error(err)
		}
	}

	put(t, c, "a")
	if err := e.Compact(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Get(ctx, "a", clientv3.WithRev(2)); !errors.Is(err, rpctypes.ErrCompacted) {
		t.Errorf("get of a compacted revision: %v", err)
	}

	for name, stop := range map[string]func() error{"stop": e.Stop, "kill": e.Members[0].Kill9} {
		if err := stop(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := e.Start(ctx); err != nil {
			t.Fatal(err)
		}
		if r, err := c.Get(ctx, "a"); err != nil || len(r.Kvs) != 1 {
			t.Errorf("get after %s: %v, %v", name, r, err)
		}
	}

	if err := e.Pause(); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	if _, err := c.Get(short, "a"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("get from a paused etcd: %v", err)
	}
	if err := e.Resume(); err != nil {
		t.Fatal(err)
	}
	put(t, c, "a")
}

func TestEtcdThreeMembersTLS(t *testing.T) {
	CheckLeaks(t)
	l := NewT(t)
	e := startEtcd(t, l, EtcdOptions{Members: 3, TLS: true, ClientAuth: true, Auth: true})
	ctx := t.Context()
	put(t, e.Client(), "b")

	leader, err := e.Leader(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := leader.Kill9(); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		next, err := e.Leader(ctx)
		if err == nil && next == leader {
			t.Fatal("a killed member leads")
		}
		return err
	})
	put(t, e.Client(), "b")
	if err := leader.Start(); err != nil {
		t.Fatal(err)
	}
	if err := e.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}

	flannel, err := e.NewClient(EtcdUser, EtcdUserPassword)
	if err != nil {
		t.Fatal(err)
	}
	defer flannel.Close()
	put(t, flannel, EtcdPrefix+"/config")
	if _, err := flannel.Put(ctx, "c", "1"); !errors.Is(err, rpctypes.ErrPermissionDenied) {
		t.Errorf("put of user %s outside its prefix: %v", EtcdUser, err)
	}
	if _, err := e.NewClient(EtcdUser, "wrong"); !errors.Is(err, rpctypes.ErrAuthFailed) {
		t.Errorf("login with a wrong password: %v", err)
	}
}

// TestEtcdTLSRefuses talks TLS alone: what etcd's client makes of a refusal is
// its own affair.
func TestEtcdTLSRefuses(t *testing.T) {
	CheckLeaks(t)
	l := NewT(t)
	e := startEtcd(t, l, EtcdOptions{TLS: true, ClientAuth: true})
	p := e.PKI
	tests := []struct {
		name, ca, cert, key string
		ok                  bool
	}{
		{"good", p.CA, p.ClientCert, p.ClientKey, true},
		{"wrong authority", p.WrongCA, p.ClientCert, p.ClientKey, false},
		{"wrong client", p.CA, p.WrongClientCert, p.WrongClientKey, false},
		{"no client certificate", p.CA, "", "", false},
	}
	for _, tt := range tests {
		if err := handshake(t, e.Members[0], tt.ca, tt.cert, tt.key); (err == nil) != tt.ok {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

func handshake(t *testing.T, m *Member, ca, cert, key string) error {
	t.Helper()
	pem, err := os.ReadFile(ca)
	if err != nil {
		t.Fatal(err)
	}
	cfg := &tls.Config{RootCAs: x509.NewCertPool(), ServerName: m.IPv4.String(), NextProtos: []string{"h2"}}
	cfg.RootCAs.AppendCertsFromPEM(pem)
	if cert != "" {
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	raw, err := m.DialContext(t.Context(), "tcp", m.IPv4.String()+":2379")
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	c := tls.Client(raw, cfg)
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if err := c.Handshake(); err != nil {
		return err
	}
	// In TLS 1.3 the server refuses a client after the client's handshake. The
	// first byte of HTTP/2 SETTINGS comes unasked.
	_, err = c.Read(make([]byte, 1))
	return err
}

func startEtcd(t *testing.T, l *Lab, opts EtcdOptions) *Etcd {
	t.Helper()
	begin := time.Now()
	e, err := l.StartEtcd(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("etcd %+v ready after %v", opts, time.Since(begin))
	return e
}

func put(t *testing.T, c *clientv3.Client, key string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := c.Put(ctx, key, "1"); err != nil {
		t.Fatalf("put %s: %v", key, err)
	}
}
