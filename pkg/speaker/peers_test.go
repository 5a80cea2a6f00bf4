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

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

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
	conf := fmt.Sprintf("log stderr all;\nrouter id %s;\nprotocol device {}\n%s\n", r.hosts[i].IPv4, protocols)
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
	debug { routes, states, events };
	connect delay time 1; connect retry time 2; error wait time 1, 2; graceful restart on;
	%s { import all; export all; next hop self; %s };
}
`, name, local, as, remote, remoteAS, more, f, channel)
}

// frrPeer is a session of FRR's with what is said of it: "remote-as 65000", "password x".
type frrPeer struct {
	addr netip.Addr
	says []string
	in   []string // the same, inside the address family
}

// frrConf announces prefixes to peers, each in its family.
func frrConf(as int, id netip.Addr, more []string, prefixes []string, peers ...frrPeer) string {
	var b strings.Builder
	fmt.Fprintf(&b, "router bgp %d\n bgp router-id %s\n no bgp network import-check\n no bgp ebgp-requires-policy\n no bgp default ipv4-unicast\n bgp graceful-restart\n timers bgp 30 90\n", as, id)
	for _, x := range more {
		fmt.Fprintln(&b, "", x)
	}
	for _, p := range peers {
		for _, x := range p.says {
			fmt.Fprintf(&b, " neighbor %s %s\n", p.addr, x)
		}
		fmt.Fprintf(&b, " neighbor %s timers connect 2\n neighbor %s advertisement-interval 0\n", p.addr, p.addr)
	}
	for _, f := range []overlay.Family{overlay.IPv4, overlay.IPv6} {
		fmt.Fprintf(&b, " address-family ipv%d unicast\n", f)
		for _, p := range prefixes {
			if overlay.FamilyOf(prefix(p).Addr()) == f {
				fmt.Fprintln(&b, "  network", p)
			}
		}
		for _, p := range peers {
			if overlay.FamilyOf(p.addr) == f {
				for _, x := range append([]string{"activate"}, p.in...) {
					fmt.Fprintf(&b, "  neighbor %s %s\n", p.addr, x)
				}
			}
		}
		fmt.Fprintln(&b, " exit-address-family")
	}
	return b.String()
}

// frr starts FRR's zebra and bgpd; conf is bgpd's.
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
