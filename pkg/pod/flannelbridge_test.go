package pod

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/nettest"
)

// debianPlugins is where Debian has bridge and host-local.
const debianPlugins = "/usr/lib/cni"

// network is a node whose pods flannel's plugin takes over from Twill: it hands our
// scratch file to the real bridge, and that the same to the real host-local.
type network struct {
	*testing.T
	host              *nettest.NS
	networks, scratch string // directories
}

func (n network) bridge(verb, id, netns string) {
	n.Helper()
	stdin, err := readScratch(n.scratch, id)
	if err != nil || stdin == nil {
		n.Fatalf("scratch file: %q, %v", stdin, err)
	}
	cmd := n.host.Command(context.Background(), filepath.Join(debianPlugins, "bridge"))
	cmd.Env = append(cmd.Env, "CNI_COMMAND="+verb, "CNI_CONTAINERID="+id, "CNI_NETNS="+netns, "CNI_IFNAME=eth0", "CNI_PATH="+debianPlugins)
	cmd.Stdin = bytes.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		n.Fatalf("bridge %s: %v: %s", verb, err, out)
	}
}

func (n network) run(at *nettest.NS, command string) string {
	n.Helper()
	words := strings.Fields(command)
	out, err := at.Run(words[0], words[1:]...)
	if err != nil {
		n.Fatal(err)
	}
	return out
}

// wiredByBridge has the real bridge make the pod.
func (n network) wiredByBridge(id string, pod *nettest.NS) {
	n.bridge("ADD", id, pod.Path)
	for command, want := range map[string]string{
		"ip -o addr show eth0":     "198.18.5.",
		"ip -o -6 addr show eth0":  "fd00:18:0:5::",
		"ip -o link show eth0":     "mtu 1450",
		"ip route show default":    "via 198.18.5.1",
		"ip -6 route show default": "via fd00:18:0:5::1",
	} {
		if out := n.run(pod, command); !strings.Contains(out, want) {
			n.Errorf("pod: %s: no %q in %q", command, want, out)
		}
	}
}

// wiredLikeTwill makes what DEL can see of a pod of Twill's: reservations as of
// host-local, a link to the bridge, and no rules of the bridge plugin.
func (n network) wiredLikeTwill(id string, pod *nettest.NS) {
	for _, a := range []string{"198.18.5.77", "fd00:18:0:5::77"} {
		dir := filepath.Join(n.networks, "cbr0")
		err := os.MkdirAll(dir, 0o755)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, a), []byte(id+"\r\neth0"), 0o600)
		}
		if err != nil {
			n.Fatal(err)
		}
	}
	n.run(n.host, "ip link add veth"+id[len(id)-1:]+" type veth peer name eth0 netns "+filepath.Base(pod.Path))
	n.run(pod, "ip addr add 198.18.5.77/24 dev eth0")
}

func (n network) clean() {
	n.Helper()
	if left := n.run(n.host, "ip -o link show type veth"); left != "" {
		n.Errorf("links left: %s", left)
	}
	for _, dir := range []string{n.networks + "/cbr0", n.scratch} {
		files, err := os.ReadDir(dir)
		if err != nil {
			n.Fatal(err)
		}
		for _, f := range files {
			if f.Name() != "lock" && !strings.HasPrefix(f.Name(), "last_reserved_ip.") {
				n.Errorf("file left: %s/%s", dir, f.Name())
			}
		}
	}
}

func TestScratchFileServesBridge(t *testing.T) {
	lab := nettest.NewT(t)
	host, err := lab.NewNS("host")
	if err != nil {
		t.Fatal(err)
	}
	// flanneld does not masquerade, so the delegate does.
	env, err := envOf(t, strings.Replace(envBoth, "IPMASQ=true", "IPMASQ=false", 1))
	if err != nil {
		t.Fatal(err)
	}
	n := network{T: t, host: host, networks: t.TempDir(), scratch: filepath.Join(t.TempDir(), "flannel")}
	conf := delegateOf(t, env, fmt.Sprintf(`{"cniVersion":"0.3.1","name":"cbr0","type":"flannel","ipam":{"dataDir":%q},"delegate":{"hairpinMode":true,"isDefaultGateway":true}}`, n.networks))
	pods := 0
	for how, wire := range map[string]func(network, string, *nettest.NS){"wired by bridge": network.wiredByBridge, "wired like Twill": network.wiredLikeTwill} {
		for state, c := range map[string]struct{ link, netns bool }{"whole": {true, true}, "link gone": {false, true}, "namespace gone": {false, false}} {
			pods++
			id := fmt.Sprintf("container-%d", pods)
			t.Run(how+", "+state, func(t *testing.T) {
				n.T = t
				pod, err := lab.NewNS(fmt.Sprintf("pod%d", pods))
				if err != nil {
					t.Fatal(err)
				}
				if err := writeScratch(n.scratch, id, conf); err != nil {
					t.Fatal(err)
				}
				wire(n, id, pod)
				if !c.link {
					n.run(pod, "ip link del eth0")
				}
				netns := ""
				if c.netns {
					netns = pod.Path
				}
				n.bridge("DEL", id, netns)
				if err := removeScratch(n.scratch, id); err != nil {
					t.Fatal(err)
				}
				n.clean()
			})
		}
	}
}

// delegateOf is what flannel's plugin makes of a configuration.
func delegateOf(t *testing.T, env SubnetEnv, stdin string) []byte {
	t.Helper()
	n, err := parseFlannel([]byte(stdin))
	if err != nil {
		t.Fatal(err)
	}
	conf, err := n.delegate(env)
	if err != nil {
		t.Fatal(err)
	}
	return conf
}
