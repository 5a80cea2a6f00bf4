package speaker

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

const asn = 64512

var (
	ip     = netip.MustParseAddr
	prefix = netip.MustParsePrefix
)

// patience is how long anything may take on a busy machine; nothing is timed.
const patience = 30 * time.Second

func eventually(t *testing.T, what string, done func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := done()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// rig is a lab for one test.
type rig struct {
	t     *testing.T
	lab   *nettest.Lab
	hosts []*nettest.Host
}

func newRig(t *testing.T, hosts int) *rig {
	t.Parallel()
	l, h := nettest.NewHosts(t, hosts)
	return &rig{t, l, h}
}

func (r *rig) addr(i int, f overlay.Family) netip.Addr {
	if f == overlay.IPv4 {
		return r.hosts[i].IPv4
	}
	return r.hosts[i].IPv6
}

// pods is the subnet of host i.
func pods(i int, f overlay.Family) netip.Prefix {
	if f == overlay.IPv4 {
		return prefix(fmt.Sprintf("10.5.%d.0/24", i))
	}
	return prefix(fmt.Sprintf("fd00:5:0:%d::/64", i))
}

func (r *rig) run(i int, line string) string {
	r.t.Helper()
	words := strings.Fields(line)
	out, err := r.hosts[i].Run(words[0], words[1:]...)
	if err != nil {
		r.t.Fatal(err)
	}
	return out
}

// base is host i without neighbours.
func (r *rig) base(i int, families ...overlay.Family) overlay.BGP {
	b := overlay.BGP{
		ASNumber: asn, RouterID: r.hosts[i].IPv4, Port: 179, Networks: []netip.Prefix{prefix("10.5.0.0/16"), prefix("fd00:5::/48")},
		HoldTime: 90 * time.Second, RestartTime: 120 * time.Second,
	}
	for _, f := range families {
		b.Own = append(b.Own, overlay.BGPOwn{Prefix: pods(i, f), NextHop: r.addr(i, f)})
	}
	return b
}

// node is host j as a neighbour of host i in the mesh.
func (r *rig) node(i, j int, f overlay.Family) overlay.BGPNeighbor {
	return overlay.BGPNeighbor{Name: fmt.Sprintf("lease h%d", j), Address: r.addr(j, f), Local: r.addr(i, f), ASNumber: asn, Port: 179, Node: true}
}

// router is host j as a router outside.
func (r *rig) router(i, j int, f overlay.Family, as uint32) overlay.BGPNeighbor {
	n := r.node(i, j, f)
	n.Name, n.ASNumber, n.Node = "Backend.Peers "+n.Address.String(), as, false
	return n
}

// speakerProcess is a Speaker in a process on a host.
type speakerProcess struct {
	*nettest.Process
	t      *testing.T
	socket string
	want   overlay.BGP
}

func (r *rig) speaker(i int, b overlay.BGP) *speakerProcess {
	r.t.Helper()
	p := r.idleSpeaker(i)
	p.set(b)
	return p
}

func (r *rig) idleSpeaker(i int) *speakerProcess {
	r.t.Helper()
	self, err := os.Executable()
	if err != nil {
		r.t.Fatal(err)
	}
	socket := filepath.Join(r.lab.Dir, r.hosts[i].Name+".sock")
	p, err := r.hosts[i].Start(nettest.Program{Path: self, Env: []string{"SPEAKER_SOCKET=" + socket}, Name: "speaker"})
	if err != nil {
		r.t.Fatal(err)
	}
	s := &speakerProcess{Process: p, t: r.t, socket: socket}
	s.ready()
	return s
}

func (s *speakerProcess) ready() {
	s.t.Helper()
	if _, err := s.WaitLog(s.t.Context(), "serving"); err != nil {
		s.t.Fatal(err)
	}
}

// restart starts the process again after its end, as the daemon would.
func (s *speakerProcess) restart() {
	s.t.Helper()
	if err := os.Remove(s.socket); err != nil {
		s.t.Fatal(err)
	}
	if err := s.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.ready()
	s.set(s.want)
}

func (s *speakerProcess) trySet(b overlay.BGP) error {
	s.want = b
	return call(client(s.socket), "POST", "/set", packed(b), nil)
}

func (s *speakerProcess) set(b overlay.BGP) {
	s.t.Helper()
	if err := s.trySet(b); err != nil {
		s.t.Fatal(err)
	}
}

func (s *speakerProcess) post(path string) {
	s.t.Helper()
	if err := call(client(s.socket), "POST", path, nil, nil); err != nil {
		s.t.Fatal(err)
	}
}

func (s *speakerProcess) report() report {
	s.t.Helper()
	var r report
	if err := call(client(s.socket), "GET", "/report", nil, &r); err != nil {
		s.t.Fatal(err)
	}
	return r
}

// routes prints the RIB in one line: "10.5.1.0/24 via 198.51.100.11, …".
func (r report) routes() string {
	var out []string
	if r.RIB == nil {
		return "none"
	}
	for _, x := range r.RIB.Routes {
		line := x.Prefix.String()
		for _, p := range x.Paths {
			line += " via " + p.NextHop.String()
			if p.Allowed {
				line += " allowed"
			}
			if p.Stale {
				line += " stale"
			}
		}
		out = append(out, line)
	}
	return strings.Join(out, ", ")
}

func (s *speakerProcess) learns(want ...string) {
	s.t.Helper()
	slices.Sort(want)
	eventually(s.t, "learned routes", func() error {
		got := strings.Split(s.report().routes(), ", ")
		slices.Sort(got)
		if g, w := strings.Join(got, ", "), strings.Join(want, ", "); g != w {
			return fmt.Errorf("got  %s\nwant %s", g, w)
		}
		return nil
	})
}

func (s *speakerProcess) session(a netip.Addr) overlay.BGPSession {
	s.t.Helper()
	for _, x := range s.report().Status.Sessions {
		if x.Neighbor.Address == a {
			return x
		}
	}
	s.t.Fatalf("no session to %s", a)
	return overlay.BGPSession{}
}

func (s *speakerProcess) established(a netip.Addr) {
	s.t.Helper()
	eventually(s.t, "session to "+a.String(), func() error {
		if x := s.session(a); x.State != "established" || x.Error != "" {
			return fmt.Errorf("is %s: %s", x.State, x.Error)
		}
		return nil
	})
}

// fails waits for a session that is not established for a reason that contains text.
func (s *speakerProcess) fails(a netip.Addr, text string) {
	s.t.Helper()
	eventually(s.t, "session to "+a.String(), func() error {
		if x := s.session(a); x.State == "established" || !strings.Contains(x.Error, text) {
			return fmt.Errorf("is %s: %s", x.State, x.Error)
		}
		return nil
	})
}
