// Command netctl shows the overlay network of this node and what is wrong with it.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/twill-net/twill/pkg/netctl"
)

// version is set by the linker.
var version = "devel"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	program := netctl.Program{Version: version, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}
	code := program.Run(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}
