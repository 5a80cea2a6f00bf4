package daemon

import (
	"bytes"
	"context"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
)

func newDaemon(log *bytes.Buffer) *Daemon {
	d := &Daemon{
		log: slog.New(slog.NewTextHandler(log, nil)), started: time.Now(), cfg: Config{Resync: time.Minute},
		storeBell: newBell(), kernelBell: newBell(), keeperBell: newBell(),
	}
	return d
}

func TestBell(t *testing.T) {
	b := newBell()
	b.ring("first")
	b.ring("second")
	if why := <-b; why != "first" {
		t.Errorf("rung by %s", why)
	}
	select {
	case why := <-b:
		t.Errorf("two rings are %s more", why)
	default:
	}
	b.ring("third")
	if why := <-b; why != "third" {
		t.Errorf("rung by %s", why)
	}
}

func TestJitter(t *testing.T) {
	seen := map[time.Duration]bool{}
	for range 1000 {
		d := jitter(time.Second)
		seen[d] = true
		if d < 800*time.Millisecond || d > 1200*time.Millisecond {
			t.Fatalf("jitter gives %s", d)
		}
	}
	if len(seen) < 100 {
		t.Errorf("only %d values", len(seen))
	}
}

// TestForever counts how often a task that fails at once is tried, and that one
// which ran for a while is tried again soon.
func TestForever(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDaemon(&bytes.Buffer{})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		tries := 0
		if err := d.forever(ctx, "task", func(context.Context) error { tries++; return nil }); err != context.DeadlineExceeded {
			t.Errorf("ended with %v", err)
		}
		if tries < 25 || tries > 45 { // 2 s apart at last
			t.Errorf("%d tries in a minute", tries)
		}
		var began []time.Time
		ctx, cancel = context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_ = d.forever(ctx, "task", func(context.Context) error {
			began = append(began, time.Now())
			sleep(ctx, 5*time.Second)
			return nil
		})
		for i := 1; i < len(began); i++ {
			if pause := began[i].Sub(began[i-1]) - 5*time.Second; pause > 200*time.Millisecond {
				t.Errorf("paused %s after a run of 5 s", pause)
			}
		}
	})
}

func config(t *testing.T, s string) overlay.Config {
	t.Helper()
	c, _, err := overlay.ParseConfig([]byte(s))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

const (
	v4      = `{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}`
	wider   = `{"Network":"10.4.0.0/15","Backend":{"Type":"vxlan"}}`
	mtu     = `{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","MTU":1400}}`
	other   = `{"Network":"10.6.0.0/16","Backend":{"Type":"vxlan"}}`
	tencent = `{"Network":"10.5.0.0/16","Backend":{"Type":"tencent-vpc"}}`
	hostGW  = `{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}`
	v6Only  = `{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}`
)

// TestTakeUp walks through configurations, before there is a lease and after.
func TestTakeUp(t *testing.T) {
	var log bytes.Buffer
	l := &loop{Daemon: newDaemon(&log)}
	l.node.Daemon = l.Daemon
	step := func(stored, running, problem, failure string) {
		t.Helper()
		snap := &overlay.Snapshot{Config: config(t, stored)}
		err := l.takeUp(t.Context(), snap)
		if failure != "" {
			if err == nil || !strings.Contains(err.Error(), failure) {
				t.Errorf("%s: %v, want %s", stored, err, failure)
			}
			return
		}
		if err != nil || !l.running.Equal(config(t, running)) || !l.snap.Config.Equal(l.running) {
			t.Errorf("%s: %v; running %+v", stored, err, l.running)
		}
		var problems string
		for _, p := range l.snap.Problems {
			problems += p.String()
		}
		if (problem == "") != (problems == "") || !strings.Contains(problems, problem) {
			t.Errorf("%s: problems %q, want %q", stored, problems, problem)
		}
		was := l.snap
		if err := l.takeUp(t.Context(), snap); err != nil || l.snap != was {
			t.Errorf("%s: the same Snapshot twice makes another", stored)
		}
	}
	step(tencent, "", "", "Backend.Type: tencent-vpc: Twill has no such backend")
	step(v6Only, "", "", "EnableIPv4: false: leases in etcd are named by their IPv4 subnet")
	step(v4, v4, "", "")
	l.node.known = true
	step(wider, wider, "", "") // nothing stands on the first one yet
	if l.node.known {
		t.Error("a new network was not looked at for routes of the host")
	}
	step(v4, v4, "", "")
	l.held.Store(&overlay.Subnets{V4: subnets.V4})
	step(v6Only, v4, "not taken up", "")
	step(other, v4, "config: the stored configuration is not taken up: this node's lease does not fit", "")
	step(tencent, v4, "config: the stored configuration is not taken up: Backend.Type: tencent-vpc", "")
	if len(l.former.all) != 0 {
		t.Error("a configuration that was refused is remembered")
	}
	step(hostGW, hostGW, "", "")
	if got := l.former.backends(); len(got) != 1 || got[0].Type != "vxlan" {
		t.Errorf("after the move to host-gw the node accepts %+v too, want vxlan", got)
	}
	step(v4, v4, "", "")
	if len(l.former.all) != 0 {
		t.Errorf("after the move back the node accepts %+v too", l.former.all)
	}
	step(mtu, mtu, "", "")
	if strings.Count(log.String(), "network configuration changed") != 3 {
		t.Errorf("log:\n%s", log.String())
	}
}

func TestUnready(t *testing.T) {
	d := newDaemon(&bytes.Buffer{})
	for _, x := range []struct {
		report report
		want   string
	}{
		{report{waiting: "the store: x"}, "waiting for the store: x"},
		{report{}, "waiting for the first pass"},
		{report{pass: overlay.PassStatus{Count: 1}}, "the last pass did not finish"},
		{report{pass: overlay.PassStatus{Count: 1, Failures: []string{"route add x: no"}}}, "a change failed: route add x: no"},
		{report{pass: overlay.PassStatus{Count: 1, Failures: []string{"a", "b", "c"}}}, "a change failed: a (and 2 more)"},
		{report{pass: overlay.PassStatus{Count: 1}, clean: true}, ""},
	} {
		d.report = x.report
		got := ""
		if err := d.unready(); err != nil {
			got = err.Error()
		}
		if got != x.want {
			t.Errorf("%+v: %q, want %q", x.report, got, x.want)
		}
	}
}

func TestAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDaemon(&bytes.Buffer{})
		time.Sleep(3 * d.cfg.Resync)
		if err := d.alive(); err != nil {
			t.Errorf("on time: %v", err)
		}
		time.Sleep(time.Second)
		if err := d.alive(); err == nil || !strings.Contains(err.Error(), "no pass of the reconcile loop for 3m1s") {
			t.Errorf("late: %v", err)
		}
		d.update(func(r *report) { r.heartbeat = time.Now() })
		if err := d.alive(); err != nil {
			t.Errorf("after a pass: %v", err)
		}
	})
}

func TestLogProblems(t *testing.T) {
	var log bytes.Buffer
	l := &loop{Daemon: newDaemon(&log)}
	p := overlay.Problem{Object: "lease x", Reason: "odd", Remedy: "none"}
	l.logProblems([]overlay.Problem{p})
	l.logProblems([]overlay.Problem{p})
	if strings.Count(log.String(), "msg=problem") != 1 {
		t.Errorf("a problem that stays is logged again:\n%s", log.String())
	}
	l.logProblems(nil)
	if strings.Count(log.String(), `msg="problem solved"`) != 1 {
		t.Errorf("its end is not logged:\n%s", log.String())
	}
	var many []overlay.Problem
	for range 50 {
		many = append(many, overlay.Problem{Object: string(rune('a' + len(many)))})
	}
	log.Reset()
	l.logProblems(many)
	if n := strings.Count(log.String(), "\n"); n != maxLogged+1 || !strings.Contains(log.String(), "count=40") {
		t.Errorf("%d lines:\n%s", n, log.String())
	}
}

// TestLostSessions says with which of two peers a pass shakes hands.
func TestLostSessions(t *testing.T) {
	key := overlay.WGKey{1}.Clamp()
	known := overlay.WGPeer{Link: overlay.WireGuardLink, PublicKey: overlay.WGKey{1}}
	added := overlay.WGPeer{Link: overlay.WireGuardLink, PublicKey: overlay.WGKey{2}}
	other := overlay.WGPeer{Link: overlay.WireGuardLinkV6, PublicKey: overlay.WGKey{1}}
	up := overlay.Link{Name: overlay.WireGuardLink, Up: true, WG: overlay.WireGuard{Port: 51820, Key: key}}
	down := up
	down.Up = false
	add := overlay.Plan{{Verb: overlay.Add, Object: known}, {Verb: overlay.Add, Object: added}}
	for _, x := range []struct {
		name    string
		leased  bool // the key was known before this start
		applied []overlay.WGPeer
		plan    overlay.Plan
		want    []overlay.WGPeer
	}{
		{name: "a new node", plan: add},
		{name: "a restart without its device", leased: true, plan: add, want: []overlay.WGPeer{known, added}},
		{name: "a peer removed by somebody, and another new", leased: true, applied: []overlay.WGPeer{known}, plan: add, want: []overlay.WGPeer{known}},
		{name: "a peer changed", leased: true, applied: []overlay.WGPeer{known}, plan: overlay.Plan{{Verb: overlay.Change, Object: known, Before: known}}},
		{name: "the device set down", applied: []overlay.WGPeer{known, added, other}, plan: overlay.Plan{{Verb: overlay.Change, Object: up, Before: down}}, want: []overlay.WGPeer{known, added}},
		{name: "the device changed", applied: []overlay.WGPeer{known}, plan: overlay.Plan{{Verb: overlay.Change, Object: up, Before: up}}},
		{name: "the device made", plan: overlay.Plan{{Verb: overlay.Add, Object: up}}},
	} {
		l := &loop{want: &overlay.State{WGPeers: []overlay.WGPeer{known, added, other}}}
		l.node.self.WGKey = key
		if x.leased {
			l.node.leased.WireGuardV6.PublicKey = key.Public()
		}
		if x.applied != nil {
			l.applied = &overlay.State{WGPeers: x.applied}
		}
		if got := l.lostSessions(x.plan); !slices.Equal(got, x.want) {
			t.Errorf("%s: shakes hands with %v, want %v", x.name, got, x.want)
		}
	}
}
