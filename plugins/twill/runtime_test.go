package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
)

func TestGC(t *testing.T) {
	h := newHost(t)
	var pods []*namespace
	for i := range 4 {
		pods = append(pods, newNamespace(t))
		h.attach(add(fmt.Sprint("c", i), pods[i]))
	}
	// Another network on the node, whose attachments this one's list does not hold.
	stranger := newNamespace(t)
	other := add("s", stranger).with("name", "other").with("bridge", "cni1").with("handoffFile", filepath.Join(h.dir, "other.json"))
	conf := h.conf
	h.conf = map[string]any{"handoffFile": filepath.Join(h.dir, "other.json")}
	far := dualStack
	far.Subnets = []netip.Prefix{netip.MustParsePrefix("198.18.9.0/24")}
	h.handoff(far)
	h.conf = conf
	h.attach(other)

	gc := call{verb: "GC"}
	h.must(gc) // told nothing, it does nothing
	if got := len(h.traces()); got != 4*4+4 {
		t.Errorf("traces %v", h.traces())
	}
	attachment := func(id, ifname string) map[string]any {
		return map[string]any{"containerID": id, "ifname": ifname}
	}
	for range 2 {
		h.must(gc.with("cni.dev/valid-attachments", []any{attachment("c1", "eth0"), attachment("c3", "net1")}))
		for i, want := range []string{"lo", "lo eth0", "lo", "lo"} {
			if got := pods[i].links(); got != want {
				t.Errorf("pod %d has links %s, want %s", i, got, want)
			}
		}
		stranger.link("eth0")
	}
	if got := fmt.Sprint(h.traces()); !strings.Contains(got, "198.18.1.3") || strings.Contains(got, "198.18.1.5") || !strings.Contains(got, "198.18.9.2") {
		t.Errorf("traces %s", got)
	}
	h.must(gc.with("cni.dev/valid-attachments", []any{}))
	if got := pods[1].links(); got != "lo" {
		t.Errorf("links %s", got)
	}
	h.must(gc.with("bridge", "not-there").with("name", "not-there").with("cni.dev/valid-attachments", []any{}))
}

func TestStatus(t *testing.T) {
	h := newHost(t)
	status := call{verb: "STATUS"}
	h.must(status)
	if _, err := os.Stat(h.conf["dataDir"].(string)); err == nil {
		t.Error("STATUS wrote to disk")
	}
	small := dualStack
	small.Subnets = []netip.Prefix{netip.MustParsePrefix("198.18.1.0/24"), netip.MustParsePrefix("fd00:18:0:1::/126")}
	h.handoff(small)
	for i := range 2 {
		h.must(status)
		h.attach(add(fmt.Sprint("c", i), newNamespace(t)))
	}
	h.fails(status, 50, "no free address in fd00:18:0:1::/126", "2 in use")
	moved := dualStack
	moved.Subnets = []netip.Prefix{netip.MustParsePrefix("198.18.2.0/24")}
	h.handoff(moved)
	h.fails(status, 51, "cni0 still has 198.18.1.1/24, of a subnet that this node had before")
	h.fails(status.with("mtu", 1e9), 7)
	if err := errors.Join(h.nl.LinkDel(h.link("cni0")), h.nl.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "cni0"}, PeerName: "peer"})); err != nil {
		t.Fatal(err)
	}
	h.fails(status, 50, "not a bridge")
	if err := os.Remove(h.conf["handoffFile"].(string)); err != nil {
		t.Fatal(err)
	}
	h.fails(status, 50, "twilld has not finished its first pass")
}

// referencePlugins are Debian's containernetworking-plugins: flannel's delegates.
const referencePlugins = "/usr/lib/cni"

func (h *host) flannelCommand(verb, id string, p *namespace) *exec.Cmd {
	h.t.Helper()
	if _, err := os.Stat(filepath.Join(referencePlugins, "bridge")); err != nil {
		h.t.Fatalf("apt-get install containernetworking-plugins: %v", err)
	}
	conf, err := json.Marshal(map[string]any{
		"cniVersion": "1.0.0", "name": "cbr0", "type": "bridge", "bridge": "cni0", "hairpinMode": true, "isDefaultGateway": true, "mtu": 1450,
		"ipam": map[string]any{
			"type": "host-local", "dataDir": h.conf["dataDir"],
			"ranges": []any{
				[]any{map[string]any{"subnet": dualStack.Subnets[0]}},
				[]any{map[string]any{"subnet": dualStack.Subnets[1]}},
			},
		},
	})
	if err != nil {
		h.t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(referencePlugins, "bridge"))
	cmd.Stdin = bytes.NewReader(conf)
	cmd.Env = []string{"CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + id, "CNI_IFNAME=eth0", "CNI_NETNS=" + p.path(), "CNI_PATH=" + referencePlugins}
	return cmd
}

// flannel does to a pod what flannel's plugin does: bridge and host-local.
func (h *host) flannel(verb, id string, p *namespace) []byte {
	h.t.Helper()
	var out bytes.Buffer
	cmd := h.flannelCommand(verb, id, p)
	cmd.Stdout = &out
	err := h.do(cmd.Start)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		h.t.Fatalf("bridge %s: %v: %s", verb, err, out.Bytes())
	}
	return out.Bytes()
}

// A node changes from flannel to Twill and back, and its pods notice nothing.
func TestFlannelsPods(t *testing.T) {
	h, old, second, young := newHost(t), newNamespace(t), newNamespace(t), newNamespace(t)
	h.conf["cniVersion"] = "1.0.0"
	before := h.flannel("ADD", "old", old)
	h.flannel("ADD", "second", second)
	mac := h.link("cni0").Attrs().HardwareAddr.String()
	ry := h.attach(add("young", young))
	if got := addrOf(ry, 0).String(); got != "198.18.1.4" {
		t.Errorf("third pod has %s", got)
	}
	ro := h.result(call{}, before)
	for i := range 2 {
		mustPing(t, young, addrOf(ro, i), 1400)
		mustPing(t, old, addrOf(ry, i), 1400)
	}
	if got := h.link("cni0").Attrs(); got.Alias != "" || got.HardwareAddr.String() != mac {
		t.Errorf("flannel's cni0 was changed: %+v", got)
	}
	h.must(call{verb: "CHECK", id: "old"}.on(old).with("prevResult", prev(t, before)))
	h.must(del("old", old).with("prevResult", prev(t, before)))
	if got := old.links(); got != "lo" {
		t.Errorf("links %s", got)
	}
	h.flannel("DEL", "young", young)
	if got := young.links(); got != "lo" {
		t.Errorf("links %s", got)
	}
	h.flannel("ADD", "third", newNamespace(t))
	h.must(del("second", second))
	h.must(call{verb: "GC"}.with("cniVersion", "1.1.0").with("cni.dev/valid-attachments", []any{}))
	for _, left := range h.traces() {
		if strings.Contains(left, "198.18.1.") || strings.Contains(left, "fd00:") {
			t.Errorf("left %v", h.traces())
		}
	}
}

// The reference runtime drives all verbs.
func TestCnitool(t *testing.T) {
	h, p := newHost(t), newNamespace(t)
	tool, cache := filepath.Join(h.dir, "cnitool"), t.TempDir()
	if out, err := exec.Command("go", "build", "-o", tool, "github.com/containernetworking/cni/cnitool").CombinedOutput(); err != nil {
		t.Fatalf("build cnitool: %v\n%s", err, out)
	}
	conf := map[string]any{"cniVersion": "1.1.0", "name": "cbr0", "plugins": []any{h.conf}}
	delete(h.conf, "cniVersion")
	delete(h.conf, "name")
	b, err := json.Marshal(conf)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(h.dir, "10-twill.conflist"), b, 0o644); err != nil {
		t.Fatal(err)
	}
	cnitool := func(args ...string) (string, error) {
		// Its cache is always in /var/lib/cni: here, in a mount namespace, the test's own.
		inside := `mkdir -p /var/lib/cni && mount --bind "$0" /var/lib/cni && exec "$@"`
		cmd := exec.Command("unshare", append([]string{"-m", "sh", "-c", inside, cache, tool}, args...)...)
		cmd.Env = []string{"NETCONFPATH=" + h.dir, "CNI_PATH=" + plugins, "PATH=" + os.Getenv("PATH")}
		var out strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &out
		err := h.do(cmd.Start)
		if err == nil {
			err = cmd.Wait()
		}
		return out.String(), err
	}
	for _, verb := range []string{"status", "add", "check", "gc", "status", "add", "check", "del", "del"} {
		out, err := cnitool(verb, "cbr0", p.path())
		if err != nil {
			t.Fatalf("cnitool %s: %v: %s", verb, err, out)
		}
		switch {
		case verb == "add":
			var res types100.Result
			if err := json.Unmarshal([]byte(out), &res); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			gw, _ := netip.AddrFromSlice(res.IPs[0].Gateway)
			mustPing(t, p, gw.Unmap(), 100)
		case strings.TrimSpace(out) != "":
			t.Errorf("cnitool %s: %s", verb, out)
		}
	}
	h.clean()
	if err := os.Remove(h.conf["handoffFile"].(string)); err != nil {
		t.Fatal(err)
	}
	if out, err := cnitool("status", "cbr0", p.path()); err == nil || !strings.Contains(out, "twilld has not finished its first pass") {
		t.Errorf("cnitool status without hand-off: %v: %s", err, out)
	}
}
