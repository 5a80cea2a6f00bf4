package overlay

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// golden compares got with testdata/<name>.golden.
func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs; got:\n%s\nwant:\n%s\nfirst difference: %s", file, got, want, firstDifference(got, string(want)))
	}
}

func firstDifference(got, want string) string {
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i := range max(len(g), len(w)) {
		if i >= len(g) || i >= len(w) || g[i] != w[i] {
			return fmt.Sprintf("line %d: got %q, want %q", i+1, strings.Join(g[min(i, len(g)):min(i+1, len(g))], ""), strings.Join(w[min(i, len(w)):min(i+1, len(w))], ""))
		}
	}
	return "none"
}

// printState prints all of a State, one object a line, rules below their chain.
func printState(s State) string {
	var b strings.Builder
	printAll(&b, s.Sysctls)
	printAll(&b, s.Links)
	for _, c := range s.Chains {
		fmt.Fprintln(&b, c)
		for _, r := range c.Rules {
			fmt.Fprintln(&b, "    "+r)
		}
	}
	printAll(&b, s.Addrs)
	printAll(&b, s.WGPeers)
	printAll(&b, s.Neighs)
	printAll(&b, s.FDB)
	printAll(&b, s.Nexthops)
	printAll(&b, s.Routes)
	for _, r := range s.Foreign {
		fmt.Fprintln(&b, "foreign", r)
	}
	return b.String()
}

func printAll[T fmt.Stringer](b *strings.Builder, all []T) {
	for _, x := range all {
		line := x.String()
		if s, ok := any(x).(Sysctl); ok && s.When != "" {
			line += " if it is " + s.When
		}
		fmt.Fprintln(b, line)
	}
}

func printProblems(all []Problem) string {
	var b strings.Builder
	for _, p := range all {
		fmt.Fprintln(&b, "problem:", p)
	}
	return b.String()
}

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

func mac(s string) MAC {
	m, err := ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return m
}

func subnetsOf(key string) Subnets {
	if key == "" {
		return Subnets{}
	}
	n, err := ParseKey(key)
	if err != nil {
		panic(err)
	}
	return n
}

func config(t testing.TB, json string) Config {
	t.Helper()
	c, warnings, err := ParseConfig([]byte(json))
	if err != nil || len(warnings) > 0 {
		t.Fatalf("ParseConfig(%s): warnings %q, error %v", json, warnings, err)
	}
	return c
}

const (
	v4JSON   = `{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}`
	dualJSON = `{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan","Port":4789}}`
)
