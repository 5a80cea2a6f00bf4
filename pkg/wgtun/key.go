package wgtun

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/twill-net/twill/pkg/overlay"
)

// Key returns the node's private key, kept in a file as flannel keeps it
// (WIREGUARD_KEY_FILE, /run/flannel/wgkey): base64, readable for root. If there is
// no file, it makes a key. What it cannot read it leaves alone: the peers know the
// node by the key that once was there.
func Key(path string) (overlay.WGKey, error) {
	key, err := readKey(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	key, err = makeKey(path)
	if errors.Is(err, fs.ErrExist) { // somebody was faster
		return readKey(path)
	}
	if err != nil {
		return overlay.WGKey{}, fmt.Errorf("make WireGuard key %s: %w", path, err)
	}
	return key, nil
}

func readKey(path string) (overlay.WGKey, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return overlay.WGKey{}, fmt.Errorf("read WireGuard key: %w", err)
	}
	key, err := overlay.ParseWGKey(strings.TrimSpace(string(text)))
	if err != nil {
		return overlay.WGKey{}, fmt.Errorf("read WireGuard key: the content of %s %w; restore it, or remove the file to get a new key", path, err)
	}
	if key == (overlay.WGKey{}) {
		return overlay.WGKey{}, fmt.Errorf("read WireGuard key: the key in %s is zero; remove the file to get a new key", path)
	}
	return key.Clamp(), nil
}

// makeKey writes the key under another name first: the file never exists with half
// of it, and link(2) replaces none that is there.
func makeKey(path string) (key overlay.WGKey, err error) {
	rand.Read(key[:]) // never fails (crypto/rand)
	key = key.Clamp() // as `wg genkey` writes it

	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return key, err
	}
	f, err := os.CreateTemp(dir, ".wgkey-*") // mode 0600
	if err != nil {
		return key, err
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString(key.String() + "\n")
	if err == nil {
		err = f.Chmod(0o400)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return key, err
	}
	return key, os.Link(f.Name(), path)
}
