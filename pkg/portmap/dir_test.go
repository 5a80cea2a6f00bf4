package portmap

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
)

// childDir and childTool, in the environment, make the test binary a process that
// opens and closes the ports of $TWILL_TEST_ENTRY until it is killed.
const (
	childDir   = "TWILL_TEST_PORTS"
	childTool  = "TWILL_TEST_TOOL"
	childEntry = "TWILL_TEST_ENTRY"
)

func TestMain(m *testing.M) {
	if path := os.Getenv(childDir); path != "" {
		var e Entry
		err := json.Unmarshal([]byte(os.Getenv(childEntry)), &e)
		d := NewDir(path, overlay.Tool(os.Getenv(childTool)))
		for err == nil {
			err = errors.Join(d.Add(context.Background(), e), d.Remove(context.Background(), e.Attachment))
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func eachFlavour(t *testing.T, test func(t *testing.T, f flavour)) {
	for _, f := range flavours() {
		t.Run(f.name, func(t *testing.T) { test(t, f) })
	}
}

func tcp(host, container uint16) Mapping {
	return Mapping{HostPort: host, ContainerPort: container, Protocol: "tcp"}
}

// fake is an entry whose host link exists and whose pod does not.
func (n *node) fake(number int, ms ...Mapping) Entry {
	n.t.Helper()
	n.sh(n.host, fmt.Sprintf("ip link add veth%d type bridge", number))
	p := pod{number: number, addr: fmt.Sprintf("198.18.1.%d", number+1), ipv6: fmt.Sprintf("fd00:18:0:1::%d", number+1)}
	return p.entry(ms...)
}

func TestConflict(t *testing.T) {
	n := newNode(t, flavours()[0])
	one := tcp(8443, 443)
	one.HostIP = netip.MustParseAddr(hostAddr)
	first := n.fake(1, tcp(8080, 80), one)
	if err := n.add(first); err != nil {
		t.Fatal(err)
	}
	if err := n.add(first); err != nil {
		t.Errorf("the same again: %v", err)
	}
	at := func(m Mapping, addr string) Mapping { m.HostIP = netip.MustParseAddr(addr); return m }
	second := n.fake(2)
	for _, tt := range []struct {
		m    Mapping
		want string // the error; none: no conflict
	}{
		{tcp(8080, 1), "host port 8080/tcp is taken by pod default/web-1"},
		{at(tcp(8080, 1), hostAddr), "host port 198.51.100.1:8080/tcp is taken by pod default/web-1"},
		{at(tcp(8080, 1), "::"), "host port 8080/tcp is taken by pod default/web-1"},
		{tcp(8443, 1), "host port 8443/tcp is taken by pod default/web-1"},
		{at(tcp(8443, 1), "0.0.0.0"), "host port 8443/tcp is taken by pod default/web-1"},
		{at(tcp(8443, 1), hostAddr), "host port 198.51.100.1:8443/tcp is taken by pod default/web-1"},
		{at(tcp(8443, 1), otherHostAddr), ""},
		{at(tcp(8443, 1), "::"), ""},
		{Mapping{HostPort: 8080, ContainerPort: 80, Protocol: "udp"}, ""},
		{tcp(8081, 80), ""},
	} {
		second.Mappings = []Mapping{tt.m}
		before := n.ours()
		err := n.add(second)
		var conflict *ConflictError
		if tt.want == "" && err != nil || tt.want != "" && (!errors.As(err, &conflict) || err.Error() != tt.want) {
			t.Errorf("%v: %v, want %q", tt.m, err, tt.want)
		}
		if tt.want != "" && n.ours() != before {
			t.Errorf("%v: rules changed", tt.m)
		}
		if err := n.remove(second); err != nil {
			t.Error(err)
		}
	}
	// A holder whose link has gone is dead.
	n.sh(n.host, "ip link del veth1")
	second.Mappings = []Mapping{tcp(8080, 80)}
	if err := n.add(second); err != nil {
		t.Errorf("after the holder's death: %v", err)
	}
	if all, err := n.entries(); err != nil || len(all) != 1 || all[0].Attachment != second.Attachment {
		t.Errorf("entries %v, %v", all, err)
	}
	if rules := n.ours(); strings.Contains(rules, "8443") {
		t.Errorf("rules of the dead remain:\n%s", rules)
	}
	if err := n.remove(second); err != nil {
		t.Error(err)
	}
	n.clean()
}

func (n *node) entries() (out []Entry, err error) {
	err = n.in(func() error { out, err = n.dir.Entries(); return err })
	return out, err
}

func TestBadEntries(t *testing.T) {
	n := newNode(t, flavours()[0])
	e := n.fake(1)
	v6only := e
	v6only.Addrs = e.Addrs[1:]
	v6only.Mappings = []Mapping{{HostPort: 1, ContainerPort: 1, Protocol: "tcp", HostIP: netip.MustParseAddr(hostAddr)}}
	twice := e
	twice.Mappings = []Mapping{tcp(1, 1), tcp(1, 2)}
	odd := e
	odd.Mappings = []Mapping{{HostPort: 1, ContainerPort: 1, Protocol: "icmp"}}
	path := e
	path.Attachment, path.Mappings = "../x:y:z", []Mapping{tcp(1, 1)}
	for _, tt := range []struct {
		e    Entry
		want string
	}{
		{v6only, "the pod has no IPv4 address: give a hostIP of a family that it has"},
		{twice, "host port 1/tcp is mapped twice"},
		{odd, "protocol one of [tcp udp sctp]"},
		{path, "must be a file's name"},
	} {
		if err := n.add(tt.e); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v, want %q", err, tt.want)
		}
	}
	// Nothing asked for is nothing done: not even a directory.
	if err := n.add(e); err != nil {
		t.Error(err)
	}
	if err := n.remove(e); err != nil {
		t.Error(err)
	}
	if got := n.sync(nil); got != nil {
		t.Error(got)
	}
	if _, err := os.Stat(n.dir.path); !os.IsNotExist(err) {
		t.Error("a directory was made")
	}
}

// A missing tool is named, with the package that has it, and leaves no file.
func TestNoTool(t *testing.T) {
	eachFlavour(t, func(t *testing.T, f flavour) {
		n := newNode(t, f)
		e := n.fake(1, tcp(8080, 80))
		path := os.Getenv("PATH")
		t.Setenv("PATH", t.TempDir())
		err := n.add(e)
		t.Setenv("PATH", path)
		want := map[overlay.Tool]string{overlay.Nftables: "install the nftables package", overlay.Iptables: "install the iptables package"}[f.tool]
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
		n.clean()
		if f.tool == overlay.Nftables {
			return
		}
		// One family's tool is there, and its rules are taken back.
		dir := t.TempDir()
		for _, c := range []string{"iptables", "iptables-restore"} {
			to, err := exec.LookPath(c)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(to, filepath.Join(dir, c)); err != nil {
				t.Fatal(err)
			}
		}
		t.Setenv("PATH", dir)
		err = n.add(e)
		t.Setenv("PATH", path)
		if err == nil || !strings.Contains(err.Error(), "find ip6tables-restore") {
			t.Errorf("%v, want that ip6tables-restore is missing", err)
		}
		n.clean()
	})
}

func TestConcurrent(t *testing.T) {
	eachFlavour(t, func(t *testing.T, f flavour) {
		n := newNode(t, f)
		var entries []Entry
		for i := range 32 {
			entries = append(entries, n.fake(i+1, tcp(uint16(8000+i), 80)))
		}
		all := func(do func(Entry) error) {
			var wg sync.WaitGroup
			for _, e := range entries {
				wg.Go(func() {
					if err := do(e); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
		}
		all(n.add)
		if got, err := n.entries(); err != nil || len(got) != len(entries) {
			t.Errorf("%d entries, %v", len(got), err)
		}
		for _, e := range entries {
			n.checks(e, nil)
		}
		if got := n.sync(nil); got != nil {
			t.Errorf("repaired %v", got)
		}
		all(n.remove)
		n.clean()
	})
}

// checks compares what Check says, by a part of each line.
func (n *node) checks(e Entry, want []string) {
	n.t.Helper()
	n.must(func() error {
		got, err := n.dir.Check(context.Background(), e)
		if err != nil || len(got) != len(want) {
			n.t.Errorf("check %s: %q, %v, want %q", e.Attachment, got, err, want)
			return nil
		}
		for i := range want {
			if !strings.Contains(got[i], want[i]) {
				n.t.Errorf("check %s: %q, want %q", e.Attachment, got[i], want[i])
			}
		}
		return nil
	})
}

// child starts a process that opens and closes e's ports until it is killed.
func (n *node) child(e Entry, env ...string) *exec.Cmd {
	n.t.Helper()
	text, err := json.Marshal(e)
	if err != nil {
		n.t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childDir+"="+n.dir.path, childTool+"="+string(n.dir.tool), childEntry+"="+string(text))
	cmd.Env = append(cmd.Env, env...)
	cmd.Stderr = &strings.Builder{}
	n.must(cmd.Start)
	return cmd
}

func (n *node) kill(cmd *exec.Cmd) {
	n.t.Helper()
	cmd.Process.Kill()
	if err := cmd.Wait(); cmd.Stderr.(*strings.Builder).Len() > 0 {
		n.t.Fatalf("child: %v %s", err, cmd.Stderr)
	}
}

// A process that is killed at any moment leaves what Remove or Sync mends.
func TestKilled(t *testing.T) {
	eachFlavour(t, func(t *testing.T, f flavour) {
		n := newNode(t, f)
		stays := n.fake(1, tcp(8080, 80))
		if err := n.add(stays); err != nil {
			t.Fatal(err)
		}
		e := n.fake(2, tcp(8081, 80))
		for i := range 16 {
			cmd := n.child(e)
			time.Sleep(time.Duration(20+rand.IntN(80)) * time.Millisecond)
			n.kill(cmd)
			if i%2 == 0 {
				n.sync(func(x Entry) bool { return x.Attachment == stays.Attachment })
			} else if err := n.remove(e); err != nil {
				t.Fatal(err)
			}
			n.sync(nil) // a Remove before the file was there has nothing to mend
			n.checks(stays, nil)
			if rules := n.ours(); strings.Contains(rules, "8081") {
				t.Fatalf("rules of the killed remain:\n%s", rules)
			}
		}
		if err := n.remove(stays); err != nil {
			t.Fatal(err)
		}
		n.clean()
	})
}

// The tool that a killed process has started goes on. Nobody writes before it has
// ended, so that it does not bring back what was there before.
func TestKilledToolRuns(t *testing.T) {
	eachFlavour(t, func(t *testing.T, f flavour) {
		n := newNode(t, f)
		slow := t.TempDir()
		for _, tool := range []string{"nft", "iptables-restore", "ip6tables-restore"} {
			path, err := exec.LookPath(tool)
			if err != nil {
				t.Fatal(err)
			}
			script := fmt.Sprintf("#!/bin/sh\nsleep 0.5\nexec %s \"$@\"\n", path)
			if err := os.WriteFile(filepath.Join(slow, tool), []byte(script), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		e := n.fake(1, tcp(8080, 80))
		cmd := n.child(e, "PATH="+slow+":"+os.Getenv("PATH"))
		for begin := time.Now(); ; time.Sleep(time.Millisecond) {
			if _, err := os.Stat(filepath.Join(n.dir.path, toolFile)); err == nil {
				break // the rules are next
			}
			if time.Since(begin) > 10*time.Second {
				t.Fatal("the child wrote nothing in 10 s")
			}
		}
		time.Sleep(100 * time.Millisecond)
		n.kill(cmd)
		if err := n.remove(e); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		n.clean()
	})
}

// What a killed or crashed writer leaves is no entry and does not stay.
func TestLeftFiles(t *testing.T) {
	eachFlavour(t, func(t *testing.T, f flavour) {
		n := newNode(t, f)
		lost, stays := n.fake(1, tcp(8080, 80)), n.fake(2, tcp(8081, 80))
		for _, e := range []Entry{lost, stays} {
			if err := n.add(e); err != nil {
				t.Fatal(err)
			}
		}
		for name, text := range map[string]string{lost.Attachment + entryFile: "", "x:y:z" + entryFile + tempFile: "{}"} {
			if err := os.WriteFile(filepath.Join(n.dir.path, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		n.sync(nil)
		if rules := n.ours(); strings.Contains(rules, "8080") {
			t.Errorf("rules of the lost file remain:\n%s", rules)
		}
		n.checks(stays, nil)
		if err := n.remove(stays); err != nil {
			t.Fatal(err)
		}
		n.clean()
	})
}

// BenchmarkAddRemove is one pod's port among those of 20 others.
func BenchmarkAddRemove(b *testing.B) {
	for _, f := range flavours() {
		b.Run(f.name, func(b *testing.B) {
			n := newNode(b, f)
			for i := range 20 {
				if err := n.add(n.fake(i+2, tcp(uint16(8001+i), 80))); err != nil {
					b.Fatal(err)
				}
			}
			e := n.fake(1, tcp(8000, 80))
			var adding time.Duration
			for b.Loop() {
				begin := time.Now()
				if err := n.add(e); err != nil {
					b.Fatal(err)
				}
				adding += time.Since(begin)
				if err := n.remove(e); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(adding.Microseconds())/float64(b.N)/1000, "ms/add")
		})
	}
}
