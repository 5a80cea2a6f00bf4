// Package install puts Twill into a Kubernetes cluster, and takes it away: the
// chart's objects, applied, watched until every node runs, and moved node by node
// from flannel.
package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"

	"helm.sh/helm/v4/pkg/chart/common"
	chartutil "helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/loader/archive"
	chart "helm.sh/helm/v4/pkg/chart/v2"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
	"helm.sh/helm/v4/pkg/strvals"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	sigsyaml "sigs.k8s.io/yaml"

	"github.com/twill-net/twill/manifests"
)

// Values are the chart's, as far as they differ from its values.yaml.
type Values map[string]any

// Set puts a value at a path like twill.image.tag.
func (v Values) Set(path string, value any) {
	at := map[string]any(v)
	keys := strings.Split(path, ".")
	for _, key := range keys[:len(keys)-1] {
		next, ok := at[key].(map[string]any)
		if !ok {
			next = map[string]any{}
			at[key] = next
		}
		at = next
	}
	at[keys[len(keys)-1]] = value
}

// ParseValues merges values files, then assignments like "twill.vni=2,podCidr=…",
// the later ones first in rank. read opens a file by name.
func ParseValues(files, assignments []string, read func(name string) ([]byte, error)) (Values, error) {
	v := map[string]any{}
	for _, name := range files {
		b, err := read(name)
		if err != nil {
			return nil, fmt.Errorf("read values: %w", err)
		}
		more := map[string]any{}
		if err := sigsyaml.UnmarshalStrict(b, &more); err != nil {
			return nil, fmt.Errorf("read values %s: %w", name, err)
		}
		v = loader.MergeMaps(v, more)
	}
	for _, a := range assignments {
		if err := strvals.ParseInto(a, v); err != nil {
			return nil, fmt.Errorf("--set %s: %w: write key=value, as helm takes it", a, err)
		}
	}
	return v, nil
}

// Rendered is the chart's output.
type Rendered struct {
	Values  Values // the defaults and what was given, merged
	YAML    string // with the chart's comments
	Objects []*unstructured.Unstructured
}

// order is that of dependence: what is applied first is deleted last.
var order = []string{"Namespace", "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "ConfigMap", "DaemonSet"}

// Render renders the chart that is part of this program.
func Render(values Values) (*Rendered, error) {
	c, err := loadChart()
	if err != nil {
		return nil, err
	}
	caps := common.DefaultCapabilities.Copy()
	options := common.ReleaseOptions{Name: "twill", IsInstall: true, Revision: 1}
	all, err := chartutil.ToRenderValues(c, values, options, caps)
	if err != nil {
		return nil, fmt.Errorf("check values: %w", err)
	}
	files, err := engine.Engine{Strict: true}.RenderWithContext(context.Background(), c, all)
	if err != nil {
		return nil, fmt.Errorf("render chart: %w", err)
	}
	merged, err := all.Table("Values")
	if err != nil {
		return nil, fmt.Errorf("render chart: %w", err)
	}
	r := &Rendered{Values: Values(merged)}
	docs, err := documents(files)
	if err != nil {
		return nil, err
	}
	for i, d := range docs {
		if i > 0 {
			r.YAML += "---\n"
		}
		r.YAML += d.text
		r.Objects = append(r.Objects, d.object)
	}
	return r, nil
}

func loadChart() (*chart.Chart, error) {
	var files []*archive.BufferedFile
	source := manifests.Chart()
	err := fs.WalkDir(source, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := fs.ReadFile(source, path)
		files = append(files, &archive.BufferedFile{Name: path, Data: data})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read chart: %w", err)
	}
	return loader.LoadFiles(files)
}

type document struct {
	text   string
	object *unstructured.Unstructured
}

// documents takes rendered files apart, into the order in which they are applied.
func documents(files map[string]string) ([]document, error) {
	var docs []document
	for name, content := range files {
		if !strings.HasSuffix(name, ".yaml") {
			continue
		}
		reader := yaml.NewDocumentDecoder(io.NopCloser(strings.NewReader(content)))
		for buf := make([]byte, len(content)+1); ; {
			n, err := reader.Read(buf)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return nil, fmt.Errorf("render chart: %s: %w", name, err)
			}
			text := bytes.TrimPrefix(bytes.TrimSpace(buf[:n]), []byte("---\n"))
			object := map[string]any{}
			if err := sigsyaml.Unmarshal(text, &object); err != nil {
				return nil, fmt.Errorf("render chart: %s: %w", name, err)
			}
			if len(object) > 0 {
				docs = append(docs, document{string(text) + "\n", &unstructured.Unstructured{Object: object}})
			}
		}
	}
	rank := func(d document) int { return slices.Index(order, d.object.GetKind()) }
	slices.SortFunc(docs, func(a, b document) int { return rank(a) - rank(b) })
	return docs, nil
}
