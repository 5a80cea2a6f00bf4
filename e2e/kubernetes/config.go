package kubernetes

import (
	"fmt"
	"net/netip"
	"strings"
)

// containerdConfig: restrict_oom_score_adj is for a root without CAP_SYS_RESOURCE,
// whose every sandbox would fail to ask for a negative score.
const containerdConfig = `version = 2
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs", "io.containerd.internal.v1.opt"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + PauseImage + `"
  restrict_oom_score_adj = true
  enable_unprivileged_ports = true
  enable_unprivileged_icmp = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
`

// kubeletConfig: nothing is evicted and no image removed on a machine whose disk is
// fuller than a node's.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: %[1]s
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
address: "%[2]s"
clusterDNS: ["%[3]s"]
clusterDomain: cluster.local
resolvConf: /etc/resolv.conf
failSwapOn: false
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: %[4]s/ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: %[4]s/%[5]s.crt
tlsPrivateKeyFile: %[4]s/%[5]s.key
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
evictionHard: {memory.available: 100Mi, nodefs.available: 1%%, nodefs.inodesFree: 1%%, imagefs.available: 1%%}
maxPods: 250
staticPodPath: %[6]s/static
syncFrequency: 10s
nodeStatusUpdateFrequency: 5s
`

// proxyConfig: nf_conntrack_max belongs to the machine, so kube-proxy leaves it.
const proxyConfig = `apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: %s
clusterCIDR: "%s"
hostnameOverride: %s
clientConnection: {kubeconfig: %s}
conntrack: {maxPerCore: 0, min: 0}
healthzBindAddress: "%s:10256"
metricsBindAddress: "127.0.0.1:10249"
`

// kubeletSysctls are what a kubelet wants and would set for the whole machine.
var kubeletSysctls = map[string]string{
	"vm.overcommit_memory": "1", "vm.panic_on_oom": "0", "kernel.panic": "10", "kernel.panic_on_oops": "1",
	"kernel.keys.root_maxkeys": "1000000", "kernel.keys.root_maxbytes": "25000000",
}

// Stack says which address families the cluster has.
type Stack int

// The stacks.
const (
	IPv4 Stack = iota
	DualStack
	IPv6
)

func (s Stack) String() string { return [...]string{"IPv4", "dual stack", "IPv6 only"}[s] }

// Addresses of the cluster: pods, Services, and the Service of the DNS.
const (
	podsIPv4, podsIPv6         = "10.244.0.0/16", "fd00:10:244::/56"
	servicesIPv4, servicesIPv6 = "10.96.0.0/16", "fd00:10:96::/112"
	dnsIPv4, dnsIPv6           = "10.96.0.10", "fd00:10:96::a"
	apiIPv4, apiIPv6           = "10.96.0.1", "fd00:10:96::1"
)

// pick joins what is for the stack's families, IPv4 first.
func (s Stack) pick(v4, v6 string) string {
	switch s {
	case IPv4:
		return v4
	case IPv6:
		return v6
	}
	return v4 + "," + v6
}

// first is of the first family.
func (s Stack) first(v4, v6 string) string {
	first, _, _ := strings.Cut(s.pick(v4, v6), ",")
	return first
}

func (s Stack) has(a netip.Addr) bool { return s == DualStack || a.Is4() == (s == IPv4) }

// NetConf is a net-conf.json with the cluster's pod networks. The backend is a type,
// "vxlan", or a whole JSON object.
func (s Stack) NetConf(backend string) string {
	if !strings.HasPrefix(backend, "{") {
		backend = fmt.Sprintf(`{"Type": %q}`, backend)
	}
	switch s {
	case IPv4:
		return fmt.Sprintf(`{"Network": %q, "Backend": %s}`, podsIPv4, backend)
	case IPv6:
		return fmt.Sprintf(`{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": %q, "Backend": %s}`, podsIPv6, backend)
	}
	return fmt.Sprintf(`{"Network": %q, "EnableIPv6": true, "IPv6Network": %q, "Backend": %s}`, podsIPv4, podsIPv6, backend)
}

// kubeconfig for a user whose certificate is in the PKI's directory.
func kubeconfig(server, pki, user string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: lab, cluster: {server: "%[1]s", certificate-authority: %[2]s/ca.crt}}]
users: [{name: %[3]s, user: {client-certificate: %[2]s/%[3]s.crt, client-key: %[2]s/%[3]s.key}}]
contexts: [{name: lab, context: {cluster: lab, user: %[3]s}}]
current-context: lab
`, server, pki, user)
}
