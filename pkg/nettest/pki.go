package nettest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"
)

// PKI names the files of a certificate authority made for one lab, in PEM.
type PKI struct {
	CA                              string
	ServerCert, ServerKey           string
	ClientCert, ClientKey           string // common name "flannel"
	WrongCA                         string // an authority that signed nothing of the above
	WrongClientCert, WrongClientKey string // a client certificate of WrongCA
}

// authority signs certificates.
type authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// newPKI makes the files in dir. Servers are known by the addresses.
func newPKI(dir string, servers []netip.Addr) (*PKI, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	file := func(name string) string { return filepath.Join(dir, name) }
	p := &PKI{
		CA: file("ca.crt"), WrongCA: file("wrong-ca.crt"),
		ServerCert: file("server.crt"), ServerKey: file("server.key"),
		ClientCert: file("client.crt"), ClientKey: file("client.key"),
		WrongClientCert: file("wrong-client.crt"), WrongClientKey: file("wrong-client.key"),
	}
	ca, err := newAuthority(dir, "ca")
	if err != nil {
		return nil, err
	}
	wrong, err := newAuthority(dir, "wrong-ca")
	if err != nil {
		return nil, err
	}
	var ips []net.IP
	for _, a := range servers {
		ips = append(ips, a.AsSlice())
	}
	// No common name: etcd takes it for a user when it calls itself.
	if err := ca.sign("server", &x509.Certificate{IPAddresses: ips}); err != nil {
		return nil, err
	}
	user := pkix.Name{CommonName: "flannel"}
	if err := ca.sign("client", &x509.Certificate{Subject: user}); err != nil {
		return nil, err
	}
	return p, wrong.sign("wrong-client", &x509.Certificate{Subject: user})
}

func newAuthority(dir, name string) (*authority, error) {
	a := &authority{dir: dir}
	tmpl := &x509.Certificate{
		Subject: pkix.Name{CommonName: "twill lab " + name},
		IsCA:    true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign,
	}
	// Signed by itself: sign takes the template and the new key as the issuer's.
	if err := a.sign(name, tmpl); err != nil {
		return nil, err
	}
	return a, nil
}

// sign writes name.crt and name.key. An authority without a certificate signs its
// own.
func (a *authority) sign(name string, tmpl *x509.Certificate) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make key of %s: %w", name, err)
	}
	if tmpl.SerialNumber, err = rand.Int(rand.Reader, big.NewInt(1<<62)); err != nil {
		return fmt.Errorf("make serial number of %s: %w", name, err)
	}
	tmpl.NotBefore, tmpl.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(30*24*time.Hour)
	issuer, issuerKey := a.cert, a.key
	if tmpl.IsCA {
		issuer, issuerKey = tmpl, key
	} else {
		tmpl.KeyUsage = x509.KeyUsageDigitalSignature
		tmpl.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, issuer, &key.PublicKey, issuerKey)
	if err != nil {
		return fmt.Errorf("sign %s: %w", name, err)
	}
	if tmpl.IsCA {
		if a.cert, err = x509.ParseCertificate(der); err != nil {
			return fmt.Errorf("parse %s: %w", name, err)
		}
		a.key = key
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("write key of %s: %w", name, err)
	}
	if err := writePEM(filepath.Join(a.dir, name+".crt"), "CERTIFICATE", der); err != nil {
		return err
	}
	return writePEM(filepath.Join(a.dir, name+".key"), "PRIVATE KEY", keyDER)
}

func writePEM(path, kind string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

// clientTLS is what a client needs that presents a certificate.
func (p *PKI) clientTLS() (*tls.Config, error) {
	ca, err := os.ReadFile(p.CA)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	cert, err := tls.LoadX509KeyPair(p.ClientCert, p.ClientKey)
	if err != nil {
		return nil, fmt.Errorf("load client certificate: %w", err)
	}
	return &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}, nil
}
