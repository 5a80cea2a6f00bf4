package netctl

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/store"
)

// storeConfig says how to reach etcd, or Kubernetes. What is empty is taken from the
// daemon.
type storeConfig struct {
	endpoints, prefix, caFile, certFile, keyFile, username, password string

	kubernetes                                         bool // the leases are there
	apiURL, kubeconfig, annotations, netConfig, inNode string
}

type storeFlag struct {
	name, usage string
	value       *string
}

// flags are flannel's names.
func (c *storeConfig) flags() []storeFlag {
	return []storeFlag{
		{"etcd-endpoints", "comma separated `urls` of etcd; default: the store twilld uses", &c.endpoints},
		{"etcd-prefix", "`key` prefix; default: twilld's, or " + defaultPrefix + " if --etcd-endpoints is given", &c.prefix},
		{"etcd-cafile", "`file` of the CA that signs etcd's certificate", &c.caFile},
		{"etcd-certfile", "`file` of the client certificate", &c.certFile},
		{"etcd-keyfile", "`file` of the client key", &c.keyFile},
		{"etcd-username", "etcd `user`", &c.username},
		{"etcd-password", "etcd `password`; twilld does not tell its own", &c.password},
		{"kubeconfig-file", "kubeconfig `file`, to read leases from the Kubernetes API; default: the store twilld uses", &c.kubeconfig},
		{"kube-api-url", "`URL` of the Kubernetes API; goes before that of --kubeconfig-file", &c.apiURL},
		{"kube-annotation-prefix", "`prefix` of the Nodes' annotations; default: twilld's, or flannel's", &c.annotations},
		{"net-config-path", "`file` with the network configuration, where leases are in the Kubernetes API; default: twilld's", &c.netConfig},
	}
}

const defaultPrefix = "/coreos.com/network" // flannel's

// overDaemon fills c with the daemon's settings. Endpoints that were given name
// another store, of which the daemon knows nothing.
func (c storeConfig) overDaemon(s overlay.StoreStatus, err error) (storeConfig, error) {
	const name = "name it with --etcd-endpoints, or --kubeconfig-file"
	switch {
	case c.endpoints != "":
		c.prefix = cmp.Or(c.prefix, defaultPrefix)
		return c, nil
	case c.kubeconfig != "" || c.apiURL != "":
		c.kubernetes = true
		if err == nil && s.Kind == kindKubernetes {
			c = c.asDaemon(s)
		}
		return c, nil
	case err != nil:
		return c, errors.New("where the store is, only twilld knows, which does not answer; " + name)
	case len(s.Endpoints) == 0:
		return c, errors.New("twilld does not say where its store is; " + name)
	case s.Kind == kindKubernetes:
		return c.likeDaemon(s)
	}
	c.endpoints = strings.Join(s.Endpoints, ",")
	c.prefix = cmp.Or(c.prefix, s.Prefix, defaultPrefix)
	c.caFile, c.certFile, c.keyFile = cmp.Or(c.caFile, s.CAFile), cmp.Or(c.certFile, s.CertFile), cmp.Or(c.keyFile, s.KeyFile)
	c.username = cmp.Or(c.username, s.Username)
	if c.username != "" && c.password == "" {
		return c, fmt.Errorf("store %s wants the password of user %s; give it in FLANNELD_ETCD_PASSWORD", c.endpoints, c.username)
	}
	return c, nil
}

const kindKubernetes = "kubernetes"

// likeDaemon reads the API as the daemon does.
func (c storeConfig) likeDaemon(s overlay.StoreStatus) (storeConfig, error) {
	c.kubernetes = true
	if !s.InCluster {
		c.apiURL, c.kubeconfig = s.Endpoints[0], s.Kubeconfig
	} else if _, err := os.Stat(serviceAccountToken); err != nil {
		return c, errors.New("twilld reads the Kubernetes API with the service account of its pod; run netctl in it (kubectl -n twill-system exec POD -c twilld -- netctl …), or give --kubeconfig-file")
	}
	return c.asDaemon(s), nil
}

const serviceAccountToken = "/var/run/secrets/kubernetes.io/serviceaccount/token"

// asDaemon takes what the daemon knows of the cluster.
func (c storeConfig) asDaemon(s overlay.StoreStatus) storeConfig {
	c.annotations, c.inNode = cmp.Or(c.annotations, s.Prefix), s.Node
	if c.netConfig == "" {
		// On the host, the file of twilld's pod may not be there. What twilld runs
		// stands in for it.
		if _, err := os.Stat(s.NetConfig); err == nil {
			c.netConfig = s.NetConfig
		}
	}
	return c
}

func openStore(c storeConfig) (Store, error) {
	if c.kubernetes {
		return store.OpenKube(store.KubeConfig{
			NodeName: c.inNode, APIURL: c.apiURL, Kubeconfig: c.kubeconfig,
			AnnotationPrefix: c.annotations, NetConfig: c.netConfig, Reader: true,
		})
	}
	return store.OpenEtcd(store.EtcdConfig{
		Endpoints: strings.Split(c.endpoints, ","), Prefix: c.prefix,
		CAFile: c.caFile, CertFile: c.certFile, KeyFile: c.keyFile,
		Username: c.username, Password: c.password,
	})
}
