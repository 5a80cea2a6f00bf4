package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// KubeConfig is how to reach the Kubernetes API and what to do there: flannel's
// --kube-… flags.
type KubeConfig struct {
	// NodeName is the name of this node's Node. If it is empty, PodName's is asked
	// for: twilld's own pod, in PodNamespace.
	NodeName, PodName string
	PodNamespace      string // also where subnets are claimed; default twill-system
	// APIURL goes before what Kubeconfig says. Without both, the service account of
	// the pod is used.
	APIURL, Kubeconfig string
	AnnotationPrefix   string // default flannel.alpha.coreos.com
	NetConfig          string // file with the network configuration
	// Reader is for who only calls Snapshot: it needs neither a name nor a NetConfig.
	Reader                bool
	Allocate              bool // claim free subnets for a Node without podCIDRs
	SetNetworkUnavailable bool // look after the Node's condition
	Log                   *slog.Logger
	// Dial connects. Nil dials from the network namespace of the process.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

const (
	defaultAnnotationPrefix = "flannel.alpha.coreos.com" // flannel's
	defaultNamespace        = "twill-system"

	// A connection on which nothing came for pingAfter is asked whether it is still
	// alive, and given up after pingTimeout more: together with connectTimeout, an
	// API that is cut off is known to be so after less than 20 s. (client-go's own
	// figures, which only the environment can change, make it 45 s.)
	pingAfter, pingTimeout = 8 * time.Second, 5 * time.Second

	protobuf = "application/vnd.kubernetes.protobuf"
)

// normalize returns the configuration with its defaults.
func (c KubeConfig) normalize() (KubeConfig, error) {
	c.AnnotationPrefix = cmp.Or(c.AnnotationPrefix, defaultAnnotationPrefix)
	if c.NodeName == "" && c.PodName != "" && c.PodNamespace == "" {
		return c, errors.New("environment POD_NAME is set and POD_NAMESPACE is not; set it too (fieldRef metadata.namespace), or NODE_NAME (fieldRef spec.nodeName)")
	}
	if c.NodeName == "" && c.PodName == "" && !c.Reader {
		return c, errors.New("which Node this is, nobody says; set NODE_NAME in the environment (fieldRef spec.nodeName), or POD_NAME and POD_NAMESPACE")
	}
	if c.NetConfig == "" && !c.Reader {
		return c, errors.New("--net-config-path is empty; name the file with the network configuration")
	}
	c.PodNamespace = cmp.Or(c.PodNamespace, defaultNamespace)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// kubeClient speaks to the API as the files said when it was made. Only the token
// file is read again by itself.
type kubeClient struct {
	core, coordination *rest.RESTClient
	close              func()

	url string
	// For errors: where the credentials and the authority are from.
	credentials, authority string
	inCluster              bool
}

// connect reads the files and makes a client. It does not dial.
func (c KubeConfig) connect() (*kubeClient, error) {
	cfg, err := c.rest()
	if err != nil {
		return nil, err
	}
	out := &kubeClient{url: cfg.Host, inCluster: c.APIURL == "" && c.Kubeconfig == ""}
	out.sources(c, cfg)
	transport, err := c.transport(cfg)
	if err != nil {
		return nil, err
	}
	out.close = transport.CloseIdleConnections
	wrapped, err := rest.HTTPWrappersForConfig(cfg, transport)
	if err != nil {
		return nil, fmt.Errorf("use %s: %w", out.credentials, err)
	}
	h := &http.Client{Transport: wrapped}
	if out.core, err = groupClient(cfg, h, corev1.SchemeGroupVersion, "/api"); err != nil {
		return nil, err
	}
	out.coordination, err = groupClient(cfg, h, coordinationv1.SchemeGroupVersion, "/apis")
	return out, err
}

// rest returns client-go's configuration.
func (c KubeConfig) rest() (*rest.Config, error) {
	if c.APIURL != "" {
		if err := checkAPIURL(c.APIURL); err != nil {
			return nil, fmt.Errorf("--kube-api-url=%q: %w", redact(c.APIURL), err)
		}
	}
	if c.APIURL == "" && c.Kubeconfig == "" {
		return inCluster()
	}
	if c.Kubeconfig == "" { // plain http, or what a proxy on this host lets through
		return withDefaults(&rest.Config{Host: c.APIURL}), nil
	}
	if _, err := os.ReadFile(c.Kubeconfig); err != nil {
		return nil, fmt.Errorf("read --kubeconfig-file: %w; give a kubeconfig that this process may read", err)
	}
	cfg, err := clientcmd.BuildConfigFromFlags(c.APIURL, c.Kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("read --kubeconfig-file %s: %w; check it with kubectl --kubeconfig=%s get nodes", c.Kubeconfig, err, c.Kubeconfig)
	}
	return withDefaults(cfg), nil
}

// inCluster is the service account of the pod.
func inCluster() (*rest.Config, error) {
	if os.Getenv("KUBERNETES_SERVICE_HOST") == "" || os.Getenv("KUBERNETES_SERVICE_PORT") == "" {
		return nil, errors.New("find the Kubernetes API: this is no pod of a cluster (KUBERNETES_SERVICE_HOST and _PORT are not set); give --kubeconfig-file or --kube-api-url")
	}
	cfg, err := rest.InClusterConfig()
	if err != nil {
		return nil, fmt.Errorf("use the pod's service account: %w; does the pod have automountServiceAccountToken: false?", err)
	}
	if cfg.CAFile == "" {
		return nil, fmt.Errorf("use the pod's service account: %s holds no certificate", serviceAccountDir+"/ca.crt")
	}
	return withDefaults(cfg), nil
}

const serviceAccountDir = "/var/run/secrets/kubernetes.io/serviceaccount"

func withDefaults(cfg *rest.Config) *rest.Config {
	cfg.QPS = -1 // one watch and a few writes: there is nothing to hold back
	cfg.UserAgent = filepath.Base(os.Args[0])
	cfg.ContentType, cfg.AcceptContentTypes = protobuf, protobuf+",application/json"
	return cfg
}

func checkAPIURL(text string) error {
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" {
		return errors.New("it is not a URL like https://host:6443")
	}
	if u.User != nil {
		return errors.New("it holds a user; put the credentials into a kubeconfig and give --kubeconfig-file")
	}
	return nil
}

// transport is client-go's, but for the time it takes to give a silent connection
// up, and for HTTPS_PROXY, which is there for images and not for the cluster's own
// traffic.
func (c KubeConfig) transport(cfg *rest.Config) (*http.Transport, error) {
	security, err := rest.TLSConfigFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("read certificates of %s: %w", cmp.Or(c.Kubeconfig, serviceAccountDir), err)
	}
	dial := c.Dial
	if dial == nil {
		dial = (&net.Dialer{Timeout: connectTimeout}).DialContext
	}
	return &http.Transport{
		TLSClientConfig: security, DialContext: dial, Proxy: cfg.Proxy,
		TLSHandshakeTimeout: connectTimeout, IdleConnTimeout: time.Minute, ForceAttemptHTTP2: true,
		HTTP2: &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingTimeout},
	}, nil
}

// groupClient makes a client of one API group. It knows no more kinds than are
// needed: all of Kubernetes' would double the program.
func groupClient(base *rest.Config, h *http.Client, gv schema.GroupVersion, path string) (*rest.RESTClient, error) {
	scheme := runtime.NewScheme()
	err := errors.Join(corev1.AddToScheme(scheme), coordinationv1.AddToScheme(scheme))
	if err != nil {
		return nil, fmt.Errorf("make Kubernetes client: %w", err)
	}
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	cfg := rest.CopyConfig(base)
	cfg.GroupVersion, cfg.APIPath = &gv, path
	cfg.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	client, err := rest.RESTClientForConfigAndClient(cfg, h)
	if err != nil {
		return nil, fmt.Errorf("make Kubernetes client for %s: %w", base.Host, err)
	}
	return client, nil
}

// sources notes where credentials and authority are from, for errors.
func (k *kubeClient) sources(c KubeConfig, cfg *rest.Config) {
	switch {
	case k.inCluster:
		k.credentials, k.authority = "the service account token "+cfg.BearerTokenFile, cfg.CAFile
		return
	case c.Kubeconfig == "":
		k.credentials, k.authority = "no credentials (only --kube-api-url is given)", "the system's authorities; give --kubeconfig-file"
		return
	}
	k.credentials, k.authority = "kubeconfig "+c.Kubeconfig, "certificate-authority of kubeconfig "+c.Kubeconfig
	switch {
	case cfg.BearerTokenFile != "":
		k.credentials = "the token " + cfg.BearerTokenFile + " of " + k.credentials
	case cfg.BearerToken != "":
		k.credentials = "the token in " + k.credentials
	case cfg.CertFile != "":
		k.credentials = "the client certificate " + cfg.CertFile + " of " + k.credentials
	case len(cfg.CertData) > 0:
		k.credentials = "the client certificate in " + k.credentials
	}
	if cfg.CAFile != "" {
		k.authority = cfg.CAFile + " of " + strings.TrimPrefix(k.authority, "certificate-authority of ")
	}
}
