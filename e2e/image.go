package e2e

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"runtime"
	"strings"
	"time"
)

// ImageRef is the name of the image that WriteImage makes.
const ImageRef = "twill.test/busybox:1"

// WriteImage writes an image with Debian's busybox and nothing else, as an archive
// in OCI image layout 1.0. It does nothing but sleep unless told otherwise, so a
// runtime can use it for sandboxes, too: nothing is ever pulled.
func WriteImage(file string) error {
	layer, err := busyboxLayer("/bin/busybox")
	if err != nil {
		return fmt.Errorf("make layer: %w", err)
	}
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	l := layout{tar: tar.NewWriter(f)}
	root := l.blob("application/vnd.oci.image.layer.v1.tar", layer)
	config := l.json("application/vnd.oci.image.config.v1+json", map[string]any{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": map[string]any{"Entrypoint": []string{"/bin/sleep", "86400"}, "Env": []string{"PATH=/bin"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{root.Digest}},
	})
	manifest := l.json("application/vnd.oci.image.manifest.v1+json", map[string]any{
		"schemaVersion": 2, "config": config, "layers": []descriptor{root},
	})
	// The first is containerd's own; see `ctr images import --help`.
	manifest.Annotations = map[string]string{"io.containerd.image.name": ImageRef, "org.opencontainers.image.ref.name": "1"}
	l.file("index.json", l.marshal(map[string]any{"schemaVersion": 2, "manifests": []descriptor{manifest}}))
	l.file("oci-layout", []byte(`{"imageLayoutVersion": "1.0.0"}`))
	if err := errors.Join(l.err, l.tar.Close(), f.Close()); err != nil {
		return fmt.Errorf("write image %s: %w", file, err)
	}
	return nil
}

// descriptor points to a blob (OCI image specification, descriptor.md).
type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// layout is an archive in the making. The first error stays.
type layout struct {
	tar *tar.Writer
	err error
}

func (l *layout) file(name string, content []byte) {
	if l.err == nil {
		l.err = addFile(l.tar, name, 0o644, content)
	}
}

func (l *layout) blob(mediaType string, content []byte) descriptor {
	sum := fmt.Sprintf("%x", sha256.Sum256(content))
	l.file(path.Join("blobs/sha256", sum), content)
	return descriptor{MediaType: mediaType, Digest: "sha256:" + sum, Size: len(content)}
}

func (l *layout) json(mediaType string, v any) descriptor { return l.blob(mediaType, l.marshal(v)) }

func (l *layout) marshal(v any) []byte {
	b, err := json.Marshal(v)
	l.err = errors.Join(l.err, err)
	return b
}

// busyboxLayer is a root directory with a static busybox and a link to it for
// each of its commands.
func busyboxLayer(program string) ([]byte, error) {
	binary, err := os.ReadFile(program)
	if err != nil {
		return nil, err
	}
	commands, err := exec.Command(program, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("run %s --list: %w", program, err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	var errs []error
	for _, dir := range []string{"bin", "etc", "proc", "sys", "dev", "tmp", "www"} {
		errs = append(errs, w.WriteHeader(header(tar.TypeDir, dir+"/", 0o755)))
	}
	errs = append(errs, addFile(w, "bin/busybox", 0o755, binary), addFile(w, "etc/passwd", 0o644, []byte("root:x:0:0::/:/bin/sh\n")))
	for _, c := range strings.Fields(string(commands)) {
		if c == "busybox" {
			continue
		}
		link := header(tar.TypeSymlink, "bin/"+c, 0o777)
		link.Linkname = "busybox"
		errs = append(errs, w.WriteHeader(link))
	}
	return b.Bytes(), errors.Join(append(errs, w.Close())...)
}

func addFile(w *tar.Writer, name string, mode int64, content []byte) error {
	h := header(tar.TypeReg, name, mode)
	h.Size = int64(len(content))
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	_, err := io.Copy(w, bytes.NewReader(content))
	return err
}

func header(kind byte, name string, mode int64) *tar.Header {
	return &tar.Header{Typeflag: kind, Name: name, Mode: mode, ModTime: time.Unix(0, 0)}
}
