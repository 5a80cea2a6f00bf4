package install

import (
	"flag"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"helm.sh/helm/v4/pkg/chart/v2/lint"
	"helm.sh/helm/v4/pkg/chart/v2/lint/support"
)

var update = flag.Bool("update", false, "write golden files")

func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs; -update writes it anew. Got:\n%s", path, got)
	}
}

// The plain YAML is what the chart says by default.
func TestPlainManifest(t *testing.T) {
	r, err := Render(nil)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, filepath.Join("..", "..", "manifests", "twill.yaml"), r.YAML)
}

// TestLint: what helm lint says of the chart.
func TestLint(t *testing.T) {
	result := lint.RunAll(filepath.Join("..", "..", "manifests", "helm", "twill"), nil, "default")
	for _, m := range result.Messages {
		if m.Severity > support.InfoSev {
			t.Error(m)
		}
	}
	if len(result.Messages) == 0 {
		t.Error("lint says nothing, not even that an icon is recommended: does it see the chart?")
	}
}

// TestRender renders each value, and compares what differs from the plain manifest.
func TestRender(t *testing.T) {
	plain, err := Render(nil)
	check(t, err)
	for _, file := range slices.Sorted(maps.Keys(variants)) {
		v, err := ParseValues([]string{file}, nil, func(string) ([]byte, error) { return []byte(variants[file]), nil })
		check(t, err)
		r, err := Render(v)
		check(t, err)
		if _, _, err := networkConfig(r.Objects); err != nil {
			t.Errorf("%s: %v", file, err)
		}
		golden(t, filepath.Join("testdata", file+".diff"), lineDiff(plain.YAML, r.YAML))
	}
}

var variants = map[string]string{
	"host-gw":   "twill: {backend: host-gw, directRouting: true, mtu: 1400}\n",
	"dual":      "podCidrv6: fd00:10:244::/56\ntwill: {directRouting: true, enableNFTables: true, netConf: {IPv6SubnetLen: 64}}\n",
	"six":       "podCidr: ''\npodCidrv6: fd00:10:244::/56\n",
	"bgp":       "twill: {backend: bgp, backendOptions: {ASNumber: 64512}}\n",
	"wireguard": "twill: {backend: wireguard, backendPort: 51821}\n",
	"raw":       "twill: {netConfJson: \"{\\n \\\"Network\\\": \\\"10.244.0.0/16\\\", \\\"Backend\\\": {\\\"Type\\\":\\\"vxlan\\\"}}\"}\n",
	"all": `namespace: net
createNamespace: false
global: {imagePullSecrets: [{name: s}]}
kubernetesServiceHost: 198.51.100.10
kubernetesServicePort: 6443
twill:
  image: {repository: registry.example.com/twill, tag: v1.2.3, pullPolicy: Always}
  ipMasq: false
  allocateSubnets: true
  args: [--iface=eth1, "--log-level=debug"]
  env: [{name: FLANNELD_PUBLIC_IP, value: 203.0.113.1}]
  mode: routed
  cniBinDir: /usr/libexec/cni
  cniConfDir: /etc/cni
  skipCNIConfigInstallation: true
  cniArgs: [--force]
  healthzPort: 9100
  healthzIP: 0.0.0.0
  tolerations: []
  nodeSelector: {a: b}
  affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: x, operator: Exists}]}]}}}
  resources: {limits: {memory: 200Mi}}
  updateStrategy: {type: OnDelete, rollingUpdate: null}
  podAnnotations: {a: b}
  podLabels: {c: d}
`,
}

// lineDiff lists lines that went (-) and came (+), by the longest common subsequence.
func lineDiff(a, b string) string {
	x, y := strings.Split(a, "\n"), strings.Split(b, "\n")
	common := make([][]int, len(x)+1)
	for i := range common {
		common[i] = make([]int, len(y)+1)
	}
	for i := len(x) - 1; i >= 0; i-- {
		for j := len(y) - 1; j >= 0; j-- {
			if x[i] == y[j] {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	var out strings.Builder
	for i, j := 0, 0; i < len(x) || j < len(y); {
		switch {
		case i < len(x) && j < len(y) && x[i] == y[j]:
			i, j = i+1, j+1
		case j == len(y) || i < len(x) && common[i+1][j] >= common[i][j+1]:
			out.WriteString("-" + x[i] + "\n")
			i++
		default:
			out.WriteString("+" + y[j] + "\n")
			j++
		}
	}
	return out.String()
}
