package kubernetes

import (
	"crypto/x509/pkix"
	"net"
	"os"
	"path/filepath"

	"github.com/twill-net/twill/pkg/nettest"
)

// pki is the directory with the certificates of all.
func (c *Cluster) pki() string { return filepath.Join(c.disk, "pki") }

// server is the API server's URL on the switch.
func (c *Cluster) server() string {
	cp := c.ControlPlane
	return "https://" + net.JoinHostPort(c.opts.Stack.first(cp.IPv4.String(), cp.IPv6.String()), "6443")
}

// makePKI makes one authority that everybody believes, a certificate for each program and
// node, and a kubeconfig for each client.
func (c *Cluster) makePKI() error {
	if err := os.MkdirAll(c.pki(), 0o755); err != nil {
		return err
	}
	var err error
	c.ca, err = nettest.NewCA(c.pki(), "ca")
	if err != nil {
		return err
	}
	cp := c.ControlPlane
	err = c.ca.Sign("apiserver", pkix.Name{CommonName: "kube-apiserver"},
		"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local",
		cp.IPv4.String(), cp.IPv6.String(), apiIPv4, apiIPv6, "127.0.0.1", "::1")
	if err != nil {
		return err
	}
	masters := []string{"system:masters"}
	for name, subject := range map[string]pkix.Name{
		"apiserver-kubelet":  {CommonName: "kube-apiserver-kubelet-client", Organization: masters},
		"front-proxy":        {CommonName: "front-proxy-client"},
		"service-accounts":   {CommonName: "service-accounts"},
		"admin":              {CommonName: "admin", Organization: masters},
		"controller-manager": {CommonName: "system:kube-controller-manager"},
		"scheduler":          {CommonName: "system:kube-scheduler"},
		"kube-proxy":         {CommonName: "system:kube-proxy"},
	} {
		if err := c.signUser(name, subject); err != nil {
			return err
		}
	}
	for _, n := range c.Nodes {
		subject := pkix.Name{CommonName: "system:node:" + n.Name, Organization: []string{"system:nodes"}}
		if err := c.signUser(n.Name, subject, n.Name, n.IPv4.String(), n.IPv6.String()); err != nil {
			return err
		}
	}
	return nil
}

// signUser gives a user a certificate and a kubeconfig.
func (c *Cluster) signUser(name string, subject pkix.Name, hosts ...string) error {
	if err := c.ca.Sign(name, subject, hosts...); err != nil {
		return err
	}
	return os.WriteFile(c.kubeconfig(name), []byte(kubeconfig(c.server(), c.pki(), name)), 0o600)
}

// kubeconfig is the path of a user's.
func (c *Cluster) kubeconfig(user string) string { return filepath.Join(c.pki(), user+".kubeconfig") }

// Kubeconfig is the path of the administrator's.
func (c *Cluster) Kubeconfig() string { return c.kubeconfig("admin") }
