package nettest

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestHostsPing(t *testing.T) {
	CheckLeaks(t)
	_, hosts := NewHosts(t, 2)
	for _, addr := range []fmt.Stringer{hosts[1].IPv4, hosts[1].IPv6} {
		run(t, hosts[0].NS, "ping", "-c", "1", "-W", "2", addr.String())
	}
	if got := run(t, hosts[1].NS, "ip", "-4", "route", "show", "default"); !strings.Contains(got, "via 198.51.100.1 dev eth0") {
		t.Errorf("default route: %s", got)
	}
	if _, err := hosts[0].Run("ping", "-c", "1", "-W", "1", "203.0.113.1"); err == nil {
		t.Error("an address that no host has answers")
	}
	// The machine's own ip finds the namespace by its name.
	out, err := exec.Command("ip", "netns", "exec", filepath.Base(hosts[0].Path), "ip", "-br", "addr", "show", "eth0").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "198.51.100.11/24") || !strings.Contains(string(out), "2001:db8:51::11/64") {
		t.Errorf("ip netns exec: %v: %s", err, out)
	}
}

func TestHostsHaveTheirOwnFiles(t *testing.T) {
	CheckLeaks(t)
	l, hosts := NewHosts(t, 2)
	for _, dir := range []string{"/run/flannel", "/run/twill", "/run/wireguard", "/var/lib/cni", "/etc/cni"} {
		run(t, hosts[0].NS, "touch", dir+"/nettest")
		if _, err := hosts[1].Run("test", "-e", dir+"/nettest"); err == nil {
			t.Errorf("h2 sees a file of h1 in %s", dir)
		}
		if exists(dir + "/nettest") {
			t.Errorf("the machine sees a file of h1 in %s", dir)
		}
	}
	// A pod made after its host is seen in the host's mount namespace.
	pod, err := hosts[0].NewPodNS("p1")
	if err != nil {
		t.Fatal(err)
	}
	run(t, hosts[0].NS, "nsenter", "--net="+pod.Path, "true")
	run(t, pod, "test", "-e", "/run/flannel/nettest")
	if got := run(t, hosts[0].NS, "ls", "/sys/class/net"); !strings.Contains(got, "eth0") {
		t.Errorf("/sys/class/net of h1: %s", got)
	}
	run(t, hosts[0].NS, "test", "-e", "/sys/fs/cgroup/cgroup.procs", "-o", "-d", "/sys/fs/cgroup/unified")
	run(t, hosts[0].NS, "iptables", "-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE")
	if err := l.Setenv("LAB_GREETING", "hello"); err != nil {
		t.Fatal(err)
	}
	if got := run(t, pod, "printenv", "LAB_GREETING"); got != "hello\n" {
		t.Errorf("environment: %q", got)
	}
}

func TestPodNS(t *testing.T) {
	CheckLeaks(t)
	_, hosts := NewHosts(t, 1)
	pod, err := hosts[0].NewPodNS("p1")
	if err != nil {
		t.Fatal(err)
	}
	run(t, pod, "ping", "-c", "1", "127.0.0.1")
	run(t, pod, "ping", "-c", "1", "::1")
	if got := run(t, pod, "ip", "-br", "link"); strings.Contains(got, "eth0") {
		t.Errorf("a bare pod has links: %s", got)
	}
	if _, err := hosts[0].NewPodNS("p1"); err == nil {
		t.Error("the same pod was made twice")
	}
	run(t, pod, "true") // and is still there
	if _, err := hosts[0].NewPodNS("p-1"); err == nil {
		t.Error("a name with a dash was accepted")
	}
}

func TestDo(t *testing.T) {
	CheckLeaks(t)
	ns := NewNS(t)
	before := links(t)
	err := ns.Do(func() error {
		if got := links(t); got != "lo" {
			t.Errorf("links inside: %s", got)
		}
		// A command that fn starts itself is inside.
		out, err := exec.Command("ip", "-br", "link").Output()
		if n := strings.Count(string(out), "\n"); n != 1 {
			t.Errorf("links of a command inside: %s", out)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := links(t); got != before {
		t.Errorf("links after Do: %s, want %s", got, before)
	}
	// A connection is opened inside and used outside.
	var l net.Listener
	err = ns.Do(func() (err error) {
		l, err = net.Listen("tcp", "127.0.0.1:0")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := ns.DialContext(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func TestCutCable(t *testing.T) {
	CheckLeaks(t)
	_, hosts := NewHosts(t, 2)
	ping := func() error {
		_, err := hosts[0].Run("ping", "-c", "1", "-W", "1", hosts[1].IPv4.String())
		return err
	}
	if err := hosts[1].Cut(); err != nil {
		t.Fatal(err)
	}
	if ping() == nil {
		t.Error("a host without cable answers")
	}
	if err := hosts[1].Restore(); err != nil {
		t.Fatal(err)
	}
	eventually(t, ping)
}

func TestProcess(t *testing.T) {
	CheckLeaks(t)
	ns := NewNS(t)
	p, err := ns.Start(Program{
		Path: "sh", Name: "script", Env: []string{"WORD=ready"},
		Args: []string{"-c", `trap 'echo bye; exit 3' TERM; echo "$WORD $$"; while :; do sleep 0.05; done`},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, end := range []func() error{p.Kill9, p.Term} {
		line, err := p.WaitLog(t.Context(), "ready")
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprint("ready ", p.Pid()); line != want {
			t.Errorf("log says %q, want %q", line, want)
		}
		if p.Start() == nil {
			t.Error("started while running")
		}
		err = end()
		if _, still := startTime(p.Pid()); still == nil {
			t.Error("still there")
		}
		if end2 := p.Kill9(); end2 != nil {
			t.Errorf("kill after its end: %v", end2)
		}
		t.Log(err)
		if err := p.Start(); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Kill9(); err != nil {
		t.Fatal(err)
	}
	if _, err := p.WaitLog(t.Context(), "never said"); err == nil {
		t.Error("WaitLog returned without the line")
	}
	if b, _ := os.ReadFile(p.Log); strings.Count(string(b), "bye") != 1 {
		t.Errorf("log of all runs: %s", b)
	}
}

func run(t *testing.T, n *NS, name string, args ...string) string {
	t.Helper()
	out, err := n.Run(name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func links(t *testing.T) string {
	t.Helper()
	all, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, l := range all {
		names = append(names, l.Name)
	}
	return strings.Join(names, " ")
}

// eventually fails only if f fails for half a minute.
func eventually(t *testing.T, f func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatal(err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}
