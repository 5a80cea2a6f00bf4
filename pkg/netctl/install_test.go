package netctl

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestInstallPrint: without a cluster netctl prints what it would apply.
func TestInstallPrint(t *testing.T) {
	plain, err := os.ReadFile("../../manifests/twill.yaml")
	if err != nil {
		t.Fatal(err)
	}
	values := filepath.Join(t.TempDir(), "v.yaml")
	if err := os.WriteFile(values, []byte("twill: {vni: 7, backend: host-gw}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args, version string
		has, lacks    []string
	}{
		{"", "devel", []string{string(plain)}, nil},
		{"", "v1.2.3", []string{`image: "localhost/twill:v1.2.3"`}, []string{"twill:devel"}},
		{"--image [2001:db8::1]:5000/a/twill:v9", "v1.2.3", []string{`image: "[2001:db8::1]:5000/a/twill:v9"`}, []string{"v1.2.3"}},
		{"--set twill.image.tag=x", "v1.2.3", []string{`image: "localhost/twill:x"`}, []string{"v1.2.3"}},
		{"--pod-cidr 10.1.0.0/16 --pod-cidr-v6 fd00::/48", "devel", []string{`"Network": "10.1.0.0/16"`, `"IPv6Network": "fd00::/48"`}, nil},
		{"--pod-cidr-v6 fd00::/48", "devel", []string{`"EnableIPv4": false`}, []string{`"Network"`}},
		{"-f " + values + " --set twill.vni=8 --backend vxlan", "devel", []string{`"VNI": 8`, `"Type": "vxlan"`}, nil},
		{"--namespace net --api-server [2001:db8::10]:6443", "devel", []string{"namespace: net", `value: "2001:db8::10"`, `value: "6443"`}, []string{"twill-system"}},
	} {
		var out, errs strings.Builder
		p := Program{Version: tt.version, Stdout: &out, Stderr: &errs}
		if code := p.Run(t.Context(), append([]string{"install", "--print"}, strings.Fields(tt.args)...)); code != exitFine {
			t.Errorf("%s: exit code %d: %s", tt.args, code, errs.String())
		}
		for _, want := range tt.has {
			if !strings.Contains(out.String(), want) {
				t.Errorf("%s: lacks %q", tt.args, want)
			}
		}
		for _, bad := range tt.lacks {
			if strings.Contains(out.String(), bad) {
				t.Errorf("%s: has %q", tt.args, bad)
			}
		}
	}
}

// TestClusterErrors: a wrong command line is an error that names flag and remedy, and
// nothing is printed.
func TestClusterErrors(t *testing.T) {
	t.Setenv("KUBECONFIG", "")
	t.Setenv("HOME", t.TempDir())
	for args, want := range map[string]string{
		"install":                                "read kubeconfig: ",
		"install --kubeconfig /none":             "/none",
		"install --print --image twill":          "--image twill: must name a tag, too",
		"install --print --api-server here":      "--api-server here: must be host:port",
		"install --print --set a":                "--set a: ",
		"install --print --set twill.x=1":        "additional properties 'x' not allowed",
		"install --print -f /none":               "read values: open /none",
		"install --print --backend nothing":      "twill/backend",
		"install --dry-run=client":               "must be one of none, server",
		"uninstall":                              "read kubeconfig: ",
		"uninstall now":                          "takes no argument",
		"migrate-from-flannel":                   "read kubeconfig: ",
		"migrate-from-flannel --finish --back":   "--finish --back: give one of them",
		"migrate-from-flannel --finish --node a": "leave --node out",
	} {
		var out, errs strings.Builder
		code := Program{Version: "devel", Stdout: &out, Stderr: &errs}.Run(t.Context(), strings.Fields(args))
		if code != exitUnknown || !strings.Contains(errs.String(), want) || out.Len() > 0 {
			t.Errorf("%s: exit code %d, stderr %q, want %q", args, code, errs.String(), want)
		}
	}
}
