package router

import (
	"bytes"
	"cmp"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/template"
	"time"
	"unicode"

	"github.com/twill-net/twill/pkg/overlay"
)

//go:embed *.tmpl
var builtin embed.FS

// facts are what a template is given.
type facts struct {
	overlay.BGP
	Families []family
}

// family holds what there is of one address family.
type family struct {
	Version   int // 4 or 6
	Own       []overlay.BGPOwn
	Networks  []netip.Prefix
	Guarded   []netip.Prefix
	Neighbors []overlay.BGPNeighbor
}

func newFacts(b overlay.BGP) facts {
	f := facts{BGP: b}
	for _, version := range []int{4, 6} {
		is := func(a netip.Addr) bool { return a.IsValid() && a.Is4() == (version == 4) }
		x := family{Version: version}
		guard := func(a netip.Addr) {
			if is(a) {
				x.Guarded = append(x.Guarded, netip.PrefixFrom(a, a.BitLen()))
			}
		}
		for _, o := range b.Own {
			if is(o.Prefix.Addr()) {
				x.Own = append(x.Own, o)
				x.Guarded = append(x.Guarded, o.Prefix)
				guard(o.NextHop)
			}
		}
		for _, p := range b.Networks {
			if is(p.Addr()) {
				x.Networks = append(x.Networks, p)
			}
		}
		for _, n := range b.Neighbors {
			if is(n.Address) {
				x.Neighbors = append(x.Neighbors, n)
				guard(n.Local)
				if max(n.Multihop, n.TTLSecurity) <= 1 {
					guard(n.Address)
				}
			}
		}
		x.Guarded = sortedUnique(x.Guarded)
		if len(x.Own)+len(x.Networks)+len(x.Neighbors) > 0 {
			f.Families = append(f.Families, x)
		}
	}
	return f
}

func sortedUnique(all []netip.Prefix) []netip.Prefix {
	slices.SortFunc(all, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	return slices.Compact(all)
}

// source is where the configuration is rendered from: the operator's template if
// there is one, else the built-in one.
type source struct {
	kind kind
	file string // of the operator; empty: there is no directory for it

	parsed  *template.Template // nil: nothing parsed yet
	modTime time.Time          // of what was parsed; zero: the built-in one
	size    int64
}

// load parses the template if it is not the one that was parsed before.
func (s *source) load() error {
	var modTime time.Time
	var size int64
	text, err := fs.ReadFile(builtin, s.kind.template)
	name := "built-in " + s.kind.template
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	if s.file != "" {
		dir, err := os.Stat(filepath.Dir(s.file))
		if err == nil && !dir.IsDir() {
			err = errors.New("it is no directory")
		}
		if err != nil {
			return fmt.Errorf("use templates of %s: %w; make the directory, or leave it out to use the built-in templates", filepath.Dir(s.file), err)
		}
		info, err := os.Stat(s.file)
		if err == nil {
			modTime, size, name = info.ModTime(), info.Size(), s.file
		} else if !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("read template: %w", err)
		}
	}
	if s.parsed != nil && s.modTime.Equal(modTime) && s.size == size {
		return nil
	}
	s.parsed = nil
	if name == s.file {
		if text, err = os.ReadFile(s.file); err != nil {
			return fmt.Errorf("read template: %w", err)
		}
	}
	t, err := template.New(name).Option("missingkey=error").Funcs(s.kind.funcs()).Parse(string(text))
	if err != nil {
		return fmt.Errorf("parse template: %w; correct the line, or remove the file to use the built-in %s", err, s.kind.template)
	}
	s.parsed, s.modTime, s.size = t, modTime, size
	return nil
}

// render returns the whole configuration.
func (s *source) render(b overlay.BGP) ([]byte, error) {
	for _, n := range b.Neighbors {
		if _, err := s.kind.quote(n.Password); err != nil {
			return nil, fmt.Errorf("write password of neighbour %s (%s): %w; choose another password", n.Address, words(n.Name), err)
		}
	}
	if err := s.load(); err != nil {
		return nil, err
	}
	var out bytes.Buffer
	fmt.Fprintf(&out, mark+" from %s; what is changed here is lost.\n", filepath.Base(strings.TrimPrefix(s.parsed.Name(), "built-in ")))
	if err := s.parsed.Execute(&out, newFacts(b)); err != nil {
		return nil, fmt.Errorf("render template: %w", err)
	}
	return out.Bytes(), nil
}

func (k kind) funcs() template.FuncMap {
	return template.FuncMap{
		"symbol":   symbol,
		"quote":    k.quote,
		"words":    words,
		"seconds":  func(d time.Duration) int { return int(d / time.Second) },
		"third":    func(d time.Duration) int { return int(d / time.Second / 3) },
		"high":     func(c overlay.Community) uint32 { return uint32(c) >> 16 },
		"low":      func(c overlay.Community) uint32 { return uint32(c) & 0xffff },
		"covering": covering,
		"number":   func(i int) int { return 5 * (i + 1) },
		"add":      func(i, j int) int { return i + j },
		"lengths":  lengths,
		"last":     last,
		"distinct": distinct,
		"set":      setCommunity,
	}
}

// symbol turns an address into a part of a name: no two are the same.
func symbol(a netip.Addr) string {
	return strings.Map(func(r rune) rune {
		if r == '.' || r == ':' {
			return '_'
		}
		return r
	}, a.WithZone("").String())
}

// words makes a text one line of printable ASCII, of one word at least, that ends
// no string and begins no comment.
func words(s string) string {
	return cmp.Or(strings.Join(strings.FieldsFunc(s, func(r rune) bool {
		return r > unicode.MaxASCII || !unicode.IsPrint(r) || strings.ContainsRune(" \"\\|?!#", r)
	}), " "), "-")
}

// quoteBIRD writes a string for BIRD 2, which knows no escapes.
func quoteBIRD(s string) (string, error) {
	for _, r := range s {
		if r == '"' || r == unicode.ReplacementChar || unicode.IsControl(r) {
			return "", fmt.Errorf("BIRD can hold no %q in a string", r)
		}
	}
	return `"` + s + `"`, nil
}

// wordFRR writes a word for FRR: there are neither quotes nor escapes.
func wordFRR(s string) (string, error) {
	for _, r := range s {
		if r > unicode.MaxASCII || !unicode.IsGraphic(r) || r == ' ' {
			return "", fmt.Errorf("FRR can hold no %q in a word", r)
		}
	}
	address, _, _ := strings.Cut(s, "/")
	if a, err := netip.ParseAddr(address); err == nil && a.Is6() {
		return "", errors.New("frr-reload.py rewrites what looks like an IPv6 address")
	}
	return s, nil
}

// covering returns all prefixes that contain one of those: FRR has no pattern for
// them.
func covering(all []netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range all {
		for bits := p.Bits(); bits >= 0; bits-- {
			out = append(out, netip.PrefixFrom(p.Addr(), bits).Masked())
		}
	}
	return sortedUnique(out)
}

// distinct leaves out rules with the range of one before them, which can decide on
// nothing: FRR refuses to hold them.
func distinct(rules []overlay.BGPRule) []overlay.BGPRule {
	var out []overlay.BGPRule
	for _, r := range rules {
		twin := func(x overlay.BGPRule) bool {
			return x.Prefix == r.Prefix && x.MinLen == r.MinLen && x.MaxLen == r.MaxLen
		}
		if !slices.ContainsFunc(out, twin) {
			out = append(out, r)
		}
	}
	return out
}

// last adds the rule that is meant after all others: reject.
func last(rules []overlay.BGPRule, version int) []overlay.BGPRule {
	all := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	if version == 6 {
		all = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return append(slices.Clone(rules), overlay.BGPRule{Prefix: all, MaxLen: all.Addr().BitLen()})
}

// setCommunity writes the line of a route-map that adds communities, as FRR shows
// it: frr-reload.py compares texts.
func setCommunity(lists ...[]overlay.Community) string {
	all := slices.Concat(lists...)
	slices.Sort(all)
	all = slices.Compact(all)
	if len(all) == 0 {
		return ""
	}
	names := map[overlay.Community]string{
		0xffff0000: "graceful-shutdown", 0xffff0001: "accept-own", 0xffff0002: "route-filter-translated-v4",
		0xffff0003: "route-filter-v4", 0xffff0004: "route-filter-translated-v6", 0xffff0005: "route-filter-v6",
		0xffff0006: "llgr-stale", 0xffff0007: "no-llgr", 0xffff0008: "accept-own-nexthop", 0xffff029a: "blackhole",
		0xffffff01: "no-export", 0xffffff02: "no-advertise", 0xffffff03: "local-AS", 0xffffff04: "no-peer",
	}
	line := " set community"
	for _, c := range all {
		line += " " + cmp.Or(names[c], c.String())
	}
	return line + " additive"
}

// lengths writes a rule's range for FRR, which says only what is not implied.
func lengths(r overlay.BGPRule) string {
	var s string
	if r.MinLen > r.Prefix.Bits() {
		s = fmt.Sprintf(" ge %d", r.MinLen)
	}
	if r.MaxLen > r.Prefix.Bits() {
		s += fmt.Sprintf(" le %d", r.MaxLen)
	}
	return s
}
