package portmap

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// flavour is a firewall tool as a node may have it.
type flavour struct {
	name string
	tool overlay.Tool
}

func flavours() []flavour {
	return []flavour{{"nftables", overlay.Nftables}, {"iptables-nft", overlay.Iptables}, {"iptables-legacy", overlay.Iptables}}
}

// choose makes the commands iptables and so on be of the flavour.
func (f flavour) choose(t testing.TB) {
	t.Helper()
	t.Setenv("XTABLES_LOCKFILE", filepath.Join(t.TempDir(), "lock"))
	kind, ok := strings.CutPrefix(f.name, "iptables-")
	if !ok {
		return
	}
	dir := t.TempDir()
	for _, command := range []string{"iptables", "ip6tables"} {
		for _, end := range []string{"", "-restore", "-save"} {
			path, err := exec.LookPath(command + "-" + kind + end)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(path, filepath.Join(dir, command+end)); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// node is a host between two clients outside and pods on a bridge.
type node struct {
	t       testing.TB
	lab     *nettest.Lab
	host    *nettest.NS
	clients [2]*nettest.NS
	dir     Dir
}

const (
	hostAddr, otherHostAddr     = "198.51.100.1", "203.0.113.1"
	hostAddr6                   = "fd00:51::1"
	clientAddr, otherClientAddr = "198.51.100.2", "203.0.113.2"
	clientAddr6                 = "fd00:51::2"
	gateway, gateway6           = "198.18.1.1", "fd00:18:0:1::1"
)

func newNode(t testing.TB, f flavour) *node {
	t.Helper()
	f.choose(t)
	n := &node{t: t, lab: nettest.NewT(t)}
	n.dir = NewDir(filepath.Join(t.TempDir(), "ports"), f.tool)
	n.host = n.namespace("host")
	n.sh(n.host, `
		ip link add cni0 type bridge
		ip link set cni0 up
		ip addr add 198.18.1.1/24 dev cni0
		ip addr add fd00:18:0:1::1/64 dev cni0 nodad
		echo 1 > /proc/sys/net/ipv4/ip_forward
		echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
		echo 1 > /proc/sys/net/ipv4/conf/cni0/route_localnet`)
	for i, addr := range []string{"198.51.100", "203.0.113"} {
		n.clients[i] = n.namespace(fmt.Sprintf("client%d", i))
		v6 := fmt.Sprintf("fd00:5%d::", i+1)
		n.sh(n.host, fmt.Sprintf(`
			ip link add eth%d type veth peer name eth0 netns %s
			ip link set eth%d up
			ip addr add %s.1/24 dev eth%d
			ip addr add %s1/64 dev eth%d nodad`, i, filepath.Base(n.clients[i].Path), i, addr, i, v6, i))
		n.sh(n.clients[i], fmt.Sprintf(`
			ip link set eth0 up
			ip addr add %s.2/24 dev eth0
			ip addr add %s2/64 dev eth0 nodad
			ip route add default via %s.1
			ip -6 route add default via %s1`, addr, v6, addr, v6))
	}
	return n
}

func (n *node) namespace(name string) *nettest.NS {
	n.t.Helper()
	ns, err := n.lab.NewNS(name)
	if err != nil {
		n.t.Fatal(err)
	}
	return ns
}

func (n *node) sh(ns *nettest.NS, script string) string {
	n.t.Helper()
	out, err := ns.Run("sh", "-ec", script)
	if err != nil {
		n.t.Fatal(err)
	}
	return out
}

// in runs f in the host's namespace, as the plugin runs.
func (n *node) in(f func() error) error { return n.host.Do(f) }

func (n *node) must(f func() error) {
	n.t.Helper()
	if err := n.in(f); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) add(e Entry) error {
	return n.in(func() error { return n.dir.Add(context.Background(), e) })
}

func (n *node) remove(e Entry) error {
	return n.in(func() error { return n.dir.Remove(context.Background(), e.Attachment) })
}

func (n *node) sync(keep func(Entry) bool) []string {
	n.t.Helper()
	var out []string
	n.must(func() (err error) { out, err = n.dir.Sync(context.Background(), keep); return err })
	return out
}

// pod is a namespace on the bridge whose servers answer with the pod's name and
// who asked.
type pod struct {
	*nettest.NS
	number     int
	addr, ipv6 string
}

func (n *node) pod(number int) *pod {
	n.t.Helper()
	p := &pod{NS: n.namespace(fmt.Sprintf("pod%d", number)), number: number}
	p.addr, p.ipv6 = fmt.Sprintf("198.18.1.%d", number+1), fmt.Sprintf("fd00:18:0:1::%d", number+1)
	n.sh(n.host, fmt.Sprintf(`
		ip link add veth%d type veth peer name eth0 netns %s
		ip link set veth%d master cni0 up
		ip link set veth%d type bridge_slave hairpin on`, number, filepath.Base(p.Path), number, number))
	n.sh(p.NS, fmt.Sprintf(`
		ip link set eth0 up
		ip addr add %s/24 dev eth0
		ip addr add %s/64 dev eth0 nodad
		ip route add default via %s
		ip -6 route add default via %s`, p.addr, p.ipv6, gateway, gateway6))
	return p
}

func (p *pod) entry(ms ...Mapping) Entry {
	return Entry{
		Attachment: fmt.Sprintf("cbr0:c%d:eth0", p.number),
		Holder:     fmt.Sprintf("pod default/web-%d", p.number),
		HostLink:   fmt.Sprintf("veth%d", p.number),
		Addrs:      []netip.Addr{netip.MustParseAddr(p.addr), netip.MustParseAddr(p.ipv6)},
		Mappings:   ms,
		Local:      []netip.Prefix{netip.MustParsePrefix("198.18.1.0/24"), netip.MustParsePrefix("fd00:18:0:1::/64")},
	}
}

// serve answers tcp, udp and sctp at the port, in both families.
func (n *node) serve(p *pod, port int) { n.listen(p.NS, fmt.Sprintf("pod%d", p.number), port) }

func (n *node) listen(ns *nettest.NS, name string, port int) {
	n.t.Helper()
	err := ns.Do(func() error {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		n.t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				fmt.Fprintf(c, "%s %s", name, addrOf(c.RemoteAddr()))
				c.Close()
			}
		}()
		u, err := net.ListenPacket("udp", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		n.t.Cleanup(func() { u.Close() })
		go answer(u, func(b []byte, from net.Addr) []byte { return fmt.Appendf(nil, "%s %s", name, addrOf(from)) })
		for _, network := range []string{"ip4:sctp", "ip6:sctp"} {
			s, err := net.ListenPacket(strings.Replace(network, "sctp", "132", 1), "")
			if err != nil {
				return err
			}
			n.t.Cleanup(func() { s.Close() })
			go answer(s, func(b []byte, from net.Addr) []byte {
				return initAck(b, uint16(port), fmt.Sprintf("%s %s", name, addrOf(from)))
			})
		}
		return nil
	})
	if err != nil {
		n.t.Fatal(err)
	}
}

func answer(c net.PacketConn, reply func(b []byte, from net.Addr) []byte) {
	b := make([]byte, 2048)
	for {
		l, from, err := c.ReadFrom(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if out := reply(b[:l], from); err == nil && out != nil {
			c.WriteTo(out, from)
		}
	}
}

func addrOf(a net.Addr) string {
	if host, _, err := net.SplitHostPort(a.String()); err == nil {
		return host
	}
	return a.String()
}

// ask connects and returns what the server says: "<pod> <source it saw>".
func ask(ns *nettest.NS, protocol, to string) (string, error) {
	var out string
	var err error
	for range 3 { // the first packet may find no neighbour yet, and nobody repeats it
		if out, err = askOnce(ns, protocol, to, patience); err == nil || errors.Is(err, syscall.ECONNREFUSED) {
			break
		}
	}
	return out, err
}

// silence is how long a client waits that expects no answer, patience one that does.
const (
	silence  = 300 * time.Millisecond
	patience = 3 * time.Second
)

func askOnce(ns *nettest.NS, protocol, to string, wait time.Duration) (string, error) {
	if protocol == "sctp" {
		return askSCTP(ns, to, wait)
	}
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	c, err := ns.DialContext(ctx, protocol, to)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(wait))
	if protocol == "udp" {
		if _, err := c.Write([]byte("?")); err != nil {
			return "", err
		}
	}
	b := make([]byte, 256)
	l, err := c.Read(b)
	return string(b[:l]), err
}

// answers checks what a client is told.
func (n *node) answers(ns *nettest.NS, protocol, to, want string) {
	n.t.Helper()
	got, err := ask(ns, protocol, to)
	if err != nil || got != want {
		n.t.Errorf("%s from %s to %s: %q, %v, want %q", protocol, ns.Name, to, got, err, want)
	}
}

func (n *node) silent(ns *nettest.NS, protocol, to string) {
	n.t.Helper()
	if got, err := askOnce(ns, protocol, to, silence); err == nil {
		n.t.Errorf("%s from %s to %s: %q, want no answer", protocol, ns.Name, to, got)
	}
}

// ours returns what is left of ours in the host's firewall, by any tool.
func (n *node) ours() string {
	n.t.Helper()
	return n.sh(n.host, `(nft list ruleset 2>/dev/null
		for c in iptables ip6tables; do $c-save; $c-legacy-save; done 2>/dev/null) | grep -i twill || true`)
}

func (n *node) clean() {
	n.t.Helper()
	if left := n.ours(); left != "" {
		n.t.Errorf("left in the firewall:\n%s", left)
	}
	files, err := os.ReadDir(n.dir.path)
	if err != nil {
		n.t.Fatal(err)
	}
	for _, f := range files {
		if f.Name() != lockFile {
			n.t.Errorf("left in the directory: %s", f.Name())
		}
	}
}
