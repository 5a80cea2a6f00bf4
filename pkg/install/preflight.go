package install

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/twill-net/twill/pkg/overlay"
)

// oldestMinor is the oldest Kubernetes 1.x whose objects these are: 1.25 has Pod
// Security admission, 1.22 server-side apply.
const oldestMinor = 25

// others are the DaemonSets of other networks, by the beginnings of their names.
var others = []struct{ prefix, network string }{
	{"kube-flannel", "flannel"},
	{"calico-node", "Calico"},
	{"canal", "Canal"},
	{"cilium", "Cilium"},
	{"weave-net", "Weave Net"},
	{"antrea-agent", "Antrea"},
	{"kube-router", "kube-router"},
	{"kindnet", "kindnet"},
	{"aws-node", "the AWS VPC CNI"},
	{"ovnkube-node", "OVN-Kubernetes"},
	{"kube-ovn-cni", "Kube-OVN"},
}

// checkServer asks for the server's version: whether it is there, and not too old.
func (c *Cluster) checkServer() error {
	v, err := c.discovery.ServerVersion()
	if err != nil {
		return c.explain("ask the API server for its version", err)
	}
	minor, err := strconv.Atoi(strings.TrimRight(v.Minor, "+"))
	if err == nil && v.Major == "1" && minor < oldestMinor {
		return fmt.Errorf("check API server: it is Kubernetes %s: Twill needs 1.%d or newer", v.GitVersion, oldestMinor)
	}
	return nil
}

// checkOthers refuses to be the second network of a cluster.
func (c *Cluster) checkOthers(ctx context.Context, namespace string) error {
	all, err := c.apps.DaemonSets("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return c.explain("list DaemonSets", err)
	}
	var errs []error
	for _, ds := range all.Items {
		where := ds.Namespace + "/" + ds.Name
		if ds.Name == name && ds.Labels["app.kubernetes.io/name"] == name && ds.Namespace != namespace {
			errs = append(errs, fmt.Errorf("check other networks: Twill is in namespace %s already: give --namespace %s, or remove it there with netctl uninstall --namespace %s", ds.Namespace, ds.Namespace, ds.Namespace))
			continue
		}
		if ds.Status.DesiredNumberScheduled == 0 && ds.Status.ObservedGeneration > 0 {
			continue // it runs nowhere, as flannel's after a migration
		}
		for _, o := range others {
			if !strings.HasPrefix(ds.Name, o.prefix) {
				continue
			}
			remedy := "remove it first, or, if it is no pod network, give --skip-checks"
			if o.network == "flannel" {
				remedy = "netctl migrate-from-flannel takes its place node by node, with the pods running"
			}
			errs = append(errs, fmt.Errorf("check other networks: DaemonSet %s is %s: %s", where, o.network, remedy))
		}
	}
	return errors.Join(errs...)
}

// checkNodes compares the nodes' subnets with the network configuration.
func checkNodes(nodes []corev1.Node, conf overlay.Config, allocate bool) error {
	var errs []error
	var without []string
	for _, n := range nodes {
		subnets, err := subnetsOf(n)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, family := range []overlay.Family{overlay.IPv4, overlay.IPv6} {
			network := conf.Pool(family).Network
			i := slices.IndexFunc(subnets, func(p netip.Prefix) bool { return p.Addr().Is4() == (family == overlay.IPv4) })
			switch {
			case !network.IsValid():
			case i < 0:
				without = append(without, fmt.Sprintf("%s (%s)", n.Name, family))
			case !network.Contains(subnets[i].Addr()) || subnets[i].Bits() < network.Bits():
				errs = append(errs, fmt.Errorf("check nodes: podCIDR %s of node %s is not in the pods' network %s: name the one that kube-controller-manager has as --cluster-cidr (%s)", subnets[i], n.Name, network, flagOf(family)))
			}
		}
	}
	if len(without) > 0 && !allocate {
		errs = append(errs, fmt.Errorf("check nodes: no podCIDR on %s: start kube-controller-manager with --allocate-node-cidrs=true --cluster-cidr=%s (kubeadm init --pod-network-cidr), or let Twill lease subnets itself (--set twill.allocateSubnets=true)",
			strings.Join(without, ", "), overlayNetworks(conf)))
	}
	return errors.Join(errs...)
}

func flagOf(f overlay.Family) string {
	if f == overlay.IPv4 {
		return "--pod-cidr"
	}
	return "--pod-cidr-v6"
}

func overlayNetworks(conf overlay.Config) string {
	var s []string
	for _, p := range conf.Networks() {
		s = append(s, p.String())
	}
	return strings.Join(s, ",")
}

func subnetsOf(n corev1.Node) ([]netip.Prefix, error) {
	cidrs := n.Spec.PodCIDRs
	if len(cidrs) == 0 && n.Spec.PodCIDR != "" {
		cidrs = []string{n.Spec.PodCIDR}
	}
	var out []netip.Prefix
	for _, s := range cidrs {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, fmt.Errorf("check nodes: podCIDR of node %s: %w", n.Name, err)
		}
		out = append(out, p.Masked())
	}
	return out, nil
}

// Linux lists the nodes on which Twill runs, by name.
func (c *Cluster) nodes(ctx context.Context) ([]corev1.Node, error) {
	list, err := c.core.Nodes().List(ctx, metav1.ListOptions{LabelSelector: "kubernetes.io/os=linux"})
	if err != nil {
		return nil, c.explain("list nodes", err)
	}
	slices.SortFunc(list.Items, func(a, b corev1.Node) int { return strings.Compare(a.Name, b.Name) })
	return list.Items, nil
}

// podNetworks finds out what the pods' networks are, where the operator named none:
// from kube-controller-manager's flags, kubeadm's configuration or kube-proxy's.
func (c *Cluster) podNetworks(ctx context.Context) (cidrs []netip.Prefix, from string, err error) {
	pods, err := c.core.Pods("kube-system").List(ctx, metav1.ListOptions{LabelSelector: "component=kube-controller-manager"})
	if err != nil {
		return nil, "", c.explain("look for kube-controller-manager's flags", err)
	}
	for _, p := range pods.Items {
		for _, container := range p.Spec.Containers {
			for _, arg := range append(container.Command, container.Args...) {
				if cidr, ok := strings.CutPrefix(arg, "--cluster-cidr="); ok && cidr != "" {
					cidrs, err = prefixes(cidr)
					return cidrs, "kube-controller-manager's --cluster-cidr", err
				}
			}
		}
	}
	for _, place := range []struct{ configMap, key, expression, from string }{
		{"kubeadm-config", "ClusterConfiguration", `(?m)^\s*podSubnet:\s*"?([^"\s]+)`, "kubeadm's podSubnet"},
		{"kube-proxy", "config.conf", `(?m)^\s*clusterCIDR:\s*"?([^"\s]+)`, "kube-proxy's clusterCIDR"},
	} {
		cm, err := c.core.ConfigMaps("kube-system").Get(ctx, place.configMap, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, "", c.explain("look for "+place.from, err)
		}
		if m := regexp.MustCompile(place.expression).FindStringSubmatch(cm.Data[place.key]); m != nil {
			cidrs, err = prefixes(m[1])
			return cidrs, place.from, err
		}
	}
	return nil, "", nil
}

func prefixes(list string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for s := range strings.SplitSeq(list, ",") {
		p, err := netip.ParsePrefix(strings.TrimSpace(s))
		if err != nil {
			return nil, fmt.Errorf("read the pods' network %q: %w: name it with --pod-cidr", list, err)
		}
		out = append(out, p)
	}
	return out, nil
}

// networkConfig is what the rendered ConfigMap says.
func networkConfig(objects []*unstructured.Unstructured) (overlay.Config, []string, error) {
	for _, o := range objects {
		if o.GetKind() == "ConfigMap" {
			text, _, err := unstructured.NestedString(o.Object, "data", netConfKey)
			if err != nil {
				return overlay.Config{}, nil, fmt.Errorf("read %s: %w", netConfKey, err)
			}
			conf, warnings, err := overlay.ParseConfig([]byte(text))
			if err != nil {
				err = fmt.Errorf("check %s: %w", netConfKey, err)
			}
			return conf, warnings, err
		}
	}
	return overlay.Config{}, nil, errors.New("render chart: there is no ConfigMap")
}
