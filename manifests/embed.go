// Package manifests holds the files that Twill's programs put on nodes and into
// clusters, so that what they deploy is what the source shows.
package manifests

import (
	"embed"
	"io/fs"
)

//go:embed 10-twill.conflist
var conflist string

// Conflist is the network configuration list for container runtimes (CNI
// specification, section 1): network cbr0, bridged.
//
// cniVersion is 1.0.0 and not 1.1.0, for a runtime with a library older than 1.2
// (containerd 1.6 has 1.1.1) passes the version on unseen and fails over the result
// of every ADD: unsupported CNI result version "1.1.0". It does not know
// cniVersions, of which newer libraries take the highest they know.
//
// The name is flannel's default, for host-local's directory is called after it: a
// node that comes from flannel, or goes back, keeps its pods' reservations.
func Conflist() string { return conflist }

//go:embed all:helm/twill
var helm embed.FS

// Chart is the Helm chart: the one source of what Twill is in a cluster. The plain
// twill.yaml is what it renders with its default values (make manifests).
func Chart() fs.FS {
	chart, err := fs.Sub(helm, "helm/twill")
	if err != nil {
		panic(err) // the name is valid
	}
	return chart
}
