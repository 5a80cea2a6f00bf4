package kubernetes

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	rbac "k8s.io/api/rbac/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/twill-net/twill/pkg/nettest"
)

// APIServer is the one kube-apiserver. Pause stops it where it stands: connections stay
// open and nothing answers; Resume lets it go on.
type APIServer struct {
	*nettest.Process
	cluster *Cluster
}

// Stop kills the API server: connections end, and new ones are refused.
func (a *APIServer) Stop() error { return a.Kill9() }

// Start starts it again and waits until it is ready.
func (a *APIServer) Start() error {
	if err := a.Process.Start(); err != nil {
		return err
	}
	return a.waitReady(a.cluster.context())
}

func (a *APIServer) waitReady(ctx context.Context) error {
	var last error
	for {
		if _, last = a.cluster.Client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx); last == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for kube-apiserver: %w", last)
		case <-a.Done():
			return fmt.Errorf("start kube-apiserver: it has ended: %w", a.Wait())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (c *Cluster) startControlPlane() error {
	var err error
	if c.Etcd, err = c.Lab.StartEtcd(nettest.EtcdOptions{}); err != nil {
		return err
	}
	c.Config = &rest.Config{
		Host: c.server(), Dial: c.ControlPlane.DialContext, QPS: -1,
		TLSClientConfig: rest.TLSClientConfig{
			CAFile: filepath.Join(c.pki(), "ca.crt"), CertFile: filepath.Join(c.pki(), "admin.crt"), KeyFile: filepath.Join(c.pki(), "admin.key"),
		},
	}
	if c.Client, err = kubernetes.NewForConfig(c.Config); err != nil {
		return fmt.Errorf("make client: %w", err)
	}
	run := func(name string, args ...string) (*nettest.Process, error) {
		p, err := c.ControlPlane.Start(nettest.Program{Path: filepath.Join(c.programs, name), Args: args})
		if err == nil {
			c.control = append(c.control, p)
		}
		return p, err
	}
	c.APIServer = &APIServer{cluster: c}
	if c.APIServer.Process, err = run("kube-apiserver", c.apiserverArgs()...); err != nil {
		return err
	}
	if err := c.APIServer.waitReady(c.context()); err != nil {
		return err
	}
	if _, err := run("kube-controller-manager", c.controllerArgs()...); err != nil {
		return err
	}
	if _, err := run("kube-scheduler", append(c.clientArgs("scheduler"), "--leader-elect=false", "--bind-address=127.0.0.1")...); err != nil {
		return err
	}
	return c.bindProxy(c.context())
}

func (c *Cluster) file(name string) string { return filepath.Join(c.pki(), name) }

func (c *Cluster) apiserverArgs() []string {
	etcd, cp, s := c.Etcd.Members[0], c.ControlPlane, c.opts.Stack
	return append([]string{
		"--etcd-servers=" + s.first(etcd.ClientURL, etcd.ClientURLv6),
		"--advertise-address=" + s.first(cp.IPv4.String(), cp.IPv6.String()),
		"--bind-address=" + s.first("0.0.0.0", "::"), "--secure-port=6443",
		"--service-cluster-ip-range=" + s.pick(servicesIPv4, servicesIPv6),
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
		"--client-ca-file=" + c.file("ca.crt"),
		"--tls-cert-file=" + c.file("apiserver.crt"), "--tls-private-key-file=" + c.file("apiserver.key"),
		"--kubelet-client-certificate=" + c.file("apiserver-kubelet.crt"), "--kubelet-client-key=" + c.file("apiserver-kubelet.key"),
		"--kubelet-preferred-address-types=InternalIP",
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file=" + c.file("service-accounts.crt"), "--service-account-signing-key-file=" + c.file("service-accounts.key"),
		"--requestheader-client-ca-file=" + c.file("ca.crt"), "--requestheader-allowed-names=front-proxy-client",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-", "--requestheader-group-headers=X-Remote-Group",
		"--requestheader-username-headers=X-Remote-User",
		"--proxy-client-cert-file=" + c.file("front-proxy.crt"), "--proxy-client-key-file=" + c.file("front-proxy.key"),
		"--profiling=false",
	}, c.opts.APIServerArgs...)
}

func (c *Cluster) controllerArgs() []string {
	args := append(c.clientArgs("controller-manager"),
		"--leader-elect=false", "--bind-address=127.0.0.1", "--use-service-account-credentials=true",
		"--service-cluster-ip-range="+c.opts.Stack.pick(servicesIPv4, servicesIPv6),
		"--cluster-cidr="+c.opts.Stack.pick(podsIPv4, podsIPv6),
		fmt.Sprintf("--allocate-node-cidrs=%v", !c.opts.NoPodCIDRs),
		"--service-account-private-key-file="+c.file("service-accounts.key"), "--root-ca-file="+c.file("ca.crt"),
		"--cluster-signing-cert-file="+c.file("ca.crt"), "--cluster-signing-key-file="+c.file("ca.key"))
	if c.opts.Stack == DualStack {
		args = append(args, "--node-cidr-mask-size-ipv4=24", "--node-cidr-mask-size-ipv6=64")
	} else {
		args = append(args, "--node-cidr-mask-size="+c.opts.Stack.first("24", "64"))
	}
	return append(args, c.opts.ControllerArgs...)
}

// clientArgs of a program that serves metrics, too, and asks the API server who may
// read them.
func (c *Cluster) clientArgs(user string) []string {
	var args []string
	for _, flag := range []string{"kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"} {
		args = append(args, "--"+flag+"="+c.kubeconfig(user))
	}
	return append(args, "--cert-dir="+filepath.Join(c.disk, user))
}

// bindProxy gives kube-proxy its role, which is an installer's work.
func (c *Cluster) bindProxy(ctx context.Context) error {
	_, err := c.Client.RbacV1().ClusterRoleBindings().Create(ctx, &rbac.ClusterRoleBinding{
		ObjectMeta: meta.ObjectMeta{Name: "kube-proxy"},
		RoleRef:    rbac.RoleRef{APIGroup: rbac.GroupName, Kind: "ClusterRole", Name: "system:node-proxier"},
		Subjects:   []rbac.Subject{{Kind: "User", APIGroup: rbac.GroupName, Name: "system:kube-proxy"}},
	}, meta.CreateOptions{})
	if err != nil {
		return fmt.Errorf("bind role of kube-proxy: %w", err)
	}
	return nil
}
