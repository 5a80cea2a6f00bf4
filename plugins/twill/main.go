// Command twill is the CNI plugin: the container runtime executes it for each pod
// that comes or goes (https://www.cni.dev/docs/spec/).
package main

import (
	"os"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/twill-net/twill/pkg/pod"
)

// release is set by the linker.
var release = "devel"

func main() {
	// The library would look at CNI_NETNS a second time when the verb is done, and
	// could call an ADD failed whose result is printed. Twill looks by itself, before.
	os.Setenv("CNI_NETNS_OVERRIDE", "1")
	conf := peek()
	err := skel.PluginMainFuncsWithError(skel.CNIFuncs{
		Add:    pod.Add,
		Del:    pod.Del,
		Check:  pod.Check,
		GC:     pod.GC,
		Status: pod.Status,
	}, version.All, "CNI plugin twill "+release)
	if err != nil {
		printError(err, conf)
		os.Exit(1)
	}
}
