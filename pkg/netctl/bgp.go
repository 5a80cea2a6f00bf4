package netctl

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/twill-net/twill/pkg/overlay"
)

// bgpRoutesReport is the JSON form of bgp routes.
type bgpRoutesReport struct {
	Received  []overlay.BGPRoute `json:"received"`
	Announced []overlay.BGPOwn   `json:"announced"`
}

func (a *app) bgp() *cobra.Command {
	c := &cobra.Command{
		Use:   "bgp",
		Short: "Show this node's BGP sessions",
		Long: `Show the BGP speaker of this node and its sessions, for backend bgp:
  FOR        how long the session has been established, or not
  RECEIVED   prefixes that the neighbour announces
  ACCEPTED   of these, those that the import filter accepts
  ANNOUNCED  prefixes that it is told
  IN, OUT    messages
  FLAPS      how often the session has ended
  ERROR      why it is not established
The speaker is settled when each neighbour has told all it knows or had the time
to; before that twilld deletes no learned route.

Reads twilld's local API.

Exit code: 0 fine, 1 a session is not established, 2 could not find out.`,
		Example: "  netctl bgp\n  netctl bgp routes\n  netctl bgp -o json | jq -r '.sessions[] | select(.state != \"established\") | .neighbor.Address'",
		Args:    noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.runBGP(c.Context(), a.printBGP)
		},
	}
	c.AddCommand(&cobra.Command{
		Use:   "routes",
		Short: "Show the prefixes received and announced by BGP",
		Long: `Show the prefixes that the BGP speaker of this node has received, each with its
best ways (several if packets are spread over them), and those it announces:
  NEXT HOP   where packets for the prefix are sent
  FROM       the neighbour that told it
  NOTE       stale: the neighbour is restarting, and its routes are kept meanwhile;
             allowed: an import rule accepts it by name, so it may overlap the underlay
What of it is in the kernel, and what was refused, shows netctl routes and status.

Reads twilld's local API.

Exit code: 0 fine, 1 a session is not established, 2 could not find out.`,
		Example: "  netctl bgp routes\n  netctl bgp routes -o json | jq -r '.received[].Prefix'",
		Args:    noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.runBGP(c.Context(), a.printBGPRoutes)
		},
	})
	return c
}

// BGP returns what the speaker says of itself. It is an error if the backend is not
// bgp, or if an external router speaks for the node.
func (c *Client) BGP(ctx context.Context) (overlay.BGPStatus, error) {
	return get[overlay.BGPStatus](ctx, c, "/v1/bgp")
}

func (a *app) runBGP(ctx context.Context, show func(overlay.BGPStatus) error) error {
	st, err := within(ctx, a.timeout, NewClient(a.socket).BGP)
	if err != nil {
		return err
	}
	st.Sessions, st.Received, st.Announced = orEmpty(st.Sessions), orEmpty(st.Received), orEmpty(st.Announced)
	if err := show(st); err != nil {
		return err
	}
	if slices.ContainsFunc(st.Sessions, func(s overlay.BGPSession) bool { return !established(s) }) {
		return errDiffers
	}
	return nil
}

func established(s overlay.BGPSession) bool { return s.State == "established" }

func (a *app) printBGP(st overlay.BGPStatus) error {
	if a.json() {
		return a.printJSON(st)
	}
	t := a.table()
	speaker := fmt.Sprintf("%s, AS %d, router id %s", st.Speaker, st.ASNumber, st.RouterID)
	if st.ClusterID.IsValid() {
		speaker += fmt.Sprintf(", route reflector of cluster %s", st.ClusterID)
	}
	t.row(texts("speaker", speaker)...)
	settled := cell{"yes", good}
	if !st.Settled {
		settled = cell{"no: not every neighbour has told all it knows yet", doubt}
	}
	t.row(cell{text: "settled"}, settled)
	up := 0
	for _, s := range st.Sessions {
		if established(s) {
			up++
		}
	}
	sessions := cell{fmt.Sprintf("%d of %d established", up, len(st.Sessions)), good}
	if up < len(st.Sessions) {
		sessions.style = bad
	}
	t.row(cell{text: "sessions"}, sessions)
	t.row(texts("prefixes", fmt.Sprintf("%d received, %d announced", len(st.Received), len(st.Announced)))...)
	if err := t.print(a.stdout); err != nil || len(st.Sessions) == 0 {
		return err
	}
	fmt.Fprintln(a.stdout)
	return a.printSessions(st.Sessions)
}

func (a *app) printSessions(sessions []overlay.BGPSession) error {
	t := a.table()
	t.header("NEIGHBOR", "NAME", "AS", "STATE", "FOR", "RECEIVED", "ACCEPTED", "ANNOUNCED", "IN", "OUT", "FLAPS", "ERROR")
	for _, s := range sessions {
		state := cell{s.State, good}
		if !established(s) {
			state.style = bad
		}
		row := texts(s.Neighbor.Address.String(), s.Neighbor.Name, fmt.Sprint(s.Neighbor.ASNumber))
		row = append(row, state)
		row = append(row, texts(span(a.now().Sub(s.Since)), fmt.Sprint(s.Received), fmt.Sprint(s.Accepted), fmt.Sprint(s.Announced),
			fmt.Sprint(s.MessagesIn), fmt.Sprint(s.MessagesOut), fmt.Sprint(s.Flaps), orDash(s.Error))...)
		t.row(row...)
	}
	return t.print(a.stdout)
}

func (a *app) printBGPRoutes(st overlay.BGPStatus) error {
	if a.json() {
		return a.printJSON(bgpRoutesReport{st.Received, st.Announced})
	}
	if len(st.Received) == 0 {
		fmt.Fprintln(a.stdout, "nothing is received")
	} else {
		t := a.table()
		t.header("RECEIVED", "NEXT HOP", "FROM", "NOTE")
		for _, r := range st.Received {
			name := r.Prefix.String()
			for _, p := range r.Paths {
				t.row(cell{text: name}, cell{text: p.NextHop.String()}, cell{text: p.From.String()}, note(p))
				name = ""
			}
		}
		if err := t.print(a.stdout); err != nil {
			return err
		}
	}
	fmt.Fprintln(a.stdout)
	if len(st.Announced) == 0 {
		_, err := fmt.Fprintln(a.stdout, "nothing is announced")
		return err
	}
	t := a.table()
	t.header("ANNOUNCED", "NEXT HOP")
	for _, o := range st.Announced {
		t.row(texts(o.Prefix.String(), o.NextHop.String())...)
	}
	return t.print(a.stdout)
}

// note is what is out of the ordinary in a path.
func note(p overlay.BGPPath) cell {
	var words []string
	c := cell{}
	if p.Stale {
		words, c.style = append(words, "stale"), doubt
	}
	if p.Allowed {
		words = append(words, "allowed")
	}
	c.text = orDash(strings.Join(words, ", "))
	return c
}
