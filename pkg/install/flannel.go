package install

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/twill-net/twill/pkg/overlay"
)

// flannel is flannel as it runs in a cluster.
type flannel struct {
	daemonSets []appsv1.DaemonSet // one, or one per architecture
	container  corev1.Container   // flanneld's
	config     corev1.ConfigMap
}

func (f *flannel) namespace() string { return f.daemonSets[0].Namespace }

// findFlannel looks for flannel where its manifests put it; nil: it is not there.
func (c *Cluster) findFlannel(ctx context.Context) (*flannel, error) {
	f := &flannel{}
	for _, namespace := range []string{"kube-flannel", "kube-system"} {
		list, err := c.apps.DaemonSets(namespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return nil, c.explain("look for flannel", err)
		}
		for _, ds := range list.Items {
			if strings.HasPrefix(ds.Name, "kube-flannel") && !strings.Contains(ds.Name, "windows") {
				f.daemonSets = append(f.daemonSets, ds)
			}
		}
		if len(f.daemonSets) > 0 {
			break
		}
	}
	if len(f.daemonSets) == 0 {
		return nil, nil
	}
	ds := f.daemonSets[0]
	spec := ds.Spec.Template.Spec
	i := slices.IndexFunc(spec.Containers, func(c corev1.Container) bool {
		return strings.HasSuffix(strings.Join(c.Command, " "), "flanneld") || c.Name == "kube-flannel"
	})
	if i < 0 {
		return nil, fmt.Errorf("read flannel's DaemonSet %s/%s: no container runs flanneld: it cannot be migrated by itself", ds.Namespace, ds.Name)
	}
	f.container = spec.Containers[i]
	configMap := ""
	for _, v := range spec.Volumes {
		if v.ConfigMap != nil && mountedAt(f.container, v.Name) == "/etc/kube-flannel" {
			configMap = v.ConfigMap.Name
		}
	}
	if configMap == "" {
		return nil, fmt.Errorf("read flannel's DaemonSet %s/%s: it mounts no ConfigMap at /etc/kube-flannel, where its network configuration is", ds.Namespace, ds.Name)
	}
	cm, err := c.core.ConfigMaps(ds.Namespace).Get(ctx, configMap, metav1.GetOptions{})
	if err != nil {
		return nil, c.explain("read flannel's ConfigMap", err)
	}
	f.config = *cm
	return f, nil
}

func mountedAt(c corev1.Container, volume string) string {
	for _, m := range c.VolumeMounts {
		if m.Name == volume {
			return strings.TrimSuffix(m.MountPath, "/")
		}
	}
	return ""
}

// What becomes of flanneld's flags.
const (
	taken   = "taken" // twilld has the same
	implied = "ours"  // the chart says it, whatever flannel's value
	refused = "no"
)

var flannelFlags = map[string]string{
	"iface": taken, "iface-regex": taken, "iface-can-reach": taken, "public-ip": taken, "public-ipv6": taken,
	"ip-masq-fully-random-disable": taken, "iptables-resync": taken, "iptables-forward-rules": taken, "ip-blackhole-route": taken,
	"kube-api-url": taken, "kube-annotation-prefix": taken, "set-node-network-unavailable": taken, "subnet-lease-renew-margin": taken,
	"v": taken, "vmodule": taken, "log_backtrace_at": taken,
	"ip-masq": implied, "kube-subnet-mgr": implied, "healthz-ip": implied, "healthz-port": implied, "net-config-path": implied, "subnet-file": implied,
	"kubeconfig-file": refused, "etcd-endpoints": refused, "etcd-prefix": refused, "etcd-keyfile": refused, "etcd-certfile": refused,
	"etcd-cafile": refused, "etcd-username": refused, "etcd-password": refused, "version": refused,
}

// boolean flags take their value behind = only.
var booleanFlags = []string{"ip-masq", "kube-subnet-mgr", "ip-masq-fully-random-disable", "iptables-forward-rules", "ip-blackhole-route", "set-node-network-unavailable", "version"}

// values translates what flannel was told. What Twill cannot do is an error, and all of
// it is named.
func (f *flannel) values() (Values, error) {
	text, ok := f.config.Data[netConfKey]
	if !ok {
		return nil, fmt.Errorf("read flannel's ConfigMap %s/%s: it has no key %s", f.config.Namespace, f.config.Name, netConfKey)
	}
	if _, _, err := overlay.ParseConfig([]byte(text)); err != nil {
		return nil, fmt.Errorf("take over flannel's %s: %w", netConfKey, err)
	}
	v := Values{}
	v.Set("twill.netConfJson", text)
	v.Set("twill.cniArgs", []any{"--replace-flannel"})
	err := errors.Join(f.takeArgs(v), f.takeEnv(v))
	f.takePaths(v)
	return v, err
}

// takeArgs takes over flanneld's command line.
func (f *flannel) takeArgs(v Values) error {
	flags, errs := parseFlags(append(slices.Clone(f.container.Command), f.container.Args...))
	masq, kube := false, false
	args := []any{}
	for _, fl := range flags {
		on := fl.value != "false"
		switch flannelFlags[fl.name] {
		case taken:
			args = append(args, fl.String())
		case implied:
			switch fl.name {
			case "ip-masq":
				masq = on
			case "kube-subnet-mgr":
				kube = on
			case "subnet-file":
				if fl.value != "/run/flannel/subnet.env" {
					errs = append(errs, fmt.Errorf("--subnet-file=%s: Twill's plugin reads it in /run/flannel", fl.value))
				}
			}
		case refused:
			errs = append(errs, fmt.Errorf("--%s: has no meaning for Twill in a pod", fl.name))
		default:
			errs = append(errs, fmt.Errorf("--%s: Twill knows no such flag", fl.name))
		}
	}
	if !kube {
		errs = append(errs, errors.New("--kube-subnet-mgr is not there, so this flannel keeps its leases in etcd: run twilld beside it with the same etcd flags, node by node"))
	}
	v.Set("twill.ipMasq", masq)
	v.Set("twill.args", args)
	if len(errs) > 0 {
		return fmt.Errorf("take over flanneld's flags: %w", errors.Join(errs...))
	}
	return nil
}

// takeEnv takes over the environment, as far as it is flannel's.
func (f *flannel) takeEnv(v Values) error {
	var env []any
	var errs []error
	for _, e := range f.container.Env {
		flag := strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(e.Name, "FLANNELD_")), "_", "-")
		switch {
		case e.Name == "KUBERNETES_SERVICE_HOST":
			v.Set("kubernetesServiceHost", e.Value)
		case e.Name == "KUBERNETES_SERVICE_PORT":
			v.Set("kubernetesServicePort", e.Value)
		case !strings.HasPrefix(e.Name, "FLANNELD_"):
			// NODE_NAME, POD_NAME and what tunes flannel's own code
		case e.ValueFrom != nil:
			errs = append(errs, fmt.Errorf("%s: it comes from another object: give it to netctl as --set twill.env", e.Name))
		case flannelFlags[flag] == taken:
			env = append(env, map[string]any{"name": e.Name, "value": e.Value})
		case flag == "ip-masq":
			v.Set("twill.ipMasq", e.Value != "false")
		case flannelFlags[flag] == implied:
		default:
			errs = append(errs, fmt.Errorf("%s: Twill knows no such setting", e.Name))
		}
	}
	if len(env) > 0 {
		v.Set("twill.env", env)
	}
	if len(errs) > 0 {
		return fmt.Errorf("take over flanneld's environment: %w", errors.Join(errs...))
	}
	return nil
}

// takePaths takes over where the runtime's files are.
func (f *flannel) takePaths(v Values) {
	spec := f.daemonSets[0].Spec.Template.Spec
	for _, volume := range spec.Volumes {
		if volume.HostPath == nil {
			continue
		}
		for _, c := range spec.InitContainers {
			switch mountedAt(c, volume.Name) {
			case "/opt/cni/bin":
				v.Set("twill.cniBinDir", volume.HostPath.Path)
			case "/etc/cni/net.d":
				v.Set("twill.cniConfDir", volume.HostPath.Path)
			}
		}
	}
}

// commandFlag is a flag as it was given.
type commandFlag struct {
	name, value string
	given       bool // a value
}

func (f commandFlag) String() string {
	if !f.given {
		return "--" + f.name
	}
	return "--" + f.name + "=" + f.value
}

// parseFlags reads a command line as Go's package flag does.
func parseFlags(line []string) (flags []commandFlag, errs []error) {
	if len(line) > 0 && !strings.HasPrefix(line[0], "-") {
		if !strings.HasSuffix(line[0], "flanneld") {
			return nil, []error{fmt.Errorf("it is started by %s, so its flags cannot be told", line[0])}
		}
		line = line[1:]
	}
	for i := 0; i < len(line); i++ {
		word, isFlag := strings.CutPrefix(line[i], "-")
		if !isFlag {
			errs = append(errs, fmt.Errorf("%s: is no flag", line[i]))
			continue
		}
		f := commandFlag{}
		f.name, f.value, f.given = strings.Cut(strings.TrimPrefix(word, "-"), "=")
		if !f.given && !slices.Contains(booleanFlags, f.name) && i+1 < len(line) {
			i++
			f.value, f.given = line[i], true
		}
		if strings.Contains(f.value, "$(") {
			errs = append(errs, fmt.Errorf("%s: it refers to the environment of flannel's container: give it to netctl as --set twill.args", f))
		}
		flags = append(flags, f)
	}
	return flags, errs
}
