package install

import "k8s.io/apimachinery/pkg/types"

// Names of Twill's objects, as the chart has them.
const (
	name          = "twill"        // of all but the next
	configMapName = "twill-config" // with netConfKey
	netConfKey    = "net-conf.json"
	podSelector   = "app=twill"
	daemonName    = "twilld"      // the container
	initName      = "install-cni" // the init container

	// valuesAnnotation is on the ConfigMap: the values that were given, for the next
	// run, which must not go back to the defaults.
	valuesAnnotation = "twill.net/values"
)

const applyPatch = types.ApplyPatchType
