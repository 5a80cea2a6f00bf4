package e2e

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// ConfigScale has room for 16,383 nodes.
const ConfigScale = `{"Network": "10.64.0.0/10", "SubnetLen": 24, "Backend": {"Type": "vxlan", "Port": 4789}}`

// ScalePeer returns the lease of the i-th made-up peer, from 0: a subnet of
// ConfigScale and an address of 198.18.0.0/15, which no host of the lab has.
func ScalePeer(i int) overlay.Lease {
	mac := overlay.MAC{0x0e, 0x2a, 0, byte(i >> 16), byte(i >> 8), byte(i)}
	n := i + 256 // the first subnets are left to the lab's own nodes
	return overlay.Lease{
		Subnets: overlay.Subnets{V4: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(64 + n>>8), byte(n), 0}), 24)},
		Attrs: overlay.Attrs{
			PublicIP: netip.AddrFrom4([4]byte{198, 18 + byte(i>>16), byte(i >> 8), byte(i)}),
			Backend:  "vxlan",
			Data:     fmt.Sprintf(`{"VNI":1,"VtepMAC":"%s"}`, mac),
		},
	}
}

// PutPeers stores the leases of made-up peers from..to-1, many to a transaction.
func PutPeers(ctx context.Context, c *clientv3.Client, from, to int) error {
	const most = 128 // operations in a transaction: etcd's default limit
	grant, err := c.Grant(ctx, 86400)
	if err != nil {
		return err
	}
	for i := from; i < to; i += most {
		var ops []clientv3.Op
		for j := i; j < min(i+most, to); j++ {
			l := ScalePeer(j)
			ops = append(ops, clientv3.OpPut(Prefix+"/subnets/"+l.Key(), string(l.Value()), clientv3.WithLease(grant.ID)))
		}
		if _, err := c.Txn(ctx).Then(ops...).Commit(); err != nil {
			return fmt.Errorf("put peers %d..: %w", i, err)
		}
	}
	return nil
}

// Notify is systemd's end of sd_notify(3): it says when the daemon was ready.
type Notify struct {
	conn *net.UnixConn
	Path string
}

// NewNotify listens in dir.
func NewNotify(dir string) (*Notify, error) {
	n := &Notify{Path: filepath.Join(dir, "notify")}
	if err := os.RemoveAll(n.Path); err != nil {
		return nil, err
	}
	var err error
	n.conn, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: n.Path, Net: "unixgram"})
	return n, err
}

// Ready waits for READY=1 and returns when it came.
func (n *Notify) Ready(limit time.Duration) (time.Time, error) {
	buf := make([]byte, 256)
	if err := n.conn.SetReadDeadline(time.Now().Add(limit)); err != nil {
		return time.Time{}, err
	}
	for {
		k, err := n.conn.Read(buf)
		if err != nil {
			return time.Time{}, fmt.Errorf("wait for READY=1: %w", err)
		}
		if strings.Contains(string(buf[:k]), "READY=1") {
			return time.Now(), nil
		}
	}
}

// Close ends listening.
func (n *Notify) Close() error { return n.conn.Close() }

// RouteEvents reports each new route of Twill's in a namespace, as the kernel
// announces it. A route is the last thing that is added of a peer.
func RouteEvents(ctx context.Context, ns *nettest.NS) (<-chan netip.Prefix, error) {
	updates := make(chan netlink.RouteUpdate, 65536)
	err := ns.Do(func() error {
		return netlink.RouteSubscribeWithOptions(updates, ctx.Done(), netlink.RouteSubscribeOptions{ReceiveBufferSize: 32 << 20, ReceiveBufferForceSize: true})
	})
	if err != nil {
		return nil, fmt.Errorf("subscribe to routes: %w", err)
	}
	out := make(chan netip.Prefix, 65536)
	go func() {
		defer close(out)
		for u := range updates {
			if u.Type == unix.RTM_NEWROUTE && u.Protocol == overlay.Protocol && u.Dst != nil {
				a, _ := netip.AddrFromSlice(u.Dst.IP)
				ones, _ := u.Dst.Mask.Size()
				out <- netip.PrefixFrom(a.Unmap(), ones)
			}
		}
	}()
	return out, nil
}

// Usage is what a process has used so far.
type Usage struct {
	CPU      time.Duration
	RSS, HWM int64 // resident memory now and at its peak, bytes
	Anon     int64 // of RSS: the process's own; the rest is the program, shared by all that run it
}

// UsageOf reads it from /proc. The scheduler counts CPU time in nanoseconds.
func UsageOf(pid int) (Usage, error) {
	var u Usage
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil || len(tasks) == 0 {
		return u, fmt.Errorf("process %d is gone", pid)
	}
	for _, t := range tasks {
		b, err := os.ReadFile(t)
		if err != nil {
			continue // a thread that has ended
		}
		ns, err := strconv.ParseInt(strings.Fields(string(b))[0], 10, 64)
		if err != nil {
			return u, err
		}
		u.CPU += time.Duration(ns)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return u, err
	}
	for _, line := range strings.Split(string(b), "\n") {
		var kib int64
		if _, err := fmt.Sscanf(line, "VmRSS: %d kB", &kib); err == nil {
			u.RSS = kib << 10
		}
		if _, err := fmt.Sscanf(line, "VmHWM: %d kB", &kib); err == nil {
			u.HWM = kib << 10
		}
		if _, err := fmt.Sscanf(line, "RssAnon: %d kB", &kib); err == nil {
			u.Anon = kib << 10
		}
	}
	return u, nil
}

// CountObjects counts the VXLAN peers' objects in a namespace.
func CountObjects(ns *nettest.NS) (routes, neighs, fdb int, err error) {
	err = ns.Do(func() error {
		link, err := netlink.LinkByName("flannel.1")
		if err != nil {
			return err
		}
		r, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Protocol: overlay.Protocol}, netlink.RT_FILTER_PROTOCOL)
		if err != nil {
			return err
		}
		n, err := netlink.NeighList(link.Attrs().Index, netlink.FAMILY_V4)
		if err != nil {
			return err
		}
		f, err := netlink.NeighList(link.Attrs().Index, unix.AF_BRIDGE)
		routes, neighs, fdb = len(r), len(n), len(f)
		return err
	})
	return routes, neighs, fdb, err
}

// PeerRoutes returns the destinations of Twill's IPv4 routes to other nodes: those
// with a gateway.
func PeerRoutes(ns *nettest.NS) (map[netip.Prefix]bool, error) {
	out := map[netip.Prefix]bool{}
	err := ns.Do(func() error {
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Protocol: overlay.Protocol}, netlink.RT_FILTER_PROTOCOL)
		for _, r := range routes {
			if r.Dst == nil || r.Gw == nil {
				continue
			}
			a, _ := netip.AddrFromSlice(r.Dst.IP)
			ones, _ := r.Dst.Mask.Size()
			out[netip.PrefixFrom(a.Unmap(), ones)] = true
		}
		return err
	})
	return out, err
}

// Introduce tells all hosts the others' MAC addresses for good. What a host has
// learned by ARP is in one table of the kernel for all namespaces together, of 1,024
// entries (net.ipv4.neigh.default.gc_thresh3): more than thirty hosts that all
// speak to each other push each other out, and most packets are lost. Permanent
// entries do not count.
func Introduce(hosts []*nettest.Host) error {
	macs := map[netip.Addr]net.HardwareAddr{}
	for _, h := range hosts {
		err := h.Do(func() error {
			eth0, err := netlink.LinkByName("eth0")
			if err == nil {
				macs[h.IPv4] = eth0.Attrs().HardwareAddr
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("find eth0 of %s: %w", h.Name, err)
		}
	}
	for _, h := range hosts {
		if err := h.Do(func() error { return meet(h.IPv4, macs) }); err != nil {
			return fmt.Errorf("introduce hosts to %s: %w", h.Name, err)
		}
	}
	return nil
}

func meet(self netip.Addr, macs map[netip.Addr]net.HardwareAddr) error {
	kernel, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer kernel.Close()
	eth0, err := kernel.LinkByName("eth0")
	if err != nil {
		return err
	}
	for a, mac := range macs {
		if a == self {
			continue
		}
		n := &netlink.Neigh{LinkIndex: eth0.Attrs().Index, State: netlink.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: mac}
		if err := kernel.NeighSet(n); err != nil {
			return err
		}
	}
	return nil
}

// ReferenceProgram does for n peers what Twill does, the plain way, as flannel: one
// netlink call at a time, and an onlink route with a gateway of its own each. The
// namespace must be fresh.
func ReferenceProgram(ns *nettest.NS, n int) (time.Duration, error) {
	var took time.Duration
	err := ns.Do(func() error {
		link := &netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: "flannel.1", MTU: 1450}, VxlanId: 1, Port: 4789, SrcAddr: net.IPv4(127, 0, 0, 1)}
		if err := netlink.LinkAdd(link); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		began := time.Now()
		for i := range n {
			if err := referencePeer(link.Index, ScalePeer(i)); err != nil {
				return err
			}
		}
		took = time.Since(began)
		return nil
	})
	return took, err
}

func referencePeer(link int, l overlay.Lease) error {
	a, err := overlay.ParseAttrs(l.Value())
	if err != nil {
		return err
	}
	mac := net.HardwareAddr(a.VTEP.MAC[:])
	gateway := net.IP(l.V4.Addr().AsSlice())
	if err := netlink.NeighSet(&netlink.Neigh{LinkIndex: link, State: netlink.NUD_PERMANENT, IP: gateway, HardwareAddr: mac}); err != nil {
		return err
	}
	if err := netlink.NeighSet(&netlink.Neigh{LinkIndex: link, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF, State: netlink.NUD_PERMANENT, IP: l.PublicIP.AsSlice(), HardwareAddr: mac}); err != nil {
		return err
	}
	dst := &net.IPNet{IP: gateway, Mask: net.CIDRMask(l.V4.Bits(), 32)}
	return netlink.RouteReplace(&netlink.Route{LinkIndex: link, Dst: dst, Gw: gateway, Flags: int(netlink.FLAG_ONLINK)})
}
