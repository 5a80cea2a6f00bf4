package router

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// meshLab is a mesh of BIRD and FRR.
type meshLab struct {
	t     *testing.T
	all   []*speakerHost
	facts map[*speakerHost]overlay.BGP
	// before are the connections that nothing may interrupt.
	before map[*speakerHost][]string
}

// join tells each member of all others, and waits for the sessions.
func (m *meshLab) join(members ...*speakerHost) {
	m.t.Helper()
	for _, s := range members {
		b := m.facts[s]
		for _, f := range families() {
			for _, o := range members {
				if o != s {
					n := s.to(f, o)
					n.Password = `s3cret\+/=!#?|'$%`
					b.Neighbors = append(b.Neighbors, n)
				}
			}
		}
		s.set(b)
	}
	for _, s := range members {
		s.established()
	}
}

// undisturbed wants all connections of before, but those to gone.
func (m *meshLab) undisturbed(what string, gone ...*speakerHost) {
	m.t.Helper()
	for s, before := range m.before {
		now := s.connections()
		for _, c := range before {
			to := func(o *speakerHost) bool {
				return strings.Contains(c, o.IPv4.String()+":") || strings.Contains(c, "["+o.IPv6.String()+"]")
			}
			if there, want := slices.Contains(now, c), !slices.ContainsFunc(gone, to); there != want && !slices.Contains(gone, s) {
				m.t.Errorf("%s: connection %s of %s (%s): there %v, want %v", what, c, s.Name, s.kind, there, want)
			}
		}
	}
}

// TestMesh: members come, change, die and go, and no session of the others is
// interrupted.
func TestMesh(t *testing.T) {
	nettest.CheckLeaks(t)
	l := nettest.NewT(t)
	m := &meshLab{t: t, facts: map[*speakerHost]overlay.BGP{}, before: map[*speakerHost][]string{}}
	for i, kind := range []string{"bird", "bird", "bird", "frr", "frr"} {
		s := newSpeakerHost(t, l, kind)
		m.all = append(m.all, s)
		m.facts[s] = s.node(i + 1)
	}
	four := []*speakerHost{m.all[0], m.all[1], m.all[3], m.all[4]}
	m.join(four...)
	for _, s := range four {
		m.before[s] = s.connections()
	}

	m.join(m.all...)
	m.undisturbed("a node has come")
	m.reach()

	m.move(m.all[0], 101)
	m.move(m.all[3], 104)
	m.join(m.all...)
	m.undisturbed("subnets have changed")
	for _, f := range families() {
		for _, s := range []*speakerHost{m.all[1], m.all[2], m.all[4]} {
			s.wantRoute(subnet(f, 101), "via "+m.all[0].public(f).String())
			s.wantRoute(subnet(f, 104), "dev eth0") // FRR gives its link-local address in IPv6
			s.wantNoRoute(subnet(f, 1))
			s.wantNoRoute(subnet(f, 4))
		}
	}

	m.die(m.all[2], m.all[1], m.all[3])
	m.all[2].start()
	m.all[2].established()
	m.die(m.all[4], m.all[1], m.all[3])

	m.join(four[:3]...)
	m.undisturbed("nodes have gone", m.all[4])
	for _, s := range four[:3] {
		for _, f := range families() {
			s.wantNoRoute(subnet(f, 3))
			s.wantNoRoute(subnet(f, 5))
		}
	}
}

// reach sends packets between all, and looks at each node's own subnet.
func (m *meshLab) reach() {
	m.t.Helper()
	for _, f := range families() {
		for i, s := range m.all {
			for j := range m.all {
				if i != j {
					s.ping(f, i+1, j+1)
				}
			}
			if got := s.routes(subnet(f, i+1)); got != "" {
				m.t.Errorf("%s (%s) has put its own subnet into the kernel: %s", s.Name, s.kind, got)
			}
		}
	}
}

// move gives a node other subnets.
func (m *meshLab) move(s *speakerHost, n int) {
	b := m.facts[s]
	b.Own = nil
	for _, f := range families() {
		b.Own = append(b.Own, overlay.BGPOwn{Prefix: subnet(f, n), NextHop: s.public(f)})
	}
	m.facts[s] = b
}

// die kills a router: the others keep its routes for its time to restart
// (RFC 4724).
func (m *meshLab) die(dead *speakerHost, others ...*speakerHost) {
	m.t.Helper()
	for _, p := range dead.procs {
		if err := p.Kill9(); err != nil {
			m.t.Fatal(err)
		}
	}
	for _, s := range others {
		eventually(m.t, func() error {
			st, err := s.r.Status(m.t.Context())
			if err == nil && st.Settled {
				err = errors.New("the session still stands")
			}
			return err
		})
		for _, f := range families() {
			if s.routes(subnet(f, slices.Index(m.all, dead)+1)) == "" {
				m.t.Errorf("%s (%s) dropped the route to %s (%s), which restarts", s.Name, s.kind, dead.Name, dead.kind)
			}
		}
	}
}
