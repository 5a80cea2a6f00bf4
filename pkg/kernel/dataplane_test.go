package kernel

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
	wgconn "golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

const socketDir = "/run/wireguard"

// inHost is inNode with a directory of its own for the sockets of WireGuard in
// user space.
func inHost(t testing.TB, fn func(k *Kernel)) {
	t.Helper()
	done := make(chan struct{})
	var run func()
	run = func() {
		runtime.LockOSThread() // not unlocked: the thread ends with the goroutine
		if unix.Gettid() == unix.Getpid() {
			go run() // the main thread never ends
			<-done
			return
		}
		defer close(done)
		for _, err := range []error{
			os.MkdirAll(socketDir, 0o755),
			unix.Unshare(unix.CLONE_NEWNS),
			unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""),
			unix.Mount("twill-test", socketDir, "tmpfs", 0, ""),
		} {
			if err != nil {
				t.Errorf("enter mount namespace: %v", err)
				return
			}
		}
		inNode(t, fn)
	}
	go run()
	<-done
}

// dataPlane holds the devices that programs in user space make.
type dataPlane struct {
	tun *os.File
	wg  *userWireGuard
}

// start makes the devices of w that are not there yet.
func (d *dataPlane) start(t testing.TB, w world) {
	t.Helper()
	if w.tunnelled > 0 && d.tun == nil {
		d.tun = newTUN(t, overlay.UDPLink)
	}
	if w.encrypted > 0 && d.wg == nil {
		d.wg = newUserWireGuard(t, overlay.WireGuardLink)
	}
}

// stop ends those that w does not need.
func (d *dataPlane) stop(w world) {
	if w.tunnelled == 0 && d.tun != nil {
		d.tun.Close()
		d.tun = nil
	}
	if w.encrypted == 0 && d.wg != nil {
		d.wg.close()
		d.wg = nil
	}
}

func (d *dataPlane) reconcile(t testing.TB, k *Kernel, w world) overlay.Plan {
	t.Helper()
	d.start(t, w)
	p := reconcile(t, k, w.state())
	d.stop(w)
	return p
}

// newTUN makes a TUN that stays when the file is closed, without carrier then.
func newTUN(t testing.TB, name string) *os.File {
	t.Helper()
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	request, err := unix.NewIfreq(name)
	if err != nil {
		t.Fatal(err)
	}
	request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(int(f.Fd()), unix.TUNSETIFF, request); err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetInt(int(f.Fd()), unix.TUNSETPERSIST, 1); err != nil {
		t.Fatal(err)
	}
	return f
}

// userWireGuard is a WireGuard device of this process.
type userWireGuard struct {
	device *device.Device
	listen net.Listener
	done   chan struct{}
}

func newUserWireGuard(t testing.TB, name string) *userWireGuard {
	t.Helper()
	link, err := tun.CreateTUN(name, 1420)
	if err != nil {
		t.Fatal(err)
	}
	bind := hereBind{wgconn.NewDefaultBind(), &nettest.NS{Path: fmt.Sprintf("/proc/%d/task/%d/ns/net", unix.Getpid(), unix.Gettid())}}
	u := &userWireGuard{device: device.NewDevice(link, bind, device.NewLogger(device.LogLevelSilent, "")), done: make(chan struct{})}
	if u.listen, err = net.Listen("unix", socketDir+"/"+name+".sock"); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(u.done)
		for {
			c, err := u.listen.Accept()
			if err != nil {
				return
			}
			u.device.IpcHandle(c)
		}
	}()
	return u
}

func (u *userWireGuard) close() {
	u.listen.Close()
	<-u.done
	u.device.Close()
}

// hereBind opens its sockets in a namespace, whatever thread asks.
type hereBind struct {
	wgconn.Bind
	ns *nettest.NS
}

func (b hereBind) Open(port uint16) (fns []wgconn.ReceiveFunc, actual uint16, err error) {
	err = b.ns.Do(func() error {
		fns, actual, err = b.Bind.Open(port)
		return err
	})
	return fns, actual, err
}

// tunnels adds the devices of the data planes, with which w needs no more than
// their peers.
func (w world) tunnels(s *overlay.State) {
	var links []overlay.Link
	if w.tunnelled > 0 {
		links = append(links, overlay.Link{Name: overlay.UDPLink, Alias: overlay.Alias, Up: true, MTU: w.mtu - 30, Kind: overlay.KindTUN})
	}
	if w.encrypted > 0 {
		key := overlay.WGKey{1: w.mac, 31: 64} // in the form that X25519 gives all keys
		links = append(links, overlay.Link{
			Name: overlay.WireGuardLink, Alias: overlay.Alias, Up: true, MTU: w.mtu - 40, Kind: overlay.KindTUN,
			WG: overlay.WireGuard{Port: w.port + 1, Key: key},
		})
	}
	for _, l := range links {
		s.Links = append(s.Links, l)
		for _, f := range w.families {
			own := subnet(f, 0).Addr()
			s.Addrs = append(s.Addrs, overlay.Addr{Link: l.Name, Prefix: netip.PrefixFrom(own, own.BitLen())})
			// The whole network, as a plain route beside those by nexthop objects.
			if l.Name == overlay.UDPLink {
				s.Routes = append(s.Routes, overlay.Route{Dst: netip.PrefixFrom(own, 12).Masked(), Metric: metric(f), Link: l.Name, Protocol: overlay.Protocol})
			}
		}
	}
}

// wgPeer adds a subnet to a peer, which carries all families.
func (w world) wgPeer(s *overlay.State, f overlay.Family, p int) {
	key := overlay.WGKey{byte(p), byte(p >> 8), 1}
	for i := range s.WGPeers {
		if s.WGPeers[i].PublicKey == key {
			s.WGPeers[i].AllowedIPs += "," + subnet(f, p).String()
			return
		}
	}
	peer := overlay.WGPeer{
		Link: overlay.WireGuardLink, PublicKey: key, AllowedIPs: subnet(f, p).String(),
		Endpoint: netip.AddrPortFrom(underlayHost(w.families[0], p), w.port),
	}
	if p < w.moved {
		peer.Endpoint = netip.AddrPortFrom(underlayHost(w.families[len(w.families)-1], p+1), w.port)
		peer.PSK, peer.Keepalive = overlay.WGKey{1}, 25e9
	}
	s.WGPeers = append(s.WGPeers, peer)
}

// group leads to two gateways on the underlay.
func (w world) group(s *overlay.State, f overlay.Family, p int) overlay.Nexthop {
	first := uint32(0x56<<24 | int(f)<<8)
	for i := range uint32(2 + w.parent) {
		n := overlay.Nexthop{ID: first + i, Gateway: underlayGateway(f, byte(i)), Link: "eth0"}
		if !contains(s.Nexthops, n) {
			s.Nexthops = append(s.Nexthops, n)
		}
	}
	group := fmt.Sprintf("%d/%d", first, first+1)
	if w.parent > 0 && p%2 == 0 {
		group = fmt.Sprintf("%d/%d", first+1, first+2)
	}
	return overlay.Nexthop{ID: uint32(0x57<<24 | int(f)<<8 | p%2), Group: group}
}

func contains[T comparable](s []T, x T) bool {
	for _, y := range s {
		if x == y {
			return true
		}
	}
	return false
}
