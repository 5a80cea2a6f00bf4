package netctl

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

func (a *app) routes() *cobra.Command {
	return &cobra.Command{
		Use:   "routes",
		Short: "Show the kernel's path to every pod subnet",
		Long: `Show the kernel's path to every pod subnet and every other route of Twill: the
route, its gateway (several if packets are spread over equal ways) and nexthop
object, the link, and how the link finds the peer:
  NEIGH, FDB  vxlan: the gateway's permanent neighbour entry (the peer's VTEP MAC)
              and the forwarding entry of that MAC (the address of the outer packet)
  PEER, KEY   wireguard: endpoint and public key of the peer whose allowed
              addresses hold the destination; udp: where twilld sends the datagram
For ipip, VIA on flannel.ipip is the address of the outer packet. A column that
has nothing to say is left out.

SOURCE is who asks for the route: lease (a node's), bgp (learned from a
neighbour), own (this node's). STATE compares the kernel with what is asked for:
  ok       everything is as it should be
  missing  a part of the path is not in the kernel; it is named
  changed  a part leads elsewhere; it is named with what it should be
  extra    Twill's own route that nobody asks for
  local    the bridge's own route to the pods of this node
  foreign  another program's route in the pod networks; Twill leaves it alone
  unknown  without twilld or the store there is nothing to compare with

Reads the kernel, the leases in the store, and from twilld what this node is and
what it has learned by BGP.
` + exitCodes,
		Example: "  netctl routes\n  netctl routes -o json | jq -r '.[] | select(.state != \"ok\") | .destination'",
		Args:    noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.runRoutes(c.Context())
		},
	}
}

func (a *app) runRoutes(ctx context.Context) error {
	s := a.look(ctx, false)
	if s.kernelErr != nil {
		return s.kernelErr
	}
	rows := s.routeRows()
	if err := a.printRoutes(rows); err != nil {
		return err
	}
	if !s.complete() {
		a.noteMissing(s)
		return errPartial
	}
	if slices.ContainsFunc(rows, func(r routeRow) bool { return !slices.Contains([]string{stateOK, stateLocal, stateForeign}, r.State) }) {
		return errDiffers
	}
	return nil
}

func (a *app) printRoutes(rows []routeRow) error {
	if a.json() {
		return a.printJSON(rows)
	}
	t := a.table()
	t.header("DESTINATION", "SOURCE", "VIA", "NEXTHOP", "LINK", "NEIGH", "FDB", "PEER", "KEY", "STATE")
	for _, r := range rows {
		nexthop := ""
		if r.Nexthop != 0 {
			nexthop = fmt.Sprint(r.Nexthop)
		}
		state := cell{r.State, bad}
		switch r.State {
		case stateOK:
			state.style = good
		case stateLocal, stateForeign:
			state.style = plain
		case stateUnknown, stateExtra:
			state.style = doubt
		}
		if r.summary != "" {
			state.text += ": " + r.summary
		}
		via, link := r.Gateway, r.Link
		if len(r.Ways) > 0 {
			via, link = r.column(func(w wayRow) string { return w.Gateway }), r.column(func(w wayRow) string { return w.Link })
		}
		cells := texts(r.Destination, orDash(r.Source), orDash(via), orDash(nexthop), orDash(link), orDash(r.Neigh), orDash(r.FDB), orDash(r.Peer), orDash(r.key))
		t.row(append(cells, state)...)
	}
	t.dropEmpty("SOURCE", "VIA", "NEXTHOP", "NEIGH", "FDB", "PEER", "KEY")
	return t.print(a.stdout)
}

// column lists one field of all ways in one cell.
func (r routeRow) column(field func(wayRow) string) string {
	var out []string
	for _, w := range r.Ways {
		if s := orDash(field(w)); !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return strings.Join(out, ",")
}
