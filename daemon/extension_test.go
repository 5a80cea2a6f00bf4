package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
)

// extensionWorld is a runner whose scripts write what they are told into a journal.
type extensionWorld struct {
	t   *testing.T
	dir string
	x   *extensionRunner
}

func newExtensionWorld(t *testing.T) *extensionWorld {
	t.Helper()
	w := &extensionWorld{t: t, dir: t.TempDir(), x: newExtensionRunner(slog.New(slog.DiscardHandler))}
	// $1 names the command; it fails if there is a file fail-$1.
	w.script("tell", `
read -r data
echo "$*: NETWORK=$NETWORK SUBNET=$SUBNET IPV6SUBNET=$IPV6SUBNET PUBLIC_IP=$PUBLIC_IP PUBLIC_IPV6=$PUBLIC_IPV6 data=$data" >>`+w.dir+`/journal
if [ -e `+w.dir+`/fail-$1 ]; then echo "cannot $1 now" >&2; exit 7; fi`)
	return w
}

func (w *extensionWorld) script(name, body string) string {
	w.t.Helper()
	path := filepath.Join(w.dir, name)
	if err := os.WriteFile(path, []byte("#!/bin/sh"+body+"\n"), 0o755); err != nil {
		w.t.Fatal(err)
	}
	return path
}

func (w *extensionWorld) config() overlay.ExtensionConfig {
	tell := filepath.Join(w.dir, "tell")
	return overlay.ExtensionConfig{PostStartup: tell + " post", SubnetAdd: tell + " add", SubnetRemove: tell + " remove"}
}

func (w *extensionWorld) extension(peers ...overlay.ExtensionPeer) *overlay.Extension {
	return &overlay.Extension{
		ExtensionConfig: w.config(),
		Networks:        []netip.Prefix{netip.MustParsePrefix("10.5.0.0/16"), netip.MustParsePrefix("fd00:5::/48")},
		Subnets:         []netip.Prefix{netip.MustParsePrefix("10.5.1.0/24"), netip.MustParsePrefix("fd00:5:0:1::/64")},
		PublicIP:        netip.MustParseAddr("198.51.100.1"), PublicIPv6: netip.MustParseAddr("2001:db8::1"),
		Peers: peers,
	}
}

func extensionPeer(n int, data string) overlay.ExtensionPeer {
	return overlay.ExtensionPeer{
		Subnet: netip.MustParsePrefix(fmt.Sprintf("10.5.%d.0/24", n)), PublicIP: netip.MustParseAddr(fmt.Sprintf("198.51.100.%d", n)), Data: data,
	}
}

// expect compares the journal since the last call.
func (w *extensionWorld) expect(errs []error, failures int, lines ...string) {
	w.t.Helper()
	path := filepath.Join(w.dir, "journal")
	b, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		w.t.Fatal(err)
	}
	_ = os.Remove(path)
	got := strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
	if len(b) == 0 {
		got = nil
	}
	if !slices.Equal(got, lines) {
		w.t.Errorf("run:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(lines, "\n"))
	}
	if len(errs) != failures {
		w.t.Errorf("errors %v, want %d", errs, failures)
	}
	for _, err := range errs {
		if !strings.Contains(err.Error(), "exit status 7; its output: cannot ") {
			w.t.Errorf("error %q", err)
		}
	}
}

const toldPost = "post: NETWORK=10.5.0.0/16 SUBNET=10.5.1.0/24 IPV6SUBNET=fd00:5:0:1::/64 PUBLIC_IP=198.51.100.1 PUBLIC_IPV6=2001:db8::1 data="

func told(verb string, p overlay.ExtensionPeer) string {
	return fmt.Sprintf("%s: NETWORK= SUBNET=%s IPV6SUBNET= PUBLIC_IP=%s PUBLIC_IPV6= data=%s", verb, p.Subnet, p.PublicIP, p.Data)
}

func TestExtensionFollows(t *testing.T) {
	w := newExtensionWorld(t)
	ctx := t.Context()
	two, three := extensionPeer(2, `{"key": "a b"}`), extensionPeer(3, "")

	w.expect(w.x.set(ctx, nil), 0)
	w.expect(w.x.set(ctx, w.extension(three, two)), 0, toldPost, told("add", two), told("add", three))
	w.expect(w.x.set(ctx, w.extension(two, three)), 0)
	// Another key, another address: the old one goes first.
	moved := three
	moved.PublicIP = netip.MustParseAddr("198.51.100.33")
	other := extensionPeer(2, "other")
	w.expect(w.x.set(ctx, w.extension(other, moved)), 0,
		told("remove", two), told("remove", three), told("add", other), told("add", moved))
	w.expect(w.x.set(ctx, w.extension(moved)), 0, told("remove", other))
	// The node's own address changes: everything anew.
	readdressed := w.extension(moved)
	readdressed.PublicIP = netip.MustParseAddr("198.51.100.111")
	w.expect(w.x.set(ctx, readdressed), 0,
		told("remove", moved), strings.Replace(toldPost, "198.51.100.1 ", "198.51.100.111 ", 1), told("add", moved))
	// Other commands: what was added is removed by the command that belongs to it.
	changed := w.extension(moved)
	changed.SubnetRemove += " in another way"
	w.expect(w.x.set(ctx, changed), 0, told("remove", moved), toldPost, told("add", moved))
	w.expect(w.x.set(ctx, nil), 0, told("remove in another way", moved))
	w.expect(w.x.set(ctx, nil), 0)
	w.expect(w.x.set(ctx, w.extension(two)), 0, toldPost, told("add", two))
	// A new process knows nothing and adds again.
	w.x = newExtensionRunner(slog.New(slog.DiscardHandler))
	w.expect(w.x.set(ctx, w.extension(two)), 0, toldPost, told("add", two))
}

func TestExtensionRetries(t *testing.T) {
	w := newExtensionWorld(t)
	ctx := t.Context()
	two, three := extensionPeer(2, "x"), extensionPeer(3, "y")
	fail := func(verb string, on bool) {
		t.Helper()
		path := filepath.Join(w.dir, "fail-"+verb)
		err := os.Remove(path)
		if on {
			err = os.WriteFile(path, nil, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	fail("post", true)
	w.expect(w.x.set(ctx, w.extension(two)), 1, toldPost)
	w.expect(w.x.set(ctx, w.extension(two)), 1, toldPost)
	fail("post", false)
	fail("add", true)
	w.expect(w.x.set(ctx, w.extension(two, three)), 2, toldPost, told("add", two), told("add", three))
	fail("add", false)
	w.expect(w.x.set(ctx, w.extension(two, three)), 0, told("add", two), told("add", three))
	fail("remove", true)
	// Not added anew before the old one is gone.
	other := extensionPeer(2, "other")
	w.expect(w.x.set(ctx, w.extension(other, three)), 1, told("remove", two))
	// Even if it is wanted again as it was: who knows what the failed command left?
	w.expect(w.x.set(ctx, w.extension(two, three)), 1, told("remove", two))
	fail("remove", false)
	w.expect(w.x.set(ctx, w.extension(two, three)), 0, told("remove", two), told("add", two))
	fail("remove", true)
	w.expect(w.x.set(ctx, nil), 2, told("remove", two), told("remove", three))
	w.expect(w.x.set(ctx, w.extension(two)), 2, told("remove", two), told("remove", three), toldPost)
	fail("remove", false)
	w.expect(w.x.set(ctx, w.extension(two)), 0, told("remove", two), told("remove", three), told("add", two))
}

func TestExtensionCommand(t *testing.T) {
	w := newExtensionWorld(t)
	t.Setenv("GREETING", "good  day")
	t.Setenv("PUBLIC_IP", "of the daemon")
	args := w.script("args", ` 
for a; do printf '<%s>' "$a"; done; echo; echo "to stderr" >&2`)
	for _, c := range []struct{ line, want string }{
		{"", ""},
		{"  ", ""},
		{args + "  a\t'b  c'", "<a><'b><c'>\nto stderr"},
		{args + " $GREETING ${GREETING}! $NOT_SET; $(id) | cat", "<good  day><good  day!><;><$(id)><|><cat>\nto stderr"},
		{"printenv PUBLIC_IP", "of the daemon"},
		{"cat /proc/self/cmdline", "cat\x00/proc/self/cmdline"},
	} {
		got, err := w.x.preStartup(t.Context(), overlay.ExtensionConfig{PreStartup: c.line})
		if err != nil || strings.Trim(got, "\x00") != c.want {
			t.Errorf("%q: %q, %v, want %q", c.line, got, err, c.want)
		}
	}
	e := w.extension(extensionPeer(2, ""))
	journal := filepath.Join(w.dir, "journal")
	e.PostStartup, e.SubnetAdd = "", "cp /dev/null "+journal+"-$PUBLIC_IP"
	if errs := w.x.set(t.Context(), e); errs != nil {
		t.Error(errs)
	}
	if _, err := os.Stat(journal + "-198.51.100.2"); err != nil {
		t.Errorf("the peer's variable is not put in: %v", err)
	}
	for line, want := range map[string]string{
		"/no/such/command x": `run PreStartupCommand "/no/such/command x": `,
		"false":              `run PreStartupCommand "false": exit status 1`,
		"sh -c exit":         "",
		"ls /no/such":        "exit status 2; its output: ls: cannot access",
	} {
		if _, err := w.x.preStartup(t.Context(), overlay.ExtensionConfig{PreStartup: line}); (err == nil) != (want == "") ||
			err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", line, err, want)
		}
	}
	got, err := w.x.preStartup(t.Context(), overlay.ExtensionConfig{PreStartup: "head -c 1000000 /dev/zero"})
	if err != nil || len(got) != extensionOutput {
		t.Errorf("%d bytes kept, %v", len(got), err)
	}
}

// TestExtensionLimit runs a command that does not end, with a child that would
// outlive it.
func TestExtensionLimit(t *testing.T) {
	w := newExtensionWorld(t)
	hang := w.script("hang", `
sleep 300 &
echo $! >`+w.dir+`/pid
echo started
wait`)
	child := func() int {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(w.dir, "pid"))
		if err != nil {
			t.Fatal(err)
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
		if err != nil {
			t.Fatal(err)
		}
		return pid
	}
	gone := func(pid int) {
		t.Helper()
		deadline := time.Now().Add(10 * time.Second)
		for running(pid) {
			if time.Now().After(deadline) {
				t.Fatalf("the child %d still runs", pid)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	w.x.limit = time.Second
	_, err := w.x.preStartup(t.Context(), overlay.ExtensionConfig{PreStartup: hang})
	if err == nil || !strings.Contains(err.Error(), "killed: it did not end in 1s; its output: started") {
		t.Errorf("error %v", err)
	}
	gone(child())

	// The daemon ends meanwhile.
	w.x.limit = extensionLimit
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(time.Second, cancel)
	if _, err := w.x.preStartup(ctx, overlay.ExtensionConfig{PreStartup: hang}); err == nil || strings.Contains(err.Error(), "did not end") {
		t.Errorf("error %v", err)
	}
	gone(child())

	// What a command leaves in the background lives on, even with its output open.
	background := w.script("background", `
sleep 300 &
echo $! >`+w.dir+`/pid
echo ready`)
	out, err := w.x.preStartup(t.Context(), overlay.ExtensionConfig{PreStartup: background})
	if err != nil || out != "ready" {
		t.Errorf("%q, %v", out, err)
	}
	if !running(child()) {
		t.Error("the background process was ended")
	}
	if err := syscall.Kill(child(), syscall.SIGKILL); err != nil {
		t.Error(err)
	}
}

// running tells a process from one that has ended and is not waited for.
func running(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	return !strings.HasPrefix(rest, "Z")
}
