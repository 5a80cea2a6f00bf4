package netctl

import (
	"fmt"
	"runtime"

	"github.com/spf13/cobra"
)

func (a *app) version() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the version of netctl",
		Long:    "Print the version of netctl. That of the running twilld stands in netctl status.\nExit code: 0.",
		Example: "  netctl version",
		Args:    noArgs,
		RunE: func(*cobra.Command, []string) error {
			platform := runtime.GOOS + "/" + runtime.GOARCH
			if a.json() {
				return a.printJSON(map[string]string{"version": a.built, "go": runtime.Version(), "platform": platform})
			}
			_, err := fmt.Fprintln(a.stdout, "netctl", a.built, runtime.Version(), platform)
			return err
		},
	}
}
