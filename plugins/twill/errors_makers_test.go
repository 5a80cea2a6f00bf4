//go:build linux && amd64

package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// coveredPackages are pod, and main, which writes down what was covered.
func coveredPackages() []string {
	const module = "github.com/twill-net/twill"
	return []string{module + "/pkg/pod", module + "/plugins/twill"}
}

// unreachable are the errors that no failure can show, and why.
var unreachable = map[string]string{
	`fail(types.ErrIncompatibleCNIVersion, "convert result to version %s: %v", w.CNIVersion, err)`: "the library lets no version pass that it cannot convert to",
	`fail(types.ErrDecodingFailure, "decode network configuration: %v", err)`:                      "the library has decoded it before",
	`fail(types.ErrInvalidNetworkConfig, "flannel's network configuration: %v", err)`:              "it was decoded from JSON, and is encoded as such",
	`fail(code, "%v", err)`: "whatever STATUS hands over is a CNI error already",
}

// errorMaker is a place in package pod that makes an error of a verb.
type errorMaker struct {
	at   token.Position
	text string         // as it stands in the source
	says *regexp.Regexp // its message
}

// errorMakers finds the calls of fail, badValue and ioFail.
func errorMakers(t *testing.T) []errorMaker {
	t.Helper()
	sources, err := filepath.Glob("../../pkg/pod/*.go")
	if err != nil {
		t.Fatal(err)
	}
	var out []errorMaker
	fset := token.NewFileSet()
	for _, path := range sources {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		file, err := parser.ParseFile(fset, path, text, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			c, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			if says := messageOf(c); says != "" {
				from, to := fset.Position(c.Pos()), fset.Position(c.End())
				out = append(out, errorMaker{from, string(text[from.Offset:to.Offset]), regexp.MustCompile("(?s)^" + says + "$")})
			}
			return true
		})
	}
	if len(out) < 50 {
		t.Fatalf("only %d errors found", len(out))
	}
	return out
}

// messageOf returns a pattern of the message that the call makes, or "" if it makes
// none.
func messageOf(c *ast.CallExpr) string {
	name, ok := c.Fun.(*ast.Ident)
	if !ok {
		return ""
	}
	switch name.Name {
	case "fail":
		return regexp.MustCompile(`%[a-z]`).ReplaceAllString(pattern(c.Args[1]), ".*")
	case "ioFail":
		return pattern(c.Args[0]) + ": .*"
	case "badValue":
		return "network configuration: " + pattern(c.Args[0]) + ": .*: " + pattern(c.Args[2])
	}
	return ""
}

// pattern matches the values that an expression can have, as far as its texts say.
func pattern(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.BasicLit:
		if s, err := strconv.Unquote(e.Value); err == nil {
			return regexp.QuoteMeta(s)
		}
	case *ast.BinaryExpr:
		return pattern(e.X) + pattern(e.Y)
	}
	return ".*"
}

// coverage tells which of the errors were made.
func (r *errorRuns) coverage(t *testing.T) func(errorMaker) bool {
	t.Helper()
	profile := filepath.Join(t.TempDir(), "profile")
	if out, err := exec.Command("go", "tool", "covdata", "textfmt", "-i="+r.data, "-o="+profile).CombinedOutput(); err != nil {
		t.Fatalf("covdata: %v\n%s", err, out)
	}
	text, err := os.ReadFile(profile)
	if err != nil {
		t.Fatal(err)
	}
	type position struct{ line, column int }
	type block struct{ from, to position }
	done := map[string][]block{} // that were executed, by file
	for line := range strings.Lines(string(text)) {
		// package/file.go:line.column,line.column statements count
		path, rest, ok := strings.Cut(line, ":")
		var b block
		var statements, count int
		_, err := fmt.Sscanf(rest, "%d.%d,%d.%d %d %d", &b.from.line, &b.from.column, &b.to.line, &b.to.column, &statements, &count)
		if file := filepath.Base(path); ok && err == nil && count > 0 {
			done[file] = append(done[file], b)
		}
	}
	before := func(a, b position) bool { return a.line < b.line || a.line == b.line && a.column <= b.column }
	return func(m errorMaker) bool {
		at := position{m.at.Line, m.at.Column}
		return slices.ContainsFunc(done[filepath.Base(m.at.Filename)], func(b block) bool { return before(b.from, at) && before(at, b.to) })
	}
}
