package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/ipam"
	"github.com/twill-net/twill/pkg/pod"
)

// plugins holds the binary under test.
var plugins string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "twill-plugin-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	plugins = dir
	build := exec.Command("go", "build", "-trimpath", "-o", dir, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// namespace is a network namespace that lives as long as the test: only a file
// descriptor of this process holds it.
type namespace struct {
	t  testing.TB
	ns netns.NsHandle
	nl *netlink.Handle
}

func newNamespace(t testing.TB) *namespace {
	t.Helper()
	n := &namespace{t: t, ns: netns.None()}
	err := onThread(netns.None(), func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		var err error
		if n.ns, err = netns.GetFromPath("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		n.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.close)
	return n
}

// close lets the namespace die, with all that is in it.
func (n *namespace) close() {
	if n.ns.IsOpen() {
		n.nl.Close()
		n.ns.Close()
	}
}

// path is good for other processes too.
func (n *namespace) path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.ns) }

func (n *namespace) do(f func() error) error { return onThread(n.ns, f) }

// onThread runs f on a thread of its own, in ns if that is open, and brings the
// thread back.
func onThread(ns netns.NsHandle, f func() error) error {
	runtime.LockOSThread()
	own, err := netns.GetFromPath("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer own.Close()
	if ns.IsOpen() {
		if err := netns.Set(ns); err != nil {
			return err
		}
	}
	err = f()
	if back := netns.Set(own); back != nil {
		panic(back) // the other tests would run in the wrong namespace
	}
	runtime.UnlockOSThread()
	return err
}

// host is a node: a namespace, the files of the daemon and of the plugin.
type host struct {
	*namespace
	dir  string
	conf map[string]any
}

var dualStack = pod.Handoff{
	Networks: []netip.Prefix{netip.MustParsePrefix("198.18.0.0/16"), netip.MustParsePrefix("fd00:18::/48")},
	Subnets:  []netip.Prefix{netip.MustParsePrefix("198.18.1.0/24"), netip.MustParsePrefix("fd00:18:0:1::/64")},
	MTU:      1450,
}

func newHost(t testing.TB) *host {
	t.Helper()
	h := &host{namespace: newNamespace(t), dir: t.TempDir()}
	h.conf = map[string]any{
		"cniVersion": "1.1.0", "name": "cbr0", "type": "twill",
		"handoffFile": filepath.Join(h.dir, "run", "twill.json"),
		"dataDir":     filepath.Join(h.dir, "networks"),
	}
	h.handoff(dualStack)
	return h
}

func (h *host) handoff(o pod.Handoff) {
	h.t.Helper()
	if err := pod.WriteHandoff(h.conf["handoffFile"].(string), o); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) reservations() ipam.Dir { return ipam.NewDir(h.conf["dataDir"].(string), "cbr0") }

// call is one execution of the plugin.
type call struct {
	verb, id, ifname, netns string
	conf                    map[string]any // beside the host's
	env                     []string
}

func (c call) on(ns *namespace) call { c.netns = ns.path(); return c }

func (c call) with(key string, value any) call {
	conf := map[string]any{key: value}
	for k, v := range c.conf {
		if k != key {
			conf[k] = v
		}
	}
	c.conf = conf
	return c
}

func add(id string, ns *namespace) call { return call{verb: "ADD", id: id}.on(ns) }
func del(id string, ns *namespace) call { return call{verb: "DEL", id: id}.on(ns) }

// command is the plugin, ready to start in the host's namespace.
func (h *host) command(c call) *exec.Cmd {
	conf := map[string]any{}
	for k, v := range h.conf {
		conf[k] = v
	}
	for k, v := range c.conf {
		conf[k] = v
		if v == nil {
			delete(conf, k)
		}
	}
	stdin, err := json.Marshal(conf)
	if err != nil {
		h.t.Fatal(err)
	}
	if c.ifname == "" {
		c.ifname = "eth0"
	}
	cmd := exec.Command(filepath.Join(plugins, "twill"))
	cmd.Stdin = bytes.NewReader(stdin)
	cmd.Env = append([]string{
		"CNI_COMMAND=" + c.verb, "CNI_CONTAINERID=" + c.id, "CNI_IFNAME=" + c.ifname,
		"CNI_NETNS=" + c.netns, "CNI_PATH=" + plugins,
	}, c.env...)
	return cmd
}

// run executes the plugin. The error is the plugin's own, a *types.Error.
func (h *host) run(c call) ([]byte, error) {
	cmd := h.command(c)
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	err := h.do(cmd.Start)
	if err == nil {
		err = cmd.Wait()
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		e := &types.Error{}
		if json.Unmarshal(out.Bytes(), e) != nil || e.Code == 0 {
			return nil, fmt.Errorf("%s: %w, no CNI error: %s%s", c.verb, err, out.Bytes(), stderr.Bytes())
		}
		return nil, e
	}
	if stderr.Len() > 0 {
		err = errors.Join(err, errors.New("stderr: "+stderr.String()))
	}
	return out.Bytes(), err
}

func (h *host) must(c call) []byte {
	h.t.Helper()
	out, err := h.run(c)
	if err != nil {
		h.t.Fatalf("%s %s: %v", c.verb, c.id, err)
	}
	return out
}

// attach is a successful ADD with its result.
func (h *host) attach(c call) *types100.Result {
	h.t.Helper()
	return h.result(c, h.must(c))
}

func (h *host) result(c call, out []byte) *types100.Result {
	h.t.Helper()
	v, _ := c.conf["cniVersion"].(string)
	if v == "" {
		v = h.conf["cniVersion"].(string)
	}
	res, err := version.NewResult(v, out)
	if err != nil {
		h.t.Fatalf("result %s: %v", out, err)
	}
	cur, err := types100.NewResultFromResult(res)
	if err != nil {
		h.t.Fatal(err)
	}
	return cur
}

// prev is a result as the runtime gives it back.
func prev(t testing.TB, out []byte) map[string]any {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal(out, &m); err != nil {
		t.Fatal(err)
	}
	return m
}

// fails runs the plugin and compares the error.
func (h *host) fails(c call, code uint, words ...string) {
	h.t.Helper()
	out, err := h.run(c)
	var e *types.Error
	if !errors.As(err, &e) {
		h.t.Errorf("%s: got %s and error %v, want code %d", c.verb, out, err, code)
		return
	}
	if e.Code != code {
		h.t.Errorf("%s: code %d, want %d: %s", c.verb, e.Code, code, e.Msg)
	}
	for _, w := range words {
		if !strings.Contains(e.Msg, w) {
			h.t.Errorf("%s: %q does not say %q", c.verb, e.Msg, w)
		}
	}
}

// traces lists what pods leave on a node: links and files. The bridge, the lock
// and the round robin are the node's.
func (h *host) traces() []string {
	h.t.Helper()
	var out []string
	links, err := h.nl.LinkList()
	if err != nil {
		h.t.Fatal(err)
	}
	for _, l := range links {
		if n := l.Attrs().Name; n != "lo" && n != "cni0" {
			out = append(out, n)
		}
	}
	return append(out, h.files()...)
}

// files lists what there is of addresses and records.
func (h *host) files() []string {
	h.t.Helper()
	var out []string
	err := filepath.WalkDir(h.conf["dataDir"].(string), func(path string, f fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
			return nil
		}
		if err == nil && !f.IsDir() && f.Name() != "lock" && !strings.HasPrefix(f.Name(), "last_reserved_ip.") {
			out = append(out, f.Name())
		}
		return err
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return out
}

func (h *host) clean() {
	h.t.Helper()
	if left := h.traces(); len(left) > 0 {
		h.t.Errorf("left on the host: %v", left)
	}
}

// links lists the names of the links in a pod.
func (n *namespace) links() string {
	n.t.Helper()
	list, err := n.nl.LinkList()
	if err != nil {
		n.t.Fatal(err)
	}
	var names []string
	for _, l := range list {
		names = append(names, l.Attrs().Name)
	}
	return strings.Join(names, " ")
}

func (n *namespace) link(name string) netlink.Link {
	n.t.Helper()
	l, err := n.nl.LinkByName(name)
	if err != nil {
		n.t.Fatalf("link %s: %v", name, err)
	}
	return l
}
