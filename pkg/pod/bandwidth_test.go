package pod

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/nettest"
)

func TestParseBandwidth(t *testing.T) {
	for _, tt := range []struct {
		raw  string
		want *Bandwidth
		err  string
	}{
		{``, nil, ""},
		{`null`, nil, ""},
		{`{}`, nil, ""},
		{`{"ingressRate":1000000,"ingressBurst":2000000,"egressRate":3000000,"egressBurst":4000000}`, &Bandwidth{1e6, 2e6, 3e6, 4e6}, ""},
		{`{"egressRate":1000000}`, &Bandwidth{EgressRate: 1e6, EgressBurst: 1e5}, ""},
		{`{"ingressRate":16000000,"ingressBurst":4294967295}`, &Bandwidth{IngressRate: 16e6, IngressBurst: math.MaxUint32}, ""},
		{`{"ingressBurst":1}`, nil, "ingressBurst is 1, but there is no ingressRate"},
		{`{"egressRate":-1}`, nil, "not negative"},
		{`{"egressRate":1.5}`, nil, "whole numbers"},
		{`{"egressRate":"1M"}`, nil, "whole numbers"},
		{`[]`, nil, "must be an object"},
	} {
		got, err := parseBandwidth(json.RawMessage(tt.raw))
		if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
			t.Errorf("%s: error %v, want %q", tt.raw, err, tt.err)
		}
		if fmt.Sprint(got) != fmt.Sprint(tt.want) {
			t.Errorf("%s: %v, want %v", tt.raw, got, tt.want)
		}
	}
}

// shaped is a pod on a veth, without bridge.
type shaped struct {
	t         testing.TB
	host, pod *nettest.NS
	nl        *netlink.Handle
	link      netlink.Link
}

const (
	shapedAlias = "twill:c1/eth0"
	shapedHost  = "198.18.1.1"
	shapedPod   = "198.18.1.2"
)

func newShaped(t testing.TB) *shaped {
	t.Helper()
	s := &shaped{t: t}
	lab := nettest.NewT(t)
	for name, ns := range map[string]**nettest.NS{"host": &s.host, "pod": &s.pod} {
		var err error
		if *ns, err = lab.NewNS(name); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		ns     *nettest.NS
		script string
	}{
		{s.host, `ip link add veth0 mtu 1400 type veth peer name eth0 mtu 1400 netns ` + filepath.Base(s.pod.Path) +
			` && ip link set veth0 alias ` + shapedAlias + ` && ip link set veth0 up && ip addr add ` + shapedHost + `/24 dev veth0`},
		{s.pod, `ip link set eth0 up && ip addr add ` + shapedPod + `/24 dev eth0`},
	} {
		if _, err := c.ns.Run("sh", "-ec", c.script); err != nil {
			t.Fatal(err)
		}
	}
	err := s.host.Do(func() (err error) { s.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE); return err })
	if err == nil {
		t.Cleanup(s.nl.Close)
		s.link, err = s.nl.LinkByName("veth0")
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *shaped) clean() {
	s.t.Helper()
	if _, err := s.nl.LinkByName(ifbName("veth0")); err == nil {
		s.t.Error("the ifb is left")
	}
	out, err := s.host.Run("tc", "qdisc", "show")
	if err != nil || strings.Contains(out, "tbf") || strings.Contains(out, "ingress") {
		s.t.Errorf("queues are left: %v\n%s", err, out)
	}
}

// transfer sends by TCP from one namespace to the other and returns the rate in bits
// per second that arrives once the burst is over.
func (s *shaped) transfer(from, to *nettest.NS, addr string) float64 {
	s.t.Helper()
	var l net.Listener
	if err := to.Do(func() (err error) { l, err = net.Listen("tcp", addr+":0"); return err }); err != nil {
		s.t.Fatal(err)
	}
	defer l.Close()
	c, err := from.DialContext(context.Background(), "tcp", l.Addr().String())
	if err != nil {
		s.t.Fatal(err)
	}
	go func() {
		b := make([]byte, 32<<10)
		for {
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	}()
	defer c.Close()
	in, err := l.Accept()
	if err != nil {
		s.t.Fatal(err)
	}
	defer in.Close()
	const warmup, length = 500 * time.Millisecond, 2 * time.Second
	begin := time.Now()
	in.SetDeadline(begin.Add(10 * time.Second))
	b := make([]byte, 32<<10)
	var bytes int
	var from0 time.Time
	for time.Since(begin) < warmup+length {
		n, err := in.Read(b)
		if err != nil {
			s.t.Fatal(err)
		}
		if time.Since(begin) < warmup {
			from0, bytes = time.Now(), 0
			continue
		}
		bytes += n
	}
	return float64(bytes) * 8 / time.Since(from0).Seconds()
}

// Traffic is limited to what is asked for, each way by itself.
func TestBandwidth(t *testing.T) {
	s := newShaped(t)
	const slow, fast = 20e6, 60e6
	b := &Bandwidth{IngressRate: slow, IngressBurst: slow / 10, EgressRate: fast, EgressBurst: fast / 10}
	if err := b.apply(s.nl, s.link, shapedAlias); err != nil {
		t.Fatal(err)
	}
	if got := b.differences(s.nl, s.link, shapedAlias); len(got) > 0 {
		t.Errorf("differences %q", got)
	}
	for _, d := range []struct {
		name     string
		from, to *nettest.NS
		addr     string
		rate     float64
	}{{"ingress", s.host, s.pod, shapedPod, slow}, {"egress", s.pod, s.host, shapedHost, fast}} {
		ratio := s.transfer(d.from, d.to, d.addr) / d.rate
		t.Logf("%s: %.3f of the rate", d.name, ratio)
		// Headers count for tbf: at an MTU of 1400, TCP's data is 95 %. A machine
		// that is busy sends less; nothing lets it send more.
		if ratio < 0.80 || ratio > 1.02 {
			t.Errorf("%s: %.3f of the rate", d.name, ratio)
		}
	}
	begin := time.Now()
	if err := removeBandwidth(s.nl, s.link, shapedAlias); err != nil {
		t.Fatal(err)
	}
	t.Logf("removed in %s", time.Since(begin))
	s.clean()
	if err := removeBandwidth(s.nl, s.link, shapedAlias); err != nil {
		t.Errorf("again: %v", err)
	}
	if rate := s.transfer(s.host, s.pod, shapedPod); rate < fast*2 {
		t.Errorf("%.0f bit/s without limit", rate)
	}
}

// What Kubernetes' runtimes ask for: any burst. It neither overflows nor makes a
// queue of that size, and the smallest lets packets through.
func TestBurst(t *testing.T) {
	s := newShaped(t)
	for _, b := range []*Bandwidth{
		{1e6, math.MaxUint32, 1e6, math.MaxUint32},
		{100e9, math.MaxUint32, 100e9, math.MaxUint32},
		{1e6, 1, 1e6, 1},
		{3000, 1, 3000, 1},
		{math.MaxUint64, math.MaxUint64, math.MaxUint64, math.MaxUint64},
	} {
		if err := b.apply(s.nl, s.link, shapedAlias); err != nil {
			t.Fatalf("%+v: %v", *b, err)
		}
		if got := b.differences(s.nl, s.link, shapedAlias); len(got) > 0 {
			t.Errorf("%+v: differences %q", *b, got)
		}
		if q := tbf(s.link, b.IngressRate, b.IngressBurst); b.IngressRate <= 1e6 && q.Limit > 256<<10 {
			t.Errorf("%+v: a queue of %d bytes", *b, q.Limit)
		}
		if out, err := s.pod.Run("ping", "-c1", "-W3", "-s1300", shapedHost); err != nil {
			t.Errorf("%+v: %v %s", *b, err, out)
		}
		if err := removeBandwidth(s.nl, s.link, shapedAlias); err != nil {
			t.Fatal(err)
		}
	}
	s.clean()
}

// Each thing that is taken away is told.
func TestBandwidthDifferences(t *testing.T) {
	s := newShaped(t)
	b := &Bandwidth{1e6, 1e6, 2e6, 2e6}
	ifb := ifbName("veth0")
	if len(ifb) > 15 {
		t.Errorf("%s is too long for a link", ifb)
	}
	for _, tt := range []struct{ deed, want string }{
		{"tc qdisc del dev veth0 root", "link veth0 is not limited to 1000000 bit/s"},
		{"tc qdisc change dev veth0 root tbf rate 2mbit burst 20000 limit 30000", "link veth0 is limited to 2000000 bit/s"},
		{"tc qdisc del dev veth0 ingress", "veth0 does not redirect"},
		{"tc filter del dev veth0 ingress", "veth0 does not redirect"},
		{"tc qdisc del dev " + ifb + " root", "link " + ifb + " is not limited to 2000000 bit/s"},
		{"ip link set " + ifb + " mtu 1300", "MTU 1300, must be up and have 1400"},
		{"ip link set " + ifb + " alias other", "not the ifb of"},
		{"ip link del " + ifb, "queued at"},
	} {
		if err := b.apply(s.nl, s.link, shapedAlias); err != nil {
			t.Fatal(err)
		}
		if _, err := s.host.Run("sh", "-ec", tt.deed); err != nil {
			t.Fatal(err)
		}
		got := b.differences(s.nl, s.link, shapedAlias)
		if len(got) != 1 || !strings.Contains(got[0], tt.want) {
			t.Errorf("%s: %q, want %q", tt.deed, got, tt.want)
		}
		if strings.Contains(tt.deed, "alias") {
			if _, err := s.host.Run("ip", "link", "set", ifb, "alias", shapedAlias); err != nil {
				t.Fatal(err)
			}
		}
		if err := removeBandwidth(s.nl, s.link, shapedAlias); err != nil {
			t.Fatal(err)
		}
		s.clean()
	}
}

// What was there before is told apart: a killed call's ifb is made anew, a stranger's
// is left alone, and nothing of the limits stays.
func TestBandwidthTaken(t *testing.T) {
	s := newShaped(t)
	b := &Bandwidth{1e6, 1e6, 2e6, 2e6}
	ifb := ifbName("veth0")
	for _, left := range []string{"", "alias " + shapedAlias} {
		if _, err := s.host.Run("sh", "-ec", "ip link add "+ifb+" type ifb; ip link set "+ifb+" up "+left); err != nil {
			t.Fatal(err)
		}
		if err := b.apply(s.nl, s.link, shapedAlias); err != nil {
			t.Fatal(err)
		}
		if got := b.differences(s.nl, s.link, shapedAlias); len(got) > 0 {
			t.Errorf("differences %q", got)
		}
		if err := removeBandwidth(s.nl, s.link, shapedAlias); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.host.Run("sh", "-ec", "ip link add "+ifb+" type ifb; ip link set "+ifb+" alias mine"); err != nil {
		t.Fatal(err)
	}
	err := b.apply(s.nl, s.link, shapedAlias)
	if err == nil || !strings.Contains(err.Error(), `belongs to "mine"`) {
		t.Errorf("%v", err)
	}
	if _, err := s.nl.LinkByName(ifb); err != nil {
		t.Errorf("the stranger's link: %v", err)
	}
	b.EgressRate = 2000
	if err := b.apply(s.nl, s.link, shapedAlias); err == nil || !strings.Contains(err.Error(), "egressRate is 2000 bit/s: must be at least 2828") {
		t.Errorf("%v", err)
	}
	if err := s.nl.LinkDel(&netlink.Ifb{LinkAttrs: netlink.LinkAttrs{Name: ifb}}); err != nil {
		t.Fatal(err)
	}
	s.clean()
}

// removeBandwidth takes the limits off a veth that stays. A pod's goes: with it the
// queues, and then the ifb, without which the pod's packets would be lost.
func removeBandwidth(h *netlink.Handle, host netlink.Link, alias string) error {
	return errors.Join(clearQueues(h, host), removeIfb(h, ifbName(host.Attrs().Name), alias))
}
