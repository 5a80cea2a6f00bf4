// Command images writes the images of the tests' workloads as archives, from programs that
// are there: nothing is pulled.
//
//	images BIN OUT    pause.tar, agnhost.tar and coredns.tar in OUT
package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/twill-net/twill/pkg/ociimage"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: images BIN OUT")
		os.Exit(2)
	}
	if err := write(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func write(bin, out string) error {
	userland, err := busybox("/bin/busybox")
	if err != nil {
		return err
	}
	agnhost, coredns := &ociimage.Tree{}, &ociimage.Tree{}
	if err := agnhost.CopyFile("agnhost", filepath.Join(bin, "agnhost"), 0o755); err != nil {
		return err
	}
	if err := coredns.CopyFile("coredns", filepath.Join(bin, "coredns"), 0o755); err != nil {
		return err
	}
	for _, i := range []struct {
		name, entrypoint string
		args             []string
		layers           []*ociimage.Tree
	}{
		// Busybox as what holds a pod's namespaces: it needs less memory than any Go program.
		{"pause", "/bin/sleep", []string{"infinity"}, []*ociimage.Tree{userland}},
		{"agnhost", "/agnhost", []string{"pause"}, []*ociimage.Tree{userland, agnhost}},
		{"coredns", "/coredns", nil, []*ociimage.Tree{coredns}},
	} {
		f, err := os.Create(filepath.Join(out, i.name+".tar"))
		if err != nil {
			return err
		}
		image := ociimage.Image{
			Ref: "localhost/" + i.name + ":1", Created: time.Unix(0, 0), Architecture: runtime.GOARCH, Layers: i.layers,
			Config: ociimage.Config{Env: []string{"PATH=/bin"}, Entrypoint: []string{i.entrypoint}, Cmd: i.args},
		}
		if err := image.Write(f); err != nil {
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	return nil
}

// busybox is a root directory with a static busybox and a link to it for each of its
// commands.
func busybox(program string) (*ociimage.Tree, error) {
	commands, err := exec.Command(program, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("run %s --list: %w; the package busybox-static has it", program, err)
	}
	t := &ociimage.Tree{}
	for _, dir := range []string{"etc", "proc", "sys", "dev", "root"} {
		t.Dir(dir, 0o755)
	}
	t.Dir("tmp", os.ModeSticky|0o777)
	t.File("etc/passwd", 0o644, []byte("root:x:0:0::/root:/bin/sh\n"))
	for c := range strings.FieldsSeq(string(commands)) {
		t.Link("bin/"+c, "busybox")
	}
	return t, t.CopyFile("bin/busybox", program, 0o755)
}
