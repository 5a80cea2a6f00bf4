package wgtun

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

const (
	link = "flannel-wg"
	mtu  = 1420
)

// TestMain lets this program be the daemon of a host: "carry" carries packets until
// it is ended, "configure" does what package kernel does.
func TestMain(m *testing.M) {
	var err error
	switch os.Getenv("WGTUN_TEST") {
	case "carry":
		err = carry()
	case "configure":
		err = configure(os.Args[1:])
	default:
		os.Exit(m.Run())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func carry() error {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	d, err := Open(Options{Name: link, MTU: mtu, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))})
	if err != nil {
		return err
	}
	fmt.Println("open")
	select {
	case <-ctx.Done():
	case <-d.Done():
		fmt.Println("done")
	}
	return d.Close()
}

// configure takes a private key, a peer's public key, its endpoint and its prefixes.
func configure(args []string) error {
	c, err := wgctrl.New()
	if err != nil {
		return err
	}
	defer c.Close()
	var keys [2]wgtypes.Key
	for i := range keys {
		if keys[i], err = wgtypes.ParseKey(args[i]); err != nil {
			return err
		}
	}
	peer := wgtypes.PeerConfig{PublicKey: keys[1], ReplaceAllowedIPs: true}
	peer.Endpoint = net.UDPAddrFromAddrPort(netip.MustParseAddrPort(args[2]))
	for _, s := range args[3:] {
		_, n, err := net.ParseCIDR(s)
		if err != nil {
			return err
		}
		peer.AllowedIPs = append(peer.AllowedIPs, *n)
	}
	port := 51820
	return c.ConfigureDevice(link, wgtypes.Config{
		PrivateKey: &keys[0], ListenPort: &port, ReplacePeers: true, Peers: []wgtypes.PeerConfig{peer},
	})
}

// node is a host with a device and a key.
type node struct {
	*nettest.Host
	t     *testing.T
	key   overlay.WGKey
	inner [2]netip.Prefix // of its pods
	proc  *nettest.Process
}

func newNode(t *testing.T, h *nettest.Host, n int) *node {
	t.Helper()
	key, err := Key(filepath.Join(t.TempDir(), "wgkey"))
	if err != nil {
		t.Fatal(err)
	}
	x := &node{Host: h, t: t, key: key, inner: [2]netip.Prefix{
		netip.MustParsePrefix(fmt.Sprintf("10.5.%d.0/24", n)), netip.MustParsePrefix(fmt.Sprintf("fd00:5:0:%d::/64", n)),
	}}
	return x
}

func (x *node) run(name string, args ...string) string {
	x.t.Helper()
	out, err := x.Run(name, args...)
	if err != nil {
		x.t.Fatal(err)
	}
	return out
}

// start starts the daemon, or starts it again.
func (x *node) start() {
	x.t.Helper()
	var err error
	if x.proc == nil {
		x.proc, err = x.Start(nettest.Program{Path: program(x.t), Name: "carry", Env: []string{"WGTUN_TEST=carry"}})
	} else {
		err = x.proc.Start()
	}
	if err != nil {
		x.t.Fatal(err)
	}
	x.waitLog("open")
}

func (x *node) waitLog(text string) {
	x.t.Helper()
	ctx, cancel := context.WithTimeout(x.t.Context(), 20*time.Second)
	defer cancel()
	if _, err := x.proc.WaitLog(ctx, text); err != nil {
		x.t.Fatal(err)
	}
}

// meet gives the device its key and the peer, by wgctrl.
func (x *node) meet(peer *node) {
	x.t.Helper()
	x.run("env", "WGTUN_TEST=configure", program(x.t), x.key.String(), peer.key.Public().String(),
		netip.AddrPortFrom(peer.IPv4, 51820).String(), peer.inner[0].String(), peer.inner[1].String())
}

// plumb does once what the kernel layer does: what outlives the daemon.
func (x *node) plumb(peer *node) {
	x.t.Helper()
	for i, p := range x.inner {
		x.run("ip", "address", "add", netip.PrefixFrom(p.Addr(), p.Addr().BitLen()).String(), "dev", link, "nodad")
		if i == 0 {
			x.run("ip", "link", "set", link, "up")
		}
		x.run("ip", "route", "add", peer.inner[i].String(), "dev", link, "src", p.Addr().String())
	}
}

// plumbing is what must survive.
func (x *node) plumbing() string {
	return x.run("ip", "-o", "address", "show", "dev", link, "scope", "global") +
		x.run("ip", "route", "show", "dev", link) + x.run("ip", "-6", "route", "show", "dev", link, "proto", "boot")
}

// reach pings with packets that fill the MTU, and once before that until the
// handshake has been made.
func (x *node) reach(peer *node) {
	x.t.Helper()
	for _, p := range peer.inner {
		overhead := 28
		if p.Addr().Is6() {
			overhead = 48
		}
		to := p.Addr().String()
		x.run("ping", "-c", "1", "-w", "15", to)
		x.run("ping", "-c", "20", "-i", "0.01", "-w", "10", "-M", "do", "-s", fmt.Sprint(mtu-overhead), to)
	}
}

func program(t *testing.T) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func newPair(t *testing.T) (a, b *node) {
	t.Helper()
	_, hosts := nettest.NewHosts(t, 2)
	a, b = newNode(t, hosts[0], 1), newNode(t, hosts[1], 2)
	for _, x := range []*node{a, b} {
		x.start()
	}
	a.meet(b)
	b.meet(a)
	a.plumb(b)
	b.plumb(a)
	return a, b
}
