package main

import (
	"fmt"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/embed"
)

func etcdCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "etcd --config-file FILE",
		Short: "Run one etcd member in this process",
		Long:  `Run one etcd member in this process. The file is etcd's own configuration file, YAML or JSON.`,
		Example: `  echo '{"data-dir": "/tmp/lab-etcd", "unsafe-no-fsync": true}' > /tmp/lab-etcd.json
  lab etcd --config-file /tmp/lab-etcd.json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			cfg, err := embed.ConfigFromFile(file)
			if err != nil {
				return fmt.Errorf("read %s: %w", file, err)
			}
			e, err := embed.StartEtcd(cfg)
			if err != nil {
				return fmt.Errorf("start etcd: %w", err)
			}
			defer e.Close()
			select {
			case <-ctx.Done():
				return nil
			case err := <-e.Err():
				return fmt.Errorf("run etcd: %w", err)
			case <-e.Server.StopNotify():
				return fmt.Errorf("run etcd: the server has stopped")
			}
		},
	}
	cmd.Flags().StringVar(&file, "config-file", "", "etcd configuration file")
	_ = cmd.MarkFlagRequired("config-file") // the flag exists
	return cmd
}
