package nettest

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"net"
	"path/filepath"
)

// CA is a certificate authority for one lab, in files.
type CA struct {
	Cert, Key string // its own, in PEM
	authority *authority
}

// NewCA makes an authority in dir, which is there already, as name.crt and name.key.
func NewCA(dir, name string) (*CA, error) {
	a, err := newAuthority(dir, name)
	if err != nil {
		return nil, fmt.Errorf("make certificate authority %s: %w", name, err)
	}
	return &CA{Cert: filepath.Join(dir, name+".crt"), Key: filepath.Join(dir, name+".key"), authority: a}, nil
}

// Sign writes name.crt and name.key beside the authority's, good for a server that is
// known by these names and addresses and for a client.
func (c *CA) Sign(name string, subject pkix.Name, hosts ...string) error {
	cert := &x509.Certificate{Subject: subject}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			cert.IPAddresses = append(cert.IPAddresses, ip)
		} else {
			cert.DNSNames = append(cert.DNSNames, h)
		}
	}
	return c.authority.sign(name, cert)
}
