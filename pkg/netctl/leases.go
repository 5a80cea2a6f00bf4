package netctl

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/twill-net/twill/pkg/overlay"
)

// What the node makes of a lease.
const (
	nodeSelf    = "self"    // the lease is this node's
	nodeOK      = "ok"      // the kernel has what it asks for
	nodeVacant  = "vacant"  // a reservation that no node has taken
	nodePending = "pending" // written after the revision the daemon has seen
	nodeDiffers = "differs" // the kernel has something else
	nodeProblem = "problem" // it makes no sense to this node
	nodeOutside = "outside" // Twill is not to carry packets there
	nodeStale   = "stale"   // the kernel has a route that nobody asks for
	nodeKernel  = "kernel"  // the kernel has a route; whether it is right is not known
	nodeUnknown = "unknown" // the node's view could not be had
)

// leaseReport is the JSON form of leases.
type leaseReport struct {
	Revision       int64             `json:"revision,omitempty"`       // of the store
	DaemonRevision int64             `json:"daemonRevision,omitempty"` // the last one twilld has seen
	Leases         []leaseRow        `json:"leases"`
	Problems       []overlay.Problem `json:"problems"` // those of no single lease
}

// leaseRow is one lease in the cluster's view and in the node's.
type leaseRow struct {
	Key        string         `json:"key,omitempty"`
	Node       string         `json:"node,omitempty"` // its name, in Kubernetes
	Subnets    []netip.Prefix `json:"subnets"`
	PublicIPs  []netip.Addr   `json:"publicIPs"`
	Backend    string         `json:"backend,omitempty"`
	VTEPs      []vtep         `json:"vteps"`
	WireGuard  []wgNode       `json:"wireguard,omitempty"`
	BGP        *bgpNode       `json:"bgp,omitempty"`
	Reserved   bool           `json:"reserved"`
	ExpiresIn  *int64         `json:"expiresInSeconds,omitempty"`
	Created    int64          `json:"createdRevision,omitempty"`
	Modified   int64          `json:"modifiedRevision,omitempty"`
	NodeView   string         `json:"nodeView"`
	NodeDetail []string       `json:"nodeDetail,omitempty"`

	unreadable bool // the value does not parse
}

type vtep struct {
	MAC overlay.MAC `json:"mac"`
	VNI uint32      `json:"vni"`
}

type wgNode struct {
	PublicKey overlay.WGKey `json:"publicKey"`
	Port      uint16        `json:"port,omitempty"` // absent: the configuration's
}

type bgpNode struct {
	ASNumber  uint32     `json:"asNumber"`
	Port      uint16     `json:"port"`
	ClusterID netip.Addr `json:"clusterID"` // not empty: of a route reflector
}

func (a *app) leases() *cobra.Command {
	ttl := false
	c := &cobra.Command{
		Use:   "leases",
		Short: "Show every node's lease, and whether this node can reach it",
		Long: `Show every node's lease as the store has it, and in NODE VIEW what this node
makes of it: "this node", "ok", what the kernel lacks or has otherwise
("route missing", "fdb → 203.0.113.9"), "not in the daemon yet", a problem, or
"no lease" for a route in the kernel that nobody asks for.
DATA is what the node publishes for its backend: the VTEP MAC of vxlan, the
public key and port of wireguard, the AS number of bgp and the cluster id of a
route reflector.

Reads the leases in the store; the kernel; and from twilld what this node is and
which revision it has seen. If one side cannot be read, the other is shown, a
note says why, and the exit code is 2.
` + exitCodes,
		Example: "  netctl leases\n  netctl leases --ttl\n  netctl leases -o json | jq -r '.leases[].subnets[0]'",
		Args:    noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.runLeases(c.Context(), ttl)
		},
	}
	c.Flags().BoolVar(&ttl, "ttl", false, "show when each lease expires; costs a question to the store per lease")
	return c
}

func (a *app) runLeases(ctx context.Context, ttl bool) error {
	s := a.look(ctx, ttl)
	if s.storeErr != nil && s.kernelErr != nil {
		a.noteMissing(s)
		return errPartial
	}
	report := s.leaseReport()
	if a.json() {
		if err := a.printJSON(report); err != nil {
			return err
		}
	} else if err := a.printLeases(s, report); err != nil {
		return err
	}
	switch {
	case !s.complete():
		a.noteMissing(s)
		return errPartial
	case len(report.Problems) > 0 || slices.ContainsFunc(report.Leases, leaseRow.wrong):
		return errDiffers
	}
	return nil
}

func (r leaseRow) wrong() bool {
	return slices.Contains([]string{nodePending, nodeDiffers, nodeProblem, nodeStale}, r.NodeView)
}

func (a *app) printLeases(s *sight, report leaseReport) error {
	t := a.table()
	t.header("NODE", "SUBNET", "PUBLIC IP", "BACKEND", "DATA", "LEASE", "NODE VIEW")
	for _, r := range report.Leases {
		backend := r.Backend
		if backend == "" && !r.Reserved && r.Key != "" && !r.unreadable {
			backend = "udp or alloc" // flannel writes neither
		}
		cells := texts(orDash(r.Node), list(r.Subnets), list(r.PublicIPs), orDash(backend), r.data(s.commonVNI()), r.life())
		t.row(append(cells, r.view())...)
	}
	t.dropEmpty("NODE", "DATA")
	if slices.ContainsFunc(report.Leases, func(r leaseRow) bool { return r.Node != "" }) {
		t.dropEmpty("LEASE")
	}
	if err := t.print(a.stdout); err != nil {
		return err
	}
	footer := count(len(report.Leases), "subnet", "subnets") + " known to this node"
	if s.snap != nil {
		footer = fmt.Sprintf("%s, revision %d", count(len(s.snap.Leases), "lease", "leases"), report.Revision)
	}
	if s.statusErr == nil {
		footer += fmt.Sprintf(", daemon at revision %d", report.DaemonRevision)
	}
	fmt.Fprintf(a.stdout, "\n%s\n", footer)
	a.printProblems(report.Problems)
	return nil
}

// commonVNI is the one that needs no mention.
func (s *sight) commonVNI() uint32 {
	for _, b := range s.accepted() {
		if b.Type == "vxlan" {
			return b.VXLAN.VNI
		}
	}
	return 1 // the default
}

// data is what the node publishes for its backend, short.
func (r leaseRow) data(common uint32) string {
	var out []string
	for _, v := range r.VTEPs {
		text := v.MAC.String()
		if v.VNI != common {
			text += fmt.Sprintf(" (VNI %d)", v.VNI)
		}
		out = append(out, text)
	}
	for i, w := range r.WireGuard {
		switch same := i > 0 && w.PublicKey == r.WireGuard[i-1].PublicKey; {
		case w.Port == 0 && same:
		case w.Port == 0:
			out = append(out, "key "+shortKey(w.PublicKey))
		case same: // the device for IPv6
			out[len(out)-1] += fmt.Sprintf(",%d", w.Port)
		default:
			out = append(out, fmt.Sprintf("key %s port %d", shortKey(w.PublicKey), w.Port))
		}
	}
	if b := r.BGP; b != nil {
		text := fmt.Sprintf("AS %d", b.ASNumber)
		if b.Port != 179 {
			text += fmt.Sprintf(" port %d", b.Port)
		}
		if b.ClusterID.IsValid() {
			text += " reflector " + b.ClusterID.String()
		}
		out = append(out, text)
	}
	return orDash(strings.Join(slices.Compact(out), ","))
}

func (r leaseRow) life() string {
	switch {
	case r.Key == "", r.Node != "": // a Node's ends with the Node
		return "-"
	case r.Reserved:
		return "reserved"
	case r.ExpiresIn != nil:
		return "expires in " + span(time.Duration(*r.ExpiresIn)*time.Second)
	}
	return "leased"
}

func (r leaseRow) view() cell {
	detail := strings.Join(r.NodeDetail, "; ")
	switch r.NodeView {
	case nodeSelf:
		return cell{"this node", good}
	case nodeOK:
		return cell{"ok", good}
	case nodeOutside:
		return cell{detail, plain}
	case nodeVacant:
		return cell{"not taken yet", plain}
	case nodePending:
		return cell{fmt.Sprintf("not in the daemon yet (rev %d)", r.Modified), doubt}
	case nodeStale:
		return cell{"no lease, in the kernel", doubt}
	case nodeKernel:
		return cell{"in the kernel", doubt}
	case nodeProblem:
		return cell{"problem: " + detail, bad}
	case nodeDiffers:
		return cell{detail, bad}
	}
	return cell{"unknown", doubt}
}
