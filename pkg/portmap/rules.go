package portmap

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/twill-net/twill/pkg/overlay"
)

// ruleset is what entries need of one family, in no tool's words. It depends on
// nothing but the entries, not on their order either.
type ruleset struct {
	family     overlay.Family
	forwards   []forward
	masquerade []masquerade
}

// forward sends what arrives for one port of the node to a pod.
type forward struct {
	protocol string
	port     uint16
	host     netip.Addr // none: any of the node's addresses
	to       netip.AddrPort
	local    []netip.Prefix // sources that are replaced
}

// masquerade gives what one pod sends the node's address.
type masquerade struct {
	pod    netip.Addr
	except []netip.Prefix // destinations
}

func (r ruleset) empty() bool { return len(r.forwards) == 0 && len(r.masquerade) == 0 }

// loopback is where the node's own programs connect from to 127.0.0.1. IPv6 has
// no such thing: the kernel sends nothing from ::1 out of the node.
func loopback() netip.Prefix { return netip.MustParsePrefix("127.0.0.0/8") }

// kubeProxyMark is set by kube-proxy on packets that it masquerades itself.
const kubeProxyMark = 0x4000

// multicast is never masqueraded.
func multicast(f overlay.Family) netip.Prefix {
	if f == overlay.IPv4 {
		return netip.MustParsePrefix("224.0.0.0/4")
	}
	return netip.MustParsePrefix("ff00::/8")
}

func families() []overlay.Family { return []overlay.Family{overlay.IPv4, overlay.IPv6} }

// rules returns what all entries together need of a family.
func rules(entries []Entry, f overlay.Family) ruleset {
	out := ruleset{family: f}
	for _, e := range entries {
		pod := e.addr(f)
		if !pod.IsValid() {
			continue
		}
		out.forwards = append(out.forwards, e.forwards(f)...)
		if e.Masquerade != nil {
			out.masquerade = append(out.masquerade, masquerade{pod, covering(ofFamily(e.Masquerade, f))})
		}
	}
	slices.SortFunc(out.forwards, func(a, b forward) int {
		return cmp.Or(cmp.Compare(a.protocol, b.protocol), cmp.Compare(a.port, b.port), a.host.Compare(b.host), a.to.Compare(b.to))
	})
	slices.SortFunc(out.masquerade, func(a, b masquerade) int { return a.pod.Compare(b.pod) })
	return out
}

func (e Entry) forwards(f overlay.Family) []forward {
	pod := e.addr(f)
	if !pod.IsValid() {
		return nil
	}
	local := ofFamily(e.Local, f)
	if f == overlay.IPv4 {
		local = append(local, loopback())
	}
	local = covering(local)
	var out []forward
	for _, m := range e.Mappings {
		if !m.in(f) {
			continue
		}
		fw := forward{protocol: m.Protocol, port: m.HostPort, to: netip.AddrPortFrom(pod, m.ContainerPort), local: local}
		if !m.HostIP.IsUnspecified() {
			fw.host = m.HostIP
		}
		out = append(out, fw)
	}
	return out
}

func ofFamily(ps []netip.Prefix, f overlay.Family) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range ps {
		if overlay.FamilyOf(p.Addr()) == f {
			out = append(out, p.Masked())
		}
	}
	return out
}

// covering returns the same addresses in sorted prefixes that do not overlap.
func covering(ps []netip.Prefix) []netip.Prefix {
	ps = slices.Clone(ps)
	slices.SortFunc(ps, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	var out []netip.Prefix
	for _, p := range ps {
		if n := len(out); n == 0 || !out[n-1].Overlaps(p) {
			out = append(out, p)
		}
	}
	return out
}

// change is what one family's rules become. The rules before are what the files
// say, and are there unless somebody else wrote, or a writer was killed; looking
// at what is there takes more processes and is done if exact is set.
type change struct {
	before, after ruleset
	exact         bool
}

// changes returns those of the families that the touched entries have to do with.
func changes(before, after, touched []Entry, exact bool) []change {
	var out []change
	for _, f := range families() {
		if !rules(touched, f).empty() {
			out = append(out, change{rules(before, f), rules(after, f), exact})
		}
	}
	return out
}

// impossible reports that an ADD is being taken back that failed for want of the
// tool: what it could not write need not be removed.
func (c change) impossible(able bool) bool { return c.exact && c.after.empty() && !able }
