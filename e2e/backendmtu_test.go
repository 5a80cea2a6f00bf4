package e2e

import (
	"fmt"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// mtu changes the uplinks' MTU under running pods, down and up again. Devices,
// subnet.env and new pods follow; pods with the old MTU are told by ICMP.
func (s *trial) mtu(t *testing.T) {
	const lower = 1400
	before := s.newPods(t, "before")
	s.setMTU(t, lower)
	after := s.newPods(t, "after")
	for i, p := range after {
		if got, want := podMTU(p), s.podMTU(lower); got != want {
			t.Errorf("MTU of a new pod on %s is %d, want %d", p.Node.Name, got, want)
		}
		for _, f := range families(p) {
			checkPings(t, p, after[1-i].Addr(f))
		}
	}
	for i, p := range before {
		for _, f := range families(p) {
			s.toldOfMTU(t, p, before[1-i], f)
			r, err := nettest.Transfer(p.NS, before[1-i].NS, before[1-i].Addr(f), 4<<20)
			must(t, err)
			t.Logf("TCP with the old MTU over %s: %.0f Mbit/s", f, r.MbitPS)
		}
	}
	// The bridge of a node is as narrow as its narrowest pod.
	for _, p := range append(before, after...) {
		must(t, p.Delete())
	}
	s.setMTU(t, 1500)
	for i, p := range s.newPods(t, "again") {
		if got, want := podMTU(p), s.podMTU(1500); got != want {
			t.Errorf("MTU of a new pod on %s is %d, want %d", p.Node.Name, got, want)
		}
		for _, f := range families(p) {
			checkPings(t, p, s.pods[1-i].Addr(f))
		}
	}
	for _, n := range s.Nodes {
		must(t, n.waitProblem(s.ctx))
	}
}

// newPods adds a pod to each of the first two nodes.
func (s *trial) newPods(t *testing.T, name string) []*Pod {
	t.Helper()
	var pods []*Pod
	for _, n := range s.Nodes[:2] {
		p, err := n.AddPod(name)
		must(t, err)
		pods = append(pods, p)
	}
	return pods
}

// setMTU changes the uplinks and waits until all has followed.
func (s *trial) setMTU(t *testing.T, uplink int) {
	t.Helper()
	for _, n := range s.Nodes {
		n.shell(t, fmt.Sprintf("ip link set eth0 mtu %d", uplink))
	}
	want := s.podMTU(uplink)
	for _, n := range s.Nodes {
		must(t, n.WaitStatus(s.ctx, "telling pods the new MTU", func(s overlay.Status) bool { return s.PodMTU == want }))
		must(t, n.WaitInSync(s.ctx))
		for _, x := range []struct{ file, want string }{
			{"/run/flannel/subnet.env", fmt.Sprintf("FLANNEL_MTU=%d\n", want)},
			{"/run/flannel/twill.json", fmt.Sprintf(`"mtu":%d`, want)},
		} {
			must(t, Eventually(s.ctx, func() bool {
				return strings.Contains(strings.ReplaceAll(n.shell(t, "cat "+x.file), ": ", ":"), x.want)
			}))
		}
		for i, link := range s.links {
			over := s.overhead[i]
			if want := fmt.Sprintf("mtu %d ", uplink-over); !strings.Contains(n.shell(t, "ip link show "+link), want) {
				t.Errorf("%s on %s has not %s: %s", link, n.Name, want, n.shell(t, "ip link show "+link))
			}
		}
	}
}

// toldOfMTU sends what was small enough before the uplinks' MTU fell: ICMP must
// say what is small enough now.
func (s *trial) toldOfMTU(t *testing.T, from, to *Pod, f overlay.Family) {
	t.Helper()
	headers := map[overlay.Family]int{overlay.IPv4: 28, overlay.IPv6: 48}[f]
	size := podMTU(from) - headers
	var out string
	if Eventually(s.ctx, func() bool {
		out, _ = from.Run("ping", "-n", "-c", "2", "-i", "0.2", "-W", "0.3", "-M", "do", "-s", fmt.Sprint(size), to.Addr(f).String())
		return strings.Contains(out, "mtu = ") || strings.Contains(out, "mtu=")
	}) != nil {
		t.Errorf("nobody tells %s that %d bytes over %s are too much:\n%s", from.Name, size+headers, f, out)
	}
	must(t, from.Ping(to.Addr(f), 1, s.podMTU(1400)-headers))
}
