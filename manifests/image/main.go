// Command image makes Twill's container image from the programs that were built and
// from Debian's packages of iptables and nftables: an archive in OCI image layout
// (--output), or a root directory for whoever builds images in another way
// (--rootfs, see Dockerfile). Neither root nor a container engine is needed, and
// nothing of the machine's own file system gets in.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"time"
)

func main() {
	var b build
	var epoch int64
	flag.StringVar(&b.arch, "arch", "amd64", "architecture, in Go's `word`")
	flag.StringVar(&b.programs, "programs", "", "`directory` with twilld, netctl and twill")
	flag.StringVar(&b.work, "work", "", "`directory` for Debian's packages; what is there is not fetched again")
	flag.StringVar(&b.license, "license", "LICENSE", "Twill's license `file`")
	flag.StringVar(&b.version, "version", "devel", "Twill's `version`, the image's tag")
	flag.StringVar(&b.revision, "revision", "", "the source's `commit`")
	flag.Int64Var(&epoch, "created", 0, "`seconds` since 1970 that everything in the image is dated with")
	flag.StringVar(&b.output, "output", "", "archive to write, a `file`")
	flag.StringVar(&b.rootfs, "rootfs", "", "root directory to write instead, a new `directory`")
	flag.Parse()
	b.created = time.Unix(epoch, 0).UTC()
	err := errors.New("give --programs, --work, and --output or --rootfs")
	if b.programs != "" && b.work != "" && (b.output == "") != (b.rootfs == "") {
		err = b.run(os.Stdout)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "image: %v\n", err)
		os.Exit(1)
	}
}
