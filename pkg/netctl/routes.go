package netctl

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/twill-net/twill/pkg/overlay"
)

// The states of a route.
const (
	stateOK      = "ok"
	stateMissing = "missing" // a part of the path is not in the kernel
	stateChanged = "changed" // a part leads elsewhere
	stateLocal   = "local"   // to this node's own pods
	stateForeign = "foreign" // another program's route
	stateExtra   = "extra"   // Twill's, and no lease asks for it
	stateUnknown = "unknown" // the store could not be read
)

// routeRow is one destination: what the kernel has, and what is wrong with it.
type routeRow struct {
	Destination string   `json:"destination"`
	Gateway     string   `json:"gateway,omitempty"`
	Nexthop     uint32   `json:"nexthop,omitempty"`
	Link        string   `json:"link,omitempty"`
	Neigh       string   `json:"neigh,omitempty"` // MAC of the gateway
	FDB         string   `json:"fdb,omitempty"`   // outer address
	State       string   `json:"state"`
	Detail      []string `json:"detail,omitempty"`

	summary string // Detail in short, for the table
	route   overlay.Route
}

func (a *app) routes() *cobra.Command {
	return &cobra.Command{
		Use:   "routes",
		Short: "Show the kernel's path to every pod subnet",
		Long: `Show the kernel's path to every pod subnet: the route, its gateway and nexthop
object, the link, the gateway's permanent neighbour entry (the peer's VTEP MAC)
and the forwarding entry of that MAC (the address of the outer packet).

Reads the kernel, the leases in the store, and from twilld what this node is.
STATE compares the kernel with what the leases ask for:
  ok       everything is as it should be
  missing  a part of the path is not in the kernel; it is named
  changed  a part leads elsewhere; it is named with what it should be
  extra    Twill's own route that no lease asks for
  local    the bridge's own route to the pods of this node
  foreign  another program's route in the pod networks; Twill leaves it alone
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
	if s.storeErr != nil {
		a.note(s.storeErr)
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
	t.header("DESTINATION", "VIA", "NEXTHOP", "LINK", "NEIGH", "FDB", "STATE")
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
		cells := texts(r.Destination, orDash(r.Gateway), orDash(nexthop), orDash(r.Link), orDash(r.Neigh), orDash(r.FDB))
		t.row(append(cells, state)...)
	}
	return t.print(a.stdout)
}

// routeRows lists what is wanted, what is ours, and what is foreign, by
// destination.
func (s *sight) routeRows() []routeRow {
	have, want := index(s.have), index(s.want)
	refused := map[string]overlay.Problem{}
	for _, p := range s.refused {
		refused[p.Object] = p
	}
	rows := []routeRow{}
	for _, r := range s.want.Routes {
		row := have.row(r)
		faults := have.faults(want.follow(r))
		p, isRefused := refused["route "+r.Dst.String()]
		switch {
		case isRefused:
			row.State, row.Detail, row.summary = stateMissing, []string{p.Reason}, p.Reason
		case len(faults) == 0:
			row.State = stateOK
		default:
			row.judge(faults)
		}
		rows = append(rows, row)
	}
	for _, r := range s.have.Routes {
		if _, wanted := want.routes[keyOf(r)]; wanted {
			continue
		}
		row := have.row(r)
		row.State = stateExtra
		if s.snap == nil {
			row.State = stateUnknown
		}
		rows = append(rows, row)
	}
	for _, r := range s.have.Foreign {
		row := have.row(r)
		if r.Link == overlay.Bridge && slices.Contains(s.self.Self.All(), r.Dst) {
			row.State = stateLocal
		} else {
			row.State, row.summary = stateForeign, "proto "+protocol(r.Protocol)
			row.Detail = []string{row.summary}
		}
		rows = append(rows, row)
	}
	slices.SortStableFunc(rows, func(a, b routeRow) int {
		return cmp.Or(a.route.Dst.Addr().Compare(b.route.Dst.Addr()), cmp.Compare(a.route.Dst.Bits(), b.route.Dst.Bits()), cmp.Compare(a.route.Metric, b.route.Metric))
	})
	return rows
}

// row shows what the kernel has at the key of r; nothing but the destination if
// there is no such route.
func (s parts) row(r overlay.Route) routeRow {
	row := routeRow{Destination: r.Dst.String(), route: r}
	have, ok := s.routes[keyOf(r)]
	if r.Protocol != overlay.Protocol {
		have, ok = r, true // a stranger stands in no State but as Foreign
	}
	if !ok {
		return row
	}
	p := s.follow(have)
	row.Nexthop, row.Link = have.NH, p.device()
	if g := p.gateway(); g.IsValid() {
		row.Gateway = g.String()
	}
	if have.Blackhole {
		row.Gateway = "blackhole"
	}
	if p.neigh.Link != "" {
		row.Neigh = p.neigh.MAC.String()
	}
	if p.fdb.Link != "" {
		row.FDB = p.fdb.Dst.String()
	}
	return row
}

// judge sums up faults: a path with a part that leads elsewhere is changed, one
// that only lacks parts is missing.
func (r *routeRow) judge(faults []fault) {
	r.State = stateMissing
	var short []string
	for _, f := range faults {
		full := f.String() + ", should be " + f.want
		r.Detail = append(r.Detail, full)
		if f.missing {
			short = append(short, f.part)
		} else {
			short = append(short, full)
			r.State = stateChanged
		}
	}
	r.summary = strings.Join(short, "; ")
}

// protocol names the origin of a route (rtnetlink(7), rtm_protocol).
func protocol(n uint8) string {
	switch n {
	case 2:
		return "kernel"
	case 3:
		return "boot"
	case 4:
		return "static"
	case 16:
		return "dhcp"
	}
	return fmt.Sprint(n)
}
