package cniinstall

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/twill-net/twill/manifests"
)

const flannelConflist = `{"name":"podnet","cniVersion":"0.3.1","plugins":[{"type":"flannel","delegate":{"hairpinMode":true,"isDefaultGateway":true}},{"type":"portmap","capabilities":{"portMappings":true}}]}`

// fresh is what a run leaves on a node that had nothing.
const fresh = "twill=old 10-twill.conflist=cbr0/bridged"

// situations are nodes as they are found, a command, and what it leaves. The same
// command again must find nothing to do.
var situations = []struct {
	name   string
	before func(n *node)
	args   []string
	code   int
	says   []string // in table, warnings or error
	after  string
}{
	{name: "nothing there", says: []string{"bin", "created", "twill", "installed", "v1.0.0", "network cbr0, bridged"}, after: fresh},
	{name: "routed", args: []string{"--mode=routed"}, after: "twill=old 10-twill.conflist=cbr0/routed"},
	{name: "all there", before: func(n *node) { n.must() }, says: []string{"unchanged"}, after: fresh},
	{
		name: "the mode there stays", before: func(n *node) { n.must("--mode=routed") }, args: []string{"--plugin=new"},
		says: []string{"replaced", "v1.0.0 → v1.1.0-3-gabc1234-dirty"}, after: "twill=new 10-twill.conflist=cbr0/routed",
	},
	{name: "another mode", before: func(n *node) { n.must() }, args: []string{"--mode=routed"}, says: []string{"conflist", "replaced"}, after: "twill=old 10-twill.conflist=cbr0/routed"},
	{
		name: "newer there", before: func(n *node) { n.must("--plugin=new", "--mode=routed") }, args: []string{"--mode=bridged"}, code: exitError,
		says: []string{"release v1.1.0-3-gabc1234-dirty is there, which is newer than v1.0.0", "--force"}, after: "twill=new 10-twill.conflist=cbr0/routed",
	},
	{name: "newer there, forced", before: func(n *node) { n.must("--plugin=new") }, args: []string{"--force"}, says: []string{"v1.1.0-3-gabc1234-dirty → v1.0.0"}, after: fresh},
	{name: "devel there", before: func(n *node) { n.must("--plugin=devel") }, says: []string{"devel → v1.0.0"}, after: fresh},
	{name: "devel over a release", before: func(n *node) { n.must("--plugin=new") }, args: []string{"--plugin=devel"}, after: "twill=devel 10-twill.conflist=cbr0/bridged"},
	{
		name: "another build", before: func(n *node) { n.put(n.bin("twill"), append(n.read(plugin("old")), 0), 0o755) },
		says: []string{"v1.0.0, another build or another mode"}, after: fresh,
	},
	{name: "not executable", before: func(n *node) { n.must(); n.put(n.bin("twill"), n.read(plugin("old")), 0o600) }, says: []string{"replaced", "another mode"}, after: fresh},
	{
		name: "a foreign plugin", before: func(n *node) { n.copy("twill", plugin("foreign")) }, code: exitError,
		says: []string{"is not Twill's plugin: it says", "bridge", "--force"}, after: "twill=foreign",
	},
	{
		name: "a foreign plugin, forced", before: func(n *node) { n.copy("twill", plugin("foreign")) }, args: []string{"--force"},
		says: []string{"kept as", ".twill.before-twill"}, after: ".twill.before-twill=foreign " + fresh,
	},
	{name: "half a plugin", before: func(n *node) { n.put(n.bin("twill"), n.read(plugin("old"))[:5000], 0o755) }, code: exitError, says: []string{"is not Twill's plugin"}, after: "twill=5000bytes"},
	{name: "what killed runs left", before: func(n *node) {
		n.put(n.bin(".twill-install-1.tmp"), []byte("x"), 0o600)
		n.put(n.conf(".twill-install-22.tmp"), []byte("x"), 0o600)
	}, after: fresh},
	{
		name: "an edited conflist", before: func(n *node) { n.must(); n.edit("10-twill.conflist", `"mac": true`, `"mac": false`) }, args: []string{"--mode=routed"},
		says: []string{"kept", "was edited", "--force"}, after: "twill=old 10-twill.conflist=cbr0/bridged/edited",
	},
	{name: "an edited conflist, forced", before: func(n *node) { n.must(); n.edit("10-twill.conflist", `"cbr0"`, `"mine"`) }, args: []string{"--force"}, after: "twill=old 10-twill.conflist=mine/bridged"},
	{
		name: "a foreign conflist at our name", before: func(n *node) {
			n.put(n.conf("10-twill.conflist"), []byte(`{"name":"a","plugins":[{"type":"ptp"}]}`), 0o644)
		},
		says: []string{"kept", "does not use the plugin twill"}, after: "twill=old 10-twill.conflist=a",
	},
	{
		name: "a broken conflist", before: func(n *node) { n.put(n.conf("10-twill.conflist"), nil, 0o644) },
		says: []string{"kept", "is not a configuration", "--force"}, after: "twill=old 10-twill.conflist=broken",
	},
	{
		name: "a network before ours", before: func(n *node) {
			n.put(n.conf("05-x.conflist"), []byte(`{"name":"x","plugins":[{"type":"ptp"}]}`), 0o644)
		},
		says: []string{"05-x.conflist comes before 10-twill.conflist, so pods get the network of ptp", ".off", "--conf-name"}, after: "twill=old 05-x.conflist=x 10-twill.conflist=cbr0/bridged",
	},
	{
		name: "a broken one before ours", before: func(n *node) { n.put(n.conf("05-x.conflist"), []byte(`{`), 0o644) },
		says: []string{"05-x.conflist", "is not a configuration"}, after: "twill=old 05-x.conflist=broken 10-twill.conflist=cbr0/bridged",
	},
	{name: "one after ours", before: func(n *node) { n.put(n.conf("99-x.conflist"), []byte(`{`), 0o644) }, after: fresh + " 99-x.conflist=broken"},
	{name: "flannel's", before: flannels, says: []string{"10-flannel.conflist comes before", "mv ", "--as-flannel"}, after: "flannel=foreign twill=old 10-flannel.conflist=podnet 10-twill.conflist=podnet/bridged"},
	{
		name: "as flannel", before: flannels, args: []string{"--as-flannel"}, says: []string{"what was there is not Twill's plugin", ".flannel.before-twill"},
		after: ".flannel.before-twill=foreign flannel=old twill=old 10-flannel.conflist=podnet 10-twill.conflist=podnet/bridged",
	},
	{
		name: "as flannel, which came back", before: func(n *node) { flannels(n); n.must("--as-flannel"); n.copy("flannel", plugin("foreign")) }, args: []string{"--as-flannel"},
		after: ".flannel.before-twill=foreign flannel=old twill=old 10-flannel.conflist=podnet 10-twill.conflist=podnet/bridged",
	},
	{
		name: "as flannel, which is gone", before: func(n *node) { flannels(n); n.must("--as-flannel"); os.Remove(n.conf("10-flannel.conflist")) },
		after: ".flannel.before-twill=foreign flannel=old twill=old 10-twill.conflist=podnet/bridged",
	},
	{
		name: "upgrade in flannel's place", before: func(n *node) { flannels(n); n.must("--as-flannel") }, args: []string{"--plugin=new"},
		after: ".flannel.before-twill=foreign flannel=new twill=new 10-flannel.conflist=podnet 10-twill.conflist=podnet/bridged",
	},
	{name: "another name", args: []string{"--conf-name=00-twill.conflist"}, before: flannels, after: "flannel=foreign twill=old 00-twill.conflist=podnet/bridged 10-flannel.conflist=podnet"},

	{
		name: "in flannel's place", before: flannels, args: []string{"--replace-flannel"}, says: []string{"10-flannel.conflist", "moved", ".10-flannel.conflist.before-twill"},
		after: "flannel=foreign twill=old .10-flannel.conflist.before-twill=podnet 10-twill.conflist=podnet/bridged",
	},
	{
		name: "in flannel's place, which came back", before: func(n *node) { flannels(n); n.must("--replace-flannel"); flannels(n) }, args: []string{"--replace-flannel"}, says: []string{"moved"},
		after: "flannel=foreign twill=old .10-flannel.conflist.before-twill=podnet 10-twill.conflist=podnet/bridged",
	},
	{
		name: "in flannel's place, with another plugin", args: []string{"--replace-flannel"}, before: func(n *node) {
			n.put(n.conf("10-flannel.conflist"), []byte(`{"name":"a","plugins":[{"type":"flannel"},{"type":"tuning"}]}`), 0o644)
		},
		says: []string{"plugin tuning of", "has no part in 10-twill.conflist"}, after: "twill=old .10-flannel.conflist.before-twill=a 10-twill.conflist=a/bridged",
	},
	{name: "in flannel's place without flannel", args: []string{"--replace-flannel"}, after: fresh},
	{name: "the operator's configuration", args: []string{"--skip-conf"}, before: flannels, after: "flannel=foreign twill=old 10-flannel.conflist=podnet"},
	{name: "uninstall from flannel's place", before: func(n *node) { flannels(n); n.must("--replace-flannel") }, args: []string{"--uninstall"}, says: []string{"restored"}, after: "flannel=foreign 10-flannel.conflist=podnet"},
	{name: "uninstall from flannel's place, with Twill's pods to come", before: func(n *node) { flannels(n); n.must("--replace-flannel") }, args: []string{"--uninstall", "--keep-plugin"}, says: []string{"restored"}, after: "flannel=foreign twill=old 10-flannel.conflist=podnet"},
	{name: "uninstall from flannel's place, which came back", before: func(n *node) { flannels(n); n.must("--replace-flannel"); flannels(n) }, args: []string{"--uninstall"}, says: []string{"kept", "there again"}, after: "flannel=foreign 10-flannel.conflist=podnet"},

	{name: "uninstall nothing", args: []string{"--uninstall"}, says: []string{"absent"}},
	{name: "uninstall", before: func(n *node) { n.must() }, args: []string{"--uninstall"}, says: []string{"removed"}},
	{name: "uninstall flannel's place", before: func(n *node) { flannels(n); n.must("--as-flannel") }, args: []string{"--uninstall"}, says: []string{"restored"}, after: "flannel=foreign 10-flannel.conflist=podnet"},
	{name: "uninstall where flannel came back", before: func(n *node) { flannels(n); n.must("--as-flannel"); n.copy("flannel", plugin("foreign")) }, args: []string{"--uninstall"}, says: []string{"kept"}, after: ".flannel.before-twill=foreign flannel=foreign 10-flannel.conflist=podnet"},
	{name: "uninstall with flannel's pods to come", before: func(n *node) {
		n.must("--as-flannel")
		n.put(n.conf("10-flannel.conflist"), []byte(flannelConflist), 0o644)
	}, args: []string{"--uninstall"}, code: exitError, says: []string{"flannel stays", "10-flannel.conflist uses it", "--force"}, after: "flannel=old 10-flannel.conflist=podnet"},
	{name: "uninstall a foreign plugin", before: func(n *node) { n.copy("twill", plugin("foreign")) }, args: []string{"--uninstall"}, says: []string{"kept", "is not Twill's"}, after: "twill=foreign"},
	{name: "uninstall what was forced", before: func(n *node) { n.copy("twill", plugin("foreign")); n.must("--force") }, args: []string{"--uninstall"}, says: []string{"restored"}, after: "twill=foreign"},
	{
		name: "uninstall an edited conflist", before: func(n *node) { n.must(); n.edit("10-twill.conflist", `"cbr0"`, `"mine"`) }, args: []string{"--uninstall"}, code: exitError,
		says: []string{"was edited", "twill stays", "10-twill.conflist uses it"}, after: "twill=old 10-twill.conflist=mine/bridged/edited",
	},
	{name: "uninstall an edited conflist, forced", before: func(n *node) { n.must(); n.edit("10-twill.conflist", `"cbr0"`, `"mine"`) }, args: []string{"--uninstall", "--force"}},
}

func flannels(n *node) {
	n.copy("flannel", plugin("foreign"))
	n.put(n.conf("10-flannel.conflist"), []byte(flannelConflist), 0o644)
}

func TestSituations(t *testing.T) {
	for _, c := range situations {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t)
			if c.before != nil {
				c.before(n)
			}
			code, out, errs := n.install(c.args...)
			if code != c.code {
				t.Errorf("exit code %d, want %d", code, c.code)
			}
			for _, w := range c.says {
				if !strings.Contains(out+errs, w) {
					t.Errorf("does not say %q", w)
				}
			}
			if got := n.state(); got != c.after {
				t.Errorf("left %s\nwant %s", got, c.after)
			}
			before := n.stamps()
			again, out2, errs2 := n.install(c.args...)
			if again != c.code || !slices.Equal(before, n.stamps()) {
				t.Errorf("the second run: exit code %d, files before and after:\n%v\n%v", again, before, n.stamps())
			}
			for _, word := range []string{"installed", "replaced", "removed", "restored", "created"} {
				if strings.Contains(out2, word) {
					t.Errorf("the second run %s something", word)
				}
			}
			if t.Failed() {
				t.Logf("said:\n%s%s\nthen:\n%s%s", out, errs, out2, errs2)
			}
		})
	}
}

// stamps are the identities of all files: what was replaced has another.
func (n *node) stamps() []string {
	n.Helper()
	out, err := exec.Command("find", n.dir, "-type", "f", "-printf", "%p %i %T@ %C@\n").Output()
	if err != nil {
		n.Fatal(err)
	}
	return strings.Fields(string(out))
}

// A runtime executes the plugin at any time: it finds one, and that one runs, also
// while it is replaced.
func TestExecWhileReplaced(t *testing.T) {
	n := newNode(t)
	n.must()
	child := exec.Command(os.Args[0], n.bin(""), n.conf(""), plugin("new"), plugin("old"))
	child.Env = append(os.Environ(), "TWILL_CHILD=loop")
	var out bytes.Buffer
	child.Stdout, child.Stderr = &out, &out
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	var done atomic.Bool
	go func() { _ = child.Wait(); done.Store(true) }()
	runs := 0
	for ; !done.Load(); runs++ {
		cmd := exec.Command(n.bin("twill"))
		cmd.Env = []string{"CNI_COMMAND=VERSION"}
		cmd.Stdin = strings.NewReader(`{"cniVersion":"1.0.0"}`)
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "supportedVersions") {
			t.Errorf("execution %d: %v: %s", runs, err, out)
			break
		}
	}
	for !done.Load() {
		time.Sleep(time.Millisecond)
	}
	if out.String() != "done\n" {
		t.Errorf("installer: %s", out.String())
	}
	t.Logf("%d executions during 200 replacements", runs)
	if runs < 50 {
		t.Error("too few to mean anything")
	}
}

func TestTwoAtOnce(t *testing.T) {
	n := newNode(t)
	var children []*exec.Cmd
	for range 4 {
		c := exec.Command(os.Args[0], n.args()...)
		c.Env = append(os.Environ(), "TWILL_CHILD=command")
		c.Stderr = os.Stderr
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		children = append(children, c)
	}
	for _, c := range children {
		if err := c.Wait(); err != nil {
			t.Error(err)
		}
	}
	if got := n.state(); got != fresh {
		t.Errorf("left %s", got)
	}
}

// Where files cannot be written nothing is changed, and the error says what to do.
func TestNoPlace(t *testing.T) {
	for _, c := range []struct {
		name, prepare string // shell, in a mount namespace
		args          []string
		says, after   string
	}{
		{"read-only", "mount -t tmpfs -o ro tmpfs $D/bin", nil, "read-only: remount it", "twill=new 10-twill.conflist=cbr0/bridged"},
		{"full", "mount -t tmpfs -o size=1m tmpfs $D/bin", nil, "bin/twill: .*no space left on device: free some space there", "twill=new 10-twill.conflist=cbr0/bridged"},
		{"no program may run", "mount -t tmpfs -o noexec tmpfs $D/bin", nil, "see whether it is mounted noexec", "twill=new 10-twill.conflist=cbr0/bridged"},
		{"full, for the conflist", "mount -t tmpfs -o nr_inodes=1 tmpfs $D/conf", nil, "10-twill.conflist.*no space left", "twill=old 10-twill.conflist=cbr0/bridged"},
		{"not a directory", "true", []string{"--bin-dir=/dev/null/x"}, "not a directory: name a directory", "twill=new 10-twill.conflist=cbr0/bridged"},
		{"cannot be made", "mount -t tmpfs -o ro tmpfs $D/bin", []string{"--conf-dir=bin/conf"}, "create directory .*read-only", "twill=new 10-twill.conflist=cbr0/bridged"},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t)
			n.must("--plugin=new")
			n.put(n.dir+"/old", n.read(plugin("old")), 0o755)
			script := "set -e; cd $D; " + c.prepare + `; exec "$@"`
			cmd := exec.Command("unshare", append([]string{"--mount", "sh", "-c", script, "sh", os.Args[0]}, n.args(append([]string{"--force"}, c.args...)...)...)...)
			cmd.Env = append(os.Environ(), "TWILL_CHILD=command", "D="+n.dir)
			out, err := cmd.CombinedOutput()
			if cmd.ProcessState.ExitCode() != exitError {
				t.Errorf("%v, want exit code 1", err)
			}
			if !matches(c.says, string(out)) {
				t.Errorf("does not say %q: %s", c.says, out)
			}
			os.Remove(n.dir + "/old")
			if got := n.state(); got != c.after {
				t.Errorf("left %s, want %s", got, c.after)
			}
		})
	}
}

func TestManifest(t *testing.T) {
	var was, is map[string]any
	text, err := render("a\"net", "routed")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(manifests.Conflist()), &was); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &is); err != nil {
		t.Fatal(err)
	}
	if was["name"] != defaultName || is["name"] != "a\"net" || is["cniVersion"] != "1.0.0" || !untouched(text) {
		t.Errorf("%v became %s", was, text)
	}
	p := is["plugins"].([]any)[0].(map[string]any)
	if p["type"] != "twill" || p["mode"] != "routed" {
		t.Errorf("plugin %v", p)
	}
	for i, b := range text { // whatever is changed, it is seen
		text[i] = b ^ 1
		if untouched(text) {
			t.Errorf("byte %d (%q) changed and it was not seen", i, b)
		}
		text[i] = b
	}
}

func TestNewer(t *testing.T) {
	order := []string{"v0.9.0", "v1.0.0-rc.1", "v1.0.0-rc.1-2-g0123abc", "v1.0.0-rc.2", "v1.0.0", "v1.0.0-2-gabc1234-dirty", "v1.0.0-10-gabc1234", "v1.0.1", "1.2", "v1.10.0"}
	for i, a := range order {
		for k, b := range order {
			if newer(a, b) != (i > k) {
				t.Errorf("newer(%s, %s) is %t", a, b, newer(a, b))
			}
		}
		for _, x := range []string{"devel", "", "abc1234", "abc1234-dirty", strings.TrimSuffix(a, "-dirty") + "-dirty"} {
			if newer(a, x) || newer(x, a) {
				t.Errorf("%s and %q are in an order", a, x)
			}
		}
	}
}

// A program that hangs is killed, and its child that holds the output is not waited for.
func TestAskHanging(t *testing.T) {
	n := newNode(t)
	n.put(n.bin("twill"), []byte("#!/bin/sh\nsleep 1000 &\necho $! > "+n.dir+"/child.tmp\nmv "+n.dir+"/child.tmp "+n.dir+"/child\nexec sleep 1000\n"), 0o755)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		for !exists(n.dir + "/child") {
			time.Sleep(time.Millisecond)
		}
		cancel()
	}()
	if _, err := ask(ctx, n.bin("twill")); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	if out, err := exec.Command("kill", strings.TrimSpace(string(n.read(n.dir+"/child")))).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

func TestUsage(t *testing.T) {
	n := newNode(t)
	for _, c := range []struct {
		args []string
		says string
	}{
		{[]string{"--mode=x"}, `--mode "x": must be bridged or routed`},
		{[]string{"-o", "yaml"}, `-o "yaml": must be table or json`},
		{[]string{"--conf-name=a/b.conflist"}, "--conf-name"},
		{[]string{"--conf-name=10-twill.conf"}, "ends in .conflist"},
		{[]string{"--bin-dir="}, "--bin-dir: must name a directory"},
		{[]string{"now"}, `unexpected argument "now"`},
		{[]string{"--bindir"}, "bindir"},
	} {
		code, out, errs := n.install(c.args...)
		if code != exitUsage || out != "" || !strings.Contains(errs, c.says) || !strings.Contains(errs, "--help") {
			t.Errorf("%v: exit code %d: %s%s", c.args, code, out, errs)
		}
	}
	for _, flag := range []string{"-h", "--help"} {
		code, out, errs := n.install(flag)
		if code != exitDone || errs != "" {
			t.Errorf("%s: exit code %d: %s", flag, code, errs)
		}
		n.examples(out)
	}
	for _, missing := range []string{"--plugin=/nowhere/twill", "--plugin=" + plugin("foreign"), "--plugin=/etc/hostname"} {
		code, _, errs := n.install(missing)
		if code != exitError || !strings.Contains(errs, "plugin") || n.state() != "" {
			t.Errorf("%s: exit code %d: %s", missing, code, errs)
		}
	}
}

// examples runs those of the help, in order, on a node of their own.
func (n *node) examples(help string) {
	n.Helper()
	e := newNode(n.TB)
	found := 0
	for line := range strings.Lines(help) {
		if args, ok := strings.CutPrefix(strings.TrimSpace(line), "twilld install-cni"); ok {
			e.must(strings.Fields(args)...)
			found++
		}
	}
	if found < 3 {
		n.Errorf("%d examples in the help", found)
	}
}

func TestJSON(t *testing.T) {
	n := newNode(t)
	flannels(n)
	code, out, errs := n.install("-o", "json")
	var got struct {
		Steps           []Step
		Warnings, Extra []string
		Error           string
	}
	if err := json.Unmarshal([]byte(out), &got); err != nil || code != exitDone || errs != "" || len(got.Steps) != 2 || len(got.Warnings) != 1 || got.Error != "" {
		t.Errorf("exit code %d, %v: %s%s", code, err, out, errs)
	}
	n.copy("twill", plugin("foreign"))
	code, out, _ = n.install("-o", "json")
	if err := json.Unmarshal([]byte(out), &got); err != nil || code != exitError || !strings.Contains(got.Error, "is not Twill's") {
		t.Errorf("exit code %d, %v: %s", code, err, out)
	}
}

// A second run that waits for the lock ends when it is told to.
func TestLocked(t *testing.T) {
	n := newNode(t)
	n.must()
	d, err := os.Open(n.bin(""))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := syscall.Flock(int(d.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Uninstall(ctx, Options{BinDir: n.bin(""), ConfDir: n.conf(""), ConfName: "10-twill.conflist"}); err == nil || !strings.Contains(err.Error(), "another install-cni is at work") {
		t.Errorf("error %v", err)
	}
	if got := n.state(); got != fresh {
		t.Errorf("left %s", got)
	}
}
