package kubernetes

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/twill-net/twill/pkg/nettest"
)

// Image returns the archive of Twill's image, as `make image` writes it or as
// TWILL_IMAGE names it, and the image's name.
func (c *Cluster) Image() (archive, ref string, err error) {
	archive = os.Getenv("TWILL_IMAGE")
	if archive == "" {
		archive = filepath.Join(c.source, "build/image/twill.tar")
	}
	if archive, err = filepath.Abs(archive); err != nil {
		return "", "", err
	}
	ref, err = imageRef(archive)
	if err != nil {
		return "", "", fmt.Errorf("read image %s: %w; `make image` writes it", archive, err)
	}
	return archive, ref, nil
}

// imageRef reads the name that containerd gives to the image in an archive.
func imageRef(archive string) (string, error) {
	f, err := os.Open(archive)
	if err != nil {
		return "", err
	}
	defer f.Close()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return "", errors.New("it has no index.json with a name")
		}
		if err != nil {
			return "", err
		}
		if h.Name != "index.json" {
			continue
		}
		var index struct {
			Manifests []struct{ Annotations map[string]string }
		}
		if err := json.NewDecoder(r).Decode(&index); err != nil {
			return "", err
		}
		for _, m := range index.Manifests {
			if name := m.Annotations["io.containerd.image.name"]; name != "" {
				return name, nil
			}
		}
	}
}

// importTwill puts Twill's image on every node.
func (c *Cluster) importTwill() error {
	archive, _, err := c.Image()
	if err != nil {
		return err
	}
	return c.each(func(n *Node) error {
		// containerd may be about to start.
		return Eventually(c.context(), func() error { return n.ImportImage(archive) })
	})
}

// installTwill does what the README tells an operator to do.
func (c *Cluster) installTwill() error {
	_, ref, err := c.Image()
	if err != nil {
		return err
	}
	if _, err := c.NetctlInstall(c.NetConf(), append([]string{"--image", ref}, c.opts.InstallArgs...)...); err != nil {
		return err
	}
	c.Mark("netctl install --image %s is done", ref)
	return nil
}

// NetConf is the net-conf.json that the options ask for.
func (c *Cluster) NetConf() string {
	if c.opts.NetConf != "" {
		return c.opts.NetConf
	}
	return c.opts.Stack.NetConf(c.opts.Backend)
}

// NetctlInstall runs netctl install with this net-conf.json and returns what it prints.
func (c *Cluster) NetctlInstall(netConf string, args ...string) (string, error) {
	quoted, err := json.Marshal(netConf)
	if err != nil {
		return "", err
	}
	out := ""
	// JSON is YAML.
	err = c.withFile(fmt.Sprintf(`{"twill": {"netConfJson": %s}}`, quoted), func(file string) error {
		out, err = c.Netctl(append([]string{"install", "--values", file}, args...)...)
		return err
	})
	return out, err
}

// Netctl runs a command of netctl that concerns the whole cluster, as an administrator.
func (c *Cluster) Netctl(args ...string) (string, error) {
	netctl, err := nettest.BuildProgram("./daemon/cmd/netctl")
	if err != nil {
		return "", err
	}
	return c.ControlPlane.Run(netctl, append(args, "--kubeconfig", c.Kubeconfig())...)
}

// SetNetConf replaces the net-conf.json in the ConfigMap, as kubectl edit would. Nodes
// see it when their kubelets have.
func (c *Cluster) SetNetConf(netConf string) error {
	patch, err := json.Marshal(map[string]any{"data": map[string]string{"net-conf.json": netConf}})
	if err != nil {
		return err
	}
	_, err = c.Kubectl("patch", "configmap", "twill-config", "--namespace=twill-system", "--patch="+string(patch))
	return err
}

// Twilld runs a program in the twilld container of a node, netctl for instance.
func (c *Cluster) Twilld(node string, command ...string) (string, error) {
	pod, err := c.Kubectl("get", "pods", "--namespace=twill-system", "--selector=app=twill", "--field-selector=spec.nodeName="+node, "--output=name")
	if err != nil {
		return "", err
	}
	return c.Kubectl(append([]string{"exec", "--namespace=twill-system", "--container=twilld", strings.TrimSpace(pod), "--"}, command...)...)
}
