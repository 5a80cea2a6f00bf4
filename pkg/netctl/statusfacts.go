package netctl

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/twill-net/twill/pkg/overlay"
)

// others returns the leases of peers that have published something.
func (s *sight) others() []*overlay.Lease {
	return without(s.snap.Leases, func(l *overlay.Lease) bool {
		return l.Subnets == s.self.Self.Subnets || l.Err != nil || l.Backend == "" && l.Reserved()
	})
}

// peersBy counts the peers by the backend they publish.
func (s *sight) peersBy() map[string]int {
	if s.snap == nil || len(s.self.Config.Networks()) == 0 { // it has not taken up a lease yet
		return nil
	}
	out := map[string]int{}
	for _, l := range s.others() {
		name := s.backendOf(l)
		if name == "" {
			name = "udp or alloc" // flannel writes neither
		}
		out[name]++
	}
	return out
}

func (s *sight) acceptReports() []acceptReport {
	out := []acceptReport{}
	for _, b := range s.self.Self.Former {
		r := acceptReport{Backend: b.Type}
		if b.Type == "vxlan" {
			r.VNI = b.VXLAN.VNI
		}
		if s.snap != nil {
			n := len(without(s.others(), func(l *overlay.Lease) bool { return !b.Carries(l) }))
			r.Peers = &n
		}
		out = append(out, r)
	}
	return out
}

func (r acceptReport) String() string {
	name := r.Backend
	if r.VNI != 0 {
		name += fmt.Sprintf(" (VNI %d)", r.VNI)
	}
	switch {
	case r.Peers == nil:
		return name
	case *r.Peers == 0:
		return name + ", which no peer publishes any more"
	case *r.Peers == 1:
		return name + ", which 1 peer publishes"
	}
	return fmt.Sprintf("%s, which %d peers publish", name, *r.Peers)
}

// peers counts them, by backend unless all have ours.
func (s statusReport) peers() string {
	text := fmt.Sprint(s.Peers)
	if len(s.PeersBy) == 0 || len(s.PeersBy) == 1 && s.PeersBy[s.Backend] > 0 {
		return text
	}
	var by []string
	for _, name := range slices.Sorted(maps.Keys(s.PeersBy)) {
		by = append(by, fmt.Sprintf("%d %s", s.PeersBy[name], name))
	}
	return text + ": " + strings.Join(by, ", ")
}

// countKernel needs the backends to say where a tunnel listens: no kernel shows it.
func countKernel(s overlay.State, backends []overlay.BackendConfig) *kernelReport {
	var udpPort uint16
	for _, b := range backends {
		if b.Type == "udp" {
			udpPort = b.UDPPort
		}
	}
	k := &kernelReport{
		Links: len(s.Links), Addrs: len(s.Addrs), Nexthops: len(s.Nexthops), Routes: len(s.Routes),
		Neighs: len(s.Neighs), FDB: len(s.FDB), WGPeers: len(s.WGPeers), Chains: len(s.Chains), Foreign: len(s.Foreign),
		Devices: []deviceReport{},
	}
	for _, l := range s.Links {
		d := deviceReport{Name: l.Name, Kind: l.Kind, Up: l.Up, MTU: l.MTU, VNI: l.VXLAN.VNI, Port: l.VXLAN.Port}
		if l.Name == overlay.UDPLink {
			d.Port = udpPort
		}
		if l.WG.Port != 0 {
			key, peers := l.WG.Key.Public(), 0
			for _, p := range s.WGPeers {
				if p.Link == l.Name {
					peers++
				}
			}
			d.Port, d.PublicKey, d.Peers = l.WG.Port, &key, &peers
		}
		k.Devices = append(k.Devices, d)
	}
	return k
}

// mute reports whether d is a WireGuard that nobody answers for.
func (d deviceReport) mute() bool {
	return (d.Name == overlay.WireGuardLink || d.Name == overlay.WireGuardLinkV6) && d.PublicKey == nil
}

func (d deviceReport) style() style {
	if !d.Up || d.mute() {
		return bad
	}
	return plain
}

func (d deviceReport) String() string {
	parts := []string{d.Name + " " + string(d.Kind)}
	if d.Kind == overlay.KindTUN {
		parts[0] += ", read by twilld"
	}
	if d.VNI != 0 {
		parts = append(parts, fmt.Sprintf("VNI %d", d.VNI))
	}
	if d.Port != 0 {
		parts = append(parts, fmt.Sprintf("UDP port %d", d.Port))
	}
	if d.PublicKey != nil {
		parts = append(parts, "public key "+d.PublicKey.String(), count(*d.Peers, "peer", "peers"))
	}
	if d.mute() {
		parts = append(parts, "answered by no WireGuard")
	}
	parts = append(parts, fmt.Sprintf("MTU %d bytes", d.MTU))
	if !d.Up {
		parts = append(parts, "down")
	}
	return strings.Join(parts, ", ")
}

func (k *kernelReport) String() string {
	out := []string{
		count(k.Links, "link", "links"), count(k.Addrs, "address", "addresses"),
		count(k.Nexthops, "nexthop", "nexthops"), count(k.Routes, "route", "routes"),
		count(k.Neighs, "neighbour", "neighbours"), count(k.FDB, "FDB entry", "FDB entries"),
	}
	if k.WGPeers > 0 {
		out = append(out, count(k.WGPeers, "WireGuard peer", "WireGuard peers"))
	}
	out = append(out, count(k.Chains, "chain", "chains"), count(k.Foreign, "foreign route", "foreign routes"))
	return strings.Join(out, ", ")
}
