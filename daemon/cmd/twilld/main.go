// Command twilld gives this node its share of the cluster's pod network.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/twill-net/twill/daemon"
	"github.com/twill-net/twill/pkg/cniinstall"
)

// version is set by the linker.
var version = "devel"

func main() {
	if len(os.Args) > 1 && os.Args[1] == "install-cni" {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
		code := cniinstall.Command(ctx, os.Args[2:], os.Stdout, os.Stderr)
		stop()
		os.Exit(code)
	}
	cfg, err := daemon.ParseConfig(os.Args[1:], os.Getenv, os.Stderr)
	if errors.Is(err, daemon.ErrHelp) {
		os.Exit(0)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "twilld: %v\n", err)
		os.Exit(2)
	}
	if cfg.Version {
		fmt.Println("twilld", version)
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	log := cfg.Logger(os.Stderr)
	switch {
	case cfg.Cleanup:
		err = daemon.Cleanup(ctx, cfg, os.Stdout, log)
	case cfg.HandBack:
		err = daemon.HandBack(ctx, os.Stdout, log)
	default:
		err = daemon.Run(ctx, cfg, version, log)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "twilld: %v\n", err)
		os.Exit(1)
	}
}
