package speaker

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
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

// daemon is a BIRD or FRR on a host.
type daemon struct {
	*nettest.Process
	t    *testing.T
	host *nettest.Host
	ask  []string // the client's command line
}

func (d *daemon) show(question string) string {
	d.t.Helper()
	out, err := d.host.Run(d.ask[0], append(slices.Clone(d.ask[1:]), question)...)
	if err != nil {
		d.t.Fatal(err)
	}
	return out
}

// says waits for an answer with all of the texts, in any order.
func (d *daemon) says(question string, texts ...string) {
	d.t.Helper()
	eventually(d.t, question, func() error {
		out := d.show(question)
		for _, x := range texts {
			if negated, not := strings.CutPrefix(x, "!"); strings.Contains(out, negated) == not {
				return fmt.Errorf("want %q in\n%s", x, out)
			}
		}
		return nil
	})
}

// bird starts BIRD 2 with a configuration of protocols.
func (r *rig) bird(i int, protocols string) *daemon {
	r.t.Helper()
	base := filepath.Join(r.lab.Dir, r.hosts[i].Name+"-bird")
	conf := fmt.Sprintf("router id %s;\nprotocol device {}\n%s\n", r.hosts[i].IPv4, protocols)
	if err := os.WriteFile(base+".conf", []byte(conf), 0o644); err != nil {
		r.t.Fatal(err)
	}
	p, err := r.hosts[i].Start(nettest.Program{Path: "/usr/sbin/bird", Args: []string{"-f", "-c", base + ".conf", "-s", base + ".ctl", "-P", base + ".pid"}, Name: "bird"})
	if err != nil {
		r.t.Fatal(err)
	}
	d := &daemon{p, r.t, r.hosts[i], []string{"birdc", "-r", "-s", base + ".ctl"}}
	eventually(r.t, "bird on "+r.hosts[i].Name, func() error {
		_, err := r.hosts[i].Run("birdc", "-s", base+".ctl", "show", "status")
		return err
	})
	return d
}

// birdRoutes are the static routes that BIRD announces.
func birdRoutes(prefixes ...string) string {
	var b bytes.Buffer
	for _, f := range []string{"ipv4", "ipv6"} {
		fmt.Fprintf(&b, "protocol static own%s { %s;\n", f, f)
		for _, p := range prefixes {
			if strings.Contains(p, ":") == (f == "ipv6") {
				fmt.Fprintf(&b, "route %s blackhole;\n", p)
			}
		}
		fmt.Fprintln(&b, "}")
	}
	return b.String()
}

// birdPeer is a session of BIRD's; more is added to it, as it is.
func birdPeer(name string, local, remote netip.Addr, as, remoteAS int, more, channel string) string {
	f := "ipv4"
	if local.Is6() {
		f = "ipv6"
	}
	return fmt.Sprintf(`protocol bgp %s {
	local %s as %d; neighbor %s as %d; %s
	connect delay time 1; connect retry time 2; error wait time 1, 2; graceful restart on;
	%s { import all; export all; next hop self; %s };
}
`, name, local, as, remote, remoteAS, more, f, channel)
}

// frr starts FRR's zebra and bgpd; conf is what follows "router bgp".
func (r *rig) frr(i int, conf string) *daemon {
	r.t.Helper()
	dir := filepath.Join(r.lab.Dir, r.hosts[i].Name+"-frr")
	if err := os.Mkdir(dir, 0o755); err != nil {
		r.t.Fatal(err)
	}
	r.ownedBy("frr", dir)
	var last *nettest.Process
	for _, name := range []string{"zebra", "bgpd"} {
		file := filepath.Join(dir, name+".conf")
		text := "hostname " + r.hosts[i].Name + "\nlog stdout informational\n"
		if name == "bgpd" {
			text += conf
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			r.t.Fatal(err)
		}
		args := []string{"-f", file, "-i", filepath.Join(dir, name+".pid"), "-z", filepath.Join(dir, "zserv"), "--vty_socket", dir}
		if name == "bgpd" {
			args = append(args, "-l", r.hosts[i].IPv4.String(), "-l", r.hosts[i].IPv6.String())
		}
		p, err := r.hosts[i].Start(nettest.Program{Path: "/usr/lib/frr/" + name, Args: args, Name: name})
		if err != nil {
			r.t.Fatal(err)
		}
		eventually(r.t, name+" on "+r.hosts[i].Name, func() error {
			_, err := os.Stat(filepath.Join(dir, name+".vty"))
			return err
		})
		last = p
	}
	return &daemon{last, r.t, r.hosts[i], []string{"vtysh", "--vty_socket", dir, "-c"}}
}

// ownedBy gives a directory to the user that a program becomes.
func (r *rig) ownedBy(name, dir string) {
	r.t.Helper()
	u, err := user.Lookup(name)
	if err != nil {
		r.t.Fatal(err)
	}
	uid, err1 := strconv.Atoi(u.Uid)
	gid, err2 := strconv.Atoi(u.Gid)
	if err := errors.Join(err1, err2, os.Chown(dir, uid, gid)); err != nil {
		r.t.Fatal(err)
	}
}
