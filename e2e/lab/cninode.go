package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	current "github.com/containernetworking/cni/pkg/types/100"
	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/nettest"
)

// cniNode is a host with what its container runtime is: threads that stand in the
// host's namespaces and execute plugins. Nothing is executed but the plugins.
type cniNode struct {
	*nettest.Host
	work    chan func()
	workers sync.WaitGroup
	watch   *linkWatch
	staying []*cniPod
}

// newCNINode makes a node for so many calls at once.
func newCNINode(h *nettest.Host, calls int) (*cniNode, error) {
	n := &cniNode{Host: h, work: make(chan func())}
	for range calls {
		if err := n.addWorker(); err != nil {
			return nil, errors.Join(err, n.close())
		}
	}
	var err error
	n.do(func() { n.watch, err = watchLinks() })
	if err != nil {
		return nil, errors.Join(err, n.close())
	}
	return n, nil
}

// addWorker starts a thread in the host's network and mount namespace.
func (n *cniNode) addWorker() error {
	entered := make(chan error, 1)
	n.workers.Go(func() {
		_ = onOwnThread(func() error { // told by entered
			err := n.enter()
			entered <- err
			if err == nil {
				for f := range n.work {
					f()
				}
			}
			return err
		})
	})
	if err := <-entered; err != nil {
		return fmt.Errorf("enter %s: %w", n.Name, err)
	}
	return nil
}

func (n *cniNode) enter() error {
	// Threads share root and working directory, which a mount namespace changes.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	for _, ns := range []struct {
		path string
		kind int
	}{{n.Path, unix.CLONE_NEWNET}, {n.MountNS(), unix.CLONE_NEWNS}} {
		f, err := os.Open(ns.path)
		if err != nil {
			return err
		}
		err = unix.Setns(int(f.Fd()), ns.kind)
		if err := errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("setns %s: %w", ns.path, err)
		}
	}
	return nil
}

// do runs f on one of the threads and waits for it.
func (n *cniNode) do(f func()) {
	done := make(chan struct{})
	n.work <- func() { defer close(done); f() }
	<-done
}

// close lets go of the namespaces of all pods that stay: the kernel removes them,
// and their links, at its leisure.
func (n *cniNode) close() error {
	close(n.work)
	n.workers.Wait()
	err := closePods(n.staying)
	if n.watch != nil {
		err = errors.Join(err, n.watch.close())
	}
	return err
}

// cniPod is the network namespace of a pod, held by a file descriptor alone, as
// an empty one.
type cniPod struct {
	id     string
	ns     *os.File
	link   int32 // index of the host's end; valid after ADD
	result *current.Result
}

func newCNIPod(id string) (*cniPod, error) {
	p := &cniPod{id: id}
	err := onOwnThread(func() error {
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			p.ns, err = os.Open("/proc/thread-self/ns/net")
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make pod %s: %w", id, err)
	}
	return p, nil
}

func newCNIPods(prefix string, n int) ([]*cniPod, error) {
	var pods []*cniPod
	for i := range n {
		p, err := newCNIPod(prefix + strconv.Itoa(i))
		if err != nil {
			return nil, errors.Join(err, closePods(pods))
		}
		pods = append(pods, p)
	}
	return pods, nil
}

func closePods(pods []*cniPod) error {
	var err error
	for _, p := range pods {
		err = errors.Join(err, p.ns.Close())
	}
	return err
}

// do runs f on a thread in the pod's network namespace.
func (p *cniPod) do(f func() error) error {
	return onOwnThread(func() error {
		if err := unix.Setns(int(p.ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter pod %s: %w", p.id, err)
		}
		return f()
	})
}

// cniNetwork is a network configuration list on a node.
type cniNetwork struct {
	node     *cniNode
	list     *libcni.NetworkConfigList
	path     string // where the plugins are
	families int    // of a pod's addresses
	routed   bool   // there must be no bridge
	hostPort int    // of every pod that is measured, TCP; 0: none
}

// cniCall is what one ADD or DEL took.
type cniCall struct {
	wall time.Duration
	cpu  time.Duration // user and system, of the plugins and the processes they ran
	gone time.Duration // DEL: until the kernel said that the link is gone
}

// podPort is where a pod that is looked at listens.
const podPort = 8080

// runtimeConf is what a runtime tells with every call.
func (n *cniNetwork) runtimeConf(p *cniPod) *libcni.RuntimeConf {
	rt := &libcni.RuntimeConf{
		ContainerID: p.id, IfName: "eth0",
		NetNS: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), p.ns.Fd()),
		Args:  [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "bench"}, {"K8S_POD_NAME", p.id}},
	}
	if n.hostPort != 0 {
		rt.CapabilityArgs = map[string]any{"portMappings": []map[string]any{
			{"hostPort": n.hostPort, "containerPort": podPort, "protocol": "tcp"},
		}}
	}
	return rt
}

// timed runs f on a thread of the node with a libcni that counts CPU time.
func (n *cniNetwork) timed(f func(*libcni.CNIConfig) error) (c cniCall, err error) {
	n.node.do(func() {
		m := &meter{}
		lib := libcni.NewCNIConfigWithCacheDir([]string{n.path}, "/var/lib/cni", m)
		begin := time.Now()
		err = f(lib)
		c = cniCall{wall: time.Since(begin), cpu: m.cpu}
	})
	return c, err
}

// add calls ADD of every plugin in order.
func (n *cniNetwork) add(ctx context.Context, p *cniPod) (cniCall, error) {
	rt := n.runtimeConf(p)
	c, err := n.timed(func(lib *libcni.CNIConfig) error {
		res, err := lib.AddNetworkList(ctx, n.list, rt)
		if err == nil {
			p.result, err = current.NewResultFromResult(res)
		}
		return err
	})
	if err == nil {
		err = n.findLink(p)
	}
	if err != nil {
		return c, fmt.Errorf("ADD %s to %s: %w", p.id, n.list.Name, err)
	}
	return c, nil
}

// findLink notes the index of the pod's host end.
func (n *cniNetwork) findLink(p *cniPod) (err error) {
	for _, i := range p.result.Interfaces {
		if i.Sandbox != "" || i.Name == "cni0" {
			continue
		}
		var b []byte
		n.node.do(func() { b, err = os.ReadFile(filepath.Join("/sys/class/net", i.Name, "ifindex")) })
		if err == nil {
			_, err = fmt.Sscan(string(b), &p.link)
		}
		return err
	}
	return fmt.Errorf("no host end in result %+v", p.result.Interfaces)
}

// del calls DEL of every plugin in reverse order. It does not wait for the link.
func (n *cniNetwork) del(ctx context.Context, p *cniPod) (begin time.Time, c cniCall, err error) {
	rt := n.runtimeConf(p)
	c, err = n.timed(func(lib *libcni.CNIConfig) error {
		begin = time.Now()
		return lib.DelNetworkList(ctx, n.list, rt)
	})
	if err != nil {
		err = fmt.Errorf("DEL %s from %s: %w", p.id, n.list.Name, err)
	}
	return begin, c, err
}

// delAway is del, and then waits until the link is gone.
func (n *cniNetwork) delAway(ctx context.Context, p *cniPod) (cniCall, error) {
	begin, c, err := n.del(ctx, p)
	if err != nil {
		return c, err
	}
	at, err := n.node.watch.await(ctx, p.link)
	c.gone = max(c.wall, at.Sub(begin))
	return c, err
}

// meter executes plugins as libcni does by itself, and adds up their CPU time.
type meter struct {
	invoke.DefaultExec
	cpu time.Duration
}

func (m *meter) ExecPlugin(ctx context.Context, path string, stdin []byte, env []string) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, path)
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = env, bytes.NewReader(stdin), &stdout, &stderr
	err := cmd.Run()
	if s := cmd.ProcessState; s != nil {
		m.cpu += s.UserTime() + s.SystemTime()
	}
	if err != nil {
		// Not wrapped: an exit code of a plugin is none of lab's.
		return nil, fmt.Errorf("%s: %v: %s%s", filepath.Base(path), err, strings.TrimSpace(stdout.String()), stderr.String())
	}
	return stdout.Bytes(), nil
}

// addrs are the pod's addresses.
func (p *cniPod) addrs() []netip.Addr {
	var out []netip.Addr
	for _, ip := range p.result.IPs {
		a, _ := netip.AddrFromSlice(ip.Address.IP)
		out = append(out, a.Unmap())
	}
	return out
}
