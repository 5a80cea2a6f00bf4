// Command twill is the CNI plugin: the container runtime executes it for each pod
// that comes or goes (https://www.cni.dev/docs/spec/).
package main

import (
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/twill-net/twill/pkg/pod"
)

// release is set by the linker.
var release = "devel"

func main() {
	skel.PluginMainFuncs(skel.CNIFuncs{
		Add:    pod.Add,
		Del:    pod.Del,
		Check:  pod.Check,
		GC:     pod.GC,
		Status: pod.Status,
	}, version.All, "CNI plugin twill "+release)
}
