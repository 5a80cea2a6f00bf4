package ipam

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// job is what another process does: the test's executable, when told to.
type job struct {
	DataDir string
	Do      string // add, del, sweep, loop
	Request Request
	Known   []netip.Addr
	Times   int // of add
}

func TestMain(m *testing.M) {
	if s := os.Getenv("IPAM_TEST_JOB"); s != "" {
		var j job
		err := json.Unmarshal([]byte(s), &j)
		if err == nil {
			err = j.run()
		}
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func (j job) options() ReleaseOptions {
	return ReleaseOptions{Pod: j.Request.Pod, Sticky: j.Request.Sticky, CoolDown: j.Request.CoolDown}
}

func (j job) run() error {
	d := NewDir(j.DataDir, "net")
	switch j.Do {
	case "add":
		for i := range j.Times {
			req := j.Request
			req.Owner.IfName = fmt.Sprint("eth", i)
			if _, err := d.Allocate(req); err != nil {
				return err
			}
		}
	case "del":
		return d.Release(j.Request.Owner, j.Known, j.options())
	case "sweep":
		_, err := d.Sweep(func(o Owner) bool { return o != j.Request.Owner })
		return err
	case "loop": // until it is killed
		fmt.Println("ready")
		for i := 0; ; i++ {
			req := j.Request
			req.Owner.IfName = fmt.Sprint("eth", i)
			got, err := d.Allocate(req)
			if err != nil {
				return err
			}
			var known []netip.Addr
			for _, a := range got[i%(len(got)+1):] {
				known = append(known, a.Prefix.Addr())
			}
			if err := d.Release(req.Owner, known, j.options()); err != nil {
				return err
			}
		}
	}
	return nil
}

func (j job) command(t testing.TB) *exec.Cmd {
	t.Helper()
	b, err := json.Marshal(j)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "IPAM_TEST_JOB="+string(b))
	return cmd
}

// checkOwners reports owners that have not one address of each set.
func checkOwners(t *testing.T, d Dir, owners, sets int) {
	t.Helper()
	got, err := d.List()
	if err != nil {
		t.Fatal(err)
	}
	n := map[Owner]int{}
	for _, r := range got {
		n[r.Owner]++
	}
	if len(n) != owners {
		t.Errorf("%d owners, want %d", len(n), owners)
	}
	for o, n := range n {
		if n != sets {
			t.Errorf("%s has %d addresses, want %d", o, n, sets)
		}
	}
	if files := reserved(t, d); len(files) != len(got) {
		t.Errorf("%d files for %d reservations", len(files), len(got))
	}
}

// 64 ADDs at the same time, of both tools: no address twice, none lost.
func TestConcurrentProcesses(t *testing.T) {
	requireHostLocal(t)
	dir := t.TempDir()
	d := NewDir(dir, "net")
	sets := newSets("198.18.1.0/24,203.0.113.0/24", "fd00:18:1::/64")
	allocate(t, d, "first", sets) // makes the directory, which host-local races for
	const each, processes = 3, 32
	var wg sync.WaitGroup
	for i := range processes {
		wg.Go(func() {
			j := job{DataDir: dir, Do: "add", Times: each, Request: Request{
				Owner: Owner{ContainerID: fmt.Sprint("t", i)}, Sets: sets,
				Pod: fmt.Sprint("default/t", i), Sticky: i%2 == 0, CoolDown: time.Minute,
			}}
			if out, err := j.command(t).CombinedOutput(); err != nil {
				t.Errorf("process %d: %v: %s", i, err, out)
			}
		})
		wg.Go(func() {
			for k := range each {
				if _, err := runHostLocal("ADD", dir, fmt.Sprintf("f%d-%d", i, k), sets); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	checkOwners(t, d, 1+2*each*processes, 2)

	// And as many DELs, each tool the other's too.
	for i := range processes {
		for k := range each {
			j := job{DataDir: dir, Do: "del", Request: Request{Owner: Owner{fmt.Sprintf("f%d-%d", i, k), "eth0"}}}
			if k == 0 {
				j.Request.Owner = Owner{fmt.Sprint("t", i), "eth0"}
			}
			wg.Go(func() {
				if out, err := j.command(t).CombinedOutput(); err != nil {
					t.Errorf("release: %v: %s", err, out)
				}
			})
		}
		wg.Go(func() {
			if _, err := runHostLocal("DEL", dir, fmt.Sprintf("f%d-0", i), sets); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	checkOwners(t, d, 1+2*processes, 2) // eth1 and eth2 of each of Twill's
}

// Killed at random times, in the middle of ADD and DEL, a process leaves nothing
// that Release does not free, and no address that two pods have.
func TestKilledAtRandom(t *testing.T) {
	const rounds = 100 // of each kind of pod
	for _, opts := range []Request{{}, {Pod: "default/p", Sticky: true, CoolDown: time.Nanosecond}} {
		dir := t.TempDir()
		d := NewDir(dir, "net")
		sets := newSets("198.18.0.0/22", "fd00::/64")
		held := map[string]string{}
		for i := range rounds {
			req := opts
			req.Owner, req.Sets = Owner{ContainerID: fmt.Sprint("c", i)}, sets
			killAtRandom(t, job{DataDir: dir, Do: "loop", Request: req}.command(t))

			survivor := fmt.Sprint("survivor", i)
			a := allocate(t, d, survivor, sets)
			if other := held[a]; other != "" {
				t.Fatalf("round %d: %s is given to %s, and %s has it", i, a, survivor, other)
			}
			held[a] = survivor
			got, err := d.List()
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range got {
				if !strings.HasPrefix(r.Owner.ContainerID, "survivor") {
					if err := d.Release(r.Owner, nil, ReleaseOptions{Pod: req.Pod, Sticky: req.Sticky, CoolDown: req.CoolDown}); err != nil {
						t.Fatal(err)
					}
				}
			}
			release(t, d, "nobody") // the empty file of one who was killed before he wrote his name
			checkOwners(t, d, len(held), 2)
		}
	}
}

// killAtRandom kills the process within its first few hundred calls.
func killAtRandom(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ready := make([]byte, 100)
	n, _ := out.Read(ready)
	time.Sleep(time.Duration(rand.Int64N(int64(4 * time.Millisecond))))
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if s := string(ready[:n]); s != "ready\n" {
		t.Fatalf("it ended by itself: %s", s)
	}
}

// state is what is on disk, for comparison.
func state(t *testing.T, d Dir) []string {
	t.Helper()
	got, err := d.List()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, r := range got {
		out = append(out, fmt.Sprint(r.Addr, " ", r.Owner))
	}
	slices.Sort(out)
	return out
}
