package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

type object = map[string]any

const scratchDir = "/var/lib/cni/flannel"

// plugin is flannel's CNI plugin. It returns the exit code.
func plugin() int {
	code, err := delegate()
	if err != nil {
		_ = json.NewEncoder(os.Stdout).Encode(object{"cniVersion": "0.3.1", "code": 100, "msg": err.Error()})
		return 1
	}
	return code
}

func delegate() (int, error) {
	command := os.Getenv("CNI_COMMAND")
	input, err := io.ReadAll(os.Stdin)
	if err != nil {
		return 0, err
	}
	scratch := filepath.Join(scratchDir, os.Getenv("CNI_CONTAINERID"))
	var conf []byte
	switch command {
	case "VERSION":
		return 0, json.NewEncoder(os.Stdout).Encode(object{"cniVersion": "1.1.0", "supportedVersions": []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"}})
	case "ADD":
		if conf, err = delegateConf(input); err != nil {
			return 0, err
		}
		if err := os.MkdirAll(scratchDir, 0o700); err != nil {
			return 0, err
		}
		if err := os.WriteFile(scratch, conf, 0o600); err != nil {
			return 0, err
		}
	case "DEL":
		conf, err = os.ReadFile(scratch)
		if errors.Is(err, fs.ErrNotExist) {
			return 0, nil
		}
		if err != nil {
			return 0, err
		}
		defer os.Remove(scratch) // whatever comes of it, as flannel's does
	default:
		return 0, nil
	}
	var to struct{ Type string }
	if err := json.Unmarshal(conf, &to); err != nil {
		return 0, err
	}
	cmd := exec.Command(filepath.Join(filepath.Dir(os.Args[0]), to.Type))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(conf), os.Stdout, os.Stderr
	err = cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return exit.ExitCode(), nil // it has said why
	}
	return 0, err
}

// delegateConf is the configuration of the plugin that does the work.
func delegateConf(input []byte) ([]byte, error) {
	var in struct {
		Name, CNIVersion string
		Delegate         object
		RuntimeConfig    object
	}
	if err := json.Unmarshal(input, &in); err != nil {
		return nil, err
	}
	text, err := os.ReadFile("/run/flannel/subnet.env")
	if err != nil {
		return nil, fmt.Errorf("loadFlannelSubnetEnv failed: %w", err)
	}
	env := map[string]string{}
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		env[key] = value
	}
	d := in.Delegate
	if d == nil {
		d = object{}
	}
	var ranges [][]object
	var routes []object
	for _, v6 := range []string{"", "IPV6_"} {
		if env["FLANNEL_"+v6+"SUBNET"] == "" {
			continue
		}
		subnet, err := netip.ParsePrefix(env["FLANNEL_"+v6+"SUBNET"])
		if err != nil {
			return nil, err
		}
		ranges = append(ranges, []object{{"subnet": subnet.Masked()}})
		routes = append(routes, object{"dst": env["FLANNEL_"+v6+"NETWORK"]})
	}
	var mtu int
	if _, err := fmt.Sscan(env["FLANNEL_MTU"], &mtu); err != nil {
		return nil, fmt.Errorf("read FLANNEL_MTU: %w", err)
	}
	defaults := object{"type": "bridge", "mtu": mtu, "ipMasq": env["FLANNEL_IPMASQ"] != "true", "isGateway": true}
	for key, value := range defaults {
		if _, given := d[key]; !given {
			d[key] = value
		}
	}
	d["name"], d["cniVersion"] = in.Name, in.CNIVersion
	d["ipam"] = object{"type": "host-local", "ranges": ranges, "routes": routes}
	if in.RuntimeConfig != nil {
		d["runtimeConfig"] = in.RuntimeConfig
	}
	return json.Marshal(d)
}
