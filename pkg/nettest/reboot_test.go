package nettest

import (
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// TestReboot: what the kernel held is gone, processes too, and the cable is in again.
func TestReboot(t *testing.T) {
	l := NewT(t)
	a, err := l.NewNamedHost("a", 2)
	must(t, err)
	b, err := l.NewNamedHost("b", 3)
	must(t, err)
	must(t, a.Do(func() error {
		return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "old"}})
	}))
	_, err = a.Run("touch", "/run/flannel/old")
	must(t, err)
	p, err := a.Start(Program{Path: "sh", Args: []string{"-c", "echo inside; exec sleep 60"}})
	must(t, err)
	_, err = p.WaitLog(t.Context(), "inside")
	must(t, err)

	must(t, a.Reboot())
	select {
	case <-p.Done():
	case <-time.After(30 * time.Second):
		t.Error("a process outlives a reboot")
	}
	if out, err := a.Run("sh", "-c", "ip link show dev old || ls /run/flannel/old"); err == nil {
		t.Errorf("left after a reboot: %s", out)
	}
	if out, err := a.Run("ping", "-c", "1", "-W", "5", b.IPv4.String()); err != nil {
		t.Errorf("no network after a reboot: %v: %s", err, out)
	}
	if _, err := l.NewNamedHost("c", 255); err == nil {
		t.Error("a host has the address 198.51.100.255")
	}
}

// TestCgroup: a process enters a host's group, and neither outlives the lab.
func TestCgroup(t *testing.T) {
	l, err := New(Options{})
	must(t, err)
	h, err := l.NewHost()
	must(t, err)
	groups, err := l.NewCgroup(h.Name, "child")
	must(t, err)
	if len(groups) == 0 {
		t.Fatal("no controller has the group")
	}
	script := `for g; do echo 0 >"$g/cgroup.procs" || exit; done; echo inside; exec sleep 600`
	p, err := h.Start(Program{Path: "sh", Args: append([]string{"-c", script, "sh"}, groups...)})
	must(t, err)
	_, err = p.WaitLog(t.Context(), "inside")
	must(t, err)
	disk, err := l.DiskDir()
	must(t, err)
	must(t, l.Close())
	for _, g := range append(groups, disk) {
		if exists(g) {
			t.Errorf("%s outlives the lab", g)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
