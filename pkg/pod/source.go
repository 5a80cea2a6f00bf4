package pod

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/twill-net/twill/pkg/ipam"
)

// legacy is what makes a pod flannel's too, if the network configuration is of
// "type": "flannel".
type legacy struct {
	net      flannelNet
	delegate []byte // for the scratch file
}

// readConf reads a network configuration, Twill's own or flannel's, for the verbs
// that need all of it.
func readConf(args *skel.CmdArgs) (*Config, error) {
	if !isFlannel(args.StdinData) {
		return ParseConfig(args.StdinData)
	}
	net, err := parseFlannel(args.StdinData)
	if err != nil {
		return nil, fail(types.ErrInvalidNetworkConfig, "%v", err)
	}
	env, err := ReadSubnetEnv(net.SubnetFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fail(types.ErrTryAgainLater, "%v", err)
	}
	if err != nil {
		return nil, badFile(err)
	}
	delegate, err := net.delegate(env)
	if err != nil {
		return nil, fail(types.ErrInvalidNetworkConfig, "%v", err)
	}
	native, err := net.addConf(delegate)
	if err != nil {
		return nil, fail(types.ErrInvalidNetworkConfig, "%v", err)
	}
	c, err := ParseConfig(native)
	if err != nil {
		return nil, err
	}
	c.asFlannel(legacy{net, delegate})
	return c, nil
}

// readBasics is readConf for DEL: a pod must be removable with the very
// configuration that ADD refused.
func readBasics(args *skel.CmdArgs) (*Config, fields, error) {
	if !isFlannel(args.StdinData) {
		return parseBasics(args.StdinData)
	}
	net, err := parseFlannel(args.StdinData)
	if err != nil {
		return nil, nil, fail(types.ErrInvalidNetworkConfig, "%v", err)
	}
	var scratch []byte
	if args.ContainerID != "" { // GC has none
		if scratch, err = readScratch(net.ScratchDir, args.ContainerID); err != nil {
			return nil, nil, ioFail("read what flannel's plugin kept of the container", err)
		}
	}
	native, err := net.delConf(scratch)
	if err != nil {
		return nil, nil, fail(types.ErrInvalidNetworkConfig, "flannel's network configuration: %v", err)
	}
	c, f, err := parseBasics(native)
	if err != nil {
		return nil, nil, err
	}
	c.asFlannel(legacy{net: net})
	return c, f, nil
}

func isFlannel(stdin []byte) bool {
	var conf struct{ Type string }
	return json.Unmarshal(stdin, &conf) == nil && conf.Type == "flannel"
}

func (c *Config) asFlannel(l legacy) {
	c.legacy = &l
	c.HandoffFile = filepath.Join(filepath.Dir(l.net.SubnetFile), filepath.Base(DefaultHandoff))
}

// handoff is what the daemon says of this node: in its own file, or, for flannel's
// configuration, in subnet.env.
func (c *Config) handoff() (Handoff, error) {
	own, err := ReadHandoff(c.HandoffFile)
	if c.legacy == nil {
		return own, err
	}
	env, err := ReadSubnetEnv(c.legacy.net.SubnetFile)
	if err != nil {
		return Handoff{}, err
	}
	return Handoff{
		Version: handoffVersion, Networks: env.Networks, Subnets: env.Subnets, MTU: env.MTU, IPMasq: env.IPMasq,
		Firewall: own.Firewall,
	}, nil
}

// keepScratch writes down for flannel's plugin how to remove the pod, in case the
// node goes back to it: the delegate's configuration, to which it hands the DEL. For a
// pod of Twill's own configuration that is this plugin.
func (c *Config) keepScratch(rec Record) error {
	if rec.Scratch == "" {
		return nil
	}
	if c.legacy != nil {
		return writeScratch(rec.Scratch, rec.ContainerID, c.legacy.delegate)
	}
	own, err := json.Marshal(map[string]string{"cniVersion": c.CNIVersion, "name": c.Name, "type": "twill", "dataDir": c.DataDir, "bridge": c.Bridge})
	if err != nil {
		return err
	}
	return writeScratch(rec.Scratch, rec.ContainerID, own)
}

// scratchDir is where flannel's plugin keeps its scratch files; empty if there never
// was one on this node.
func (c *Config) scratchDir() string {
	if c.legacy != nil {
		return c.legacy.net.ScratchDir
	}
	if _, err := os.Stat(DefaultScratchDir); err != nil {
		return ""
	}
	return DefaultScratchDir
}

// dropScratch forgets what keepScratch, or flannel's plugin, wrote down.
func (c *Config) dropScratch(rec Record) error {
	dir := rec.Scratch
	if c.legacy != nil {
		dir = c.legacy.net.ScratchDir
	}
	if dir == "" {
		return nil
	}
	return removeScratch(dir, rec.ContainerID)
}

func (c *Config) collectScratch() error {
	if c.legacy == nil {
		return nil
	}
	return sweepScratch(c.legacy.net.ScratchDir, c.Name, func(id string) bool {
		return slices.ContainsFunc(c.Valid, func(o ipam.Owner) bool { return o.ContainerID == id })
	})
}
