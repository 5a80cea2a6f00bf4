package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/santhosh-tekuri/jsonschema/v6"
)

// inEachWay runs a test at each version of the specification that runtimes in use
// speak, with each way to wire a pod: by Twill's configuration and by flannel's, on a
// bridge and without.
func inEachWay(t *testing.T, test func(t *testing.T, h *host, v string)) {
	for _, v := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		for name, set := range map[string]func(*host){
			"bridged":        func(h *host) { h.conf["routes"] = tunedRoute() },
			"routed":         func(h *host) { h.conf["mode"], h.conf["routes"] = "routed", tunedRoute() },
			"flannel":        func(h *host) { h.useFlannel("bridge") },
			"flannel by ptp": func(h *host) { h.useFlannel("ptp") },
		} {
			t.Run(v+" "+name, func(t *testing.T) {
				t.Parallel()
				h := newHost(t)
				set(h)
				delete(h.conf, "cniVersion")
				delete(h.conf, "name")
				test(t, h, v)
			})
		}
	}
}

// tunedRoute has what version 1.1.0 alone has words for.
func tunedRoute() any {
	return []any{map[string]any{"dst": "203.0.113.0/24", "mtu": 1400, "advmss": 1300, "priority": 7}}
}

func (h *host) file(name string) string { return filepath.Join(h.dir, name) }

// write makes a file, and the directories above it.
func (h *host) write(name, text string) error {
	return errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(text), 0o644))
}

// subnetEnv is what flanneld leaves for this node.
var subnetEnv = strings.Join([]string{
	"FLANNEL_NETWORK=198.18.0.0/16", "FLANNEL_SUBNET=198.18.1.1/24", "FLANNEL_IPV6_NETWORK=fd00:18::/48", "FLANNEL_IPV6_SUBNET=fd00:18:0:1::1/64",
	"FLANNEL_MTU=1450", "FLANNEL_IPMASQ=true", "",
}, "\n")

// asFlannel gives the call a configuration of flannel's plugin.
func (h *host) asFlannel(c call) call {
	return c.with("type", "flannel").with("handoffFile", nil).with("subnetFile", h.file("run/subnet.env")).
		with("dataDir", h.file("scratch")).with("ipam", map[string]any{"dataDir": h.conf["dataDir"]})
}

// useFlannel gives the node flannel's configuration, and the daemon's file for it.
func (h *host) useFlannel(delegate string) {
	h.t.Helper()
	if err := h.write(h.file("run/subnet.env"), subnetEnv); err != nil {
		h.t.Fatal(err)
	}
	h.conf = h.asFlannel(call{conf: h.conf}).with("delegate", map[string]any{"type": delegate, "isDefaultGateway": true}).conf
	delete(h.conf, "handoffFile")
}

// conflist is a network configuration list, as it lies in /etc/cni/net.d.
func (h *host) conflist(v string, chained ...map[string]any) []byte {
	h.t.Helper()
	list, err := json.Marshal(map[string]any{"cniVersion": v, "name": "cbr0", "plugins": append([]map[string]any{h.conf}, chained...)})
	if err != nil {
		h.t.Fatal(err)
	}
	return list
}

// pluginPath holds the binary under the names that configurations call it, and the
// plugins of Debian.
func pluginPath(t *testing.T) []string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"twill", "flannel"} {
		if err := os.Symlink(filepath.Join(plugins, "twill"), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return []string{dir, referencePlugins}
}

// validate compares what the plugin printed with a definition of the version's schema.
func validate(t *testing.T, v, definition string, printed []byte) {
	t.Helper()
	if err := schemaError(v, definition, printed); err != nil {
		t.Errorf("%s of version %s: %v: %s", definition, v, err, printed)
	}
}

func schemaError(v, definition string, printed []byte) error {
	c := jsonschema.NewCompiler()
	c.AssertFormat()
	schema, err := c.Compile("testdata/schema/" + v + ".json#/$defs/" + definition)
	if err != nil {
		return err
	}
	value, err := jsonschema.UnmarshalJSON(bytes.NewReader(printed))
	if err != nil {
		return err
	}
	return schema.Validate(value)
}

// driver is libcni, which drives plugins in the host's namespace as runtimes do. It
// keeps what the first plugin of a list prints.
type driver struct {
	*host
	invoke.RawExec
	version.PluginDecoder
	cni     *libcni.CNIConfig
	list    *libcni.NetworkConfigList
	printed map[string][]byte // by verb
}

func newDriver(t *testing.T, h *host, conflist []byte) *driver {
	t.Helper()
	d := &driver{host: h, printed: map[string][]byte{}}
	d.Stderr = &bytes.Buffer{}
	d.cni = libcni.NewCNIConfigWithCacheDir(pluginPath(t), h.file("cache"), d)
	var err error
	if d.list, err = libcni.NetworkConfFromBytes(conflist); err != nil {
		t.Fatal(err)
	}
	return d
}

func (d *driver) ExecPlugin(ctx context.Context, path string, stdin []byte, env []string) (out []byte, err error) {
	err = d.do(func() (err error) { out, err = d.RawExec.ExecPlugin(ctx, path, stdin, env); return err })
	for _, e := range env {
		verb, ok := strings.CutPrefix(e, "CNI_COMMAND=")
		if ok && (filepath.Base(path) == "twill" || filepath.Base(path) == "flannel") {
			d.printed[verb] = out
		}
	}
	return out, err
}

// run has libcni do a verb.
func (d *driver) run(verb string, p *namespace) error {
	ctx, rt := d.t.Context(), &libcni.RuntimeConf{ContainerID: "c", NetNS: p.path(), IfName: "eth0", CapabilityArgs: capabilityArgs()}
	switch verb {
	case "ADD":
		_, err := d.cni.AddNetworkList(ctx, d.list, rt)
		return err
	case "CHECK":
		return d.cni.CheckNetworkList(ctx, d.list, rt)
	case "DEL":
		return d.cni.DelNetworkList(ctx, d.list, rt)
	case "STATUS":
		return d.cni.GetStatusNetworkList(ctx, d.list)
	case "GC of others":
		return d.cni.GCNetworkList(ctx, d.list, &libcni.GCArgs{ValidAttachments: []types.GCAttachment{{ContainerID: "c", IfName: "eth0"}}})
	case "GC":
		return d.cni.GCNetworkList(ctx, d.list, &libcni.GCArgs{ValidAttachments: []types.GCAttachment{}})
	}
	return errors.New("no such verb: " + verb)
}

// call is run, and a success that only ADD prints something of.
func (d *driver) call(verb string, p *namespace) {
	d.t.Helper()
	clear(d.printed)
	if err := d.run(verb, p); err != nil {
		d.t.Fatalf("%s: %v", verb, err)
	}
	for asked, out := range d.printed {
		if asked != "ADD" && len(out) > 0 {
			d.t.Errorf("%s prints %s", asked, out)
		}
	}
	if errs := d.Stderr.(*bytes.Buffer); errs.Len() > 0 {
		d.t.Errorf("%s writes to standard error: %s", verb, errs)
	}
}

// check is CHECK, which libcni does not ask for before version 0.4.0.
func (d *driver) check(p *namespace, v string) {
	d.t.Helper()
	if v >= "0.4.0" {
		d.call("CHECK", p)
	} else if err := d.run("CHECK", p); err == nil || !strings.Contains(err.Error(), "does not support the CHECK command") {
		d.t.Errorf("CHECK: %v", err)
	}
}

func TestLibcni(t *testing.T) {
	inEachWay(t, func(t *testing.T, h *host, v string) {
		p := newNamespace(t)
		d := newDriver(t, h, h.conflist(v))
		info, err := d.cni.GetVersionInfo(t.Context(), d.list.Plugins[0].Network.Type)
		if err != nil || strings.Join(info.SupportedVersions(), " ") != "0.1.0 0.2.0 0.3.0 0.3.1 0.4.0 1.0.0 1.1.0" {
			t.Errorf("versions %v, %v", info, err)
		}
		validate(t, v, "info", d.printed["VERSION"])

		d.call("STATUS", p)
		d.call("ADD", p)
		validate(t, v, "result", d.printed["ADD"])
		h.sameInKernel(p, d.printed["ADD"])
		d.check(p, v)
		d.call("GC of others", p)
		d.check(p, v)
		h.refusals(p, v)
		d.call("GC", p)
		h.spotless(p)
		for _, verb := range []string{"ADD", "DEL", "DEL"} {
			d.call(verb, p)
		}
		h.spotless(p)
	})
}

// refusals has the plugin refuse verbs that the version does not know, and a bad
// value. It says so in the version's own words.
func (h *host) refusals(p *namespace, v string) {
	h.t.Helper()
	asked := func(verb string) call {
		return call{verb: verb, id: "c"}.on(p).with("cniVersion", v).with("name", "cbr0")
	}
	refused := func(c call, code uint, word string) {
		h.t.Helper()
		cmd := h.command(c)
		var out bytes.Buffer
		cmd.Stdout = &out
		if err := h.do(cmd.Run); !errors.As(err, new(*exec.ExitError)) {
			h.t.Errorf("%s: %v", c.verb, err)
		}
		validate(h.t.(*testing.T), v, "error", out.Bytes())
		h.fails(c, code, word)
	}
	for verb, since := range map[string]string{"CHECK": "0.4.0", "STATUS": "1.1.0", "GC": "1.1.0"} {
		if v < since {
			refused(asked(verb), types.ErrIncompatibleCNIVersion, verb)
		}
	}
	refused(asked("ADD").with("name", "a b"), types.ErrInvalidNetworkConfig, "a b")
}

// spotless wants nothing to be left of a pod.
func (h *host) spotless(p *namespace) {
	h.t.Helper()
	conf := h.conf
	for _, dir := range []string{"networks", "scratch"} {
		h.conf = maps.Clone(conf)
		h.conf["dataDir"] = h.file(dir)
		h.clean()
	}
	h.conf = conf
	if got := p.links(); got != "lo" {
		h.t.Errorf("links in the pod: %s", got)
	}
}

// cnitool is the reference runtime.
type cnitool struct {
	*host
	binary, cache string
	path          []string
}

func (c cnitool) call(verb string, p *namespace) (string, error) {
	// Its cache is always in /var/lib/cni: here, in a mount namespace, the test's own.
	inside := `mkdir -p /var/lib/cni && mount --bind "$0" /var/lib/cni && exec "$@"`
	cmd := exec.Command("unshare", "-m", "sh", "-c", inside, c.cache, c.binary, verb, "cbr0", p.path())
	cmd.Env = []string{"NETCONFPATH=" + c.file("net.d"), "CNI_PATH=" + strings.Join(c.path, ":"), "PATH=" + os.Getenv("PATH")}
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	err := c.do(cmd.Start)
	if err == nil {
		err = cmd.Wait()
	}
	return strings.TrimSpace(out.String()), err
}

func TestCnitoolVersions(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "cnitool")
	if out, err := exec.Command("go", "build", "-o", binary, "github.com/containernetworking/cni/cnitool").CombinedOutput(); err != nil {
		t.Fatalf("build cnitool: %v\n%s", err, out)
	}
	inEachWay(t, func(t *testing.T, h *host, v string) {
		p := newNamespace(t)
		if err := h.write(h.file("net.d/10-twill.conflist"), string(h.conflist(v))); err != nil {
			t.Fatal(err)
		}
		tool := cnitool{h, binary, t.TempDir(), pluginPath(t)}
		for _, verb := range []string{"status", "add", "check", "gc", "status", "add", "check", "del", "del"} {
			out, err := tool.call(verb, p)
			switch {
			case verb == "check" && v < "0.4.0":
				if err == nil || !strings.Contains(out, "does not support the CHECK command") {
					t.Errorf("check: %v: %s", err, out)
				}
			case err != nil:
				t.Fatalf("%s: %v: %s", verb, err, out)
			case verb == "add":
				validate(t, v, "result", []byte(out))
				h.sameInKernel(p, []byte(out))
			case out != "":
				t.Errorf("%s prints %s", verb, out)
			}
			if verb == "gc" {
				h.spotless(p)
			}
		}
		h.spotless(p)
	})
}
