package cniinstall

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// plugins holds twill, built as several releases: old, new, devel; and another
// vendor's plugin.
var plugins string

// TestMain lets this test program be install-cni itself, for what must happen to a
// process of its own: to be killed, to run where a disk is full.
func TestMain(m *testing.M) {
	switch os.Getenv("TWILL_CHILD") {
	case "command":
		os.Exit(Command(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
	case "loop":
		os.Exit(loop(os.Args[1:]))
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "twill-cniinstall-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	plugins = dir
	for name, release := range map[string]string{"old": "v1.0.0", "new": "v1.1.0-3-gabc1234-dirty", "devel": "devel"} {
		build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w -X main.release="+release, "-o", filepath.Join(dir, name), "../../plugins/twill")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
			return 1
		}
	}
	foreign, err := os.ReadFile("/usr/lib/cni/bridge")
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "foreign"), foreign, 0o755)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

func matches(pattern, text string) bool { return regexp.MustCompile(pattern).MatchString(text) }

func plugin(name string) string { return filepath.Join(plugins, name) }

// node is a node's two directories.
type node struct {
	testing.TB
	dir string
}

func newNode(t testing.TB) *node { return &node{TB: t, dir: t.TempDir()} }

func (n *node) bin(name string) string  { return filepath.Join(n.dir, "bin", name) }
func (n *node) conf(name string) string { return filepath.Join(n.dir, "conf", name) }

// args is a command line for this node.
func (n *node) args(args ...string) []string {
	args = slices.Clone(args)
	for i, a := range args {
		if name, ok := strings.CutPrefix(a, "--plugin="); ok && filepath.Base(name) == name {
			args[i] = "--plugin=" + plugin(name) // one of those above
		}
	}
	return append([]string{"--bin-dir=" + n.bin(""), "--conf-dir=" + n.conf(""), "--plugin=" + plugin("old")}, args...)
}

func (n *node) install(args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	code = Command(context.Background(), n.args(args...), &out, &errs)
	return code, out.String(), errs.String()
}

func (n *node) must(args ...string) {
	n.Helper()
	if code, out, errs := n.install(args...); code != exitDone {
		n.Fatalf("%v: exit code %d: %s%s", args, code, out, errs)
	}
}

// put makes a file as somebody else would.
func (n *node) put(path string, content []byte, mode os.FileMode) {
	n.Helper()
	err := os.MkdirAll(filepath.Dir(path), 0o755)
	if err == nil {
		err = os.WriteFile(path, content, mode)
	}
	if err == nil {
		err = os.Chmod(path, mode)
	}
	if err != nil {
		n.Fatal(err)
	}
}

func (n *node) copy(name, from string) {
	n.Helper()
	n.put(n.bin(name), n.read(from), 0o755)
}

func (n *node) read(path string) []byte {
	n.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		n.Fatal(err)
	}
	return b
}

// edit changes a configuration by hand.
func (n *node) edit(name, was, is string) {
	n.Helper()
	text := string(n.read(n.conf(name)))
	if !strings.Contains(text, was) {
		n.Fatalf("%s does not hold %s", name, was)
	}
	n.put(n.conf(name), []byte(strings.Replace(text, was, is, 1)), 0o644)
}

// state says what is on the node: "twill=old 10-twill.conflist=cbr0/bridged".
func (n *node) state() string {
	n.Helper()
	var out []string
	for _, dir := range []string{n.bin(""), n.conf("")} {
		files, err := os.ReadDir(dir)
		if err != nil && !os.IsNotExist(err) {
			n.Fatal(err)
		}
		for _, f := range files {
			out = append(out, f.Name()+"="+n.what(filepath.Join(dir, f.Name())))
		}
	}
	return strings.Join(out, " ")
}

func (n *node) what(path string) string {
	n.Helper()
	info, err := os.Stat(path)
	if err != nil {
		n.Fatal(err)
	}
	content := n.read(path)
	if strings.HasSuffix(strings.TrimSuffix(path, ".before-twill"), ".conflist") {
		c := parseNetwork(filepath.Base(path), content)
		switch {
		case c.err != nil:
			return "broken"
		case info.Mode().Perm() != 0o644:
			return info.Mode().String()
		case c.uses("twill") && !untouched(content):
			return c.name + "/" + c.mode + "/edited"
		case c.uses("twill"):
			return c.name + "/" + c.mode
		}
		return c.name
	}
	for _, name := range []string{"old", "new", "devel", "foreign"} {
		if slices.Equal(content, n.read(plugin(name))) {
			if info.Mode().Perm() != 0o755 {
				return name + "/" + info.Mode().Perm().String()
			}
			return name
		}
	}
	return fmt.Sprintf("%dbytes", len(content))
}

// loop replaces the plugin again and again, by each of two in turn.
func loop(args []string) int {
	o := Options{BinDir: args[0], ConfDir: args[1], ConfName: "10-twill.conflist", Force: true}
	for i := range 200 {
		o.Plugin = args[2+i%2]
		r, err := Install(context.Background(), o)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		if r.Steps[0].Result != "replaced" {
			fmt.Fprintln(os.Stderr, "not replaced:", r)
			return 1
		}
	}
	_, _ = io.WriteString(os.Stdout, "done\n")
	return 0
}
