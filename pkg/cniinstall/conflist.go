package cniinstall

import (
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/twill-net/twill/manifests"
)

// The defaults of a node that has no configuration of ours or of flannel's yet, as
// the manifest says.
const (
	defaultName = "cbr0"
	defaultMode = "bridged"
)

// render returns our conflist for a network. The manifest's text stays as it is,
// but for the two values and the mark at its end.
func render(name, mode string) ([]byte, error) {
	text := manifests.Conflist()
	for _, v := range []struct{ key, was, is string }{{"name", defaultName, name}, {"mode", defaultMode, mode}} {
		quoted, err := json.Marshal(v.is)
		if err != nil {
			return nil, err
		}
		text = strings.Replace(text, fmt.Sprintf("%q: %q", v.key, v.was), fmt.Sprintf("%q: %s", v.key, quoted), 1)
	}
	text, ok := strings.CutSuffix(text, "\n}\n")
	if !ok {
		return nil, errors.New("render conflist: the manifest does not end with a brace on a line of its own")
	}
	text += ",\n  " + mark("") + "\n}\n"
	return []byte(strings.Replace(text, mark(""), mark(sum([]byte(text))), 1)), nil
}

// mark is the key by which we know a conflist as ours and unedited: the hash of the
// whole file with an empty mark. Runtimes pass over keys they do not know.
func mark(hash string) string { return fmt.Sprintf(`"twillSHA256": %q`, hash) }

func sum(content []byte) string { return fmt.Sprintf("%x", sha256.Sum256(content)) }

// untouched reports whether a conflist is as some release of ours wrote it.
func untouched(content []byte) bool {
	m := regexp.MustCompile(mark("([0-9a-f]{64})")).FindSubmatch(content)
	if m == nil {
		return false
	}
	empty := strings.Replace(string(content), string(m[0]), mark(""), 1)
	return sum([]byte(empty)) == string(m[1])
}

// network is a file of the configuration directory, as far as it matters here.
type network struct {
	file    string // without the directory
	content []byte
	name    string
	types   []string // of its plugins
	mode    string   // of Twill's plugin
	err     error    // why it is not a configuration
}

func (n network) uses(plugin string) bool { return slices.Contains(n.types, plugin) }

// networks reads the configurations in the order in which runtimes take them. It is
// all of them or an error: what is not known here, others would lose.
func networks(dir string) ([]network, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, explain("read directory "+dir, err)
	}
	var out []network
	for _, e := range entries {
		if ext := filepath.Ext(e.Name()); e.IsDir() || ext != ".conf" && ext != ".conflist" && ext != ".json" {
			continue
		}
		content, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, explain("read configurations", err)
		}
		out = append(out, parseNetwork(e.Name(), content))
	}
	slices.SortFunc(out, func(a, b network) int { return cmp.Compare(a.file, b.file) })
	return out, nil
}

func parseNetwork(name string, content []byte) network {
	n := network{file: name, content: content}
	type plugin struct{ Type, Mode string }
	var conf struct {
		Name    string
		Plugins []plugin // of a conflist
		plugin           // of a conf
	}
	n.err = json.Unmarshal(n.content, &conf)
	n.name = conf.Name
	for _, p := range append(conf.Plugins, conf.plugin) {
		if p.Type != "" {
			n.types = append(n.types, p.Type)
		}
		if p.Type == "twill" && n.mode == "" {
			n.mode = p.Mode
		}
	}
	return n
}

// choose says what the node's network is called and how its pods are wired: as our
// conflist has it already, else with the name of flannel's.
func choose(all []network, confName, mode string) (name, chosenMode string) {
	name, chosenMode = defaultName, defaultMode
	for _, n := range slices.Backward(all) {
		if n.uses("flannel") && n.name != "" {
			name = n.name
		}
	}
	for _, n := range all {
		if n.file == confName && n.uses("twill") {
			name = cmp.Or(n.name, name)
			chosenMode = cmp.Or(n.mode, chosenMode)
		}
	}
	return name, cmp.Or(mode, chosenMode)
}
