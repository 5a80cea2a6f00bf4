package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// CRIPod is a pod that containerd made as a kubelet would have it: a sandbox and
// one container that serves its own name by HTTP on port 8080.
type CRIPod struct {
	Name   string
	ID     string // of the sandbox
	NetNS  string // path, where containerd runs
	IPv4   netip.Addr
	IPv6   netip.Addr
	Config *cri.PodSandboxConfig

	runtime   *Containerd
	container string
}

// webPort is where the container serves.
const webPort = 8080

// RunPod makes a pod and starts its container. The configuration of its sandbox is
// changed by edit first, if that is given.
func (c *Containerd) RunPod(ctx context.Context, name string, edit func(*cri.PodSandboxConfig)) (*CRIPod, error) {
	p, err := c.RunSandbox(ctx, name, edit)
	if err != nil {
		return nil, err
	}
	if err := p.startContainer(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("start container in pod %s: %w", name, err), p.Remove(ctx))
	}
	return p, nil
}

// RunSandbox makes a pod without a container.
func (c *Containerd) RunSandbox(ctx context.Context, name string, edit func(*cri.PodSandboxConfig)) (*CRIPod, error) {
	uid := "uid-" + name
	p := &CRIPod{Name: name, runtime: c, Config: &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Namespace: "e2e", Uid: uid},
		Hostname:     name,
		LogDirectory: filepath.Join(c.dir, "logs"),
		Labels:       map[string]string{"io.kubernetes.pod.namespace": "e2e", "io.kubernetes.pod.name": name, "io.kubernetes.pod.uid": uid},
		Annotations:  map[string]string{},
		Linux:        &cri.LinuxPodSandboxConfig{CgroupParent: c.cgroup},
	}}
	if edit != nil {
		edit(p.Config)
	}
	r, err := c.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: p.Config})
	if err != nil {
		return nil, fmt.Errorf("run sandbox of pod %s: %w", name, err)
	}
	p.ID = r.PodSandboxId
	if err := p.readStatus(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("read status of pod %s: %w", name, err), p.Remove(ctx))
	}
	return p, nil
}

// readStatus asks containerd for the pod's addresses and network namespace.
func (p *CRIPod) readStatus(ctx context.Context) error {
	r, err := p.runtime.Runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: p.ID, Verbose: true})
	if err != nil {
		return err
	}
	texts := []string{r.Status.Network.Ip}
	for _, ip := range r.Status.Network.AdditionalIps {
		texts = append(texts, ip.Ip)
	}
	for _, text := range texts {
		ip, err := netip.ParseAddr(text)
		if err != nil {
			return fmt.Errorf("read addresses %q: %w", texts, err)
		}
		if ip.Is4() {
			p.IPv4 = ip
		} else {
			p.IPv6 = ip
		}
	}
	var info struct {
		RuntimeSpec struct {
			Linux struct {
				Namespaces []struct{ Type, Path string }
			}
		}
	}
	if err := json.Unmarshal([]byte(r.Info["info"]), &info); err != nil {
		return fmt.Errorf("read details of sandbox: %w", err)
	}
	for _, ns := range info.RuntimeSpec.Linux.Namespaces {
		if ns.Type == "network" {
			p.NetNS = ns.Path
		}
	}
	return nil
}

// startContainer waits until the web server takes connections.
func (p *CRIPod) startContainer(ctx context.Context) error {
	serve := fmt.Sprintf("hostname >/www/index.html; exec httpd -f -p %d -h /www", webPort)
	made, err := p.runtime.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId: p.ID, SandboxConfig: p.Config,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "main"},
			Image:    &cri.ImageSpec{Image: ImageRef},
			Command:  []string{"/bin/sh", "-c", serve},
			LogPath:  p.ID + ".log",
			Linux:    &cri.LinuxContainerConfig{},
		},
	})
	if err != nil {
		return err
	}
	p.container = made.ContainerId
	if _, err := p.runtime.Runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: made.ContainerId}); err != nil {
		return err
	}
	_, err = p.Exec(ctx, "sh", "-c", fmt.Sprintf("until wget -q -O /dev/null http://127.0.0.1:%d/; do sleep 0.02; done", webPort))
	return err
}

// Exec runs a command in the container and returns its standard output.
func (p *CRIPod) Exec(ctx context.Context, command ...string) (string, error) {
	r, err := p.runtime.Runtime.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: p.container, Cmd: command, Timeout: 30})
	if err == nil && r.ExitCode != 0 {
		err = fmt.Errorf("exit code %d: %s%s", r.ExitCode, r.Stdout, r.Stderr)
	}
	if err != nil {
		return "", fmt.Errorf("run %q in pod %s: %w", strings.Join(command, " "), p.Name, err)
	}
	return string(r.Stdout), nil
}

// Remove stops and removes the pod with its container. Containerd has the plugin
// delete it twice: when it stops the pod, and when it removes it.
func (p *CRIPod) Remove(ctx context.Context) error {
	_, err := p.runtime.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.ID})
	if err == nil {
		_, err = p.runtime.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.ID})
	}
	if err != nil {
		return fmt.Errorf("remove pod %s: %w", p.Name, err)
	}
	return nil
}

// Addrs returns the pod's addresses.
func (p *CRIPod) Addrs() []netip.Addr {
	var out []netip.Addr
	for _, a := range []netip.Addr{p.IPv4, p.IPv6} {
		if a.IsValid() {
			out = append(out, a)
		}
	}
	return out
}

// NetworkReady returns what containerd says of its CNI configuration, and why.
func (c *Containerd) NetworkReady(ctx context.Context) (bool, string, error) {
	r, err := c.Runtime.Status(ctx, &cri.StatusRequest{})
	if err != nil {
		return false, "", err
	}
	for _, condition := range r.Status.Conditions {
		if condition.Type == cri.NetworkReady {
			return condition.Status, condition.Message, nil
		}
	}
	return false, "", fmt.Errorf("containerd on %s says nothing of %s", c.Node.Name, cri.NetworkReady)
}

// waitNetwork waits until containerd has read this CNI configuration.
func (c *Containerd) waitNetwork(ctx context.Context, conflist string) error {
	var last error
	err := Eventually(ctx, func() bool {
		var r *cri.StatusResponse
		if r, last = c.Runtime.Status(ctx, &cri.StatusRequest{Verbose: true}); last != nil {
			return false
		}
		var cni struct {
			Networks []struct {
				Config struct{ Source string }
			}
		}
		last = json.Unmarshal([]byte(r.Info["cniconfig"]), &cni)
		for _, n := range cni.Networks {
			if n.Config.Source == conflist {
				return true
			}
		}
		return false
	})
	if err != nil {
		return fmt.Errorf("wait until containerd on %s reads the network: %w: %v", c.Node.Name, err, last)
	}
	return nil
}
