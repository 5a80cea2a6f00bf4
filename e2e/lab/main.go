// Command lab makes labs of network namespaces to look at, and holds what tests,
// demo and benchmarks run inside them: etcd and the traffic tools.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"

	"github.com/spf13/cobra"
)

func main() {
	root := &cobra.Command{
		Use:   "lab",
		Short: "Hosts, pods and a real etcd in network namespaces",
		Long: `Hosts, pods and a real etcd in network namespaces, on a switch that leads nowhere.
Needs root. Kept labs are listed by "lab list" and removed by "lab down".`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(demoCommand(), benchCommand(), etcdCommand(), probeCommand(), tcpCommand(), execCommand(), listCommand(), downCommand())
	err := root.Execute()
	// The exit code of a command in the lab is lab's own.
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		os.Exit(exit.ExitCode())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		os.Exit(1)
	}
}
