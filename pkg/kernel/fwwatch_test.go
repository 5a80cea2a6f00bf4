package kernel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

// TestFirewallIdleRunsNothing counts the commands that observe starts.
func TestFirewallIdleRunsNothing(t *testing.T) {
	for _, kind := range fwKinds() {
		t.Run(kind.name, func(t *testing.T) {
			fwFlavour(t, kind.flavour)
			fwNamespace(t)
			dir := t.TempDir()
			log := filepath.Join(dir, "log")
			for _, command := range []string{"iptables", "iptables-restore", "ip6tables", "ip6tables-restore", "nft"} {
				path, err := exec.LookPath(command)
				if err != nil {
					t.Fatal(err)
				}
				script := fmt.Sprintf("#!/bin/sh\necho %s >> %s\nexec %s \"$@\"\n", command, log, path)
				if err := os.WriteFile(filepath.Join(dir, command), []byte(script), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
			runs := func() int {
				text, err := os.ReadFile(log)
				if err != nil {
					t.Fatal(err)
				}
				return strings.Count(string(text), "\n")
			}
			f := fwOpen(t)
			opened := runs()
			want := fwWanted(kind.tool)
			fwReconcile(t, f, want)
			reconciled := runs()
			if reconciled == opened {
				t.Fatal("the counter counts nothing")
			}
			for range 100 {
				if plan := fwPlan(t, f, want); len(plan) > 0 {
					t.Fatalf("not idle:\n%s", plan)
				}
			}
			if n := runs(); n != reconciled {
				t.Errorf("100 idle observations ran %d commands", n-reconciled)
			}
			sh(t, "iptables -t nat -N KUBE-X")
			changed := runs()
			fwPlan(t, f, want)
			if runs() == changed {
				t.Error("a change was not looked at")
			}
		})
	}
}

// TestFirewallEvents looks at the real notifications of changes that are, or are
// not, our concern.
func TestFirewallEvents(t *testing.T) {
	fwFlavour(t, "nft")
	fwNamespace(t)
	sh(t, fwForeign)
	f := fwOpen(t)
	fwReconcile(t, f, fwWanted(overlay.Iptables))
	sh(t, "nft add table ip twill; nft add table inet twill")
	if err := f.events.set(unix.NETLINK_ADD_MEMBERSHIP); err != nil {
		t.Fatal(err)
	}
	for _, v := range []struct {
		script string
		want   bool
	}{
		{"iptables -t nat -A KUBE-POSTROUTING -j RETURN", false},
		{"ip6tables -t nat -N KUBE-X", false},
		{"iptables -t mangle -A POSTROUTING -j RETURN", false},
		{"iptables -t mangle -A FORWARD -j RETURN", false},
		{"iptables -A INPUT -j RETURN", false},
		{"nft add chain inet foreign POSTROUTING; nft add rule inet foreign POSTROUTING drop", false},
		{"nft add chain inet twill TWILL-X; nft delete table inet foreign", false},
		{"nft add table ip x; nft delete table ip x", false},
		{"iptables -t nat -A POSTROUTING -j RETURN", true},
		{"ip6tables -A FORWARD -j RETURN", true},
		{"iptables -t nat -F TWILL-POSTRTG", true},
		{"ip6tables -N TWILL-X", true},
		{"nft add chain ip twill x", true},
		{"nft delete table ip twill", true},
		{"nft delete table ip6 nat", true},
	} {
		sh(t, v.script)
		if got := concerned(t, f.events); got != v.want {
			t.Errorf("%s: concerns us: %t", v.script, got)
		}
	}
}

// concerned reads all notifications that are there.
func concerned(t *testing.T, s *eventSocket) bool {
	t.Helper()
	raw, err := s.file.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	found, read := false, 0
	buffer := make([]byte, 1<<16)
	var failed error
	if err := raw.Control(func(fd uintptr) {
		for {
			var n int
			if n, _, failed = unix.Recvfrom(int(fd), buffer, unix.MSG_DONTWAIT); failed != nil {
				return
			}
			read++
			if !messages(buffer[:n], func(h header, body []byte) { found = found || concernsUs(h, body) }) {
				t.Error("cut off")
			}
		}
	}); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(failed, unix.EAGAIN) || read == 0 {
		t.Fatalf("read %d events: %v", read, failed)
	}
	return found
}

// TestFirewallEventsLost overflows the event socket before anybody reads from it,
// with events that are not our concern.
func TestFirewallEventsLost(t *testing.T) {
	fwFlavour(t, "nft")
	fwNamespace(t)
	f := fwOpen(t)
	raw, err := f.events.file.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		if err := unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 1); err != nil {
			t.Error(err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	rings := 0
	if err := f.watch(ctx, func(reason string) {
		switch rings++; {
		case rings == 1: // nobody reads before this returns
			sh(t, "for i in 1 2 3 4 5 6 7 8 9; do nft add table ip x; nft delete table ip x; done")
		case strings.Contains(reason, "more happened"):
			cancel()
		}
	}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	// The next watch hears as well as the first.
	ctx, cancel = context.WithCancel(t.Context())
	rings = 0
	if err := f.watch(ctx, func(string) {
		if rings++; rings == 1 {
			sh(t, "nft add table ip twill")
			return
		}
		cancel()
	}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestFirewallNeverWithout replaces the rules 200 times while new connections are
// made, each of which must be masqueraded.
func TestFirewallNeverWithout(t *testing.T) {
	for _, kind := range fwKinds() {
		t.Run(kind.name, func(t *testing.T) {
			fwFlavour(t, kind.flavour)
			send := fwLink(t)
			f := fwOpen(t)
			masquerade := "-s 10.5.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE"
			other := "-p tcp -j RETURN"
			if kind.tool == overlay.Nftables {
				masquerade, other = "ip saddr 10.5.0.0/16 ip daddr != 224.0.0.0/4 masquerade", "ip protocol tcp return"
			}
			contents := [][]overlay.Chain{
				{fwChain(kind.tool, overlay.IPv4, overlay.PostroutingChain, masquerade)},
				{fwChain(kind.tool, overlay.IPv4, overlay.PostroutingChain, other, masquerade)},
			}
			if source := send(); source != "10.5.1.1" {
				t.Fatalf("masqueraded as %s before there is a rule", source)
			}
			fwReconcile(t, f, contents[0])
			stop, done := make(chan struct{}), make(chan int)
			go func() {
				for n := 0; ; n++ {
					select {
					case <-stop:
						done <- n
						return
					default:
					}
					if source := send(); source != "198.51.100.1" {
						t.Errorf("connection %d came from %s", n, source)
					}
					time.Sleep(200 * time.Microsecond) // spares the connection table
				}
			}()
			for i := range 200 {
				change := overlay.Op{Verb: overlay.Change, Object: contents[(i+1)%2][0], Before: contents[i%2][0]}
				for _, failure := range f.apply(t.Context(), []overlay.Op{change}) {
					t.Errorf("%s: %v", failure.Op, failure.Err)
				}
			}
			close(stop)
			t.Logf("%d connections", <-done)
			fwReconcile(t, f, contents[0])
		})
	}
}

// fwLink makes the test's namespace one with a pod's address and a link to another
// namespace. The function it returns sends a packet of a new connection there and
// says from where it came.
func fwLink(t *testing.T) (send func() string) {
	t.Helper()
	fwNamespace(t)
	here, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { here.Close() })
	there, err := netns.New() // and the thread is in it now
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { there.Close() })
	server := fwListen(t, "0.0.0.0:4000")
	if err := netns.Set(here); err != nil {
		t.Fatal(err)
	}
	sh(t, fmt.Sprintf(`ip link add v0 type veth peer name v1 netns /proc/%d/fd/%d
		ip address add 198.51.100.1/24 dev v0
		ip link set v0 up
		ip address add 10.5.1.1/32 dev lo
		ip link set lo up`, os.Getpid(), int(there)))
	if err := netns.Set(there); err != nil {
		t.Fatal(err)
	}
	sh(t, "ip address add 198.51.100.2/24 dev v1; ip link set v1 up")
	if err := netns.Set(here); err != nil {
		t.Fatal(err)
	}
	clients := fwDialer(t, here)
	return func() string {
		client := clients()
		defer client.Close()
		if _, err := client.WriteTo([]byte("x"), &net.UDPAddr{IP: net.IPv4(198, 51, 100, 2), Port: 4000}); err != nil {
			return err.Error()
		}
		_, source, err := server.ReadFrom(make([]byte, 1))
		if err != nil {
			return err.Error()
		}
		return source.(*net.UDPAddr).IP.String()
	}
}

// fwListen opens a UDP socket in the thread's namespace.
func fwListen(t *testing.T, address string) net.PacketConn {
	t.Helper()
	c, err := net.ListenPacket("udp4", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// fwDialer returns a function that opens sockets of a pod in namespace ns from
// any goroutine, each with a port of its own.
func fwDialer(t *testing.T, ns netns.NsHandle) func() net.PacketConn {
	requests, answers := make(chan struct{}), make(chan net.PacketConn)
	t.Cleanup(func() { close(requests) })
	go func() {
		runtime.LockOSThread()
		if err := netns.Set(ns); err != nil {
			t.Error(err)
		}
		for range requests {
			c, err := net.ListenPacket("udp4", "10.5.1.1:0")
			if err != nil {
				t.Error(err)
			}
			answers <- c
		}
	}()
	return func() net.PacketConn {
		requests <- struct{}{}
		return <-answers
	}
}
