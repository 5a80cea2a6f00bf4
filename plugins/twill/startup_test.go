package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A pod waits for the plugin's process to start, and what is linked initialises
// itself first: maps, tables and regular expressions, page by page.

// mayLink are the packages of other modules that the plugin is made of.
var mayLink = []string{
	"github.com/containernetworking/cni/pkg/",
	"github.com/vishvananda/netlink", "github.com/vishvananda/netlink/nl", "github.com/vishvananda/netns",
	// Not x/sys/cpu: each question to the CPU leaves a virtual machine.
	"golang.org/x/sys/unix",
	"github.com/twill-net/twill/",
}

// mustNotLink are packages of this module and of the standard library that are
// large, or have much to initialise, and are easily linked by accident.
var mustNotLink = []string{
	"crypto/tls", "crypto/x509", "encoding/asn1", "encoding/gob", "encoding/xml", "expvar", "flag",
	"go/", "html/", "html", "log/slog", "math/big", "net/http", "net/textproto", "net/url", "os/user",
	"runtime/cgo", "runtime/debug", "runtime/metrics", "runtime/pprof", "runtime/trace", "testing",
	"text/", "time/tzdata",
	"github.com/twill-net/twill/daemon", "github.com/twill-net/twill/pkg/kernel", "github.com/twill-net/twill/pkg/netctl",
	"github.com/twill-net/twill/pkg/nettest", "github.com/twill-net/twill/pkg/store",
}

func TestLinks(t *testing.T) {
	cmd := exec.Command("go", "list", "-deps", "-json=ImportPath,Standard", ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	listed := func(list []string, pkg string) bool {
		return slices.ContainsFunc(list, func(p string) bool {
			return pkg == p || strings.HasSuffix(p, "/") && strings.HasPrefix(pkg, p)
		})
	}
	count := 0
	for dec := json.NewDecoder(bytes.NewReader(out)); ; count++ {
		var p struct {
			ImportPath string
			Standard   bool
		}
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if !p.Standard && !listed(mayLink, p.ImportPath) || listed(mustNotLink, p.ImportPath) {
			t.Errorf("the plugin links %s; find out why with go mod why -m, or: go list -deps -f '{{.ImportPath}}: {{.Imports}}' ./plugins/twill", p.ImportPath)
		}
	}
	if count < 50 {
		t.Errorf("go list names %d packages only", count)
	}
}

// BenchmarkStart executes the plugin for VERSION, as `make build` builds it, and
// tells how large it is and what its packages do before main.
func BenchmarkStart(b *testing.B) {
	twill := filepath.Join(b.TempDir(), "twill")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", twill, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("build: %v: %s", err, out)
	}
	run := func(env ...string) (*os.ProcessState, []byte) {
		cmd := exec.Command(twill)
		cmd.Stdin = strings.NewReader(`{"cniVersion": "1.1.0"}`)
		cmd.Env = append([]string{"CNI_COMMAND=VERSION"}, env...)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Run(); err != nil {
			b.Fatalf("%v: %s", err, stderr.Bytes())
		}
		return cmd.ProcessState, stderr.Bytes()
	}
	var cpu time.Duration
	var faults int64
	for b.Loop() {
		s, _ := run()
		cpu += s.UserTime() + s.SystemTime()
		faults += s.SysUsage().(*syscall.Rusage).Minflt
	}
	b.ReportMetric(float64(cpu.Microseconds())/float64(b.N), "cpu-µs/op")
	b.ReportMetric(float64(faults)/float64(b.N), "page-faults/op")

	st, err := os.Stat(twill)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(st.Size()), "binary-B")
	_, trace := run("GODEBUG=inittrace=1")
	lines := regexp.MustCompile(`(?m)^init (\S+) @.* clock, (\d+) bytes, (\d+) allocs$`).FindAllSubmatch(trace, -1)
	if len(lines) == 0 {
		b.Fatalf("no trace of initialisation: %s", trace)
	}
	var size, allocs int
	var most []string
	for _, l := range lines {
		n, _ := strconv.Atoi(string(l[2])) // digits
		m, _ := strconv.Atoi(string(l[3]))
		size, allocs = size+n, allocs+m
		if m >= 20 {
			most = append(most, fmt.Sprintf("%s %d", l[1], m))
		}
	}
	b.ReportMetric(float64(len(lines)), "init-packages")
	b.ReportMetric(float64(size), "init-B")
	b.ReportMetric(float64(allocs), "init-allocs")
	b.Logf("allocations before main: %s", strings.Join(most, ", "))
}
