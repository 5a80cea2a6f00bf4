package router

import (
	"context"
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

// speakerHost is a host with a real router that runs by rendered configuration.
type speakerHost struct {
	*nettest.Host
	t     *testing.T
	kind  string
	dir   string
	r     *Router
	procs []*nettest.Process
	facts overlay.BGP
}

// newSpeakerHost renders the configuration for a router that does not run yet,
// starts it, and reloads it.
func newSpeakerHost(t *testing.T, l *nettest.Lab, kind string) *speakerHost {
	t.Helper()
	h, err := l.NewHost()
	if err != nil {
		t.Fatal(err)
	}
	s := &speakerHost{Host: h, t: t, kind: kind, dir: filepath.Join(l.Dir, h.Name)}
	if err := os.Mkdir(s.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	chown(t, s.dir, kind)
	k, err := kindOf(kind, filepath.Join(s.dir, kind+".conf"))
	if err != nil {
		t.Fatal(err)
	}
	if kind == "bird" {
		k.reload = slices.Insert(k.reload, 1, "-s", s.socket())
		k.show = slices.Insert(k.show, 1, "-s", s.socket())
	} else {
		s.run("mount", "--bind", s.dir, "/etc/frr")
		s.run("mount", "-t", "tmpfs", "-o", "mode=755,uid="+id(t, kind), "tmpfs", "/run/frr")
		if err := os.WriteFile(filepath.Join(s.dir, "vtysh.conf"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s.r = newRouter(t, Options{
		Kind: kind, Config: filepath.Join(s.dir, kind+".conf"),
		Reload: s.inside(k.reload), Show: s.inside(k.show),
	})
	return s
}

func (s *speakerHost) socket() string { return filepath.Join(s.dir, "bird.ctl") }

func (s *speakerHost) inside(command []string) []string {
	return s.Command(context.Background(), command[0], command[1:]...).Args
}

func (s *speakerHost) run(name string, args ...string) string {
	s.t.Helper()
	out, err := s.Run(name, args...)
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

func id(t testing.TB, name string) string {
	u, err := user.Lookup(name)
	if err != nil {
		t.Fatal(err)
	}
	return u.Uid
}

func chown(t testing.TB, path, name string) {
	t.Helper()
	u, err := user.Lookup(name)
	if err != nil {
		t.Fatal(err)
	}
	uid, _ := strconv.Atoi(u.Uid)
	gid, _ := strconv.Atoi(u.Gid)
	if err := os.Chown(path, uid, gid); err != nil {
		t.Fatal(err)
	}
}

func (s *speakerHost) start() {
	s.t.Helper()
	if s.procs != nil {
		for _, p := range s.procs {
			if err := p.Start(); err != nil {
				s.t.Fatal(err)
			}
			s.waitZebra()
		}
		return
	}
	programs := []nettest.Program{
		{Path: "/usr/lib/frr/zebra", Args: []string{"-A", "127.0.0.1", "--log", "stdout"}},
		{Path: "/usr/lib/frr/bgpd", Args: []string{"-A", "127.0.0.1", "--log", "stdout"}},
	}
	if s.kind == "bird" {
		programs = []nettest.Program{{
			Path: "bird",
			Args: []string{"-f", "-u", "bird", "-g", "bird", "-c", filepath.Join(s.dir, "bird.conf"), "-s", s.socket(), "-P", filepath.Join(s.dir, "bird.pid")},
		}}
	}
	for _, prog := range programs {
		p, err := s.Start(prog)
		if err != nil {
			s.t.Fatal(err)
		}
		s.procs = append(s.procs, p)
		s.waitZebra()
	}
}

// waitZebra waits until bgpd finds zebra, as FRR's own start script does.
func (s *speakerHost) waitZebra() {
	s.t.Helper()
	if s.kind == "frr" {
		eventually(s.t, func() error {
			_, err := s.Run("test", "-S", "/run/frr/zserv.api")
			return err
		})
	}
}

// set gives the router new facts; the first time it is not running yet.
func (s *speakerHost) set(b overlay.BGP) {
	s.t.Helper()
	s.facts = b
	if s.procs == nil {
		if changed, err := s.r.Set(s.t.Context(), b); !changed || err == nil || !strings.Contains(err.Error(), "told again") {
			s.t.Fatalf("Set without a router: changed %v, error %v", changed, err)
		}
		s.start()
	}
	eventually(s.t, func() error {
		_, err := s.r.Set(s.t.Context(), b)
		return err
	})
}

// eventually waits until f has no more objections.
func eventually(t *testing.T, f func() error) {
	t.Helper()
	deadline := time.Now().Add(45 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// established waits until the sessions to all neighbours are.
func (s *speakerHost) established() {
	s.t.Helper()
	eventually(s.t, func() error {
		st, err := s.r.Status(s.t.Context())
		if err != nil {
			return err
		}
		if !st.Settled || len(st.Sessions) != len(s.facts.Neighbors) {
			return fmt.Errorf("%s: sessions %+v", s.Name, st.Sessions)
		}
		return nil
	})
}

// connections returns the ends of the BGP sessions' TCP connections.
func (s *speakerHost) connections() []string {
	var all []string
	for _, line := range strings.Split(s.run("ss", "-Htn", "state", "established"), "\n") {
		if f := strings.Fields(line); len(f) >= 4 && (strings.HasSuffix(f[2], ":179") || strings.HasSuffix(f[3], ":179")) {
			all = append(all, f[2]+" "+f[3])
		}
	}
	slices.Sort(all)
	return all
}

// subnet returns the n-th subnet of a family, and address the pod in it.
func subnet(f overlay.Family, n int) netip.Prefix {
	if f == overlay.IPv4 {
		return pfx(fmt.Sprintf("10.5.%d.0/24", n))
	}
	return pfx(fmt.Sprintf("fd00:5:0:%x::/64", n))
}

func families() []overlay.Family { return []overlay.Family{overlay.IPv4, overlay.IPv6} }

func pod(p netip.Prefix) netip.Addr { return p.Addr().Next() }

func (s *speakerHost) public(f overlay.Family) netip.Addr {
	if f == overlay.IPv4 {
		return s.IPv4
	}
	return s.IPv6
}

// node returns the facts of a node without neighbours, and gives it a pod.
func (s *speakerHost) node(n int) overlay.BGP {
	b := overlay.BGP{
		ASNumber: 64512, RouterID: s.IPv4, Port: 179,
		Networks: []netip.Prefix{pfx("10.5.0.0/16"), pfx("fd00:5::/48")},
		HoldTime: 90 * time.Second, RestartTime: 60 * time.Second,
	}
	for _, f := range families() {
		b.Own = append(b.Own, overlay.BGPOwn{Prefix: subnet(f, n), NextHop: s.public(f)})
		s.run("ip", "addr", "add", pod(subnet(f, n)).String(), "dev", "lo")
	}
	return b
}

func (s *speakerHost) to(f overlay.Family, o *speakerHost) overlay.BGPNeighbor {
	return overlay.BGPNeighbor{
		Name: "lease " + o.Name, Address: o.public(f), Local: s.public(f), ASNumber: 64512, Port: 179, Node: true,
	}
}

// ping sends from one pod to another.
func (s *speakerHost) ping(f overlay.Family, from, to int) {
	s.t.Helper()
	eventually(s.t, func() error {
		_, err := s.Run("ping", "-c", "1", "-W", "1", "-I", pod(subnet(f, from)).String(), pod(subnet(f, to)).String())
		return err
	})
}

// routes returns what the kernel has for a prefix, each route in one line.
func (s *speakerHost) routes(p netip.Prefix) string {
	s.t.Helper()
	family := "-4"
	if p.Addr().Is6() {
		family = "-6"
	}
	return s.run("ip", "-o", family, "route", "show", p.String())
}

func (s *speakerHost) wantRoute(p netip.Prefix, parts ...string) {
	s.t.Helper()
	eventually(s.t, func() error {
		got := s.routes(p)
		for _, part := range parts {
			if !strings.Contains(got, part) {
				return fmt.Errorf("%s (%s): route to %s is %q, want %q", s.Name, s.kind, p, got, part)
			}
		}
		return nil
	})
}

func (s *speakerHost) wantNoRoute(p netip.Prefix) {
	s.t.Helper()
	eventually(s.t, func() error {
		if got := s.routes(p); got != "" {
			return fmt.Errorf("%s (%s): there is a route %q", s.Name, s.kind, got)
		}
		return nil
	})
}
