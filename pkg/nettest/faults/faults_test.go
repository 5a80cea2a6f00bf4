//go:build linux && amd64

package faults

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// run executes a shell script in dir.
func run(t *testing.T, dir, script string, f Fault) *Outcome {
	t.Helper()
	cmd := exec.Command("sh", "-c", script)
	cmd.Dir, cmd.Env = dir, []string{"PATH=/usr/bin:/bin", "PWD=" + dir}
	out, err := Run(cmd, f)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// find returns the first step whose call is as given.
func find(t *testing.T, steps []Step, program, call string) Step {
	t.Helper()
	i := slices.IndexFunc(steps, func(s Step) bool { return s.Program == program && strings.HasPrefix(s.Call, call) })
	if i < 0 {
		t.Fatalf("no step of %s that is %s in %v", program, call, steps)
	}
	return steps[i]
}

func exists(name string) bool {
	_, err := os.Lstat(name)
	return err == nil
}

func TestSteps(t *testing.T) {
	dir := t.TempDir()
	out := run(t, dir, "echo one >a; mkdir b; mv a b/c; echo done; exit 3", Fault{})
	if out.ExitCode != 3 || out.Killed || out.Hit != nil || string(out.Stdout) != "done\n" {
		t.Errorf("%+v", out)
	}
	for _, s := range out.Steps {
		t.Log(s)
	}
	sh := out.Steps[0].Program
	for _, want := range []struct{ program, call string }{
		{sh, "openat " + dir + "/a O_CREAT O_TRUNC"},
		{sh, "write " + dir + "/a (4)"},
		{"mkdir", "mkdir b"},
		{"mv", "rename " + dir + "/a to " + dir + "/b/c"},
		{sh, "write standard output (5)"},
	} {
		if s := find(t, out.Steps, want.program, want.call); !s.Changes {
			t.Errorf("%s does not change anything?", s)
		}
	}
}

func TestFaults(t *testing.T) {
	const script = "mkdir a && mkdir b && echo both"
	steps := run(t, t.TempDir(), script, Fault{}).Steps
	b := find(t, steps, "mkdir", "mkdir b")
	for _, tt := range []struct {
		fault  Fault
		a, b   bool
		killed bool
		stdout string
	}{
		{Fault{Kind: Fail, Step: b.Number}, true, false, false, ""},
		{Fault{Kind: Fail, Step: b.Number, Err: syscall.EROFS}, true, false, false, ""},
		// The helper outlives the shell.
		{Fault{Kind: KillBefore, Step: b.Number}, true, false, true, ""},
		{Fault{Kind: KillAfter, Step: b.Number}, true, true, true, ""},
		{Fault{Kind: Fail, Step: len(steps) + 1}, true, true, false, "both\n"},
	} {
		t.Run(tt.fault.Kind.String()+" "+tt.fault.Err.Error(), func(t *testing.T) {
			dir := t.TempDir()
			out := run(t, dir, script, tt.fault)
			if got := (out.Hit != nil); got != (tt.fault.Step <= len(steps)) {
				t.Errorf("hit %v", out.Hit)
			}
			if exists(dir+"/a") != tt.a || exists(dir+"/b") != tt.b || out.Killed != tt.killed || string(out.Stdout) != tt.stdout {
				t.Errorf("a %t, b %t, %+v", exists(dir+"/a"), exists(dir+"/b"), out)
			}
			if want := tt.fault.Err; want != 0 && !strings.Contains(string(out.Stderr), want.Error()) && !strings.Contains(strings.ToLower(string(out.Stderr)), want.Error()) {
				t.Errorf("stderr %q does not say %q", out.Stderr, want)
			}
		})
	}
}

// Every prefix of a script is seen on disk, and none twice.
func TestWalk(t *testing.T) {
	seen := map[string]bool{}
	for step := 1; ; step++ {
		dir := t.TempDir()
		out := run(t, dir, "mkdir 1; mkdir 2; mkdir 3", Fault{Kind: KillAfter, Step: step})
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		made := ""
		for _, e := range entries {
			made += e.Name()
		}
		seen[made] = true
		if out.Hit == nil {
			break
		}
		if !out.Killed {
			t.Errorf("%s: not killed", out.Hit)
		}
	}
	if len(seen) != 4 || !seen[""] || !seen["1"] || !seen["12"] || !seen["123"] {
		t.Errorf("seen %v", seen)
	}
}

func TestSignalsPass(t *testing.T) {
	out := run(t, t.TempDir(), "trap 'echo caught' USR1; kill -USR1 $$; kill -STOP $$; echo went on; kill -TERM $$", Fault{})
	if string(out.Stdout) != "caught\nwent on\n" || !out.Killed {
		t.Errorf("%+v %s", out, out.Stdout)
	}
}

// What a helper does on netlink is seen: the change, and how it went.
func TestHelperNetlink(t *testing.T) {
	links := func(f Fault) *Outcome {
		cmd := exec.Command("unshare", "-n", "sh", "-c", "ip link add br0 mtu 1400 type bridge && echo added; ip -br link show type bridge")
		cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
		out, err := Run(cmd, f)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	clean := links(Fault{})
	send := find(t, clean.Steps, "ip", "sendmsg RTM_NEWLINK bridge br0 MTU")
	answer := find(t, clean.Steps, "ip", "recvmsg answer to RTM_NEWLINK bridge br0 MTU")
	for _, tt := range []struct {
		step         Step
		added, there bool
	}{{send, false, false}, {answer, false, true}} {
		out := links(Fault{Kind: Fail, Step: tt.step.Number})
		if added, there := strings.Contains(string(out.Stdout), "added"), strings.Contains(string(out.Stdout), "br0 "); added != tt.added || there != tt.there {
			t.Errorf("error at %s: added %t, there %t: %s%s", tt.step, added, there, out.Stdout, out.Stderr)
		}
	}
}

// A Go program has threads that come and go, and signals itself all the time.
func TestGoProgram(t *testing.T) {
	dir := t.TempDir()
	src := `package main

import ("fmt"; "os"; "runtime"; "sync"; "syscall")

func main() {
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			runtime.LockOSThread() // ends with the goroutine
			if err := os.WriteFile(fmt.Sprint("f", i), nil, 0o600); err != nil { fmt.Println(err); os.Exit(1) }
			runtime.GC()
		})
	}
	wg.Wait()
	s, err := syscall.Socket(syscall.AF_NETLINK, syscall.SOCK_RAW, syscall.NETLINK_ROUTE)
	if err != nil { fmt.Println(err); os.Exit(1) }
	get := make([]byte, 32)
	get[0], get[4], get[6] = 32, syscall.RTM_GETLINK, 1
	get[20] = 1 // loopback
	if err := syscall.Sendto(s, get, 0, &syscall.SockaddrNetlink{Family: syscall.AF_NETLINK}); err != nil { fmt.Println(err); os.Exit(1) }
	n, _, err := syscall.Recvfrom(s, make([]byte, 4096), 0)
	fmt.Println(n > 32, err)
}
`
	if err := os.WriteFile(filepath.Join(dir, "main.go"), []byte(src), 0o600); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-o", "prog", "main.go")
	build.Dir, build.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	prog := func(f Fault) *Outcome {
		cmd := exec.Command(dir + "/prog")
		cmd.Dir = t.TempDir()
		out, err := Run(cmd, f)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	begin := time.Now()
	const times = 20
	var out *Outcome
	for range times {
		if out = prog(Fault{}); string(out.Stdout) != "true <nil>\n" || out.ExitCode != 0 || len(out.Steps) != 2*8+4 {
			t.Fatalf("%+v %s", out, out.Stdout)
		}
	}
	t.Logf("a run takes %s", time.Since(begin)/times)
	for _, s := range out.Steps {
		t.Log(s)
	}
	ask := find(t, out.Steps, "prog", "sendto RTM_GETLINK link 1")
	if failed := prog(Fault{Kind: Fail, Step: ask.Number}); string(failed.Stdout) != "no buffer space available\n" || failed.ExitCode != 1 {
		t.Errorf("%+v %s", failed, failed.Stdout)
	}
	// All its threads die, whatever they are at.
	for step := range len(out.Steps) {
		for _, kind := range []Kind{KillBefore, KillAfter} {
			if o := prog(Fault{Kind: kind, Step: step + 1}); !o.Killed || o.Hit == nil {
				t.Errorf("%s %d: %+v", kind, step+1, o)
			}
		}
	}
}

// The tracer reaps what it started and nothing else.
func TestOtherChildren(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	other := exec.Command("sh", "-c", "exit 7")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(20 * time.Millisecond) // it has ended
	run(t, t.TempDir(), "true; sleep 0.01", Fault{})
	if err := other.Wait(); err == nil || other.ProcessState.ExitCode() != 7 {
		t.Errorf("%v %v", err, other.ProcessState)
	}
}

func TestCannotStart(t *testing.T) {
	if _, err := Run(exec.Command("/nowhere/program"), Fault{}); err == nil {
		t.Error("no error")
	}
}
