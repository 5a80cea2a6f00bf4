package main

import (
	"bufio"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/twill-net/twill/pkg/ociimage"
)

// repository is the image's name without the tag. No registry is called localhost,
// so nobody tries to pull it.
const repository = "localhost/twill"

// build is one image in the making.
type build struct {
	arch, programs, work, license string
	version, revision             string
	created                       time.Time
	output, rootfs                string
}

// config is how the image is started. Dockerfile says the same.
func config() ociimage.Config {
	return ociimage.Config{
		Env:        []string{"PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
		Entrypoint: []string{"/usr/local/bin/twilld"},
	}
}

// labels are those of the OCI image specification, annotations.md.
func (b build) labels(packages []debianPackage) map[string]string {
	l := map[string]string{
		"org.opencontainers.image.title":       "twill",
		"org.opencontainers.image.description": "The pod network of a Kubernetes node: overlay daemon and CNI plugin",
		"org.opencontainers.image.licenses":    "Apache-2.0",
		"org.opencontainers.image.version":     b.version,
		"org.opencontainers.image.created":     b.created.Format(time.RFC3339),
	}
	if b.revision != "" {
		l["org.opencontainers.image.revision"] = b.revision
	}
	for _, p := range packages {
		if p.name == "iptables" || p.name == "nftables" {
			l["debian."+p.name] = p.version
		}
	}
	return l
}

// run makes the image and says what is in it.
func (b build) run(out io.Writer) error {
	// OCI distribution specification, "pulling manifests".
	if !regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`).MatchString(b.version) {
		return fmt.Errorf("use version %q as the image's tag: it may have letters, digits, and _ . - alone: set VERSION", b.version)
	}
	if err := b.checkPrograms(); err != nil {
		return err
	}
	d, err := fetchDebian(b.arch, b.work)
	if err != nil {
		return err
	}
	base, used, err := d.tree()
	if err != nil {
		return err
	}
	own := &ociimage.Tree{}
	for name, to := range places() {
		if err := own.CopyFile(to, filepath.Join(b.programs, name), 0o755); err != nil {
			return err
		}
	}
	if err := own.CopyFile("usr/share/doc/twill/LICENSE", b.license, 0o644); err != nil {
		return err
	}
	if b.rootfs != "" {
		base.Merge(own)
		return base.Extract(b.rootfs)
	}
	image := ociimage.Image{
		Ref: repository + ":" + b.version, Created: b.created, Architecture: b.arch,
		Config: config(), Labels: b.labels(used),
		Layers: []*ociimage.Tree{base, own}, // from what changes seldom to what changes often
	}
	if err := writeFile(b.output, image.Write); err != nil {
		return err
	}
	var versions []string
	for _, p := range used {
		versions = append(versions, p.name+" "+p.version)
	}
	info, err := os.Stat(b.output)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "%s: %s, linux/%s, %.1f MB, %d files\nof Debian: %s\n", b.output, image.Ref, b.arch,
		float64(info.Size())/1e6, len(base.Names())+len(own.Names()), strings.Join(versions, ", "))
	return err
}

// places are where Twill's programs lie in the image.
func places() map[string]string {
	return map[string]string{"twilld": "usr/local/bin/twilld", "netctl": "usr/local/bin/netctl", "twill": "opt/cni/bin/twill"}
}

func machine(arch string) elf.Machine {
	return map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}[arch]
}

// checkPrograms refuses programs that would not run in the image.
func (b build) checkPrograms() error {
	for name := range places() {
		file := filepath.Join(b.programs, name)
		f, err := elf.Open(file)
		if err != nil {
			return fmt.Errorf("read program %s: %w: run make image", file, err)
		}
		linked, err := f.ImportedLibraries()
		err = errors.Join(err, f.Close())
		switch {
		case err != nil:
			return fmt.Errorf("read program %s: %w", file, err)
		case machine(b.arch) != elf.EM_NONE && f.Machine != machine(b.arch):
			return fmt.Errorf("use program %s: it is for %s, and the image for %s: build it with GOARCH=%[3]s", file, f.Machine, b.arch)
		case len(linked) > 0:
			return fmt.Errorf("use program %s: it needs libraries (%s): build it with CGO_ENABLED=0", file, strings.Join(linked, ", "))
		}
	}
	return nil
}

// writeFile puts what write writes in place of a file, whole or not at all.
func writeFile(name string, write func(io.Writer) error) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(name), filepath.Base(name)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // it has another name by then, if all went well
	w := bufio.NewWriter(f)
	err = errors.Join(write(w), w.Flush(), f.Chmod(0o644), f.Close())
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}
