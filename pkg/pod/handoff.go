package pod

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/twill-net/twill/pkg/overlay"
)

// DefaultHandoff is where twilld leaves the hand-off: beside subnet.env.
const DefaultHandoff = "/run/flannel/twill.json"

// handoffVersion is the version of the file that this release writes and reads.
const handoffVersion = 1

// Handoff is all that the plugin needs to know of the overlay. The daemon writes
// it after its first complete pass; from then on pods are wired without the
// daemon and without the store.
type Handoff struct {
	Version  int            `json:"version"`
	Networks []netip.Prefix `json:"networks"`           // the cluster's pod networks
	Subnets  []netip.Prefix `json:"subnets"`            // this node's share, at most one per family
	MTU      int            `json:"mtu"`                // for pods: what the overlay carries unfragmented
	IPMasq   bool           `json:"ipMasq"`             // the daemon masquerades what leaves the cluster
	Firewall overlay.Tool   `json:"firewall,omitempty"` // where the daemon has its rules; of iptables, the flavour
}

// validate returns an error that names the first wrong field.
func (h Handoff) validate() error {
	if h.Version != handoffVersion {
		return fmt.Errorf("version %d: this release of Twill knows version %d only; install twilld and the twill plugin of one release", h.Version, handoffVersion)
	}
	if len(h.Subnets) == 0 {
		return errors.New("subnets: empty, must hold this node's subnet")
	}
	if len(h.Networks) == 0 {
		return errors.New("networks: empty, must hold the cluster's pod networks")
	}
	families := map[int]bool{}
	for _, p := range h.Subnets {
		if err := checkPrefix("subnets", p); err != nil {
			return err
		}
		size := p.Addr().BitLen()
		if p.Bits() > size-2 {
			return fmt.Errorf("subnets: %s is too small, must be /%d or wider", p, size-2)
		}
		if families[size] {
			return fmt.Errorf("subnets: %s is the second of its family, must be one each", p)
		}
		families[size] = true
	}
	for _, p := range h.Networks {
		if err := checkPrefix("networks", p); err != nil {
			return err
		}
	}
	if low := minMTU(h.Subnets); h.MTU < low || h.MTU > maxMTU {
		return fmt.Errorf("mtu: %d, must be from %d to %d", h.MTU, low, maxMTU)
	}
	return nil
}

func checkPrefix(key string, p netip.Prefix) error {
	if !p.IsValid() || p.Addr().Is4In6() || p != p.Masked() {
		return fmt.Errorf("%s: %q is not the network address of a subnet", key, p)
	}
	return nil
}

const maxMTU = 65535

// minMTU is the least MTU that IPv4 (RFC 791) or IPv6 (RFC 8200) works with.
func minMTU(subnets []netip.Prefix) int {
	for _, p := range subnets {
		if p.Addr().Is6() {
			return 1280
		}
	}
	return 68
}

// Equal reports whether two hand-offs say the same, of whatever version.
func (h Handoff) Equal(o Handoff) bool {
	return slices.Equal(h.Networks, o.Networks) && slices.Equal(h.Subnets, o.Subnets) && h.MTU == o.MTU && h.IPMasq == o.IPMasq && h.Firewall == o.Firewall
}

// WriteHandoff replaces the file at path. A reader, or a node that loses power,
// sees the old content or the new, never a part. There must be one writer.
func WriteHandoff(path string, h Handoff) error {
	h.Version = handoffVersion
	if err := h.validate(); err != nil {
		return fmt.Errorf("write hand-off: %w", err)
	}
	b, err := json.MarshalIndent(h, "", "  ")
	if err != nil {
		return fmt.Errorf("write hand-off: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("write hand-off: %w", err)
	}
	if err := ReplaceFile(path, append(b, '\n'), 0o644); err != nil {
		return fmt.Errorf("write hand-off: %w", err)
	}
	return nil
}

// ReplaceFile puts content in place of the file at path, whole or not at all. There
// must be one writer.
func ReplaceFile(path string, content []byte, mode os.FileMode) error {
	temp := path + ".tmp"
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	return nil
}

// ReadHandoff returns the hand-off at path. The error is fs.ErrNotExist if there
// is none yet.
func ReadHandoff(path string) (Handoff, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return Handoff{}, fmt.Errorf("read hand-off: %w", err)
	}
	h, err := parseHandoff(b)
	if err != nil {
		return Handoff{}, fmt.Errorf("read hand-off %s: %w; twilld writes it anew when it starts", path, err)
	}
	return h, nil
}

func parseHandoff(b []byte) (Handoff, error) {
	var v struct {
		Version int `json:"version"`
	}
	// The version first: what the other fields mean, only a known version says.
	if err := json.Unmarshal(b, &v); err != nil {
		return Handoff{}, err
	}
	if v.Version != handoffVersion {
		return Handoff{}, Handoff{Version: v.Version}.validate()
	}
	var h Handoff
	if err := json.Unmarshal(b, &h); err != nil {
		return Handoff{}, err
	}
	return h, h.validate()
}
