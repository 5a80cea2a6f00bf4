package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/authpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/twill-net/twill/pkg/nettest"
)

func TestStoreAwayAtStart(t *testing.T) {
	c, ctx := newCluster(t, Options{Hosts: 1, Config: ConfigIPv4})
	n := c.Nodes[0]
	before := n.dump(t)
	must(t, c.Etcd.Stop())
	must(t, n.Start())
	n.waitUnready(t, c.Etcd.Endpoints()[0], "connection refused", "is etcd running there?")
	must(t, c.Etcd.Start(ctx))
	must(t, n.WaitReady(ctx))
	must(t, n.Daemon.Term())
	out, err := n.Run(twilld(t), "--cleanup")
	must(t, err)
	if !strings.Contains(out, "link delete flannel.1") {
		t.Errorf("cleanup says %s", out)
	}
	// A cable that is cut gives no refusal.
	_, err = c.Etcd.Client().Delete(ctx, Prefix+"/subnets/", clientv3.WithPrefix())
	must(t, err)
	must(t, n.Cut())
	must(t, n.Start())
	n.waitUnready(t, c.Etcd.Endpoints()[0])
	must(t, n.Restore())
	must(t, n.WaitReady(ctx))
	if before == "" {
		t.Error("no dump")
	}
}

// TestStoreRefuses are all the ways to be turned away by an etcd that is there.
func TestStoreRefuses(t *testing.T) {
	type attempt struct {
		name  string
		args  []string
		exit  bool // the daemon ends, since it cannot get better
		words []string
	}
	check := func(t *testing.T, c *Cluster, attempts []attempt) {
		n := c.Nodes[0]
		before := n.dump(t)
		for _, a := range attempts {
			t.Run(a.name, func(t *testing.T) {
				defer func() { must(t, n.Daemon.Kill9()) }()
				must(t, n.StartWith(append(a.args, "--healthz-ip=127.0.0.1", fmt.Sprintf("--healthz-port=%d", healthPort))...))
				if a.exit {
					n.exited(t, 1, a.words...)
				} else {
					n.waitUnready(t, a.words...)
					must(t, n.Daemon.Term())
				}
				n.unchanged(t, before)
			})
		}
		must(t, n.Start())
		must(t, n.WaitReady(t.Context()))
	}
	t.Run("TLS", func(t *testing.T) {
		c, _ := newCluster(t, Options{Hosts: 1, Config: ConfigIPv4, Etcd: nettest.EtcdOptions{TLS: true, ClientAuth: true}})
		url, p := c.Etcd.Endpoints()[0], c.Etcd.PKI
		endpoint := "--etcd-endpoints=" + url
		required, ended, renew := "certificate required", "expired certificate", "renew the certificate"
		if os.Getenv("TWILL_ETCD_BINARY") != "" { // etcd 3.4 has one word for all of it
			required, ended, renew = "bad certificate", "bad certificate", "has not expired"
		}
		expired, expiredKey := expiredClient(t, c)
		files := func(ca, cert, key string) []string {
			return []string{endpoint, "--etcd-cafile=" + ca, "--etcd-certfile=" + cert, "--etcd-keyfile=" + key}
		}
		check(t, c, []attempt{
			{"wrong CA", files(p.WrongCA, p.ClientCert, p.ClientKey), false, []string{url, "unknown authority", "--etcd-cafile"}},
			{"no CA", []string{endpoint}, false, []string{url, "unknown authority", "--etcd-cafile"}},
			{"no client certificate", []string{endpoint, "--etcd-cafile=" + p.CA}, false, []string{url, required, "--etcd-certfile"}},
			{"wrong client certificate", files(p.CA, p.WrongClientCert, p.WrongClientKey), false, []string{url, "certificate", "--etcd-certfile"}},
			{"expired client certificate", files(p.CA, expired, expiredKey), false, []string{url, ended, renew}},
			{"http", []string{"--etcd-endpoints=" + strings.Replace(url, "https", "http", 1)}, false, []string{"want https?"}},
			{"http and CA", []string{"--etcd-endpoints=" + strings.Replace(url, "https", "http", 1), "--etcd-cafile=" + p.CA}, true, []string{"in clear", "write https://"}},
			{"no CA file", files("/nonexistent/ca.crt", p.ClientCert, p.ClientKey), true, []string{"--etcd-cafile", "/nonexistent/ca.crt", "no such file"}},
			{"key of another", files(p.CA, p.ClientCert, p.WrongClientKey), true, []string{"--etcd-certfile", "--etcd-keyfile", "does not match"}},
			{"no key", []string{endpoint, "--etcd-cafile=" + p.CA, "--etcd-certfile=" + p.ClientCert}, true, []string{"go together", "--etcd-keyfile"}},
		})
	})
	t.Run("https", func(t *testing.T) {
		c, _ := newCluster(t, Options{Hosts: 1, Config: ConfigIPv4})
		url := strings.Replace(c.Etcd.Endpoints()[0], "http", "https", 1)
		check(t, c, []attempt{
			{"to a plain etcd", []string{"--etcd-endpoints=" + url}, false, []string{url, "speak http, not https?"}},
		})
	})
	t.Run("users", func(t *testing.T) {
		c, ctx := newCluster(t, Options{Hosts: 1, Config: ConfigIPv4, Etcd: nettest.EtcdOptions{Auth: true}})
		addUser(t, ctx, c, "stranger", "/elsewhere/", clientv3.PermReadWrite)
		addUser(t, ctx, c, "reader", Prefix+"/", clientv3.PermRead)
		args := func(user, password string) []string {
			return []string{"--etcd-endpoints=" + c.Etcd.Endpoints()[0], "--etcd-username=" + user, "--etcd-password=" + password}
		}
		check(t, c, []attempt{
			{"wrong password", args(nettest.EtcdUser, "wrong"), false, []string{"wrong password", `"flannel"`, "--etcd-password"}},
			{"unknown user", args("nobody", "secret"), false, []string{"wrong password, or there is no user", `"nobody"`}},
			{"no user", args("", "")[:1], false, []string{"user name", "--etcd-username"}},
			{"no right to the prefix", args("stranger", "secret"), false, []string{"permission denied", `"stranger"`, "grant-permission", Prefix}},
			{"no right to write", args("reader", "secret"), false, []string{"permission denied", `"reader"`, "grant-permission", Prefix + "/subnets/"}},
			{"no password", args("flannel", "")[:2], true, []string{"--etcd-username", "--etcd-password", "together"}},
		})
	})
}

// expiredClient makes a client certificate that ended yesterday.
func expiredClient(t *testing.T, c *Cluster) (cert, key string) {
	t.Helper()
	dir := filepath.Join(c.Lab.Dir, "pki")
	cert, key = filepath.Join(dir, "expired.crt"), filepath.Join(dir, "expired.key")
	must(t, signExpired(c.Etcd.PKI.CA, cert, key))
	return cert, key
}

// addUser makes an etcd user with one right.
func addUser(t *testing.T, ctx context.Context, c *Cluster, name, prefix string, right authpb.Permission_Type) {
	t.Helper()
	etcd := c.Etcd.Client()
	_, err := etcd.RoleAdd(ctx, name)
	must(t, err)
	_, err = etcd.RoleGrantPermission(ctx, name, prefix, clientv3.GetPrefixRangeEnd(prefix), clientv3.PermissionType(right))
	must(t, err)
	_, err = etcd.UserAdd(ctx, name, "secret")
	must(t, err)
	_, err = etcd.UserGrantRole(ctx, name, name)
	must(t, err)
}

// signExpired makes a client certificate, signed by the authority, that ended
// yesterday. The key of the lab's authority is beside its certificate.
func signExpired(ca, cert, key string) error {
	issuer, err := tls.LoadX509KeyPair(ca, strings.TrimSuffix(ca, ".crt")+".key")
	if err != nil {
		return err
	}
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: nettest.EtcdUser},
		NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: time.Now().Add(-24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, issuer.Leaf, &own.PublicKey, issuer.PrivateKey)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(own)
	if err != nil {
		return err
	}
	if err := os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		return err
	}
	return os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600)
}
