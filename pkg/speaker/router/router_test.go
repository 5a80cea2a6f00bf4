package router

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

func kinds() []string { return []string{"bird", "frr"} }

// fixture is a Router without a running router; what it reloads is noted.
type fixture struct {
	*Router
	config, templates, reloads string
}

func newFixture(t testing.TB, kind string) *fixture {
	t.Helper()
	dir := t.TempDir()
	f := &fixture{config: filepath.Join(dir, kind+".conf"), templates: filepath.Join(dir, "templates"), reloads: filepath.Join(dir, "reloads")}
	if err := os.Mkdir(f.templates, 0o755); err != nil {
		t.Fatal(err)
	}
	f.Router = newRouter(t, Options{
		Kind: kind, Config: f.config, Templates: f.templates,
		Reload: []string{"sh", "-c", "echo {file} >> " + f.reloads + " && test ! -e " + f.reloads + ".broken"},
	})
	return f
}

func (f *fixture) template(t testing.TB, text string) {
	t.Helper()
	write := os.WriteFile(filepath.Join(f.templates, f.kind.template), []byte(text), 0o644)
	if write != nil {
		t.Fatal(write)
	}
}

func (f *fixture) read(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile(f.config)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func (f *fixture) reloaded() int {
	b, _ := os.ReadFile(f.reloads)
	return strings.Count(string(b), f.config+"\n")
}

// refused wants an error with all parts, no reload, and the file as it was.
func (f *fixture) refused(t testing.TB, b overlay.BGP, parts ...string) {
	t.Helper()
	old, reloads := f.read(t), f.reloaded()
	changed, err := f.Set(t.Context(), b)
	if err == nil || changed {
		t.Fatalf("Set: changed %v, error %v", changed, err)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not contain %q", err, p)
		}
	}
	if now := f.read(t); now != old {
		t.Errorf("file has changed to:\n%s", now)
	}
	if n := f.reloaded(); n != reloads {
		t.Errorf("the router was told %d times", n-reloads)
	}
}

func (f *fixture) accepted(t testing.TB, b overlay.BGP) (changed bool) {
	t.Helper()
	changed, err := f.Set(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	return changed
}

func TestSetIsIdempotent(t *testing.T) {
	for _, kind := range kinds() {
		t.Run(kind, func(t *testing.T) {
			f := newFixture(t, kind)
			if !f.accepted(t, mesh()) || f.accepted(t, mesh()) {
				t.Error("the first Set has to change the file, the second not")
			}
			if n := f.reloaded(); n != 1 {
				t.Errorf("reloaded %d times", n)
			}
			if !f.accepted(t, alone()) || f.reloaded() != 2 {
				t.Errorf("a change was not taken up: reloaded %d times", f.reloaded())
			}
			// twilld may have died between the swap and the reload.
			again := newRouter(t, Options{Kind: kind, Config: f.config, Reload: f.kind.reload})
			if changed, err := again.Set(t.Context(), alone()); changed || err != nil || f.reloaded() != 3 {
				t.Errorf("Set after a restart: changed %v, error %v, reloaded %d times", changed, err, f.reloaded())
			}
			if err := os.WriteFile(f.config, []byte("# by hand\n"), 0o640); err != nil {
				t.Fatal(err)
			}
			if !f.accepted(t, alone()) {
				t.Error("a change by hand stays")
			}
		})
	}
}

func TestReloadIsTriedAgain(t *testing.T) {
	for _, kind := range kinds() {
		f := newFixture(t, kind)
		broken := f.reloads + ".broken"
		if err := os.WriteFile(broken, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		for i := range 2 {
			changed, err := f.Set(t.Context(), mesh())
			if changed != (i == 0) || err == nil || !strings.Contains(err.Error(), "reload "+kind) {
				t.Errorf("%s: Set %d: changed %v, error %v", kind, i, changed, err)
			}
		}
		if err := os.Remove(broken); err != nil {
			t.Fatal(err)
		}
		if f.accepted(t, mesh()); f.reloaded() != 3 {
			t.Errorf("%s: reloaded %d times", kind, f.reloaded())
		}
	}
}

func TestBadTemplateKeepsFile(t *testing.T) {
	for _, kind := range kinds() {
		t.Run(kind, func(t *testing.T) {
			f := newFixture(t, kind)
			f.accepted(t, mesh())
			name := filepath.Join(f.templates, f.kind.template)

			f.template(t, "router id {{.RouterID}};\n{{range}}\n")
			f.refused(t, mesh(), name+":2", "missing value for range", "remove the file")
			f.refused(t, mesh(), name+":2") // and again, although it is unchanged
			f.template(t, "router id\n\n{{.RouterIdentity}};\n")
			f.refused(t, mesh(), name+":3", "RouterIdentity")
			f.template(t, "{{quote \"a\\nb\"}}\n")
			f.refused(t, mesh(), name+":1", "can hold no")
			// It renders, and means nothing to the router.
			f.template(t, "# first\nabracadabra\n")
			f.refused(t, mesh(), "check configuration rendered from "+name, f.config+".rejected", map[string]string{
				"bird": ".rejected:3:1 syntax error", "frr": "line 3: % Unknown command",
			}[kind])
			if b, err := os.ReadFile(f.config + ".rejected"); err != nil || !bytes.Contains(b, []byte("abracadabra")) {
				t.Errorf("rejected file: %s, error %v", b, err)
			}

			good := map[string]string{"bird": "router id {{.RouterID}};\nprotocol device {}\n", "frr": "router bgp {{.ASNumber}}\n"}[kind]
			f.template(t, good)
			if !f.accepted(t, mesh()) || !strings.Contains(f.read(t), map[string]string{"bird": "router id 198.51.100.11", "frr": "router bgp 64512\n"}[kind]) {
				t.Errorf("operator's template is not used:\n%s", f.read(t))
			}
			if _, err := os.Stat(f.config + ".rejected"); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("rejected file after a good one: %v", err)
			}
			if err := os.Remove(name); err != nil {
				t.Fatal(err)
			}
			if !f.accepted(t, mesh()) || !strings.Contains(f.read(t), "bgp_") && !strings.Contains(f.read(t), "twill-to-") {
				t.Errorf("built-in template is not used again:\n%s", f.read(t))
			}
			if err := os.Remove(f.templates); err != nil {
				t.Fatal(err)
			}
			f.refused(t, mesh(), f.templates, "make the directory")
		})
	}
}

// TestPasswordsStayInFile: what the parser prints of a refused line may hold one.
func TestPasswordsStayInFile(t *testing.T) {
	f := newFixture(t, "frr")
	b := external(t)
	b.Neighbors[0].Password = "topsecret"
	f.template(t, "neighbour {{(index .Neighbors 0).Password}}\n")
	_, err := f.Set(t.Context(), b)
	if err == nil || strings.Contains(err.Error(), "topsecret") || !strings.Contains(err.Error(), "(password)") {
		t.Errorf("Set: %v", err)
	}
}

func TestNew(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "bird.conf.tmpl")
	if err := os.WriteFile(file, []byte("a\n{{if}}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for want, o := range map[string]Options{
		"bird and frr":              {Kind: "quagga"},
		"make the directory":        {Kind: "bird", Templates: filepath.Join(dir, "none")},
		"no directory":              {Kind: "bird", Templates: file},
		file + ":2: missing value ": {Kind: "bird", Templates: dir},
	} {
		if _, err := New(o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("New(%+v): error %v, want %q", o, err, want)
		}
	}
	for kind, config := range map[string]string{"bird": "/etc/bird/bird.conf", "frr": "/etc/frr/frr.conf"} {
		if r := newRouter(t, Options{Kind: kind}); r.config != config {
			t.Errorf("%s writes %s", kind, r.config)
		}
	}
}

// TestFileBelongsToRouter: Debian's routers read their file as a user of their own.
func TestFileBelongsToRouter(t *testing.T) {
	for _, kind := range kinds() {
		f := newFixture(t, kind)
		chown(t, filepath.Dir(f.config), kind)
		owned := func(when string) {
			t.Helper()
			info, err := os.Stat(f.config)
			if err != nil {
				t.Fatal(err)
			}
			if owner := fmt.Sprint(info.Sys().(*syscall.Stat_t).Uid); owner != id(t, kind) || info.Mode() != 0o640 {
				t.Errorf("%s, %s: owner %s, mode %s", kind, when, owner, info.Mode())
			}
		}
		f.accepted(t, mesh())
		owned("in the router's directory")
		chown(t, filepath.Dir(f.config), "root")
		f.accepted(t, alone())
		owned("in place of the router's file")
	}
}

// TestKeepsOperatorsFile: the file that was there before Twill is kept.
func TestKeepsOperatorsFile(t *testing.T) {
	f := newFixture(t, "bird")
	for _, text := range []string{"# mine\n", "# by hand, later\n"} {
		if err := os.WriteFile(f.config, []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
		f.accepted(t, mesh())
	}
	if b, err := os.ReadFile(f.config + ".before-twill"); err != nil || string(b) != "# mine\n" {
		t.Errorf("kept %q, error %v", b, err)
	}
}

func TestReadOnlyDirectory(t *testing.T) {
	f := newFixture(t, "bird")
	f.accepted(t, mesh())
	dir := filepath.Dir(f.config)
	done := make(chan error)
	go func() { // the thread has mounts of its own, and ends with them
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_NEWNS)
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, "")
		}
		if err == nil {
			err = unix.Mount(dir, dir, "", unix.MS_BIND, "")
		}
		if err == nil {
			err = unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
		}
		if err == nil {
			_, err = f.Set(t.Context(), alone())
		}
		done <- err
	}()
	if err := <-done; !errors.Is(err, unix.EROFS) || !strings.Contains(err.Error(), f.config) {
		t.Errorf("Set: %v", err)
	}
	f.accepted(t, alone())
}

func TestBadPassword(t *testing.T) {
	for kind, bad := range map[string][]string{
		"bird": {`a"b`, "a\nb", "a\x00b", "a\xffb", "a\tb"},
		"frr":  {"a b", "a\nb", "a\rb", "pässword", "fd00:0::1", "fd00:0::/64"},
	} {
		f := newFixture(t, kind)
		f.accepted(t, mesh())
		for _, password := range bad {
			b := mesh()
			b.Neighbors[3].Password = password
			f.refused(t, b, "password of neighbour 2001:db8:51::13", "choose another password")
			if _, err := f.Set(t.Context(), b); strings.Contains(err.Error(), password) {
				t.Errorf("error shows the password: %v", err)
			}
		}
	}
}

// FuzzBreakOut: whatever a name or a password holds, the configuration has the
// same lines, and the router's parser takes them.
func FuzzBreakOut(f *testing.F) {
	for _, s := range []string{
		`a`, `s3cret\+/=!#?|'$%`, `"; } protocol kernel evil {`, "a\nrouter bgp 1", "\\\"", "!", "# x", `\`, "a\\\nb", "{{.}}", "${x}", "*/", "//", "é", "\x00", " ", "::/0", "\u2028", "0", "end",
	} {
		f.Add(s, s)
	}
	lines := map[string]int{}
	for _, kind := range kinds() {
		text, err := renderOne(kind, "name", "secret")
		if err != nil {
			f.Fatal(err)
		}
		lines[kind] = strings.Count(string(text), "\n")
	}
	f.Fuzz(func(t *testing.T, name, password string) {
		for _, kind := range kinds() {
			text, err := renderOne(kind, name, password)
			if err != nil {
				if !strings.Contains(err.Error(), "password of neighbour 198.51.100.12") {
					t.Fatal(err)
				}
				continue
			}
			want := lines[kind]
			if password == "" {
				want--
			}
			if n := strings.Count(string(text), "\n"); n != want {
				t.Fatalf("%s: %d lines, want %d", kind, n, want)
			}
			for _, r := range string(text) {
				if unicode.IsControl(r) && r != '\n' && r != '\t' {
					t.Fatalf("%s: %q in the file", kind, r)
				}
			}
			parse(t, kind, text)
		}
	})
}

func renderOne(kind, name, password string) ([]byte, error) {
	k, err := kindOf(kind, "")
	if err != nil {
		return nil, err
	}
	b := v4only()
	b.Neighbors[0].Name, b.Neighbors[0].Password = name, password
	s := source{kind: k}
	return s.render(b)
}

func parse(t *testing.T, kind string, text []byte) {
	t.Helper()
	k, err := kindOf(kind, "")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "conf")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	args := append([]string{}, k.check...)
	args[len(args)-1] = file
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Errorf("%s: %v: %s\n%s", kind, err, out, text)
	}
}
