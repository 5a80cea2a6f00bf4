// Package kubeapi starts a kube-apiserver in a lab. It is a package of its own
// because client-go is large, and most tests have to do without it.
package kubeapi

import (
	"context"
	"crypto/x509/pkix"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/twill-net/twill/pkg/nettest"
)

// apiHost is n of the API server's host: 198.51.100.210.
const apiHost = 210

// startTimeout is long for machines that have other work.
const startTimeout = 5 * time.Minute

// Server is a kube-apiserver on its own host, api, in front of the lab's etcd. Who
// may do what is decided by RBAC. Nothing else of Kubernetes runs: no controller
// fills in podCIDRs or collects garbage. Pause stops it where it stands: connections
// stay open and nothing answers.
type Server struct {
	*nettest.Host
	*nettest.Process
	Etcd *nettest.Etcd
	URL  string
	CA   string // file
	// Admin may do everything.
	Admin *kubernetes.Clientset

	dir string
	ca  *nettest.CA
}

// Start starts an etcd of one member and a kube-apiserver with args beside
// its own and waits until it is ready.
func Start(l *nettest.Lab, args ...string) (*Server, error) {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	s := &Server{dir: filepath.Join(l.Dir, "kubernetes")}
	path, err := Program("kube-apiserver")
	if err == nil {
		s.Etcd, err = l.StartEtcd(nettest.EtcdOptions{})
	}
	if err == nil {
		s.Host, err = l.NewNamedHost("api", apiHost)
	}
	if err == nil {
		s.URL = "https://" + net.JoinHostPort(s.IPv4.String(), "6443")
		err = s.sign()
	}
	if err == nil {
		s.Process, err = s.Host.Start(nettest.Program{Path: path, Args: append(s.args(), args...)})
	}
	if err == nil {
		s.Admin, err = kubernetes.NewForConfig(s.AdminConfig())
	}
	if err == nil {
		err = s.WaitReady(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("start kube-apiserver: %w", err)
	}
	return s, nil
}

// Program returns the path of a program of Kubernetes: of the folder
// TWILL_KUBERNETES_BIN, or as e2e/kubernetes/build.sh builds it if it is not there yet.
func Program(name string) (string, error) {
	if dir := os.Getenv("TWILL_KUBERNETES_BIN"); dir != "" {
		return filepath.Join(dir, name), nil
	}
	mod, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("find module: %w", err)
	}
	cmd := exec.Command(filepath.Join(filepath.Dir(strings.TrimSpace(string(mod))), "e2e/kubernetes/build.sh"), name)
	cmd.Stderr = os.Stderr // it tells how far it is
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return filepath.Join(lines[len(lines)-1], "bin", name), nil
}

func (s *Server) file(name string) string { return filepath.Join(s.dir, name) }

func (s *Server) sign() error {
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return err
	}
	var err error
	if s.ca, err = nettest.NewCA(s.dir, "ca"); err != nil {
		return err
	}
	s.CA = s.ca.Cert
	if err := s.ca.Sign("apiserver", pkix.Name{CommonName: "kube-apiserver"}, s.IPv4.String(), s.IPv6.String(), "127.0.0.1", "kubernetes"); err != nil {
		return err
	}
	if err := s.ca.Sign("service-accounts", pkix.Name{CommonName: "service-accounts"}); err != nil {
		return err
	}
	return s.ca.Sign("admin", pkix.Name{CommonName: "admin", Organization: []string{"system:masters"}})
}

func (s *Server) args() []string {
	return []string{
		"--etcd-servers=" + s.Etcd.Members[0].ClientURL, "--etcd-compaction-interval=0",
		"--advertise-address=" + s.IPv4.String(), "--bind-address=::", "--secure-port=6443",
		"--service-cluster-ip-range=10.96.0.0/16",
		"--authorization-mode=RBAC", "--client-ca-file=" + s.CA,
		"--tls-cert-file=" + s.file("apiserver.crt"), "--tls-private-key-file=" + s.file("apiserver.key"),
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file=" + s.file("service-accounts.crt"), "--service-account-signing-key-file=" + s.file("service-accounts.key"),
		"--profiling=false",
	}
}

// AdminConfig reaches the API server from its own namespace, so that no cut cable is
// in the way.
func (s *Server) AdminConfig() *rest.Config {
	return &rest.Config{
		Host: s.URL, Dial: s.DialContext, QPS: -1,
		// Benchmarks write and read ten thousand Nodes.
		ContentConfig:   rest.ContentConfig{ContentType: "application/vnd.kubernetes.protobuf"},
		TLSClientConfig: rest.TLSClientConfig{CAFile: s.CA, CertFile: s.file("admin.crt"), KeyFile: s.file("admin.key")},
	}
}

// WaitReady waits until it answers.
func (s *Server) WaitReady(ctx context.Context) error {
	for {
		_, err := s.Admin.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ctx.Err(), err)
		case <-s.Done():
			return fmt.Errorf("it has ended: %w", s.Wait())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Stop kills it: connections end, and new ones are refused. (In good order it would
// wait a minute for its watchers.)
func (s *Server) Stop() error { return s.Kill9() }

// Start starts it again and waits until it is ready.
func (s *Server) Start() error {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	if err := s.Process.Start(); err != nil {
		return err
	}
	return s.WaitReady(ctx)
}

// AddServiceAccount makes a ServiceAccount, and its namespace, and returns a token
// that is good for the lab's life.
func (s *Server) AddServiceAccount(ctx context.Context, namespace, name string) (token string, err error) {
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}
	_, err = s.Admin.CoreV1().Namespaces().Get(ctx, namespace, metav1.GetOptions{})
	if err != nil {
		_, err = s.Admin.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{})
	}
	if err == nil {
		account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}
		_, err = s.Admin.CoreV1().ServiceAccounts(namespace).Create(ctx, account, metav1.CreateOptions{})
	}
	var r *authenticationv1.TokenRequest
	if err == nil {
		r, err = s.Admin.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, name, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	}
	if err != nil {
		return "", fmt.Errorf("add ServiceAccount %s/%s: %w", namespace, name, err)
	}
	return r.Status.Token, nil
}

// WriteKubeconfig writes a kubeconfig for whoever has the token, which is in a file
// beside it: name.kubeconfig and name.token. An empty token is the administrator.
func (s *Server) WriteKubeconfig(name, token string) (path string, err error) {
	c := clientcmdapi.NewConfig()
	c.Clusters["lab"] = &clientcmdapi.Cluster{Server: s.URL, CertificateAuthority: s.CA}
	user := &clientcmdapi.AuthInfo{TokenFile: s.file(name + ".token")}
	if token == "" {
		user = &clientcmdapi.AuthInfo{ClientCertificate: s.file("admin.crt"), ClientKey: s.file("admin.key")}
	} else if err := os.WriteFile(user.TokenFile, []byte(token), 0o600); err != nil {
		return "", err
	}
	c.AuthInfos[name] = user
	c.Contexts["lab"] = &clientcmdapi.Context{Cluster: "lab", AuthInfo: name}
	c.CurrentContext = "lab"
	path = s.file(name + ".kubeconfig")
	return path, clientcmd.WriteToFile(*c, path)
}
