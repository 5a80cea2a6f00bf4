package ociimage

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func sample(order int) Image {
	t := &Tree{}
	puts := []func(){
		func() { t.File("usr/bin/tool", 0o755, []byte("#!/bin/true\n")) },
		func() { t.Link("/bin", "usr/bin") },
		func() { t.Dir("tmp", fs.ModeSticky|0o777) },
		func() { t.Dir("usr/lib", 0o711) },
	}
	for i := range puts {
		puts[(i+order)%len(puts)]()
	}
	upper := &Tree{}
	upper.File("opt/x", 0o600, nil)
	return Image{
		Ref: "registry.example:5000/a/b:v1", Created: time.Unix(1700000000, 500).In(time.FixedZone("", 3600*order)), Architecture: "arm64",
		Config: Config{Entrypoint: []string{"/bin/tool"}, Env: []string{"PATH=/bin"}},
		Labels: map[string]string{"org.opencontainers.image.version": "v1", "a": "b"},
		Layers: []*Tree{t, upper},
	}
}

func written(t *testing.T, i Image) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := i.Write(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// entries reads a tar archive.
func entries(t *testing.T, r io.Reader) (headers []*tar.Header, content map[string][]byte) {
	t.Helper()
	content = map[string][]byte{}
	for in := tar.NewReader(r); ; {
		h, err := in.Next()
		if err == io.EOF {
			return headers, content
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}
		headers, content[h.Name] = append(headers, h), b
	}
}

func TestSameBytes(t *testing.T) {
	first := written(t, sample(0))
	for order := 1; order < 4; order++ {
		if !bytes.Equal(first, written(t, sample(order))) {
			t.Errorf("made in order %d, the image is another", order)
		}
	}
	other := sample(0)
	other.Created = other.Created.Add(time.Second)
	if bytes.Equal(first, written(t, other)) {
		t.Error("an image of another time is the same")
	}
}

// TestLayout follows the descriptors from the index to each file of each layer.
func TestLayout(t *testing.T) {
	_, files := entries(t, bytes.NewReader(written(t, sample(0))))
	blob := func(d descriptor) []byte {
		b := files["blobs/"+strings.Replace(d.Digest, ":", "/", 1)]
		if len(b) != d.Size || len(b) == 0 || digest(sum(b)) != d.Digest {
			t.Errorf("blob %+v has %d bytes of digest %s", d, len(b), digest(sum(b)))
		}
		return b
	}
	decode := func(b []byte, v any) {
		t.Helper()
		if err := json.Unmarshal(b, v); err != nil {
			t.Fatalf("%v: %s", err, b)
		}
	}
	if got := string(files["oci-layout"]); got != `{"imageLayoutVersion":"1.0.0"}` {
		t.Errorf("oci-layout: %s", got)
	}
	var index struct{ Manifests []descriptor }
	decode(files["index.json"], &index)
	m := index.Manifests[0]
	if m.Annotations[containerdName] != "registry.example:5000/a/b:v1" || m.Annotations[refName] != "v1" || m.Platform["architecture"] != "arm64" {
		t.Errorf("index: %+v", m)
	}
	var manifest struct {
		SchemaVersion int
		Config        descriptor
		Layers        []descriptor
		Annotations   map[string]string
	}
	decode(blob(m), &manifest)
	var config struct {
		Created      time.Time
		Architecture string
		Config       struct {
			Entrypoint []string
			Labels     map[string]string
		}
		Rootfs struct {
			DiffIDs []string `json:"diff_ids"`
		}
	}
	decode(blob(manifest.Config), &config)
	if config.Created.Unix() != 1700000000 || config.Config.Labels["a"] != "b" || config.Config.Entrypoint[0] != "/bin/tool" || manifest.Annotations["a"] != "b" {
		t.Errorf("config: %+v, manifest: %+v", config, manifest)
	}
	var got []string
	for n, l := range manifest.Layers {
		z, err := gzip.NewReader(bytes.NewReader(blob(l)))
		if err != nil {
			t.Fatal(err)
		}
		plain, err := io.ReadAll(z)
		if err != nil {
			t.Fatal(err)
		}
		if id := digest(sum(plain)); id != config.Rootfs.DiffIDs[n] {
			t.Errorf("layer %d has digest %s, not %s", n, id, config.Rootfs.DiffIDs[n])
		}
		headers, _ := entries(t, bytes.NewReader(plain))
		for _, h := range headers {
			got = append(got, fmt.Sprintf("%c %o %s%s", h.Typeflag, h.Mode, h.Name, h.Linkname))
			if h.Uid != 0 || h.Gid != 0 || h.Uname != "" || h.ModTime.Unix() != 1700000000 {
				t.Errorf("%s: %+v", h.Name, h)
			}
		}
	}
	want := []string{
		"2 777 binusr/bin", "5 1777 tmp/", "5 755 usr/", "5 755 usr/bin/", "0 755 usr/bin/tool", "5 711 usr/lib/",
		"5 755 opt/", "0 600 opt/x",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func TestBadRef(t *testing.T) {
	for _, ref := range []string{"", "a", "a:", ":b", "registry.example:5000/a"} {
		i := sample(0)
		i.Ref = ref
		if err := i.Write(io.Discard); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%q: must be NAME:TAG", ref)) {
			t.Errorf("%q: %v", ref, err)
		}
	}
}

func TestExtract(t *testing.T) {
	i := sample(0)
	tree := i.Layers[0]
	upper := &Tree{}
	upper.File("usr/bin/tool", 0o644, []byte("other"))
	tree.Merge(upper)
	dir := filepath.Join(t.TempDir(), "root")
	if err := tree.Extract(dir); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]fs.FileMode{"tmp": fs.ModeDir | fs.ModeSticky | 0o777, "usr/lib": fs.ModeDir | 0o711, "usr/bin/tool": 0o644, "bin": fs.ModeSymlink | 0o777} {
		if info, err := os.Lstat(filepath.Join(dir, name)); err != nil || info.Mode() != want {
			t.Errorf("%s: %v, %v, want %v", name, info, err, want)
		}
	}
	if b, err := os.ReadFile(filepath.Join(dir, "bin/tool")); err != nil || string(b) != "other" {
		t.Errorf("through the link: %q, %v", b, err)
	}
	if err := tree.Extract(dir); err == nil {
		t.Error("extracted into a directory that was there")
	}
}

func TestCopyFile(t *testing.T) {
	if err := (&Tree{}).CopyFile("x", "/does/not/exist", 0o644); err == nil || !strings.Contains(err.Error(), "copy file: open /does/not/exist") {
		t.Error(err)
	}
}

func sum(b []byte) []byte { s := sha256.Sum256(b); return s[:] }
