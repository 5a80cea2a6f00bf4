package store

import (
	"errors"
	"fmt"
	"log/slog"

	"github.com/twill-net/twill/pkg/overlay"
)

// foldedConfig is the network configuration in force and what has become of it.
type foldedConfig struct {
	kind, name string // where it is: "key" and the key in etcd, or "file" and the path
	remedy     string // how to write one, if there is none

	good     overlay.Config
	have     bool     // there was a good one
	modified int64    // revision of what was read last, good or not
	warnings []string // of that
	refused  error    // why that is not good; the good one is older
}

// unread is the revision of a configuration that was not looked for yet; 0 is that
// of one that is not there.
const unread = -1

// set takes a new text. One that is not good changes nothing but says so.
func (c *foldedConfig) set(text []byte, modified int64) {
	c.modified, c.warnings = modified, nil
	parsed, warnings, err := overlay.ParseConfig(text)
	if c.refused = err; err == nil {
		c.good, c.have, c.warnings = parsed, true, warnings
	}
}

// none notes that there is no configuration, and why.
func (c *foldedConfig) none(why error) {
	c.modified, c.warnings, c.refused = 0, nil, why
}

// problems tells of a configuration that was refused.
func (c *foldedConfig) problems() []overlay.Problem {
	if c.refused == nil {
		return nil
	}
	p := overlay.Problem{
		Object: "config",
		Reason: fmt.Sprintf("%s: %v", c.name, c.refused),
		Remedy: "correct it: it is looked at again as soon as it is written",
	}
	if c.modified == 0 {
		p.Remedy = c.remedy
	}
	if c.have {
		p.Remedy += "; the last good one stays in force"
	}
	return []overlay.Problem{p}
}

// fault returns why there is no good configuration, or nil.
func (c *foldedConfig) fault() error {
	for _, p := range c.problems() {
		return errors.New(p.String())
	}
	return nil
}

// report logs what is new since before.
func (c *foldedConfig) report(before foldedConfig, log *slog.Logger) {
	if c.modified == before.modified {
		return
	}
	for _, w := range c.warnings {
		log.Warn("network configuration", c.kind, c.name, "warning", w)
	}
	for _, p := range c.problems() {
		log.Error("network configuration refused", "reason", p.Reason, "remedy", p.Remedy)
	}
}
