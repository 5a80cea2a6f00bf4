package e2e

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// copySource copies the source, without what was built from it, and the packages of
// Debian's that make image has fetched before.
func copySource(t *testing.T, to string) {
	t.Helper()
	script := `mkdir -p "$1/build/image" && cd .. &&
		for d in build/image/debian-*; do [ ! -d "$d" ] || cp -a "$d" "$1/build/image"; done &&
		git ls-files -z --cached --others --exclude-standard | while IFS= read -rd '' f; do [ ! -e "$f" ] || printf '%s\0' "$f"; done |
			tar --null --files-from=- --create | tar --extract --directory "$1"`
	if out, err := exec.Command("bash", "-ec", script, "bash", to).CombinedOutput(); err != nil {
		t.Fatalf("copy the source: %v: %s", err, out)
	}
}

// makeImage runs make image on the source in dir.
func makeImage(t *testing.T, dir, version string) (file string, content []byte) {
	t.Helper()
	file = filepath.Join(dir, "twill.tar")
	cmd := exec.Command("make", "image", "IMAGE="+file, "VERSION="+version, "SOURCE_DATE_EPOCH=1700000000")
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("make image: %v: %s", err, out)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	t.Log(strings.Join(lines[max(0, len(lines)-2):], "\n"))
	content, err = os.ReadFile(file)
	must(t, err)
	return file, content
}

// TestImage makes Twill's image twice, in different places, and has containerd run
// what is in it.
func TestImage(t *testing.T) {
	const version = "v0.0.0-e2e"
	here, elsewhere := filepath.Join(t.TempDir(), "here"), filepath.Join(t.TempDir(), "some", "where", "else")
	copySource(t, here)
	if out, err := exec.Command("sh", "-c", `mkdir -p "$2" && cp -a "$1/." "$2"`, "sh", here, elsewhere).CombinedOutput(); err != nil {
		t.Fatalf("copy the copy: %v: %s", err, out)
	}
	file, first := makeImage(t, here, version)
	if _, second := makeImage(t, elsewhere, version); !bytes.Equal(first, second) {
		t.Error("two images of the same source differ")
	}

	_, runtimes, _ := newRuntimes(t, 1)
	r := runtimes[0]
	_, err := r.Ctr("images", "import", file)
	must(t, err)
	const ref = "localhost/twill:" + version
	if out, err := r.Ctr("images", "ls", "-q"); err != nil || !slices.Contains(strings.Fields(out), ref) {
		t.Fatalf("%s is not among the images: %s, %v", ref, out, err)
	}
	// As the DaemonSet's container: on the node's network, with these capabilities,
	// and with a root directory that nobody writes to.
	run := func(args ...string) string {
		t.Helper()
		options := []string{
			"run", "--rm", "--net-host", "--read-only", "--cgroup", r.cgroup + "/image",
			"--mount", "type=bind,src=/run,dst=/run,options=rbind:rw", "--cap-add", "CAP_NET_ADMIN", "--cap-add", "CAP_NET_RAW", ref, "image",
		}
		out, err := r.Ctr(append(options, args...)...)
		must(t, err)
		return strings.TrimSpace(out)
	}
	for _, v := range []struct {
		command string
		want    string // in what it prints
	}{
		{"twilld --version", "twilld " + version},
		{"netctl version", "netctl " + version},
		{"nft --version", "nftables v"},
		{"iptables --version", "(nf_tables)"},
		{"iptables-nft --version", "(nf_tables)"},
		{"iptables-nft-restore --version", "(nf_tables)"},
		{"iptables-nft-save --version", "(nf_tables)"},
		{"ip6tables-nft --version", "ip6tables v"},
		{"iptables-legacy --version", "(legacy)"},
		{"iptables-legacy-restore --version", "(legacy)"},
		{"iptables-legacy-save --version", "(legacy)"},
		{"ip6tables-legacy --version", "(legacy)"},
		// Extensions and protocols are there, and the node's tables are seen.
		{"iptables-nft -t nat -A POSTROUTING -p tcp -m mark --mark 0x4000/0x4000 -m comment --comment x -j MASQUERADE --random-fully", ""},
		{"iptables-nft-save -t nat", "-j MASQUERADE --random-fully"},
		{"ip6tables-legacy -t nat -A POSTROUTING -p ipv6-icmp -m conntrack --ctstate DNAT -j MASQUERADE", ""},
		{"ip6tables-legacy-save", "-p ipv6-icmp"},
		{"nft list ruleset", "table ip nat"},
		{"twilld install-cni --help", "install-cni"},
	} {
		if out := run(strings.Fields(v.command)...); !strings.Contains(out, v.want) {
			t.Errorf("%s: %s, want %q", v.command, out, v.want)
		}
	}
}
