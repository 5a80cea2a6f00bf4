// Package layers checks which package may import which.
package layers

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/twill-net/twill/"

// layers are in order: a package imports those of lower layers alone.
var layers = [][]string{
	{"pkg/overlay", "pkg/policy", "pkg/ociimage", "manifests"},
	{"pkg/xtables"},
	{"pkg/store", "pkg/kernel", "pkg/ipam", "pkg/portmap", "pkg/udptun", "pkg/wgtun", "pkg/speaker", "pkg/speaker/router"},
	{"pkg/pod", "pkg/deploy", "pkg/cniinstall", "pkg/install"},
	// The daemon writes what the plugin (pod) reads; netctl reads what the daemon says.
	{"pkg/netctl", "daemon"},
	{"daemon/cmd/twilld", "daemon/cmd/netctl", "plugins/twill", "manifests/image"},
}

// pure packages see the standard library alone.
var pure = []string{"pkg/overlay", "manifests"}

// only lists who may import a library directly.
var only = map[string][]string{
	"github.com/vishvananda/netlink": {"pkg/kernel", "pkg/portmap", "pkg/pod", "pkg/nettest", "e2e", "e2e/kubernetes", "e2e/kubernetes/flannelstandin"},
	"github.com/coreos/go-iptables":  {"pkg/kernel", "pkg/pod", "pkg/nettest"},
	"go.etcd.io/etcd/server/v3":      {"e2e/lab"},
	"github.com/spf13/cobra":         {"pkg/netctl", "e2e/lab"},
	"k8s.io/client-go":               {"pkg/store", "pkg/install", "pkg/nettest/kubeapi", "e2e", "e2e/kubernetes", "e2e/kubernetes/flannelstandin"},
	"helm.sh/helm/v4":                {"pkg/install"},
}

// forbidden lists what must not be linked into a program, even indirectly.
var forbidden = map[string][]string{
	"plugins/twill":     {"go.etcd.io/", "google.golang.org/grpc", "k8s.io/client-go", "net/http", module + "pkg/store", module + "pkg/kernel"},
	"daemon/cmd/twilld": {"go.etcd.io/etcd/server", "testing", module + "pkg/nettest"},
	// Helm's engine links "testing" into netctl.
	"daemon/cmd/netctl": {"go.etcd.io/etcd/server", module + "pkg/nettest"},
}

type pkg struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

func list(t *testing.T) map[string]pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,Deps", module+"...")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	pkgs := map[string]pkg{}
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs[strings.TrimPrefix(p.ImportPath, module)] = p
	}
	return pkgs
}

func TestImportLayers(t *testing.T) {
	pkgs := list(t)
	layerOf := map[string]int{}
	for i, l := range layers {
		for _, name := range l {
			layerOf[name] = i
		}
	}
	checked := 0
	for name, p := range pkgs {
		own, layered := layerOf[name]
		if layered {
			checked++
		} else if !strings.HasPrefix(name, "e2e") && !strings.HasPrefix(name, "pkg/nettest") {
			t.Errorf("%s is in no layer: name it in this test", name)
		}
		for _, imp := range p.Imports {
			inner, ours := strings.CutPrefix(imp, module)
			if layered && ours {
				if n, ok := layerOf[inner]; !ok || n >= own {
					t.Errorf("%s imports %s, which is not below it", name, inner)
				}
			}
			if slices.Contains(pure, name) && strings.Contains(strings.Split(imp, "/")[0], ".") {
				t.Errorf("%s imports %s; it is pure and sees the standard library alone", name, imp)
			}
			for library, users := range only {
				if (imp == library || strings.HasPrefix(imp, library+"/")) && !slices.Contains(users, name) {
					t.Errorf("%s imports %s; only %v may", name, imp, users)
				}
			}
		}
	}
	if checked == 0 {
		t.Fatal("no package of the layers was found")
	}
	for program, bad := range forbidden {
		for _, dep := range pkgs[program].Deps {
			for _, b := range bad {
				if dep == b || strings.HasPrefix(dep, strings.TrimSuffix(b, "/")+"/") {
					t.Errorf("%s links %s", program, dep)
				}
			}
		}
		if len(pkgs[program].Deps) == 0 {
			t.Errorf("program %s was not found", program)
		}
	}
}
