package nettest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
)

func TestSweepAfterKill(t *testing.T) {
	CheckLeaks(t)
	id, pid := killedChild(t, "yes")
	// What Start started dies with its owner, the rest with the next lab.
	eventually(t, func() error {
		if _, err := startTime(pid); err == nil {
			return fmt.Errorf("process %d is still there", pid)
		}
		return nil
	})
	live, _ := NewHosts(t, 1)
	if left := remains(id); left != nil {
		t.Errorf("left after sweep: %v", left)
	}
	if remains(live.ID) == nil {
		t.Error("the live lab was swept")
	}
}

func TestKeep(t *testing.T) {
	CheckLeaks(t)
	id, pid := killedChild(t, "keep")
	if err := Sweep(); err != nil {
		t.Fatal(err)
	}
	if _, err := startTime(pid); err != nil {
		t.Errorf("process of a kept lab: %v", err)
	}
	infos, err := List()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(infos, func(i Info) bool { return i.ID == id })
	if i < 0 {
		t.Fatalf("lab %s is not in the list", id)
	}
	pod, err := infos[i].NS("h1-p1")
	if err != nil {
		t.Fatal(err)
	}
	out, err := pod.Command(t.Context(), "sh", "-c", "echo $LAB_GREETING; ls -d /run/flannel").CombinedOutput()
	if want := "hello\n/run/flannel\n"; err != nil || string(out) != want {
		t.Errorf("command in a kept lab: %v: %q, want %q", err, out, want)
	}
	if err := Down(id); err != nil {
		t.Fatal(err)
	}
	if left := remains(id); left != nil {
		t.Errorf("left after down: %v", left)
	}
	if err := Down(id); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("down again: %v", err)
	}
}

func TestSweepAfterReboot(t *testing.T) {
	CheckLeaks(t)
	NewT(t) // makes the directory
	stale, strange := netnsPath(newID(), "h1"), filepath.Join(netnsDir, "twx"+newID()+"-h1")
	for _, p := range []string{stale, strange} {
		if err := touch(p); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(p)
	}
	// A namespace of somebody else who names it like ours.
	mounted := netnsPath(newID(), "h1")
	if err := newNetNS(mounted); err != nil {
		t.Fatal(err)
	}
	defer unmountFile(mounted)
	if err := Sweep(); err != nil {
		t.Fatal(err)
	}
	if exists(stale) || !exists(strange) || !exists(mounted) {
		t.Errorf("after sweep: stale file %v, another's file %v, mounted namespace %v; want only the last two",
			exists(stale), exists(strange), exists(mounted))
	}
}

func TestDownRefusesLiveLab(t *testing.T) {
	CheckLeaks(t)
	l := NewT(t)
	if err := Down(l.ID); !errors.Is(err, ErrInUse) {
		t.Errorf("down of a live lab: %v", err)
	}
}

// killedChild returns the id of a lab whose owner was killed and the pid of a
// process that was started in it.
func killedChild(t *testing.T, kind string) (id string, pid int) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "NETTEST_CHILD="+kind)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fscan(out, &id, &pid); err != nil {
		t.Error(err)
	}
	if got := remains(id); len(got) < 5 {
		t.Errorf("lab before the kill: %v", got)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	return id, pid
}

// remains names all there is of a lab.
func remains(id string) []string {
	netns := netnsPaths(id)
	mnts, _ := filepath.Glob(mntPath(id, "*"))
	inside := map[nsID]bool{}
	for _, p := range append(slices.Clone(netns), mnts...) {
		if ns, err := statNS(p); err == nil {
			inside[ns] = true
		}
	}
	all := append(netns, mnts...)
	for _, pid := range pidsInside(inside) {
		all = append(all, fmt.Sprint("pid ", pid))
	}
	if dir := filepath.Join(baseDir, id); exists(dir) {
		all = append(all, dir)
	}
	groups, _ := filepath.Glob(cgroupRoot + "/*/twill-lab-" + id + "-*")
	return append(all, groups...)
}
