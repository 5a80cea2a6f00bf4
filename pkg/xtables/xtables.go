// Package xtables knows the two flavours of iptables and their commands. They hold
// their rules in different places, and packets pass both. A node should use one: a
// packet that one of them accepts, the other may drop. Package kernel chooses it.
package xtables

import (
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/twill-net/twill/pkg/overlay"
)

// Flavour is a flavour of iptables, as its commands are named after it
// (iptables-nft). The zero value is whatever flavour the command iptables is of.
type Flavour string

// The two flavours.
const (
	Legacy Flavour = "legacy"
	Nft    Flavour = "nft"
)

// Other returns the other flavour.
func (v Flavour) Other() Flavour {
	if v == Legacy {
		return Nft
	}
	return Legacy
}

// Tool names v where it matters which flavour is meant.
func (v Flavour) Tool() overlay.Tool {
	switch v {
	case Legacy:
		return overlay.IptablesLegacy
	case Nft:
		return overlay.IptablesNft
	}
	return overlay.Iptables
}

// OfTool is the reverse of Tool.
func OfTool(t overlay.Tool) Flavour {
	return Flavour(strings.TrimPrefix(strings.TrimPrefix(string(t), string(overlay.Iptables)), "-"))
}

// Plain returns iptables or ip6tables.
func Plain(f overlay.Family) string {
	if f == overlay.IPv6 {
		return "ip6tables"
	}
	return "iptables"
}

// Of asks an iptables command for its flavour. Those before 1.8 know but the legacy
// one and do not name it.
func Of(path string) (Flavour, error) {
	out, err := exec.Command(path, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("run %s --version: %w", path, err)
	}
	if strings.Contains(string(out), "(nf_tables)") {
		return Nft, nil
	}
	return Legacy, nil
}

// System returns the flavour of the command iptables, or of ip6tables if there is
// only that; without either, the zero value.
func System() (Flavour, error) {
	for _, f := range []overlay.Family{overlay.IPv4, overlay.IPv6} {
		if path, err := exec.LookPath(Plain(f)); err == nil {
			return Of(path)
		}
	}
	return "", nil
}

// Named reports whether the node has all three commands that are named after the
// flavour.
func (v Flavour) Named(f overlay.Family) bool {
	for _, suffix := range []string{"", "-restore", "-save"} {
		if _, err := exec.LookPath(Plain(f) + "-" + string(v) + suffix); err != nil {
			return false
		}
	}
	return v != ""
}

// Command returns the name of the flavour's command for a family; -restore and -save
// go behind it. Not every system names its commands after their flavour, and on one
// that does not, iptables may be of the other flavour, which is an error.
func (v Flavour) Command(f overlay.Family) (string, error) {
	plain := Plain(f)
	if v == "" {
		return plain, nil
	}
	if v.Named(f) {
		return plain + "-" + string(v), nil
	}
	path, err := exec.LookPath(plain)
	if err != nil {
		return "", fmt.Errorf("find %s: %w: install the iptables package", plain, err)
	}
	if got, err := Of(path); err != nil || got == v {
		return plain, err
	}
	return "", fmt.Errorf("use %s: it is of flavour %s, but the node's rules are in the other, %s: install %s-%[3]s, or have all programs of the node use %[2]s", path, v.Other(), v, plain)
}

// LegacyTables returns the tables that the legacy flavour has in the network
// namespace of the calling thread. Unlike a question to iptables-legacy, this makes
// none: an empty table costs each packet time.
func LegacyTables(f overlay.Family) []string {
	file := map[overlay.Family]string{overlay.IPv4: "ip_tables_names", overlay.IPv6: "ip6_tables_names"}[f]
	b, _ := os.ReadFile("/proc/thread-self/net/" + file) // absent: the kernel is without it
	return strings.Fields(string(b))
}
