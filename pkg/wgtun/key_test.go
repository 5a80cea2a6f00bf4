package wgtun

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/twill-net/twill/pkg/overlay"
)

func TestKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "flannel", "wgkey")
	key, err := Key(path)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Key(path)
	if err != nil || again != key || key == (overlay.WGKey{}) {
		t.Errorf("%v, the same key: %t", err, again == key)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o400 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 1 {
		t.Errorf("left beside the key: %v %v", left, err)
	}
	// wg(8) reads the file and makes the same public key.
	cmd := exec.Command("wg", "pubkey")
	cmd.Stdin, err = os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.Output()
	if err != nil || strings.TrimSpace(string(out)) != key.Public().String() {
		t.Errorf("wg pubkey: %s %v, want %s", out, err, key.Public())
	}
}

// TestKeyRace lets several processes' worth of daemons make the key at once.
func TestKeyRace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "wgkey")
	keys := make([]overlay.WGKey, 8)
	var tasks sync.WaitGroup
	for i := range keys {
		tasks.Go(func() {
			var err error
			if keys[i], err = Key(path); err != nil {
				t.Error(err)
			}
		})
	}
	tasks.Wait()
	for _, k := range keys {
		if k != keys[0] {
			t.Error("two daemons have two keys")
		}
	}
}

func TestKeyBad(t *testing.T) {
	valid := overlay.WGKey{1, 2, 3}.String()
	for _, text := range []string{"", "garbage", valid[:40], overlay.WGKey{}.String(), valid + " " + valid} {
		path := filepath.Join(t.TempDir(), "wgkey")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Key(path)
		if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "remove the file") {
			t.Errorf("%q: %v", text, err)
		}
		if strings.Contains(err.Error(), "AQID") {
			t.Errorf("the key is in the error: %v", err)
		}
		if now, err := os.ReadFile(path); err != nil || string(now) != text {
			t.Errorf("%q was changed to %q, %v", text, now, err)
		}
	}
	parsed, err := overlay.ParseWGKey(valid)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{valid, valid + "\n", " " + valid + "\r\n"} { // as flannel, wg and people write it
		path := filepath.Join(t.TempDir(), "wgkey")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if key, err := Key(path); err != nil || key != parsed.Clamp() {
			t.Errorf("%q: %v", text, err)
		}
	}
	if _, err := Key("/proc/no/such"); err == nil || !strings.Contains(err.Error(), "/proc/no/such") {
		t.Errorf("where no file can be made: %v", err)
	}
	if _, err := Key(t.TempDir()); err == nil {
		t.Error("a directory is a key")
	}
}
