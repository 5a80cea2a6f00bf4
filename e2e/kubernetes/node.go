package kubernetes

import (
	_ "embed"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/nettest"
)

// Node is a host with containerd, kubelet and kube-proxy below a process 1 of its own, in
// namespaces of its own: network, mount, PID, UTS and IPC. NS.Do and DialContext work on
// the node's network.
type Node struct {
	*nettest.Host

	cluster  *Cluster
	programs string
	dir      string // its disk
	proc     *nettest.Process
	init     int // process 1, as seen from the machine
}

//go:embed node.sh
var nodeScript string

// install writes the node's disk, as an installer would: images, configuration.
func (n *Node) install() error {
	for _, d := range []string{"etc", "static", "sysctl", "images", "cni-bin", "cni-conf"} {
		if err := os.MkdirAll(filepath.Join(n.dir, d), 0o755); err != nil {
			return err
		}
	}
	seed, err := filepath.EvalSymlinks(filepath.Join(filepath.Dir(n.programs), "seed"))
	if err != nil {
		return fmt.Errorf("install images on %s: %w", n.Name, err)
	}
	if err := linkTree(seed, filepath.Join(n.dir, "containerd")); err != nil {
		return fmt.Errorf("install images on %s: %w", n.Name, err)
	}
	plugins, _ := filepath.Glob("/usr/lib/cni/*") // the pattern is well formed
	for _, p := range plugins {
		if err := os.Symlink(p, filepath.Join(n.dir, "cni-bin", filepath.Base(p))); err != nil {
			return err
		}
	}
	c, s := n.cluster, n.cluster.opts.Stack
	ips := s.pick(n.IPv4.String(), n.IPv6.String())
	any := "0.0.0.0"
	if s != IPv4 {
		any = "::"
	}
	proxyAny := "0.0.0.0"
	if s == IPv6 {
		proxyAny = "[::]"
	}
	files := map[string]string{
		"etc/resolv.conf":        "# no resolver but the cluster's\n",
		"etc/hosts":              fmt.Sprintf("127.0.0.1 localhost\n::1 localhost\n%s %s\n", s.first(n.IPv4.String(), n.IPv6.String()), n.Name),
		"etc/name":               n.Name,
		"etc/node-ip":            ips,
		"etc/containerd.toml":    containerdConfig,
		"etc/kubelet.yaml":       fmt.Sprintf(kubeletConfig, c.Lab.CgroupPath(n.Name), any, s.first(dnsIPv4, dnsIPv6), c.pki(), n.Name, n.dir),
		"etc/kubelet.kubeconfig": kubeconfig(c.server(), c.pki(), n.Name),
		"etc/kube-proxy.yaml":    fmt.Sprintf(proxyConfig, c.opts.ProxyMode, s.pick(podsIPv4, podsIPv6), n.Name, c.kubeconfig("kube-proxy"), proxyAny),
	}
	for key, value := range kubeletSysctls {
		files["sysctl/"+key] = value + "\n"
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(n.dir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// Disk is the directory whose subdirectories the node has as /var/lib/cni (cni-state),
// /etc/cni/net.d (cni-conf), /opt/cni/bin (cni-bin), /var/lib/kubelet (kubelet) and so on.
// It stays when the node is killed.
func (n *Node) Disk() string { return n.dir }

// Start switches the node on.
func (n *Node) Start() error {
	groups, err := n.cluster.Lab.NewCgroup(n.Name, "system")
	if err != nil {
		return err
	}
	proxy := "yes"
	if n.cluster.opts.ProxyMode == "none" {
		proxy = "no"
	}
	args := []string{
		"--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", nodeScript,
		"node", n.Name, n.dir, n.cluster.Lab.Dir, proxy, n.programs,
	}
	n.proc, err = n.Host.Start(nettest.Program{Path: "unshare", Name: "init", Args: append(args, groups...)})
	if err != nil {
		return err
	}
	for { // until unshare has forked
		if n.init = onlyChild(n.proc.Pid()); n.init != 0 {
			return nil
		}
		select {
		case <-n.proc.Done():
			return fmt.Errorf("start node %s: %w", n.Name, n.proc.Wait())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// Kill cuts the node's power: all its processes end at once, and links, routes, rules and
// /run are gone. Its disk stays.
func (n *Node) Kill() error {
	err := n.stop()
	if err == nil {
		err = n.Reboot()
	}
	if err == nil {
		err = n.cluster.onlyStack(n.Host)
	}
	if err != nil {
		return fmt.Errorf("kill node: %w", err)
	}
	return nil
}

// stop ends all processes of the node and waits for the last one.
func (n *Node) stop() error {
	if n.init == 0 {
		return nil
	}
	if err := unix.Kill(n.init, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process 1 of %s: %w", n.Name, err)
	}
	n.init = 0
	<-n.proc.Done() // unshare ends when its child has, and that when all others have
	return nil
}

// Run runs a program on the node: it sees its processes, mounts and network.
func (n *Node) Run(name string, args ...string) (string, error) {
	enter := []string{"--target", fmt.Sprint(n.init), "--mount", "--uts", "--ipc", "--pid", "--", name}
	return n.Host.Run("nsenter", append(enter, args...)...)
}

// Pid returns the process id of a program of the node as seen there: "kubelet",
// "containerd" or "kube-proxy". It is started again when it ends.
func (n *Node) Pid(program string) (string, error) {
	out, err := n.Run("cat", "/run/"+program+".pid")
	return strings.TrimSpace(out), err
}

// ImportImage gives the node's containerd an image from an archive.
func (n *Node) ImportImage(archive string) error {
	_, err := n.Run("ctr", "--namespace", "k8s.io", "images", "import", archive)
	return err
}

// onlyChild returns the process that unshare has forked, or 0.
func onlyChild(pid int) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", pid))
	var child int
	if err == nil {
		_, err = fmt.Sscan(string(b), &child)
	}
	if err != nil {
		return 0
	}
	return child
}
