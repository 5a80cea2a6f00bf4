package main

import (
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/twill-net/twill/pkg/pod"
)

// await waits until something is so.
func await(t testing.TB, what string, so func() bool) {
	t.Helper()
	for begin := time.Now(); !so(); time.Sleep(5 * time.Millisecond) {
		if time.Since(begin) > 30*time.Second {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// daemonOf answers the plugin as twilld does, and counts what it is asked to collect.
func daemonOf(h *host, status func() error) *atomic.Int32 {
	h.t.Helper()
	l, err := net.Listen("unix", pod.SocketFor(h.conf["handoffFile"].(string)))
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { l.Close() })
	var collects atomic.Int32
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = pod.Answer(conn, status, func() { collects.Add(1) })
		}
	}()
	return &collects
}

// DEL cuts the pod off and frees its addresses, and leaves the deletion of its links
// to the daemon. Until then nothing of the old pod stands in a new one's way.
func TestHandOver(t *testing.T) {
	for _, mode := range []string{"bridged", "routed"} {
		t.Run(mode, func(t *testing.T) {
			h, a, b := newHost(t), newNamespace(t), newNamespace(t)
			h.conf["mode"] = mode
			h.forwards()
			collects := daemonOf(h, func() error { return nil })
			ra, rb := h.attach(add("a", a)), h.attach(add("b", b))
			for range 2 { // idempotent, too
				h.must(del("a", a))
			}
			if n := collects.Load(); n == 0 {
				t.Fatal("the daemon was not asked to collect")
			}
			if got := a.links(); got != "lo eth0" {
				t.Errorf("links in the pod: %s; the daemon has not collected yet", got)
			}
			for _, file := range h.files() {
				if file == "198.18.1.2" || file == "a:eth0" {
					t.Errorf("%s is left", file)
				}
			}
			for i := range 2 {
				if err := ping(a, addrOf(rb, i), 100); err == nil {
					t.Errorf("a pod that was detached reaches %s", addrOf(rb, i))
				}
				if err := ping(h.namespace, addrOf(ra, i), 100); err == nil {
					t.Errorf("a pod that was detached is reached by %s", addrOf(ra, i))
				}
			}
			// A new pod with the old one's address, and one in its namespace.
			c := newNamespace(t)
			want := map[string]any{"ips": []any{addrOf(ra, 0).String(), addrOf(ra, 1).String()}}
			rc := h.attach(add("c", c).with("runtimeConfig", want))
			for i := range 2 {
				mustPing(t, b, addrOf(rc, i), 100)
			}
			h.attach(add("a", a))
			h.must(del("a", a))
			h.attach(add("other", a))
			h.must(del("other", a))
			h.must(del("b", b))
			h.must(del("c", c))
			if err := h.do(pod.DeleteDoomed); err != nil {
				t.Error(err)
			}
			if err := h.nl.LinkDel(h.link("up0")); err != nil {
				t.Fatal(err)
			}
			h.clean()
		})
	}
}

// STATUS speaks with the daemon's words.
func TestStatusOfDaemon(t *testing.T) {
	h := newHost(t)
	var reason error
	daemonOf(h, func() error { return reason })
	h.must(call{verb: "STATUS"})
	reason = errors.New("a change failed: add route 10.5.2.0/24: no buffer space")
	h.fails(call{verb: "STATUS"}, 50, "twilld: a change failed: add route 10.5.2.0/24: no buffer space", "netctl status")

	early := newHost(t)
	early.conf["handoffFile"] = fmt.Sprint(t.TempDir(), "/twill.json")
	daemonOf(early, func() error { return errors.New("waiting for a lease: etcd is away") })
	early.fails(call{verb: "STATUS"}, 50, "twill.json is missing", "waiting for a lease: etcd is away")
	early.fails(add("c", newNamespace(t)), 11, "waiting for a lease: etcd is away")
}
