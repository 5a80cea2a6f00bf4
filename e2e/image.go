package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"github.com/twill-net/twill/pkg/ociimage"
)

// ImageRef is the name of the image that WriteImage makes.
const ImageRef = "twill.test/busybox:1"

// WriteImage writes an image with Debian's busybox and nothing else, as an archive
// in OCI image layout 1.0. It does nothing but sleep unless told otherwise, so a
// runtime can use it for sandboxes, too: nothing is ever pulled.
func WriteImage(file string) error {
	root, err := busyboxTree("/bin/busybox")
	if err != nil {
		return fmt.Errorf("make layer: %w", err)
	}
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	image := ociimage.Image{
		Ref: ImageRef, Created: time.Unix(0, 0), Architecture: runtime.GOARCH,
		Config: ociimage.Config{Entrypoint: []string{"/bin/sleep", "86400"}, Env: []string{"PATH=/bin"}},
		Layers: []*ociimage.Tree{root},
	}
	return errors.Join(image.Write(f), f.Close())
}

// busyboxTree is a root directory with a static busybox and a link to it for
// each of its commands.
func busyboxTree(program string) (*ociimage.Tree, error) {
	commands, err := exec.Command(program, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("run %s --list: %w", program, err)
	}
	t := &ociimage.Tree{}
	for _, dir := range []string{"proc", "sys", "dev", "tmp", "www"} {
		t.Dir(dir, 0o755)
	}
	t.File("etc/passwd", 0o644, []byte("root:x:0:0::/:/bin/sh\n"))
	for _, c := range strings.Fields(string(commands)) {
		t.Link("bin/"+c, "busybox")
	}
	return t, t.CopyFile("bin/busybox", program, 0o755)
}
