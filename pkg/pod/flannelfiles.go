package pod

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containernetworking/cni/pkg/utils"
)

// SubnetEnv is what a subnet.env says, flanneld's or twilld's. Families are in the
// order IPv4, IPv6.
type SubnetEnv struct {
	Networks []netip.Prefix // of the cluster; more than one per family where flanneld was told so
	Subnets  []netip.Prefix // this node's, one per family: network addresses
	MTU      int            // for pods
	IPMasq   bool           // the daemon masquerades
}

// ReadSubnetEnv reads the file. The error is fs.ErrNotExist if no daemon wrote it
// yet. Nothing is guessed: a line that flannel's plugin would stumble over, or a
// family without its other half, is an error.
func ReadSubnetEnv(path string) (SubnetEnv, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return SubnetEnv{}, fmt.Errorf("read subnet file: %w: the daemon has not written it yet: see whether twilld (or flanneld) runs on this node and has a lease (netctl status)", err)
	}
	if err != nil {
		return SubnetEnv{}, fmt.Errorf("read subnet file: %w", err)
	}
	defer f.Close()
	env, err := parseEnv(f)
	if err != nil {
		return SubnetEnv{}, fmt.Errorf("read subnet file %s: %w; the daemon writes the file anew when it starts", path, err)
	}
	return env, nil
}

// envFamily holds one family's lines.
type envFamily struct {
	infix    string // of the keys
	bits     int    // of an address
	networks []netip.Prefix
	subnet   netip.Prefix
}

func parseEnv(r io.Reader) (SubnetEnv, error) {
	families := []*envFamily{{infix: "", bits: 32}, {infix: "IPV6_", bits: 128}}
	var mtu int
	var masq *bool
	lines := bufio.NewScanner(r)
	for number := 1; lines.Scan(); number++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok {
			return SubnetEnv{}, fmt.Errorf("line %d: %q: must be KEY=VALUE", number, line)
		}
		value = strings.Trim(value, `"'`)
		var err error
		switch key {
		case "FLANNEL_MTU":
			mtu, err = strconv.Atoi(value)
			if err != nil || mtu < 68 || mtu > 65535 {
				err = fmt.Errorf("%q: must be a whole number from 68 to 65535", value)
			}
		case "FLANNEL_IPMASQ":
			yes := value == "true"
			masq = &yes
			if !yes && value != "false" {
				err = fmt.Errorf("%q: must be true or false", value)
			}
		default:
			for _, f := range families {
				if err == nil {
					err = f.read(key, value)
				}
			}
		}
		if err != nil {
			return SubnetEnv{}, fmt.Errorf("line %d: %s: %w", number, key, err)
		}
	}
	if err := lines.Err(); err != nil {
		return SubnetEnv{}, err
	}
	return gather(families, mtu, masq)
}

// read takes the line if it is one of the family's.
func (f *envFamily) read(key, value string) error {
	switch key {
	case "FLANNEL_" + f.infix + "SUBNET":
		p, err := f.prefix(value)
		f.subnet = p
		return err
	case "FLANNEL_" + f.infix + "NETWORK":
		f.networks = nil
		for text := range strings.SplitSeq(value, ",") {
			p, err := f.prefix(text)
			if err != nil {
				return err
			}
			if !slices.Contains(f.networks, p) {
				f.networks = append(f.networks, p)
			}
		}
	}
	return nil
}

func (f *envFamily) prefix(text string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(strings.TrimSpace(text))
	if err != nil || p.Addr().BitLen() != f.bits || p.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("%q: must be a prefix of %d-bit addresses", text, f.bits)
	}
	return p.Masked(), nil
}

// gather says which line is missing, if one is.
func gather(families []*envFamily, mtu int, masq *bool) (SubnetEnv, error) {
	env := SubnetEnv{MTU: mtu}
	for _, f := range families {
		network, subnet := "FLANNEL_"+f.infix+"NETWORK", "FLANNEL_"+f.infix+"SUBNET"
		switch has := len(f.networks) > 0; {
		case has && !f.subnet.IsValid():
			return SubnetEnv{}, fmt.Errorf("%s is there, %s is missing", network, subnet)
		case !has && f.subnet.IsValid():
			return SubnetEnv{}, fmt.Errorf("%s is there, %s is missing", subnet, network)
		case has:
			env.Networks = append(env.Networks, f.networks...)
			env.Subnets = append(env.Subnets, f.subnet)
		}
	}
	switch {
	case len(env.Subnets) == 0:
		return SubnetEnv{}, errors.New("FLANNEL_SUBNET and FLANNEL_IPV6_SUBNET are missing, one must be there")
	case mtu == 0:
		return SubnetEnv{}, errors.New("FLANNEL_MTU is missing")
	case masq == nil:
		return SubnetEnv{}, errors.New("FLANNEL_IPMASQ is missing")
	}
	env.IPMasq = *masq
	return env, nil
}

// scratchPath is the file in which flannel's plugin remembers what it gave its
// delegate: one per container, whatever the number of its interfaces.
func scratchPath(dir, containerID string) (string, error) {
	if err := utils.ValidateContainerID(containerID); err != nil {
		return "", err
	}
	return filepath.Join(dir, containerID), nil
}

// writeScratch replaces the container's scratch file, before anything is wired: a
// pod that is half there can be removed by it. delegate is what flannel's plugin
// would give its delegate. A reader sees all of it or nothing.
// It is not forced to the disk: no pod outlives a loss of power, and DEL has a
// second source.
func writeScratch(dir, containerID string, delegate []byte) error {
	path, err := scratchPath(dir, containerID)
	if err != nil {
		return fmt.Errorf("write scratch file: %w", err)
	}
	conf, err := scratchConf(delegate)
	if err == nil {
		err = os.MkdirAll(dir, 0o700)
	}
	temp := filepath.Join(dir, "."+containerID+".tmp") // no container's name starts with a dot
	if err == nil {
		err = os.WriteFile(temp, conf, 0o600)
	}
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		return fmt.Errorf("write scratch file of container %s: %w", containerID, errors.Join(err, removeFile(temp)))
	}
	return nil
}

// readScratch returns nil if there is none: DEL came before, or ADD never did.
func readScratch(dir, containerID string) ([]byte, error) {
	path, err := scratchPath(dir, containerID)
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(path)
	if absent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read scratch file: %w", err)
	}
	return b, nil
}

// removeScratch is the last thing DEL does, and only if all else succeeded: the next
// try needs the file. flannel's plugin of old removed it first, and leaked the
// address when its delegate failed.
func removeScratch(dir, containerID string) error {
	path, err := scratchPath(dir, containerID)
	if err != nil {
		return err
	}
	if err := errors.Join(removeFile(path), removeFile(filepath.Join(dir, "."+containerID+".tmp"))); err != nil {
		return fmt.Errorf("remove scratch file: %w", err)
	}
	return nil
}

func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !absent(err) {
		return err
	}
	return nil
}

// sweepScratch removes the scratch files of a network's containers that are not to
// be kept: GC's last step. Files of other networks stay, and so do files that are
// none of flannel's.
func sweepScratch(dir, network string, keep func(containerID string) bool) error {
	files, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var failed []error
	for _, f := range files {
		if !f.Type().IsRegular() || keep(f.Name()) || utils.ValidateContainerID(f.Name()) != nil {
			continue
		}
		var was struct {
			Name string `json:"name"`
		}
		b, err := readScratch(dir, f.Name())
		if err == nil && json.Unmarshal(b, &was) == nil && was.Name == network {
			err = removeScratch(dir, f.Name())
		}
		failed = append(failed, err)
	}
	if err := errors.Join(append(failed, err)...); err != nil {
		return fmt.Errorf("sweep scratch files: %w", err)
	}
	return nil
}
