package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/json"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// newBuild is a build with small programs; packages of Debian's that make image has
// fetched are used again.
func newBuild(t *testing.T) build {
	t.Helper()
	dir := t.TempDir()
	source := filepath.Join(dir, "main.go")
	if err := os.WriteFile(source, []byte("package main\n\nfunc main() {}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name := range places() {
		cmd := exec.Command("go", "build", "-o", filepath.Join(dir, name), source)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	return build{
		arch: runtime.GOARCH, programs: dir, work: "../../build/image", license: "../../LICENSE",
		version: "v1.2.3", revision: "0a1b2c", created: time.Unix(1700000000, 0).UTC(), output: filepath.Join(dir, "out", "twill.tar"),
	}
}

// untar reads an archive.
func untar(t *testing.T, r io.Reader) map[string]*tar.Header {
	t.Helper()
	out := map[string]*tar.Header{}
	for in := tar.NewReader(r); ; {
		h, err := in.Next()
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out[strings.TrimSuffix(h.Name, "/")] = h
	}
}

// contents returns what is in an image's layers, which it finds by their size.
func contents(t *testing.T, image []byte) map[string]*tar.Header {
	t.Helper()
	out := map[string]*tar.Header{}
	for in := tar.NewReader(bytes.NewReader(image)); ; {
		if _, err := in.Next(); err == io.EOF {
			return out
		} else if err != nil {
			t.Fatal(err)
		}
		z, err := gzip.NewReader(in)
		if err != nil {
			continue // a document
		}
		for name, h := range untar(t, z) {
			out[name] = h
		}
	}
}

func TestContents(t *testing.T) {
	b := newBuild(t)
	var said bytes.Buffer
	if err := b.run(&said); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(said.String(), "localhost/twill:v1.2.3") || !strings.Contains(said.String(), "iptables 1.") {
		t.Errorf("said: %s", said.String())
	}
	image, err := os.ReadFile(b.output)
	if err != nil {
		t.Fatal(err)
	}
	has := contents(t, image)
	for _, name := range []string{
		"usr/local/bin/twilld", "usr/local/bin/netctl", "opt/cni/bin/twill", "usr/share/doc/twill/LICENSE",
		"usr/sbin/nft", "usr/sbin/iptables", "usr/sbin/ip6tables-nft-restore", "usr/sbin/iptables-legacy-save", "usr/sbin/ip6tables-legacy",
		"usr/lib/" + triplets()[b.arch] + "/libc.so.6", "usr/lib/" + triplets()[b.arch] + "/xtables/libxt_comment.so",
		"var/lib/dpkg/status.d/iptables", "var/lib/dpkg/status.d/libc6", "usr/share/doc/nftables/copyright",
		"etc/os-release", "etc/protocols", "var/run", "run", "tmp",
	} {
		if has[name] == nil {
			t.Errorf("%s is missing", name)
		}
	}
	for name, h := range has {
		if strings.Contains(name, "libebt_") || strings.HasSuffix(name, "/sh") || strings.HasPrefix(name, "usr/share/man") {
			t.Errorf("%s is not needed", name)
		}
		if h.Uid != 0 || h.Gid != 0 || !h.ModTime.Equal(b.created) {
			t.Errorf("%s: of %d:%d, %s", name, h.Uid, h.Gid, h.ModTime)
		}
		// Every link leads to something.
		if target := h.Linkname; target != "" {
			if !strings.HasPrefix(target, "/") {
				target = filepath.Join("/", filepath.Dir(name), target)
			}
			if target = regexp.MustCompile(`^/lib`).ReplaceAllString(target, "/usr/lib"); has[target[1:]] == nil {
				t.Errorf("%s leads to %s, which is not there", name, target)
			}
		}
	}

	// Again, by other means: the same.
	t.Setenv("TZ", "Asia/Tokyo")
	t.Setenv("LC_ALL", "C.UTF-8")
	b.output += "2"
	if err := b.run(io.Discard); err != nil {
		t.Fatal(err)
	}
	if again, err := os.ReadFile(b.output); err != nil || !bytes.Equal(image, again) {
		t.Errorf("the second image differs: %v", err)
	}

	// The root directory that Dockerfile takes holds the same.
	b.output, b.rootfs = "", filepath.Join(t.TempDir(), "rootfs")
	if err := b.run(io.Discard); err != nil {
		t.Fatal(err)
	}
	count := 0
	err = filepath.WalkDir(b.rootfs, func(path string, e fs.DirEntry, err error) error {
		name, _ := filepath.Rel(b.rootfs, path)
		if err != nil || name == "." {
			return err
		}
		count++
		info, err := e.Info()
		if err != nil {
			return err
		}
		if h := has[name]; h == nil || h.FileInfo().Mode() != info.Mode() || info.Mode().IsRegular() && h.Size != info.Size() {
			t.Errorf("%s: %v in the directory, %v in the image", name, info.Mode(), h)
		}
		return nil
	})
	if err != nil || count != len(has) {
		t.Errorf("the directory holds %d, the image %d: %v", count, len(has), err)
	}
}

func TestBad(t *testing.T) {
	good := newBuild(t)
	linked := t.TempDir()
	for name := range places() {
		if err := os.Symlink("/bin/ls", filepath.Join(linked, name)); err != nil {
			t.Fatal(err)
		}
	}
	otherArch := map[string]string{"amd64": "arm64", "arm64": "amd64"}[good.arch]
	for _, v := range []struct {
		name string
		edit func(*build)
		want string
	}{
		{"version", func(b *build) { b.version = "v1+dirty" }, `use version "v1+dirty" as the image's tag`},
		{"architecture", func(b *build) { b.arch = "mips" }, `GOARCH "mips": must be amd64 or arm64`},
		{"other programs", func(b *build) { b.arch = otherArch }, "build it with GOARCH=" + otherArch},
		{"no programs", func(b *build) { b.programs = "/does/not/exist" }, "run make image"},
		{"dynamic programs", func(b *build) { b.programs = linked }, "build it with CGO_ENABLED=0"},
		{"no apt", func(b *build) { b.work = t.TempDir(); t.Setenv("PATH", b.work) }, "elsewhere use manifests/image/Dockerfile"},
	} {
		t.Run(v.name, func(t *testing.T) {
			b := good
			v.edit(&b)
			if err := b.run(io.Discard); err == nil || !strings.Contains(err.Error(), v.want) {
				t.Errorf("%v, want %q", err, v.want)
			}
			if _, err := os.Stat(b.output); err == nil {
				t.Error("an image was written")
			}
		})
	}
}

// TestDockerfile checks what Dockerfile says beside the content, which it takes from
// this program.
func TestDockerfile(t *testing.T) {
	text, err := os.ReadFile("Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.ReplaceAll(string(text), "\\\n", ""), "\n")
	entrypoint, err := json.Marshal(config().Entrypoint)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"FROM scratch", "COPY --from=build /rootfs /", "ENTRYPOINT " + string(entrypoint), "ENV " + config().Env[0]}
	for key, value := range (build{version: "$VERSION"}).labels(nil) {
		if !strings.HasSuffix(key, ".created") { // the engine knows better
			want = append(want, `LABEL `+key+`="`+value+`"`)
		}
	}
	for _, w := range want {
		if !slices.Contains(lines, w) {
			t.Errorf("Dockerfile has no line %q", w)
		}
	}
	module, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	version := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindSubmatch(module)
	if version == nil || !strings.Contains(string(text), "golang:"+string(version[1])+"-") {
		t.Errorf("Dockerfile has not the Go version of go.mod: %s", version)
	}
	run := regexp.MustCompile(`go run ./manifests/image [^\n]*--rootfs /rootfs`)
	if !run.Match(text) {
		t.Errorf("Dockerfile does not run this program")
	}
}

func TestMachines(t *testing.T) {
	for arch := range triplets() {
		if machine(arch) == elf.EM_NONE {
			t.Errorf("%s: which machine is that?", arch)
		}
	}
}
