package install

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"helm.sh/helm/v4/pkg/chart/v2/loader"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// DefaultNamespace is the chart's.
const DefaultNamespace = "twill-system"

// Namespace is where the objects of these values go.
func (v Values) Namespace() string {
	if ns, ok := v["namespace"].(string); ok && ns != "" {
		return ns
	}
	return DefaultNamespace
}

// merged is v with what more says on top.
func (v Values) merged(more Values) Values {
	return Values(loader.MergeMaps(v, more))
}

// WithTag is v with a tag of the image, unless v names one. Empty: the chart's.
func (v Values) WithTag(tag string) Values {
	if tag == "" {
		return v
	}
	return Values{"twill": map[string]any{"image": map[string]any{"tag": tag}}}.merged(v)
}

// has reports whether a key of the top level is set.
func (v Values) has(key string) bool {
	_, ok := v[key]
	return ok
}

// inNetConf are the values that net-conf.json is made of.
var inNetConf = []string{"backend", "backendPort", "vni", "directRouting", "mtu", "backendOptions", "enableNFTables", "netConf"}

// checkAgainst refuses what would have no effect: a net-conf.json that was taken over
// byte for byte, from flannel, is not made of values.
func (v Values) checkAgainst(kept Values) error {
	was, _ := kept["twill"].(map[string]any)
	is, _ := v["twill"].(map[string]any)
	if was["netConfJson"] == nil || is["netConfJson"] != nil {
		return nil
	}
	var idle []string
	for _, key := range []string{"podCidr", "podCidrv6"} {
		if v.has(key) {
			idle = append(idle, key)
		}
	}
	for _, key := range inNetConf {
		if _, ok := is[key]; ok {
			idle = append(idle, "twill."+key)
		}
	}
	if len(idle) == 0 {
		return nil
	}
	return fmt.Errorf("check values: %s: %s was taken over from flannel as it is, so this has no effect: give all of it (twill.netConfJson in a file for -f), or start from the defaults with --reset-values", strings.Join(idle, ", "), netConfKey)
}

// KeptValues are those of the last run in that namespace; none if there was none.
func (c *Cluster) KeptValues(ctx context.Context, namespace string) (Values, error) {
	cm, err := c.core.ConfigMaps(namespace).Get(ctx, configMapName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return Values{}, nil
	}
	if err != nil {
		return nil, c.explain("read ConfigMap "+namespace+"/"+configMapName, err)
	}
	v := Values{}
	if text := cm.Annotations[valuesAnnotation]; text != "" {
		if err := json.Unmarshal([]byte(text), &v); err != nil {
			return nil, fmt.Errorf("read annotation %s of ConfigMap %s/%s: %w: give --reset-values to start from the defaults", valuesAnnotation, namespace, configMapName, err)
		}
	}
	return v, nil
}

// keep writes the given values into the rendered ConfigMap.
func keep(objects []*unstructured.Unstructured, v Values) error {
	text, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("keep values: %w", err)
	}
	for _, o := range objects {
		if o.GetKind() == "ConfigMap" {
			o.SetAnnotations(map[string]string{valuesAnnotation: string(text)})
		}
	}
	return nil
}
