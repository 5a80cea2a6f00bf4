package install

import (
	"context"
	"errors"
	"fmt"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/dynamic"
	appsv1 "k8s.io/client-go/kubernetes/typed/apps/v1"
	corev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	rbacv1 "k8s.io/client-go/kubernetes/typed/rbac/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// FieldManager is the name under which the API server records what netctl owns of an
// object (server-side apply).
const FieldManager = "netctl"

// pollEvery is the time between two looks at what a run waits for.
const pollEvery = 500 * time.Millisecond

// Cluster is a way to an API server.
type Cluster struct {
	core      corev1.CoreV1Interface
	apps      appsv1.AppsV1Interface
	rbac      rbacv1.RbacV1Interface
	objects   dynamic.Interface
	discovery discovery.DiscoveryInterface
	server    string

	// Progress is told, line by line, what happens and what is waited for.
	Progress func(format string, a ...any)
}

// Connect reads a kubeconfig as kubectl does: the file named, else $KUBECONFIG, else
// ~/.kube/config; and the context named, else the current one. Nothing is sent yet.
func Connect(kubeconfig, context string) (*Cluster, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = kubeconfig
	loaded := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: context})
	config, err := loaded.ClientConfig()
	if clientcmd.IsEmptyConfig(err) {
		return nil, errors.New("read kubeconfig: there is none in --kubeconfig, $KUBECONFIG or ~/.kube/config: name one")
	}
	if err != nil {
		return nil, fmt.Errorf("read kubeconfig: %w", err)
	}
	return New(config)
}

// New returns the cluster behind a client configuration.
func New(config *rest.Config) (*Cluster, error) {
	config = rest.CopyConfig(config)
	config.UserAgent = FieldManager
	config.QPS, config.Burst = 50, 100 // one run of one operator
	c := &Cluster{server: config.Host, Progress: func(string, ...any) {}}
	var errs [5]error
	c.core, errs[0] = corev1.NewForConfig(config)
	c.apps, errs[1] = appsv1.NewForConfig(config)
	c.rbac, errs[2] = rbacv1.NewForConfig(config)
	c.objects, errs[3] = dynamic.NewForConfig(config)
	c.discovery, errs[4] = discovery.NewDiscoveryClientForConfig(config)
	if err := errors.Join(errs[:]...); err != nil {
		return nil, fmt.Errorf("prepare client of %s: %w", config.Host, err)
	}
	return c, nil
}

// explain adds the remedy to what the API server answered.
func (c *Cluster) explain(doing string, err error) error {
	switch {
	case err == nil:
		return nil
	case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
		return fmt.Errorf("%s: %w: take a kubeconfig with the rights of cluster-admin (--kubeconfig, --context)", doing, err)
	case apierrors.IsConflict(err):
		return fmt.Errorf("%s: %w: somebody else has set it: take it over with --force, or leave it to them", doing, err)
	case apierrors.ReasonForError(err) == "": // nothing of the API server's
		return fmt.Errorf("%s: %w: see whether %s is the API server and can be reached", doing, err, c.server)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// poll calls look until it says done or fails, or the time is up: then the error is
// waiting's.
func poll(ctx context.Context, look func() (done bool, err error), waiting func() error) error {
	for {
		done, err := look()
		if ctx.Err() != nil {
			return errors.Join(waiting(), context.Cause(ctx))
		}
		if err != nil || done {
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(pollEvery):
		}
	}
}

// passing says whether an error goes away by itself, so that a wait goes on: the API
// server of a cluster without network is away now and then.
func passing(err error) bool {
	return apierrors.ReasonForError(err) == "" || apierrors.IsServerTimeout(err) || apierrors.IsTimeout(err) ||
		apierrors.IsTooManyRequests(err) || apierrors.IsServiceUnavailable(err) || apierrors.IsInternalError(err)
}
