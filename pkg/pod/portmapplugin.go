package pod

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
)

// leaveFlannel takes back what flannel's conflist did for a pod and Twill's knows
// nothing of: the host ports that the plugin portmap opened, whose rules stand before
// ours and lead to the pod for ever, and the scratch file, which is how such a pod is
// told from one that never was.
func (c *Config) leaveFlannel(args *skel.CmdArgs) error {
	if c.legacy != nil { // portmap is in the conflist that the runtime calls
		return nil
	}
	scratch, err := readScratch(DefaultScratchDir, args.ContainerID)
	if err == nil && scratch == nil {
		return nil
	}
	if err == nil {
		err = c.delPortmap(args)
	}
	if err == nil {
		err = removeScratch(DefaultScratchDir, args.ContainerID)
	}
	if err != nil {
		return ioFail("take back what flannel set up for container "+args.ContainerID, err)
	}
	return nil
}

// delPortmap calls the plugin portmap as a runtime would. Without the plugin there is
// nobody who could take its rules back.
func (c *Config) delPortmap(args *skel.CmdArgs) error {
	var in struct {
		RuntimeConfig struct {
			PortMappings json.RawMessage `json:"portMappings,omitempty"`
		} `json:"runtimeConfig"`
	}
	if json.Unmarshal(args.StdinData, &in) != nil || in.RuntimeConfig.PortMappings == nil {
		return nil // no host ports
	}
	path := ""
	for _, dir := range filepath.SplitList(args.Path) {
		if _, err := os.Stat(filepath.Join(dir, "portmap")); err == nil && path == "" {
			path = filepath.Join(dir, "portmap")
		}
	}
	if path == "" {
		return nil
	}
	conf, err := json.Marshal(map[string]any{"cniVersion": "0.4.0", "name": c.Name, "type": "portmap", "runtimeConfig": in.RuntimeConfig})
	if err != nil {
		return err
	}
	var stdout bytes.Buffer
	cmd := exec.Command(path) // with our environment, which is that of a DEL
	cmd.Stdin, cmd.Stdout = bytes.NewReader(conf), &stdout
	err = cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		said := types.Error{}
		if json.Unmarshal(stdout.Bytes(), &said) == nil && said.Msg != "" {
			err = errors.New(said.Msg)
		}
	}
	if err != nil {
		return fmt.Errorf("close host ports by %s: %w", path, err)
	}
	return nil
}
