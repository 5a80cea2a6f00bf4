package netctl

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// TestGolden runs command lines in worlds and compares all that can be seen.
func TestGolden(t *testing.T) {
	fine := func(*testing.T, *world) {}
	sabotaged := func(t *testing.T, w *world) { w.sabotage(t) }
	noDaemon := func(t *testing.T, w *world) { w.daemonAway = true }
	noStore := func(t *testing.T, w *world) {
		w.sabotage(t)
		w.storeErr = errors.New("read /coreos.com/network/config: etcd http://198.51.100.250:2379: connection refused; is etcd running there?")
	}
	noKernel := func(t *testing.T, w *world) { w.kernelErr = fmt.Errorf("observe links: %w", unix.EPERM) }
	tests := []struct {
		name, args string
		world      func(*testing.T, *world)
		code       int
	}{
		{"leases-fine", "leases", fine, 0},
		{"leases-ttl", "leases --ttl", fine, 0},
		{"leases-sabotaged", "leases", sabotaged, 1},
		{"leases-sabotaged-json", "leases --ttl -o json", sabotaged, 1},
		{"leases-no-daemon", "leases --etcd-endpoints http://198.51.100.250:2379", noDaemon, 2},
		{"leases-no-daemon-no-endpoints", "leases", noDaemon, 2},
		{"leases-no-store", "leases", noStore, 2},
		{"leases-no-store-json", "leases -o json", noStore, 2},
		{"leases-no-kernel", "leases", noKernel, 2},
		{"leases-link-down", "leases", func(_ *testing.T, w *world) { w.have.Links[0].Up = false; w.have.Routes = nil }, 1},
		{"leases-kubernetes", "leases", inKubernetes, 1},
		{"leases-kubernetes-json", "leases -o json", inKubernetes, 1},
		{"routes-fine", "routes", fine, 0},
		{"routes-sabotaged", "routes", sabotaged, 1},
		{"routes-sabotaged-json", "routes -o json", sabotaged, 1},
		{"routes-no-store", "routes", noStore, 2},
		{"routes-no-daemon", "routes", noDaemon, 2},
		{"routes-no-nexthops", "routes", func(t *testing.T, w *world) { w.self.Self.Nexthops = false; w.settle(t) }, 0},
		{"routes-direct", "routes", func(t *testing.T, w *world) {
			w.snap.Config.Backend.VXLAN.DirectRouting = true
			w.self.Config = w.snap.Config
			w.settle(t)
		}, 0},
		{"status-fine", "status", fine, 0},
		{"status-json", "status -o json", fine, 0},
		{"status-no-daemon", "status", noDaemon, 2},
		{"status-no-kernel", "status", noKernel, 2},
		{"status-starting", "status", starting, 1},
		{"status-troubled", "status", troubled, 1},
		{"diff-fine", "diff", fine, 0},
		{"diff-fine-json", "diff -o json", fine, 0},
		{"diff-sabotaged", "diff", sabotaged, 1},
		{"diff-sabotaged-json", "diff -o json", sabotaged, 1},
		{"diff-foreign-link", "diff", func(_ *testing.T, w *world) { l := &w.have.Links[0]; l.Alias, l.VXLAN.Port = "", 8472 }, 1},
		{"diff-refused-config", "diff", func(_ *testing.T, w *world) { w.snap.Config.Backend.Type = "ipsec" }, 0},
		{"diff-starting", "diff", starting, 2},
		{"diff-no-store", "diff", noStore, 2},
		{"drift-none", "drift", fine, 0},
		{"drift", "drift", drifted, 1},
		{"drift-since", "drift --since 10m", drifted, 1},
		{"drift-since-none", "drift --since 1s", drifted, 0},
		{"drift-json", "drift --since 10m -o json", drifted, 1},
		{"drift-none-json", "drift -o json", fine, 0},
		{"drift-error", "drift", func(_ *testing.T, w *world) { w.daemonFails = "/v1/drift" }, 2},
		{"error-hung-daemon", "status --timeout 20ms", func(_ *testing.T, w *world) { w.daemonHangs = true }, 2},
		{"error-flag", "leases --colour", fine, 2},
		{"error-output", "routes -o xml", fine, 2},
		{"error-command", "leses", fine, 2},
		{"error-argument", "drift yesterday", fine, 2},
		{"error-since", "drift --since=-1s", fine, 2},
		{"error-timeout", "drift --timeout 0", fine, 2},
		{"error-password", "leases", func(_ *testing.T, w *world) { w.status.Store.Username = "twill"; w.daemonFails = "/v1/self" }, 2},
		{"help", "--help", fine, 0},
		{"help-leases", "leases --help", fine, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			tt.world(t, w)
			stdout, stderr, code := w.netctl(t, strings.Fields(tt.args)...)
			if code != tt.code {
				t.Errorf("exit code %d, want %d", code, tt.code)
			}
			if strings.Contains(tt.args, "-o json") && !json.Valid([]byte(stdout)) && tt.code < 2 {
				t.Error("stdout is not JSON")
			}
			golden(t, tt.name, fmt.Sprintf("$ netctl %s\n%s[exit %d]\n%s", tt.args, stdout, code, stderr))
		})
	}
}

func starting(_ *testing.T, w *world) {
	w.status = overlay.Status{
		Version: "v0.1.0", Started: w.now.Add(-7 * time.Second), PID: 4711, Reason: "waiting for a lease: all subnets are leased",
		Store: w.status.Store,
	}
	w.self = SelfReply{}
}

func troubled(_ *testing.T, w *world) {
	w.status.Store.Connected = false
	w.status.Store.Error = "connection refused; is etcd running there?"
	w.status.Pass.Failures = []string{"route add 10.5.2.0/24 nhid 1409286146 proto 84: no buffer space available"}
	w.status.Pass.Changes = 1
	w.status.Drifts = 1
	w.status.Problems = []overlay.Problem{
		{Object: "lease 10.5.7.0-24", Reason: "IPv4 peer 198.51.100.7: its VNI is 7, ours is 1"},
		{Object: "link flannel.1", Reason: "1450 bytes are left", Remedy: "raise the MTU"},
	}
}

func drifted(_ *testing.T, w *world) {
	route := "route 10.5.2.0/24 nhid 1409286146 proto 84"
	w.drift = []overlay.Drift{
		{Time: w.now.Add(-time.Hour), Kind: "route", What: route[6:], Before: "absent", After: route, Why: "route"},
		{
			Time: w.now.Add(-9*time.Minute - 250*time.Millisecond), Kind: "fdb", What: "0e:2a:00:00:04:03 dst 198.51.100.3 dev flannel.1 self permanent",
			Before: "fdb 0e:2a:00:00:04:03 dst 203.0.113.9 dev flannel.1 self permanent",
			After:  "fdb 0e:2a:00:00:04:03 dst 198.51.100.3 dev flannel.1 self permanent", Why: "timer",
		},
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(want) != got {
		t.Errorf("differs from %s (go test -update rewrites it); got:\n%s", path, got)
	}
}

// TestStoreSettings: what is given wins, what is not comes from the daemon, and
// endpoints that are given have nothing to do with the daemon's.
func TestStoreSettings(t *testing.T) {
	daemon := overlay.StoreStatus{
		Endpoints: []string{"https://198.51.100.250:2379", "https://198.51.100.251:2379"}, Prefix: "/other",
		CAFile: "/ca", CertFile: "/cert", KeyFile: "/key", Username: "twill",
	}
	fromDaemon := storeConfig{
		endpoints: "https://198.51.100.250:2379,https://198.51.100.251:2379", prefix: "/other",
		caFile: "/ca", certFile: "/cert", keyFile: "/key", username: "twill", password: "secret",
	}
	mine := fromDaemon
	mine.caFile = "/mine"
	kube := overlay.StoreStatus{
		Kind: "kubernetes", Node: "node-1", Endpoints: []string{"https://198.51.100.210:6443"}, Prefix: "example.com", Kubeconfig: "/twill.kubeconfig", NetConfig: "/nowhere",
	}
	asKube := storeConfig{kubernetes: true, apiURL: kube.Endpoints[0], kubeconfig: kube.Kubeconfig, annotations: "example.com", inNode: "node-1"}
	admin := asKube
	admin.apiURL, admin.kubeconfig = "", "/admin.conf"
	tests := []struct {
		name string
		args []string
		env  map[string]string
		want storeConfig
	}{
		{"daemon", nil, map[string]string{"FLANNELD_ETCD_PASSWORD": "secret"}, fromDaemon},
		{"one flag", []string{"--etcd-cafile=/mine", "--etcd-password=secret"}, nil, mine},
		{"flag over environment", []string{"--etcd-password=secret", "--etcd-cafile=/mine"}, map[string]string{"FLANNELD_ETCD_CAFILE": "/env"}, mine},
		{"endpoints", []string{"--etcd-endpoints=http://203.0.113.1:2379"}, nil, storeConfig{endpoints: "http://203.0.113.1:2379", prefix: defaultPrefix}},
		{
			"environment", nil,
			map[string]string{"FLANNELD_ETCD_ENDPOINTS": "http://203.0.113.1:2379", "FLANNELD_ETCD_PREFIX": "/env"},
			storeConfig{endpoints: "http://203.0.113.1:2379", prefix: "/env"},
		},
		{"kubernetes", nil, nil, asKube},
		{"kubernetes with a kubeconfig", []string{"--kubeconfig-file=/admin.conf"}, nil, admin},
		{"kubernetes, and etcd by flag", []string{"--etcd-endpoints=http://203.0.113.1:2379"}, nil, storeConfig{endpoints: "http://203.0.113.1:2379", prefix: defaultPrefix}},
		{"an API by flag", []string{"--kube-api-url=https://203.0.113.1:6443"}, nil, storeConfig{kubernetes: true, apiURL: "https://203.0.113.1:6443"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			w.status.Store, w.env = daemon, tt.env
			if strings.HasPrefix(tt.name, "kubernetes") {
				w.status.Store = kube
			}
			if _, stderr, code := w.netctl(t, append([]string{"leases"}, tt.args...)...); code == exitUnknown {
				t.Fatal(stderr)
			}
			if w.opened != tt.want {
				t.Errorf("store opened with %+v, want %+v", w.opened, tt.want)
			}
		})
	}
}

// TestScope: the kernel is asked for what the daemon asks it for.
func TestScope(t *testing.T) {
	w := newWorld(t)
	if _, stderr, code := w.netctl(t, "diff"); code != exitFine {
		t.Fatal(stderr)
	}
	sysctls := []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "net/ipv6/conf/eth0/accept_ra"}
	if !slices.Equal(w.scope.Networks, w.self.Config.Networks()) || !slices.Equal(w.scope.Sysctls, sysctls) || w.scope.Uplink != "eth0" {
		t.Errorf("scope %+v", w.scope)
	}
}

func TestPermission(t *testing.T) {
	err := NewClient("/run/s").explain(fmt.Errorf("dial: %w", unix.EACCES))
	if want := "twilld does not answer on /run/s: permission denied; run netctl as root"; err.Error() != want {
		t.Errorf("got %q, want %q", err, want)
	}
}

// TestRealStore asks an etcd that is not there.
func TestRealStore(t *testing.T) {
	w := newWorld(t)
	socket := w.serve(t)
	var out, errs strings.Builder
	code := Program{Stdout: &out, Stderr: &errs}.Run(t.Context(), []string{"leases", "--socket", socket + ".none", "--etcd-endpoints", "http://127.0.0.1:1"})
	for _, want := range []string{"read store: ", "http://127.0.0.1:1: ", "connection refused; is etcd running there?"} {
		if !strings.Contains(errs.String(), want) {
			t.Errorf("stderr lacks %q:\n%s", want, errs.String())
		}
	}
	if code != exitUnknown || out.Len() > 0 {
		t.Errorf("exit code %d, stdout %q", code, out.String())
	}
}

// TestHelp: every command says what it reads and what its exit code means, and
// its examples are command lines that it takes.
func TestHelp(t *testing.T) {
	a := &app{getenv: func(string) string { return "" }}
	commands := a.root().Commands()
	if len(commands) != 10 {
		t.Errorf("%d commands, want 10", len(commands))
	}
	for _, c := range commands {
		if c.Short == "" || !strings.Contains(c.Long, "Exit code: 0") || c.Example == "" {
			t.Errorf("%s: Short, Long with exit codes, or Example is missing", c.Name())
		}
		for line := range strings.Lines(c.Example) {
			example, _, _ := strings.Cut(line, "|")
			words := strings.Fields(example)
			if words[0] != "netctl" {
				t.Errorf("example %q is not of netctl", line)
			}
			checkExample(t, a.root(), words[1:])
		}
	}
}

func checkExample(t *testing.T, root *cobra.Command, args []string) {
	t.Helper()
	c, rest, err := root.Find(args)
	if err == nil {
		err = c.ParseFlags(rest)
	}
	if err == nil {
		err = c.ValidateArgs(c.Flags().Args())
	}
	if err != nil || c == root {
		t.Errorf("netctl %s: %v", strings.Join(args, " "), err)
	}
}

func TestCompletion(t *testing.T) {
	w := newWorld(t)
	if out, stderr, code := w.netctl(t, "completion", "bash"); code != exitFine || !strings.Contains(out, "__start_netctl") {
		t.Errorf("completion bash: exit code %d: %s", code, stderr)
	}
	if out, _, _ := w.netctl(t, "__complete", "leases", "-o", ""); !strings.Contains(out, "table\njson\n") {
		t.Errorf("-o completes to %q", out)
	}
}

func TestVersion(t *testing.T) {
	out, _, code := newWorld(t).netctl(t, "version", "-o", "json")
	var v struct{ Version, Go, Platform string }
	if err := json.Unmarshal([]byte(out), &v); err != nil || code != exitFine || v.Version == "" || v.Go == "" || v.Platform == "" {
		t.Errorf("exit code %d, %v: %s", code, err, out)
	}
}

func TestColour(t *testing.T) {
	w := newWorld(t)
	for args, want := range map[string]bool{"routes": false, "routes --color never": false, "routes --color always": true} {
		if out, _, _ := w.netctl(t, strings.Fields(args)...); strings.Contains(out, "\x1b[32mok\x1b[0m\n") != want {
			t.Errorf("%s: colour is not %t:\n%s", args, want, out)
		}
	}
	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer terminal.Close()
	env := map[string]string{}
	a := &app{stdout: terminal, colour: choice{value: "auto"}, getenv: func(k string) string { return env[k] }}
	if !a.coloured() {
		t.Error("no colour on a terminal")
	}
	env["NO_COLOR"] = "1"
	if a.coloured() {
		t.Error("colour on a terminal in spite of NO_COLOR")
	}
}

func TestSpan(t *testing.T) {
	for d, want := range map[time.Duration]string{
		1234567: "1.23ms", 59 * time.Second: "59s", 61 * time.Second: "1m1s",
		3*time.Hour + 12*time.Minute + time.Second: "3h12m", 50 * time.Hour: "2d2h",
	} {
		if got := span(d); got != want {
			t.Errorf("span(%s) = %s, want %s", time.Duration(d), got, want)
		}
	}
}
