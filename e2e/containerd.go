package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/twill-net/twill/pkg/nettest"
)

// Containerd is Debian's containerd on a node, with the node's own directories of
// CNI. It runs below a supervisor that is process 1 of a process namespace: when
// that ends, no shim and no container outlives it. Its mount namespace is a copy of
// the node's, so that what it mounts is seen by nobody else.
type Containerd struct {
	Node    *Node
	Runtime cri.RuntimeServiceClient
	Images  cri.ImageServiceClient

	dir    string // root, state, socket, logs
	cgroup string // parent of the containers' groups, in every controller
	conn   *grpc.ClientConn
	proc   *nettest.Process
	init   int // the supervisor's process id as seen from here
}

// supervise is process 1. Containerd is started again when it has ended, as systemd
// would. The machine's names of network namespaces are dropped first, for a copy of
// such a mount would keep the namespace alive.
const supervise = `set -e
umount -R -l /run/netns
mount -t tmpfs -o mode=0755 twill-lab /run/netns
mount --make-rshared /
cd "$1"
while :; do
	containerd --config "$1/config.toml" --log-level warn &
	echo $! >"$1/pid.new"; mv "$1/pid.new" "$1/pid"
	wait $! || echo "containerd ended with $?"
done`

// containerdConfig: restrict_oom_score_adj is for a root without CAP_SYS_RESOURCE,
// whose every sandbox would fail to ask for a negative score.
const containerdConfig = `version = 2
root = "%[1]s/root"
state = "%[1]s/state"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs", "io.containerd.internal.v1.opt"]
[grpc]
  address = "%[1]s/sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "%[2]s"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
`

// StartContainerd starts containerd on the node, with an image named ImageRef, and
// waits until it answers.
func StartContainerd(ctx context.Context, n *Node) (*Containerd, error) {
	lab := n.cluster.Lab
	c := &Containerd{Node: n, dir: filepath.Join(lab.Dir, n.Name+"-containerd"), cgroup: lab.CgroupPath(n.Name)}
	if err := os.MkdirAll(filepath.Join(c.dir, "logs"), 0o755); err != nil {
		return nil, err
	}
	config := fmt.Sprintf(containerdConfig, c.dir, ImageRef)
	if err := os.WriteFile(filepath.Join(c.dir, "config.toml"), []byte(config), 0o644); err != nil {
		return nil, err
	}
	var err error
	quick := backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1.5, MaxDelay: 100 * time.Millisecond}
	c.conn, err = grpc.NewClient("unix://"+c.socket(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: quick}),
		grpc.WithDefaultServiceConfig(`{"methodConfig": [{"name": [{}], "timeout": "120s"}]}`))
	if err != nil {
		return nil, err
	}
	c.Runtime, c.Images = cri.NewRuntimeServiceClient(c.conn), cri.NewImageServiceClient(c.conn)
	c.proc, err = n.Host.Start(nettest.Program{
		Path: "unshare", Name: "containerd",
		Args: []string{"--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", supervise, "sh", c.dir},
	})
	if err == nil {
		err = c.waitReady(ctx)
	}
	if err == nil {
		err = c.importImage(ctx)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start containerd on %s: %w", n.Name, err), c.Close())
	}
	return c, nil
}

func (c *Containerd) socket() string { return filepath.Join(c.dir, "sock") }

// waitReady waits until the Kubernetes part of containerd answers.
func (c *Containerd) waitReady(ctx context.Context) error {
	var last error
	err := Eventually(ctx, func() bool {
		if c.init == 0 {
			if c.init, last = onlyChild(c.proc.Pid()); last != nil {
				return false
			}
		}
		_, last = c.Runtime.Status(ctx, &cri.StatusRequest{})
		return last == nil
	})
	if err != nil {
		return fmt.Errorf("no answer: %w: %w", err, last)
	}
	return nil
}

// importImage makes the image and waits until containerd's Kubernetes part, which
// hears of it by an event, knows it too.
func (c *Containerd) importImage(ctx context.Context) error {
	file := filepath.Join(c.dir, "image.tar")
	if err := WriteImage(file); err != nil {
		return err
	}
	if _, err := c.Ctr("images", "import", file); err != nil {
		return err
	}
	var last error
	err := Eventually(ctx, func() bool {
		var r *cri.ImageStatusResponse
		r, last = c.Images.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: ImageRef}})
		return last == nil && r.Image != nil
	})
	if err != nil {
		return fmt.Errorf("find image %s: %w: %v", ImageRef, err, last)
	}
	return nil
}

// InstallCNI has twilld install plugin and network, as an operator would, and waits
// until containerd has read the network. Debian's plugins lie beside: containerd
// itself needs loopback.
func (c *Containerd) InstallCNI(ctx context.Context, args ...string) error {
	_, err := c.Node.Run("sh", "-c", "mkdir -p /opt/cni/bin && ln -sf /usr/lib/cni/* /opt/cni/bin/")
	if err == nil {
		_, err = c.Node.Run("twilld", append([]string{"install-cni"}, args...)...)
	}
	conflist := ""
	if err == nil {
		conflist, err = c.Node.Run("cat", networkFile)
	}
	if err != nil {
		return fmt.Errorf("install CNI plugin: %w", err)
	}
	return c.waitNetwork(ctx, conflist)
}

const networkFile = "/etc/cni/net.d/10-twill.conflist"

// SetNetwork replaces the network that is installed and waits until containerd has
// read the new one.
func (c *Containerd) SetNetwork(ctx context.Context, conflist string) error {
	_, err := c.Node.Run("sh", "-c", `printf %s "$1" >"$2.new" && mv "$2.new" "$2"`, "sh", conflist, networkFile)
	if err != nil {
		return fmt.Errorf("set network: %w", err)
	}
	return c.waitNetwork(ctx, conflist)
}

// Run runs a program where containerd runs: it sees its mounts and its processes.
func (c *Containerd) Run(name string, args ...string) (string, error) {
	enter := []string{"--target", fmt.Sprint(c.init), "--mount", "--pid", "--", name}
	return c.Node.Run("nsenter", append(enter, args...)...)
}

// Ctr runs containerd's own tool in the namespace that Kubernetes uses.
func (c *Containerd) Ctr(args ...string) (string, error) {
	return c.Run("ctr", append([]string{"--address", c.socket(), "--namespace", "k8s.io"}, args...)...)
}

// Kill9 kills containerd alone and waits until the next one answers. Shims and
// containers go on.
func (c *Containerd) Kill9(ctx context.Context) error {
	pid, err := c.pid()
	if err != nil {
		return err
	}
	if _, err := c.Run("kill", "-9", pid); err != nil {
		return err
	}
	err = Eventually(ctx, func() bool { now, err := c.pid(); return err == nil && now != pid })
	if err != nil {
		return fmt.Errorf("wait for containerd to come back: %w", err)
	}
	return c.waitReady(ctx)
}

func (c *Containerd) pid() (string, error) {
	b, err := os.ReadFile(filepath.Join(c.dir, "pid"))
	return strings.TrimSpace(string(b)), err
}

// Close ends containerd, all shims and all containers. Their control groups go with the
// lab.
func (c *Containerd) Close() error {
	errs := []error{c.conn.Close()}
	if c.init != 0 {
		// unshare, its parent, ends with it; and it ends when all others have.
		errs = append(errs, unix.Kill(c.init, unix.SIGKILL))
		<-c.proc.Done()
	} else if c.proc != nil {
		errs = append(errs, c.proc.Kill9())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close containerd on %s: %w", c.Node.Name, err)
	}
	return nil
}

// onlyChild returns the process that unshare has forked.
func onlyChild(pid int) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", pid))
	if err != nil {
		return 0, err
	}
	var child int
	if _, err := fmt.Sscan(string(b), &child); err != nil {
		return 0, fmt.Errorf("find child of process %d: %w", pid, err)
	}
	return child, nil
}
