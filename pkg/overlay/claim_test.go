package overlay

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// fakeStore keeps leases as etcd does: a revision for each write, and writes that
// only happen if what they were decided on still stands.
type fakeStore struct {
	cfg      Config
	leases   map[string]*Lease
	revision int64
}

func newFakeStore(cfg Config) *fakeStore {
	return &fakeStore{cfg: cfg, leases: map[string]*Lease{}, revision: 100}
}

func (s *fakeStore) snapshot() []*Lease {
	all := slices.Collect(maps.Values(s.leases))
	slices.SortFunc(all, func(a, b *Lease) int { return a.Compare(b.Subnets) })
	return all
}

// put writes like an operator or another program: without asking. grant 0 makes
// or leaves a reservation.
func (s *fakeStore) put(key, value string, grant int64) {
	s.revision++
	l := &Lease{Subnets: subnetsOf(key), Created: s.revision, Modified: s.revision, Grant: grant}
	if old := s.leases[key]; old != nil {
		l.Created = old.Created
	}
	l.Attrs, l.Err = ParseAttrs([]byte(value))
	s.leases[key] = l
}

func (s *fakeStore) do(step Step) bool {
	key := step.Lease.Key()
	old := s.leases[key]
	switch {
	case step.Act == Create && old == nil:
		s.put(key, string(step.Lease.Value()), s.revision+1)
	case step.Act == Update && old != nil && old.Modified == step.Lease.Modified:
		s.put(key, string(step.Lease.Value()), old.Grant)
	case step.Act == Remove && old != nil && old.Modified == step.Lease.Modified:
		s.revision++
		delete(s.leases, key)
	default:
		return false
	}
	return true
}

func (s *fakeStore) String() string {
	var b strings.Builder
	for _, l := range s.snapshot() {
		text := string(l.Value())
		if l.Err != nil {
			text = l.Err.Error()
		}
		if l.Reserved() {
			text += " reserved"
		}
		fmt.Fprintf(&b, "    %s %s\n", l.Key(), text)
	}
	return b.String()
}

// claimant does with a Claim what twilld does.
type claimant struct {
	name  string
	claim Claim
	seen  []*Lease // by look; nil: not yet
	key   string   // the lease held
}

func (c *claimant) look(s *fakeStore) { c.seen = append([]*Lease{}, s.snapshot()...) }

// act decides on what was seen and writes.
func (c *claimant) act(s *fakeStore, draw func(int) int) (Step, bool, error) {
	step, err := c.claim.Next(s.cfg, c.seen, draw)
	if err != nil {
		return step, false, err
	}
	if step.Act == Hold {
		c.claim.Prefer, c.claim.Held, c.key = step.Lease.Subnets, true, step.Lease.Key()
		return step, true, nil
	}
	done := s.do(step)
	switch {
	case !done:
	case step.Act != Remove:
		c.claim.Prefer, c.claim.Held = step.Lease.Subnets, true
	case c.claim.Prefer == (Subnets{}):
		c.claim.Prefer = step.Lease.Subnets
	}
	return step, done, nil
}

// identity sets what the claimant publishes.
func (c *claimant) identity(cfg Config, addr, hw string) {
	a := Attrs{PublicIP: ip(addr), Backend: "vxlan", VTEP: VTEP{1, mac(hw)}}
	a.Data = a.VTEP.data()
	if cfg.V6.Enabled() {
		a.PublicIPv6, a.VTEPv6 = ip("2001:db8::"+addr[strings.LastIndexByte(addr, '.')+1:]), VTEP{1, mac(hw[:15] + "66")}
		a.DataV6 = a.VTEPv6.data()
	}
	c.claim.Attrs = a
}

const (
	macA = "0e:00:00:00:00:0a" // the lower one
	macB = "0e:00:00:00:00:0b"
	macC = "0e:00:00:00:00:0c"
)

// TestClaim runs scripts of these commands:
//
//	config JSON
//	node NAME ADDRESS MAC [KEY]   KEY is what its subnet.env remembers
//	put KEY ADDRESS MAC | reserve KEY ADDRESS | garbage KEY | delete KEY
//	address NAME ADDRESS          changes while running
//	restart NAME                  subnet.env stays
//	forget NAME                   restart without subnet.env
//	run                           all nodes in turn, until nobody writes
func TestClaim(t *testing.T) {
	for _, c := range []struct{ name, script string }{
		{"fresh cluster", "node a 198.51.100.1 " + macA + "\nnode b 198.51.100.2 " + macB + "\nnode c 198.51.100.3 " + macC + "\nrun"},
		{"fresh dual stack", "config " + dualJSON + "\nnode a 198.51.100.1 " + macA + "\nnode b 198.51.100.2 " + macB + "\nrun"},
		{"remembered and free", "node a 198.51.100.1 " + macA + " 10.5.52.0-24\nrun"},
		{"remembered and taken", "put 10.5.52.0-24 198.51.100.9 " + macC + "\nnode a 198.51.100.1 " + macA + " 10.5.52.0-24\nrun"},
		{"remembered and taken by a wider one", "put 10.5.52.0-22 198.51.100.9 " + macC + "\nnode a 198.51.100.1 " + macA + " 10.5.52.0-24\nrun"},
		{"remembered and of another length", "node a 198.51.100.1 " + macA + " 10.5.52.0-25\nrun"},
		{"remembered and outside", "node a 198.51.100.1 " + macA + " 10.5.0.0-24\nrun"},
		{"remembered in part: dual stack keeps IPv4", "config " + dualJSON + "\nnode a 198.51.100.1 " + macA + " 10.5.52.0-24\nrun"},
		{"remembered in part: IPv4 taken, IPv6 kept", "config " + dualJSON + "\nput 10.5.52.0-24 198.51.100.9 " + macC + "\nnode a 198.51.100.1 " + macA + " 10.5.52.0-24&fd00:5:0:34::-64\nrun"},
		{"lease of IPv4 found in dual stack", "config " + dualJSON + "\nput 10.5.52.0-24 198.51.100.1 " + macA + "\nnode a 198.51.100.1 " + macA + "\nrun"},
		{"own lease found by address", "put 10.5.52.0-24 198.51.100.1 " + macA + "\nnode a 198.51.100.1 " + macA + "\nrun"},
		{"own lease found by address, MAC is new", "put 10.5.52.0-24 198.51.100.1 " + macC + "\nnode a 198.51.100.1 " + macA + "\nrun"},
		{"two leases with our address", "put 10.5.60.0-24 198.51.100.1 " + macA + "\nput 10.5.52.0-24 198.51.100.1 " + macA + "\nnode a 198.51.100.1 " + macA + "\nrun"},
		{"two leases with our address, one with our MAC", "put 10.5.60.0-24 198.51.100.1 " + macC + "\nput 10.5.52.0-24 198.51.100.1 " + macA + "\nnode a 198.51.100.1 " + macA + "\nrun"},
		{"two leases with our address, one remembered", "put 10.5.60.0-24 198.51.100.1 " + macA + "\nput 10.5.52.0-24 198.51.100.1 " + macA + "\nnode a 198.51.100.1 " + macA + " 10.5.52.0-24\nrun"},
		{"own lease does not fit", "put 10.6.52.0-24 198.51.100.1 " + macA + "\nnode a 198.51.100.1 " + macA + "\nrun"},
		{"reservation taken and stays", "reserve 10.5.52.0-24 198.51.100.1\nnode a 198.51.100.1 " + macA + "\nrun\nrestart a\nrun"},
		{"reservation of another", "reserve 10.5.1.0-24 198.51.100.9\nnode a 198.51.100.1 " + macA + "\nrun"},
		{"address changes while running", "node a 198.51.100.1 " + macA + "\nrun\naddress a 198.51.100.77\nrun"},
		{"address changes while down", "node a 198.51.100.1 " + macA + "\nrun\nrestart a\naddress a 198.51.100.77\nrun"},
		{"address changes while down, subnet.env lost", "node a 198.51.100.1 " + macA + "\nrun\nforget a\naddress a 198.51.100.77\nrun"},
		{"key deleted", "node a 198.51.100.1 " + macA + " 10.5.52.0-24\nrun\ndelete 10.5.52.0-24\nrun"},
		{"key deleted and taken", "node a 198.51.100.1 " + macA + " 10.5.52.0-24\nrun\ndelete 10.5.52.0-24\nput 10.5.52.0-24 198.51.100.9 " + macC + "\nrun"},
		{"key overwritten with garbage", "node a 198.51.100.1 " + macA + " 10.5.52.0-24\nrun\ngarbage 10.5.52.0-24\nrun"},
		{"garbage found after a restart", "node a 198.51.100.1 " + macA + " 10.5.52.0-24\nrun\ngarbage 10.5.52.0-24\nrestart a\nrun"},
		{"key overwritten by another node", "node a 198.51.100.1 " + macA + " 10.5.52.0-24\nrun\nput 10.5.52.0-24 198.51.100.9 " + macC + "\nrun"},
		{"pool full", "config " + `{"Network":"10.5.0.0/28","Backend":{"Type":"vxlan"}}` + "\nnode a 198.51.100.1 " + macA + "\nnode b 198.51.100.2 " + macB + "\nput 10.5.0.4-30 198.51.100.9 " + macC + "\nput 10.5.0.8-30 198.51.100.8 " + macC + "\nrun\ndelete 10.5.0.8-30\nrun"},
		{"two nodes, one address", "node a 198.51.100.1 " + macA + "\nrun\nnode b 198.51.100.1 " + macB + "\nrun\nrestart a\nrestart b\nrun\nforget a\nforget b\nrun"},
		{"two nodes, one address, other order", "node b 198.51.100.1 " + macB + "\nrun\nnode a 198.51.100.1 " + macA + "\nrun\nrestart a\nrun\nrestart b\nrun"},
		{"one subnet, two keys", "put 10.5.52.0-24 198.51.100.2 " + macB + "\nput 10.5.52.0-24&fd00:5:0:34::-64 198.51.100.1 " + macA + "\nnode a 198.51.100.1 " + macA + "\nnode b 198.51.100.2 " + macB + "\nrun"},
		{"one subnet, two keys, other order", "config " + dualJSON + "\nput 10.5.52.0-24&fd00:5:0:34::-64 198.51.100.1 " + macA + "\nput 10.5.52.0-24 198.51.100.2 " + macB + "\nnode a 198.51.100.1 " + macA + "\nnode b 198.51.100.2 " + macB + "\nrun"},
		{"same IPv6 subnet under two keys", "config " + dualJSON + "\nput 10.5.52.0-24&fd00:5:0:34::-64 198.51.100.1 " + macA + "\nput 10.5.53.0-24&fd00:5:0:34::-64 198.51.100.2 " + macB + "\nnode a 198.51.100.1 " + macA + "\nnode b 198.51.100.2 " + macB + "\nrun"},
		{"wide lease over two, and younger", "put 10.5.52.0-24 198.51.100.1 " + macA + "\nput 10.5.53.0-24 198.51.100.2 " + macB + "\nput 10.5.52.0-23 198.51.100.3 " + macC + "\nnode a 198.51.100.1 " + macA + "\nnode b 198.51.100.2 " + macB + "\nrun"},
		{"wide lease over two, and older", "put 10.5.52.0-23 198.51.100.3 " + macC + "\nput 10.5.52.0-24 198.51.100.1 " + macA + "\nput 10.5.53.0-24 198.51.100.2 " + macB + "\nnode a 198.51.100.1 " + macA + "\nnode b 198.51.100.2 " + macB + "\nrun"},
		{"wide lease, oldest of all", "put 10.0.0.0-8 198.51.100.3 " + macC + "\nput 10.5.52.0-24 198.51.100.1 " + macA + "\nnode a 198.51.100.1 " + macA + "\nnode b 198.51.100.2 " + macB + "\nrun"},
		{"subnets cut otherwise", "config " + `{"Network":"10.5.0.0/16","SubnetLen":25,"Backend":{"Type":"vxlan"}}` + "\nput 10.5.52.0-24 198.51.100.3 " + macC + "\nput 10.5.52.128-25 198.51.100.1 " + macA + "\nnode a 198.51.100.1 " + macA + "\nrun"},
		// b stands over the wide one, which therefore does not stand over a.
		{"wide lease over two, of an age between", "put 10.5.53.0-24 198.51.100.2 " + macB + "\nput 10.5.52.0-23 198.51.100.3 " + macC + "\nput 10.5.52.0-24 198.51.100.1 " + macA + "\nnode a 198.51.100.1 " + macA + "\nnode b 198.51.100.2 " + macB + "\nrun"},
	} {
		t.Run(c.name, func(t *testing.T) {
			golden(t, "claim/"+strings.NewReplacer(" ", "-", ",", "", ":", "").Replace(c.name), runScript(t, c.script))
		})
	}
}

func runScript(t *testing.T, script string) string {
	t.Helper()
	s := newFakeStore(config(t, v4JSON))
	var nodes []*claimant
	find := func(name string) *claimant {
		return nodes[slices.IndexFunc(nodes, func(c *claimant) bool { return c.name == name })]
	}
	var out strings.Builder
	for _, line := range strings.Split(script, "\n") {
		fmt.Fprintln(&out, line)
		word, rest, _ := strings.Cut(line, " ")
		w := append(strings.Fields(rest), "")
		switch word {
		case "config":
			s.cfg = config(t, rest)
		case "node":
			c := &claimant{name: w[0], claim: Claim{Prefer: subnetsOf(w[3])}}
			c.identity(s.cfg, w[1], w[2])
			nodes = append(nodes, c)
		case "put":
			var c claimant
			c.identity(Config{}, w[1], w[2])
			s.put(w[0], string(c.claim.Attrs.Value()), s.revision)
		case "reserve":
			s.put(w[0], fmt.Sprintf(`{"PublicIP":%q}`, w[1]), 0)
		case "garbage":
			s.put(w[0], "garbage", s.leases[w[0]].Grant)
		case "delete":
			delete(s.leases, w[0])
		case "address":
			c := find(w[0])
			c.identity(s.cfg, w[1], c.claim.Attrs.VTEP.MAC.String())
		case "restart", "forget":
			c := find(w[0])
			c.claim.Held, c.key = false, ""
			if word == "forget" {
				c.claim.Prefer = Subnets{}
			}
		case "run":
			runAll(t, s, nodes, &out)
		default:
			t.Fatalf("no such command: %s", line)
		}
	}
	return out.String()
}

// runAll lets the nodes act in turn until nobody has anything to write.
func runAll(t *testing.T, s *fakeStore, nodes []*claimant, out *strings.Builder) {
	t.Helper()
	for range 20 {
		writes := 0
		for _, c := range nodes {
			c.look(s)
			step, done, err := c.act(s, func(int) int { return 0 })
			switch {
			case err != nil:
				fmt.Fprintf(out, "  %s: %v\n", c.name, err)
			case step.Act != Hold:
				writes++
				fmt.Fprintf(out, "  %s: %s %s, done %t: %s\n", c.name, step.Act, step.Lease.Key(), done, step.Why)
			}
		}
		if writes == 0 {
			fmt.Fprint(out, s)
			checkHeld(t, s, nodes)
			return
		}
	}
	t.Errorf("still writing after 20 rounds:\n%s", out)
}

// checkHeld checks that the leases of all nodes stand beside each other.
func checkHeld(t *testing.T, s *fakeStore, nodes []*claimant) {
	t.Helper()
	lost := losers(s.cfg, s.snapshot())
	for i, c := range nodes {
		if c.key == "" {
			continue
		}
		own := s.leases[c.key]
		if own == nil || own.Attrs != c.claim.Attrs || s.cfg.Check(own.Subnets) != nil || lost[own] != nil {
			t.Errorf("%s holds %s, which says %+v", c.name, c.key, own)
			continue
		}
		for _, d := range nodes[:i] {
			if d.key != "" && subnetsOf(c.key).Overlaps(subnetsOf(d.key)) {
				t.Errorf("%s and %s hold %s and %s", c.name, d.name, c.key, d.key)
			}
		}
	}
}

// Of nodes with the same address the one with the lowest MAC keeps the subnet
// they meet on, in whatever order they start.
func TestTwinsVerdictIndependentOfOrder(t *testing.T) {
	macs := []string{macA, macB, macC}
	for _, order := range [][]int{{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}} {
		s := newFakeStore(config(t, v4JSON))
		var nodes []*claimant
		var log strings.Builder
		for _, i := range order {
			c := &claimant{name: macs[i]}
			c.identity(s.cfg, "198.51.100.1", macs[i])
			nodes = append(nodes, c)
			runAll(t, s, nodes, &log)
		}
		if l := s.leases["10.5.1.0-24"]; l == nil || l.VTEP.MAC != mac(macA) || len(s.leases) != 3 {
			t.Errorf("order %v: 10.5.1.0-24 went to %v of %d leases\n%s", order, l, len(s.leases), &log)
		}
	}
}

// Claimants that look and write in any order end up beside each other, and then
// are quiet.
func TestClaimantsSettle(t *testing.T) {
	for seed := range uint64(400) {
		r := rand.New(rand.NewPCG(seed, 1))
		json := v4JSON
		if seed%3 == 0 {
			json = dualJSON
		}
		s := newFakeStore(config(t, json))
		nodes := randomWorld(r, s)
		for tick := 0; ; tick++ {
			if tick == 4000 {
				t.Fatalf("seed %d: not settled:\n%s", seed, s)
			}
			c := nodes[r.IntN(len(nodes))]
			if c.seen == nil || r.IntN(2) == 0 {
				c.look(s)
			} else if _, _, err := c.act(s, r.IntN); err != nil {
				t.Fatalf("seed %d: %s: %v", seed, c.name, err)
			}
			if tick%50 == 49 && settled(t, s, nodes) {
				break
			}
		}
		if checkHeld(t, s, nodes); t.Failed() {
			t.Fatalf("seed %d:\n%s", seed, s)
		}
	}
}

func settled(t *testing.T, s *fakeStore, nodes []*claimant) bool {
	for _, c := range nodes {
		step, err := c.claim.Next(s.cfg, s.snapshot(), func(int) int { return 0 })
		if err != nil {
			t.Fatal(err)
		}
		if step.Act != Hold {
			return false
		}
		c.key = step.Lease.Key()
	}
	return true
}

// randomWorld fills the store with leases of all kinds, overlapping too, and
// returns nodes that know some of them.
func randomWorld(r *rand.Rand, s *fakeStore) []*claimant {
	key := func() string {
		third := r.IntN(16)
		k := []string{
			fmt.Sprintf("10.5.%d.0-24", third), fmt.Sprintf("10.5.%d.0-23", third&^1), fmt.Sprintf("10.5.%d.128-25", third), fmt.Sprintf("10.6.%d.0-24", third),
		}[r.IntN(4)]
		if r.IntN(2) == 0 {
			k += fmt.Sprintf("&fd00:5:0:%x::-64", 1+r.IntN(16))
		}
		return k
	}
	var nodes []*claimant
	for i := range 2 + r.IntN(8) {
		c := &claimant{name: fmt.Sprint("n", i)}
		addr := fmt.Sprintf("198.51.100.%d", 1+i)
		if r.IntN(4) == 0 {
			addr = "198.51.100.1"
		}
		c.identity(s.cfg, addr, fmt.Sprintf("0e:00:00:00:%02x:01", 255-i))
		if r.IntN(2) == 0 {
			c.claim.Prefer = subnetsOf(key())
		}
		nodes = append(nodes, c)
	}
	for range r.IntN(12) {
		value := string(nodes[r.IntN(len(nodes))].claim.Attrs.Value())
		switch r.IntN(4) {
		case 0:
			value = "garbage"
		case 1:
			value = `{"PublicIP":"198.51.100.99"}`
		}
		s.put(key(), value, int64(r.IntN(2)))
	}
	return nodes
}

// The best claim stands, then the next that overlaps none that stands.
func TestLosersAgainstReference(t *testing.T) {
	for seed := range uint64(500) {
		r := rand.New(rand.NewPCG(seed, 2))
		s := newFakeStore(config(t, dualJSON))
		randomWorld(r, s)
		leases := s.snapshot()
		irregular := func(l *Lease) bool {
			return l.V4.Bits() != 24 || !s.cfg.V4.Network.Contains(l.V4.Addr()) || l.V6.IsValid() && l.V6.Bits() != 64
		}
		byAge := slices.SortedFunc(slices.Values(leases), func(a, b *Lease) int {
			if irregular(a) != irregular(b) {
				return map[bool]int{true: 1, false: -1}[irregular(a)]
			}
			return int(a.Created - b.Created)
		})
		var stands []*Lease
		got := losers(s.cfg, leases)
		for _, l := range byAge {
			free := !slices.ContainsFunc(stands, func(o *Lease) bool { return o.Overlaps(l.Subnets) })
			if free {
				stands = append(stands, l)
			}
			if winner := got[l]; free != (winner == nil) || winner != nil && !(slices.Contains(stands, winner) && winner.Overlaps(l.Subnets)) {
				t.Fatalf("seed %d: %s loses to %v, want free %t\n%s", seed, l.Key(), winner, free, s)
			}
		}
		// All nodes agree, and so they do whatever the pointers are.
		again := losers(s.cfg, s.snapshot())
		if !maps.Equal(got, again) {
			t.Fatalf("seed %d: two verdicts", seed)
		}
	}
}

func TestDeriveMAC(t *testing.T) {
	u := Uplink{Name: "eth0", MAC: mac("52:54:00:00:00:01"), V4: ip("198.51.100.1")}
	m := DeriveMAC(u, "flannel.1")
	if want := mac("ae:1d:c6:86:43:2e"); m != want {
		t.Errorf("it is %s; after an upgrade it must still be %s", m, want)
	}
	moved := u
	moved.Name, moved.V4, moved.MTU = "eth9", ip("198.51.100.2"), 9000
	if DeriveMAC(moved, "flannel.1") != m {
		t.Error("changes with the uplink's name or address")
	}
	seen := map[MAC]string{m: "flannel.1"}
	for i := range 1000 {
		other := u
		other.MAC[5] = byte(i)
		other.MAC[4] = byte(i>>8) + 1
		for _, dev := range []string{"flannel.1", "flannel-v6.1", "flannel.2"} {
			m := DeriveMAC(other, dev)
			if m[0]&3 != 2 {
				t.Fatalf("%s is not unicast and locally administered", m)
			}
			if who, ok := seen[m]; ok {
				t.Fatalf("%s of %s %s is that of %s", m, other.MAC, dev, who)
			}
			seen[m] = dev
		}
	}
	tunnel := Uplink{Name: "wg0", V4: ip("198.51.100.1")}
	other := tunnel
	other.V4 = ip("198.51.100.2")
	if DeriveMAC(tunnel, "flannel.1") == DeriveMAC(other, "flannel.1") {
		t.Error("two uplinks without a MAC derive the same")
	}
}

// A node whose address changes keeps its subnet, whatever the backend: by what
// tells it apart, or by what the lease said when it was last its own.
func TestClaimAfterAddressChange(t *testing.T) {
	cfg := config(t, backendJSON(false, `{"Type":"host-gw"}`))
	draw := func(int) int { return 0 }
	for _, backend := range []string{"host-gw", "bgp", "", "wireguard", "vxlan"} {
		own := peerLease("10.5.2.0-24", 2)
		if backend != "vxlan" {
			by(backend)(&own)
		}
		moved := own.Attrs
		moved.PublicIP = ip("198.51.100.222")
		c := Claim{Attrs: moved, Prefer: own.Subnets, Held: true, Last: own.Attrs}
		step, err := c.Next(cfg, []*Lease{&own}, draw)
		if err != nil || step.Act != Update || step.Lease.Subnets != own.Subnets || step.Lease.Attrs != moved {
			t.Errorf("%q: %s %s (%s), %v; want an update of the same subnet", backend, step.Act, step.Lease.Key(), step.Why, err)
		}
		// Another process knows only the subnet: an identity is needed.
		step, err = Claim{Attrs: moved, Prefer: own.Subnets}.Next(cfg, []*Lease{&own}, draw)
		if want := map[bool]Act{true: Update, false: Create}[own.identity() != ""]; err != nil || step.Act != want {
			t.Errorf("%q after a restart: %s, %v; want %s", backend, step.Act, err, want)
		}
	}
}

// A node that moves to another backend writes over its own lease, and does not take
// it for that of a node with the same address.
func TestClaimAfterBackendChange(t *testing.T) {
	cfg := config(t, v4JSON)
	for _, was := range []string{"vxlan", "wireguard", "host-gw", ""} {
		for _, is := range []string{"vxlan", "wireguard", "host-gw", ""} {
			own, next := peerLease("10.5.2.0-24", 2), peerLease("10.5.2.0-24", 2)
			by(was)(&own)
			by(is)(&next)
			if was == "vxlan" {
				own = peerLease("10.5.2.0-24", 2)
			}
			if is == "vxlan" {
				next = peerLease("10.5.2.0-24", 2)
			}
			for _, held := range []bool{true, false} {
				c := Claim{Attrs: next.Attrs, Prefer: own.Subnets, Held: held, Last: own.Attrs}
				step, err := c.Next(cfg, []*Lease{&own}, func(int) int { return 0 })
				want := Update
				if was == is {
					want = Hold
				}
				if err != nil || step.Act != want || step.Lease.Subnets != own.Subnets {
					t.Errorf("from %q to %q: %s %s, %v; want %s", was, is, step.Act, step.Lease.Key(), err, want)
				}
			}
		}
	}
}
