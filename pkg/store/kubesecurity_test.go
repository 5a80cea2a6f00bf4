package store

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/twill-net/twill/pkg/overlay"
)

// TestKubeRights takes one right away after the other: the error names it, and who
// lacks it, and the store goes on when it is there.
func TestKubeRights(t *testing.T) {
	r := newKubeRig(t)
	r.addNode(t, flannelNode(1))
	r.addNode(t, bareNode("n2"))
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "twill-x"},
		Spec:       corev1.PodSpec{NodeName: "n1", Containers: []corev1.Container{{Name: "c", Image: "i"}}, ServiceAccountName: "twill"},
	}
	_, err := r.Admin.CoreV1().Pods("twill-system").Create(t.Context(), pod, metav1.CreateOptions{})
	check(t, err)
	lease := overlay.Lease{Node: "n1", Attrs: node(t, 1)}
	free := overlay.Lease{Node: "n2", Subnets: overlay.Subnets{V4: mustPrefix("10.5.7.0/24")}}
	read := func(c KubeConfig) error {
		k, err := OpenKube(c)
		check(t, err)
		_, err = k.Snapshot(t.Context(), overlay.Config{})
		return err
	}
	byPod := func(c KubeConfig) error {
		c.NodeName, c.PodName, c.PodNamespace = "", "twill-x", "twill-system"
		return read(c)
	}
	do := func(act overlay.Act, l overlay.Lease) func(KubeConfig) error {
		return func(c KubeConfig) error {
			c.NodeName, c.Allocate = l.Node, true
			k, err := OpenKube(c)
			check(t, err)
			_, err = k.Do(t.Context(), overlay.Step{Act: act, Lease: l})
			return err
		}
	}
	for _, c := range []struct {
		resource, verb, want string
		call                 func(KubeConfig) error
	}{
		{"nodes", "watch", "ClusterRole twill must allow the verb watch on nodes;", read},
		{"pods", "get", "set NODE_NAME in the environment (fieldRef spec.nodeName), which needs no right, or allow the verb get on pods in namespace twill-system", byPod},
		{"nodes/status", "patch", "ClusterRole twill must allow the verb patch on nodes/status;", do(overlay.Update, lease)},
		{"nodes/status", "patch", "ClusterRole twill must allow the verb patch on nodes/status;", do(overlay.Announce, lease)},
		{"twill-system/leases", "create", "Role twill in namespace twill-system must allow the verb create on leases of coordination.k8s.io;", do(overlay.Create, free)},
		{"twill-system/leases", "list", "Role twill in namespace twill-system must allow the verb list on leases of coordination.k8s.io;", do(overlay.Create, free)},
		{"nodes", "get", "ClusterRole twill must allow the verb get on nodes;", do(overlay.Create, free)},
		{"nodes", "patch", "ClusterRole twill must allow the verb patch on nodes;", do(overlay.Create, free)},
	} {
		less := rights()
		less[c.resource] = slices.DeleteFunc(less[c.resource], func(v string) bool { return v == c.verb })
		if len(less[c.resource]) == 0 {
			delete(less, c.resource)
		}
		r.allow(t, less)
		eventually(t, func() string { // RBAC is cached by the API server
			err := c.call(r.config())
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), account) {
				return "without " + c.verb + " " + c.resource + ": " + text(err)
			}
			return ""
		})
		t.Log(c.call(r.config()))
	}
	r.allow(t, rights())
	eventually(t, func() string { return text(read(r.config())) })
	cfg := r.config()
	cfg.NodeName, cfg.PodName, cfg.PodNamespace = "", "twill-x", "twill-system"
	k, err := OpenKube(cfg)
	check(t, err)
	s, err := k.Snapshot(t.Context(), overlay.Config{})
	check(t, err)
	if k.Status().Node != "n1" || s.Node.Missing {
		t.Errorf("node %q", k.Status().Node)
	}
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// TestKubeSecurity meets an API server with each thing wrong that keeps the two from
// trusting each other. All are said in plain words, and some mend without a restart.
func TestKubeSecurity(t *testing.T) {
	r := newKubeRig(t)
	r.addNode(t, flannelNode(1))
	edit := func(name string, change func(*clientcmdapi.Config)) string {
		c, err := clientcmd.LoadFromFile(r.kubeconfig)
		check(t, err)
		change(c)
		path := filepath.Join(t.TempDir(), name)
		check(t, clientcmd.WriteToFile(*c, path))
		return path
	}
	server := func(url string) func(*clientcmdapi.Config) {
		return func(c *clientcmdapi.Config) { c.Clusters["lab"].Server = url }
	}
	for name, c := range map[string]struct {
		kubeconfig string
		want       []string
	}{
		"wrong CA": {
			edit("k", func(c *clientcmdapi.Config) { c.Clusters["lab"].CertificateAuthority = wrongCA(t) }),
			[]string{"authority that we do not trust", "ca.crt of kubeconfig"},
		},
		"name":      {edit("k", server("https://api.test:6443")), []string{"valid for", "must use a name or address that stands in its certificate"}},
		"no TLS":    {edit("k", server("http://"+r.IPv4.String()+":6443")), []string{"Client sent an HTTP request to an HTTPS server"}},
		"http":      {edit("k", server("https://"+r.Etcd.Members[0].IPv4.String()+":2379")), []string{"it hangs up at once; does it speak http, not https"}},
		"closed":    {edit("k", server("https://"+r.IPv4.String()+":6444")), []string{"connection refused", "is kube-apiserver running there?"}},
		"bad token": {edit("k", func(c *clientcmdapi.Config) { c.AuthInfos["twill"] = &clientcmdapi.AuthInfo{Token: "nonsense"} }), []string{"does not accept the token in kubeconfig"}},
		"anonymous": {edit("k", func(c *clientcmdapi.Config) { c.AuthInfos["twill"] = &clientcmdapi.AuthInfo{} }), []string{"system:anonymous has no right to it"}},
	} {
		k := r.open(t, func(cfg *KubeConfig) {
			cfg.Kubeconfig = c.kubeconfig
			cfg.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
				return r.host.DialContext(ctx, network, strings.Replace(address, "api.test", r.IPv4.String(), 1))
			}
		})
		_, err := k.Snapshot(t.Context(), overlay.Config{})
		t.Logf("%s: %v", name, err)
		for _, w := range c.want {
			if err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %v, want %q", name, err, w)
			}
		}
	}
}

// TestKubeTokenRotation replaces a token that is no longer good.
func TestKubeTokenRotation(t *testing.T) {
	r := newKubeRig(t)
	r.addNode(t, flannelNode(1))
	k := r.open(t)
	f := follow(t, k)
	f.wait(t, "a lease", func(s *overlay.Snapshot) bool { return len(s.Leases) == 1 })
	accounts := r.Admin.CoreV1().ServiceAccounts("twill-system")
	check(t, accounts.Delete(t.Context(), "twill", metav1.DeleteOptions{}))
	step := overlay.Step{Act: overlay.Announce, Lease: overlay.Lease{Node: "n1"}}
	eventually(t, func() string {
		_, err := k.Do(t.Context(), step)
		if err == nil || !strings.Contains(err.Error(), "does not accept the token") || !strings.Contains(err.Error(), "twill.token") {
			return "a token that was revoked: " + text(err)
		}
		return ""
	})
	_, err := accounts.Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "twill"}}, metav1.CreateOptions{})
	check(t, err)
	token, err := accounts.CreateToken(t.Context(), "twill", &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	check(t, err)
	_, err = r.WriteKubeconfig("twill", token.Status.Token)
	check(t, err)
	// Watch ends when the API server no longer believes the token, and comes back with
	// the new one.
	check(t, r.Stop())
	check(t, r.Start())
	r.addNode(t, flannelNode(2))
	f.wait(t, "the new node", func(s *overlay.Snapshot) bool { return named(s, "n2") != nil })
	eventually(t, func() string {
		_, err := k.Do(t.Context(), step)
		return text(err)
	})
}

// TestOpenKube refuses what cannot work, with the flag or file, reason and remedy.
func TestOpenKube(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	junk := filepath.Join(t.TempDir(), "junk")
	check(t, os.WriteFile(junk, []byte("{"), 0o600))
	for _, c := range []struct {
		cfg  KubeConfig
		want []string
	}{
		{KubeConfig{}, []string{"KUBERNETES_SERVICE_HOST", "give --kubeconfig-file or --kube-api-url"}},
		{KubeConfig{Kubeconfig: "/nowhere/kubeconfig"}, []string{"--kubeconfig-file", "/nowhere/kubeconfig", "no such file"}},
		{KubeConfig{Kubeconfig: junk}, []string{"--kubeconfig-file " + junk, "kubectl --kubeconfig="}},
		{KubeConfig{APIURL: "host:6443"}, []string{"--kube-api-url", "https://host:6443"}},
		{KubeConfig{APIURL: "https://me:secret@host"}, []string{"--kube-api-url", "it holds a user"}},
		{KubeConfig{APIURL: "https://host", AnnotationPrefix: "a/b/c"}, []string{"--kube-annotation-prefix", "a/b/c", "flannel.alpha.coreos.com"}},
		{KubeConfig{APIURL: "https://host", AnnotationPrefix: "Nope"}, []string{"--kube-annotation-prefix"}},
		{KubeConfig{APIURL: "https://host", PodName: "p"}, []string{"POD_NAMESPACE", "NODE_NAME"}},
	} {
		c.cfg.NetConfig = "/net-conf.json"
		if c.cfg.PodName == "" {
			c.cfg.NodeName = "n1"
		}
		_, err := OpenKube(c.cfg)
		for _, w := range c.want {
			if err == nil || !strings.Contains(err.Error(), w) || strings.Contains(err.Error(), "secret") {
				t.Errorf("%+v: %v, want %q", c.cfg, err, w)
			}
		}
	}
	if _, err := OpenKube(KubeConfig{APIURL: "https://host", NetConfig: "/net-conf.json"}); err == nil || !strings.Contains(err.Error(), "NODE_NAME") {
		t.Errorf("no name: %v", err)
	}
	if _, err := OpenKube(KubeConfig{APIURL: "https://host", NodeName: "n1"}); err == nil || !strings.Contains(err.Error(), "--net-config-path") {
		t.Errorf("no configuration: %v", err)
	}
	for prefix, want := range map[string]annotations{
		"flannel.alpha.coreos.com": "flannel.alpha.coreos.com/", "example.com/net": "example.com/net-", "example.com/net-": "example.com/net-",
	} {
		if got, err := newAnnotations(prefix); got != want || err != nil {
			t.Errorf("prefix %s: %s, %v", prefix, got, err)
		}
	}
}
