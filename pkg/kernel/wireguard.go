package kernel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/twill-net/twill/pkg/overlay"
)

// wireguard speaks to WireGuard devices, those of the kernel and those of programs
// in user space (/var/run/wireguard/<name>.sock) alike.
type wireguard struct {
	client   *wgctrl.Client
	broken   error // why there is no client: of interest only to who has a device
	inKernel bool
}

// openWireGuard finds out first whether the kernel knows WireGuard: the client
// looks only once.
func openWireGuard() *wireguard {
	w := &wireguard{}
	if w.inKernel, w.broken = hasWireGuard(); w.broken == nil {
		w.client, w.broken = wgctrl.New()
	}
	return w
}

func (w *wireguard) close() error {
	if w.broken != nil {
		return nil
	}
	return w.client.Close()
}

// hasWireGuard asks for WireGuard's family of generic netlink. A kernel that has
// it as a module loads it for an answer (net-pf-16-proto-16-family-wireguard); the
// module brings the kind of link along. Nothing else comes of the question.
func hasWireGuard() (bool, error) {
	c, err := openConn(unix.NETLINK_GENERIC)
	if err != nil {
		return false, err
	}
	err = c.request(func(e *encoder) {
		b := e.begin(unix.GENL_ID_CTRL, 0, unix.GENL_HDRLEN)
		b[0], b[1] = unix.CTRL_CMD_GETFAMILY, 1
		e.str(unix.CTRL_ATTR_FAMILY_NAME, unix.WG_GENL_NAME)
	}, nil)
	if errors.Is(err, unix.ENOENT) {
		return false, c.close()
	}
	return err == nil, errors.Join(err, c.close())
}

// device reads a device with its peers. One that nobody answers for has neither.
func (w *wireguard) device(name string) (overlay.WireGuard, []overlay.WGPeer, error) {
	if w.broken != nil {
		return overlay.WireGuard{}, nil, w.broken
	}
	d, err := w.client.Device(name)
	if unanswered(err) {
		return overlay.WireGuard{}, nil, nil
	}
	if err != nil {
		return overlay.WireGuard{}, nil, err
	}
	var peers []overlay.WGPeer
	for _, p := range d.Peers {
		peers = append(peers, overlay.WGPeer{
			Link: name, PublicKey: overlay.WGKey(p.PublicKey), PSK: overlay.WGKey(p.PresharedKey),
			Endpoint: endpoint(p.Endpoint), Keepalive: p.PersistentKeepaliveInterval, AllowedIPs: allowedIPs(p.AllowedIPs),
		})
	}
	return overlay.WireGuard{Port: uint16(d.ListenPort), Key: overlay.WGKey(d.PrivateKey)}, peers, nil
}

// unanswered reports whether err says that there is no such device, or in user
// space that its program has not begun to listen, or was killed.
func unanswered(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED)
}

func endpoint(a *net.UDPAddr) netip.AddrPort {
	if a == nil {
		return netip.AddrPort{}
	}
	p := a.AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}

func allowedIPs(nets []net.IPNet) string {
	var prefixes []netip.Prefix
	for _, n := range nets {
		a, _ := netip.AddrFromSlice(n.IP)
		bits, _ := n.Mask.Size()
		prefixes = append(prefixes, netip.PrefixFrom(a.Unmap(), bits))
	}
	slices.SortFunc(prefixes, netip.Prefix.Compare)
	var s []string
	for _, p := range prefixes {
		s = append(s, p.String())
	}
	return strings.Join(s, ",")
}

func (w *wireguard) setDevice(name string, have, want overlay.WireGuard) error {
	var c wgtypes.Config
	if have.Key != want.Key {
		c.PrivateKey = (*wgtypes.Key)(&want.Key)
	}
	if have.Port != want.Port {
		port := int(want.Port)
		c.ListenPort = &port
	}
	return w.configure(name, c)
}

func (w *wireguard) configure(name string, c wgtypes.Config) error {
	if w.broken != nil {
		return w.broken
	}
	err := w.client.ConfigureDevice(name, c)
	if unanswered(err) {
		return fmt.Errorf("no WireGuard answers for %s: %w", name, unix.ENODEV)
	}
	if err != nil {
		return fmt.Errorf("configure WireGuard device: %w", inWords(err))
	}
	return nil
}

// inWords replaces an answer of user space, which the client passes on as
// "errno=-98".
func inWords(err error) error {
	if _, number, ok := strings.Cut(err.Error(), "errno=-"); ok {
		if n, bad := strconv.Atoi(number); bad == nil {
			return unix.Errno(n)
		}
	}
	return err
}

// wgPeers makes the changes of peers of one device that begin plan, all at once,
// and returns how many they are.
func (a *applier) wgPeers(plan overlay.Plan, link string) int {
	n := 0
	var peers []wgtypes.PeerConfig
	for ; n < len(plan); n++ {
		p, ok := plan[n].Object.(overlay.WGPeer)
		if !ok || p.Link != link {
			break
		}
		c, err := peerConfig(plan[n])
		if err != nil {
			a.fail(plan[n], err)
			continue
		}
		peers = append(peers, c)
	}
	w := a.kernel.wireguard
	err := w.configure(link, wgtypes.Config{Peers: peers})
	if err == nil {
		return n
	}
	// The device stopped at some peer and does not say at which.
	for _, op := range plan[:n] {
		c, bad := peerConfig(op)
		if bad != nil {
			continue // told already
		}
		if !errors.Is(err, unix.ENODEV) {
			err = w.configure(link, wgtypes.Config{Peers: []wgtypes.PeerConfig{c}})
		}
		if err != nil {
			a.fail(op, err)
		}
	}
	return n
}

// handshakePatience is how long Handshake waits for a device to send.
const handshakePatience = time.Second

// Handshake has devices make sessions with peers now, not when there is a packet for
// them: a peer goes on to encrypt for a session that this end has lost, in vain, until
// it has heard nothing for 15 s (WireGuard whitepaper, section 6.5).
func (k *Kernel) Handshake(ctx context.Context, peers []overlay.WGPeer) error {
	byLink := map[string][]wgtypes.PeerConfig{}
	for _, p := range peers {
		if p.Keepalive == 0 { // else the device has begun by itself
			byLink[p.Link] = append(byLink[p.Link], wgtypes.PeerConfig{PublicKey: wgtypes.Key(p.PublicKey), UpdateOnly: true})
		}
	}
	var errs []error
	for link, peers := range byLink {
		if err := k.wireguard.handshake(ctx, link, peers); err != nil {
			errs = append(errs, fmt.Errorf("shake hands with peers of %s: %w", link, err))
		}
	}
	return errors.Join(errs...)
}

// handshake turns keepalives on, of which a device sends the first one at once, and
// off again when it has been sent. In user space a device is up a moment later than
// its link.
func (w *wireguard) handshake(ctx context.Context, link string, peers []wgtypes.PeerConfig) error {
	before, err := w.sent(link)
	if err != nil {
		return err
	}
	keepalive := func(interval time.Duration) error {
		for i := range peers {
			peers[i].PersistentKeepaliveInterval = &interval
		}
		return w.configure(link, wgtypes.Config{Peers: peers})
	}
	if err := keepalive(time.Minute); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, handshakePatience)
	defer cancel()
	for {
		after, err := w.sent(link)
		silent := func(p wgtypes.PeerConfig) bool { return after[p.PublicKey] == before[p.PublicKey] }
		if err != nil || !slices.ContainsFunc(peers, silent) {
			return errors.Join(err, keepalive(0))
		}
		select {
		case <-ctx.Done(): // a peer may be out of reach
			return keepalive(0)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// sent returns how many bytes went to each peer.
func (w *wireguard) sent(link string) (map[wgtypes.Key]int64, error) {
	if w.broken != nil {
		return nil, w.broken
	}
	d, err := w.client.Device(link)
	if err != nil {
		return nil, err
	}
	bytes := make(map[wgtypes.Key]int64, len(d.Peers))
	for _, p := range d.Peers {
		bytes[p.PublicKey] = p.TransmitBytes
	}
	return bytes, nil
}

// peerConfig says only what differs: to set allowed addresses again would leave
// packets without a peer for a moment, to set the endpoint again would forget
// where the peer was heard last.
func peerConfig(op overlay.Op) (wgtypes.PeerConfig, error) {
	want := op.Object.(overlay.WGPeer)
	have, _ := op.Before.(overlay.WGPeer)
	c := wgtypes.PeerConfig{PublicKey: wgtypes.Key(want.PublicKey), Remove: op.Verb == overlay.Delete, UpdateOnly: op.Verb == overlay.Change}
	if c.Remove {
		return c, nil
	}
	if have.PSK != want.PSK {
		c.PresharedKey = (*wgtypes.Key)(&want.PSK)
	}
	if have.Endpoint != want.Endpoint && want.Endpoint.IsValid() {
		c.Endpoint = net.UDPAddrFromAddrPort(want.Endpoint)
	}
	if have.Keepalive != want.Keepalive {
		c.PersistentKeepaliveInterval = &want.Keepalive
	}
	if have.AllowedIPs == want.AllowedIPs {
		return c, nil
	}
	c.ReplaceAllowedIPs = true
	for _, s := range strings.Split(want.AllowedIPs, ",") {
		if s == "" {
			continue
		}
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return c, fmt.Errorf("read allowed addresses: %w", err)
		}
		c.AllowedIPs = append(c.AllowedIPs, net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())})
	}
	return c, nil
}
