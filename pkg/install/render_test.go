package install

import (
	"flag"
	"os"
	"path/filepath"
	"testing"
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
