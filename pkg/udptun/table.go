package udptun

import (
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"
)

// table says where packets go. It never changes; a new one replaces it.
type table struct {
	own   []netip.Prefix // empty: everything is for this node
	peers *bart.Table[*dest]
}

// newTable gives prefixes of one node the same dest, so that their packets may
// leave in one message.
func newTable(own []netip.Prefix, peers []Peer) *table {
	t := &table{own: slices.Clone(own), peers: &bart.Table[*dest]{}}
	dests := map[netip.AddrPort]*dest{}
	for _, p := range peers {
		d := dests[p.Addr]
		if d == nil {
			d = newDest(p.Addr)
			dests[p.Addr] = d
		}
		t.peers.Insert(p.Subnet, d)
	}
	return t
}

func (t *table) isOwn(a netip.Addr) bool {
	return len(t.own) == 0 || slices.ContainsFunc(t.own, func(p netip.Prefix) bool { return p.Contains(a) })
}

// withOwn shares the peers: they never change.
func (t *table) withOwn(own []netip.Prefix) *table {
	return &table{own: slices.Clone(own), peers: t.peers}
}
