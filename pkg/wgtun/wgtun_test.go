package wgtun

import (
	"crypto/sha256"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/twill-net/twill/pkg/nettest"
)

func TestTraffic(t *testing.T) {
	t.Parallel()
	a, b := newPair(t)
	a.reach(b)
	b.reach(a)
	transfer(t, a, b, 64<<20)

	// The peer as wg(8) shows it: key, psk, endpoint, prefixes, handshake, received, sent, keepalive.
	lines := strings.Split(strings.TrimSpace(a.run("wg", "show", link, "dump")), "\n")
	if len(lines) != 2 {
		t.Fatalf("wg show: %q", lines)
	}
	own, peer := strings.Split(lines[0], "\t"), strings.Split(lines[1], "\t")
	if own[0] != a.key.String() || own[1] != a.key.Public().String() || own[2] != "51820" {
		t.Error("wg shows another key or port of the device")
	}
	want := []string{b.key.Public().String(), "(none)", b.IPv4.String() + ":51820", b.inner[0].String() + "," + b.inner[1].String()}
	if got := strings.Join(peer[:4], " "); got != strings.Join(want, " ") {
		t.Errorf("wg shows peer %s, want %s", got, want)
	}
	if peer[4] == "0" || len(peer[6]) < len("64000000") {
		t.Errorf("handshake %s, sent %s bytes", peer[4], peer[6])
	}
	// And as it sets it: without the peer, nothing gets through.
	a.run("wg", "set", link, "peer", b.key.Public().String(), "remove")
	if _, err := a.Run("ping", "-c", "1", "-W", "1", b.inner[0].Addr().String()); err == nil {
		t.Error("reached without a peer")
	}
	if got := a.run("stat", "-c", "%a", socketDir+"/"+link+".sock"); strings.TrimSpace(got) != "600" {
		t.Errorf("mode of the socket is %s", got)
	}
}

// transfer sends bytes by TCP, which the TUN takes in large segments.
func transfer(t *testing.T, a, b *node, size int64) {
	t.Helper()
	var l net.Listener
	if err := b.Do(func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(b.inner[0].Addr(), 0).String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	type result struct {
		sum [sha256.Size]byte
		n   int64
		err error
	}
	got := make(chan result, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			got <- result{err: err}
			return
		}
		defer c.Close()
		h := sha256.New()
		n, err := io.Copy(h, c)
		got <- result{[sha256.Size]byte(h.Sum(nil)), n, err}
	}()
	c, err := a.DialContext(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	h, began := sha256.New(), time.Now()
	buf := make([]byte, 1<<20)
	for i := range buf {
		buf[i] = byte(i * 7 >> 3)
	}
	for sent := int64(0); sent < size && err == nil; sent += int64(len(buf)) {
		h.Write(buf)
		_, err = c.Write(buf)
	}
	c.Close()
	r := <-got
	if err != nil || r.err != nil || r.n != size || r.sum != [sha256.Size]byte(h.Sum(nil)) {
		t.Errorf("sent %d bytes: %v; arrived %d: %v; same content: %t", size, err, r.n, r.err, r.sum == [sha256.Size]byte(h.Sum(nil)))
	}
	t.Logf("%.2f Gb/s", float64(8*size)/float64(time.Since(began).Nanoseconds()))
}

// TestRestart ends the daemon in both ways. The TUN stays with what is on it.
func TestRestart(t *testing.T) {
	t.Parallel()
	a, b := newPair(t)
	a.reach(b)
	before := a.plumbing()
	for _, p := range a.inner {
		if !strings.Contains(before, p.Addr().String()) {
			t.Fatalf("%s is not in:\n%s", p.Addr(), before)
		}
	}
	for _, end := range []func() error{a.proc.Kill9, a.proc.Term} {
		pings, err := a.Host.Start(nettest.Program{Path: "ping", Args: []string{"-i", "0.01", "-c", "500", b.inner[0].Addr().String()}})
		if err != nil {
			t.Fatal(err)
		}
		if err := end(); err != nil {
			t.Fatal(err)
		}
		if carrier := a.run("cat", "/sys/class/net/"+link+"/carrier"); carrier != "0\n" {
			t.Errorf("carrier without a daemon: %q", carrier)
		}
		a.start()
		if after := a.plumbing(); after != before {
			t.Errorf("restart changes\n%sto\n%s", before, after)
		}
		a.meet(b)
		a.reach(b)
		if err := pings.Wait(); err != nil {
			t.Errorf("ping: %v", err)
		}
		out, err := pings.Output()
		if err != nil {
			t.Error(err)
		}
		_, lost, _ := strings.Cut(out, "statistics ---\n")
		t.Log("over a restart, one ping in 10 ms:", lost)
	}
	if left := a.run("ls", "-A", socketDir); left != link+".sock\n" {
		t.Errorf("in %s: %q", socketDir, left)
	}
	if err := a.proc.Term(); err != nil {
		t.Fatal(err)
	}
	if left := a.run("ls", "-A", socketDir); left != "" {
		t.Errorf("left in %s: %q", socketDir, left)
	}
}

// TestDone ends the device from outside, and opens it again.
func TestDone(t *testing.T) {
	t.Parallel()
	a, b := newPair(t)
	a.reach(b)
	for _, kill := range [][]string{{"ip", "link", "delete", link}, {"rm", socketDir + "/" + link + ".sock"}} {
		a.run(kill[0], kill[1:]...)
		a.waitLog("done")
		if err := a.proc.Wait(); err != nil {
			t.Errorf("%s: %v", kill, err)
		}
		a.start()
		a.meet(b)
		if kill[0] == "ip" {
			a.plumb(b)
		}
		a.reach(b)
	}
}

// TestLinkFollowed takes the link down and up, and changes its MTU.
func TestLinkFollowed(t *testing.T) {
	t.Parallel()
	a, b := newPair(t)
	a.reach(b)
	a.run("ip", "link", "set", link, "down")
	a.run("ip", "link", "set", link, "up")
	a.run("ip", "route", "replace", b.inner[0].String(), "dev", link)
	a.run("ip", "link", "set", link, "mtu", "1300")
	a.run("ping", "-c", "1", "-w", "15", "-M", "do", "-s", "1272", b.inner[0].Addr().String())
	if _, err := a.Run("ping", "-c", "1", "-w", "1", "-M", "do", "-s", "1273", b.inner[0].Addr().String()); err == nil {
		t.Error("a packet larger than the MTU goes through")
	}
}

func TestErrors(t *testing.T) {
	t.Parallel()
	_, hosts := nettest.NewHosts(t, 1)
	a := newNode(t, hosts[0], 1)
	fails := func(want string, wrap ...string) {
		t.Helper()
		args := append(wrap, "env", "WGTUN_TEST=carry", "timeout", "10", program(t))
		out, err := a.Run(args[0], args[1:]...)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %s %v, want %s", wrap, out, err, want)
		}
		if strings.Contains(want, "another process") {
			return
		}
		if left := a.run("ls", "-A", socketDir); left != "" {
			t.Errorf("%s leaves %q in %s", wrap, left, socketDir)
		}
	}
	shell := func(script string) []string {
		return []string{"unshare", "-m", "sh", "-c", script + ` && exec "$@"`, "sh"}
	}

	fails("open /dev/net/tun: no such file or directory; load the kernel module tun, and mount /dev/net/tun into the container",
		shell("mount -t tmpfs tmpfs /dev/net")...)
	fails("needs CAP_NET_ADMIN", "setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
	fails(socketDir+" must be writable", shell("mount -t tmpfs -o ro tmpfs /run/wireguard")...)
	if _, err := a.Run("ip", "link", "show", link); err == nil {
		t.Error("a failed Open leaves the TUN")
	}
	a.run("ip", "link", "add", link, "type", "bridge")
	fails("the name is taken by a link of another kind: ip link delete " + link)
	a.run("ip", "link", "delete", link)
	a.run("ip", "tuntap", "add", link, "mode", "tap")
	fails("the name is taken by a link of another kind: ip link delete " + link)
	a.run("ip", "link", "delete", link)
	a.start()
	fails("another process carries its packets")

	for _, o := range []Options{{Name: link, MTU: 0}, {Name: link, MTU: 70000}, {Name: "much-too-long-a-name", MTU: 1420}} {
		if _, err := Open(o); err == nil || !strings.Contains(err.Error(), "open WireGuard device "+o.Name) {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

// TestLeaks runs this program's TestInside in a namespace.
func TestLeaks(t *testing.T) {
	_, hosts := nettest.NewHosts(t, 1)
	a := newNode(t, hosts[0], 1)
	out, err := a.Run("env", "WGTUN_INSIDE=1", program(t), "-test.run=^TestInside$", "-test.v")
	if err != nil || !strings.Contains(out, "--- PASS: TestInside") {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestInside opens and closes a device that is up, in the namespace of TestLeaks.
func TestInside(t *testing.T) {
	if os.Getenv("WGTUN_INSIDE") == "" {
		return
	}
	nettest.CheckLeaks(t)
	t.Cleanup(func() {
		if out, err := exec.Command("ip", "link", "delete", link).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	for range 3 {
		d, err := Open(Options{Name: link, MTU: mtu, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("ip", "link", "set", link, "up").CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		idle, err := net.Dial("unix", filepath.Join(socketDir, link+".sock"))
		if err != nil {
			t.Fatal(err)
		}
		defer idle.Close() // a client that never hangs up does not hold Close
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		select {
		case <-d.Done():
		default:
			t.Error("closed and not done")
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if _, err := Open(Options{Name: "lo", MTU: mtu, Log: slog.New(slog.DiscardHandler)}); err == nil {
			t.Error("lo is a TUN")
		}
	}
}
