package netctl

import (
	"context"
	"fmt"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"

	"github.com/twill-net/twill/pkg/overlay"
)

// statusReport is the JSON form of status: the daemon's own words, and what is
// counted in the kernel.
type statusReport struct {
	overlay.Status
	Uplink uplinkReport  `json:"uplink"`
	Kernel *kernelReport `json:"kernel"` // null if it could not be read
	// Accepts are the former backends that packets still may come by.
	Accepts []acceptReport `json:"accepts"`
	// PeersBy counts the peers by backend; null if the store could not be read.
	PeersBy map[string]int `json:"peersByBackend"`
}

// acceptReport is a former backend.
type acceptReport struct {
	Backend string `json:"backend"`
	VNI     uint32 `json:"vni,omitempty"`
	Peers   *int   `json:"peers"` // that publish it; null if the store could not be read
}

type uplinkReport struct {
	Name   string         `json:"name"`
	MTU    int            `json:"mtu"` // bytes
	V4     netip.Addr     `json:"ipv4"`
	V6     netip.Addr     `json:"ipv6"`
	OnLink []netip.Prefix `json:"onLink"`
	Why    string         `json:"why"`
}

// kernelReport counts objects.
type kernelReport struct {
	Links    int `json:"links"`
	Addrs    int `json:"addrs"`
	Nexthops int `json:"nexthops"`
	Routes   int `json:"routes"`
	Neighs   int `json:"neighs"`
	FDB      int `json:"fdb"`
	WGPeers  int `json:"wgPeers"`
	Chains   int `json:"chains"`
	Foreign  int `json:"foreignRoutes"`

	Devices []deviceReport `json:"devices"`
}

// deviceReport is a link of Twill.
type deviceReport struct {
	Name string       `json:"name"`
	Kind overlay.Kind `json:"kind"`
	Up   bool         `json:"up"`
	MTU  int          `json:"mtu"`            // bytes
	VNI  uint32       `json:"vni,omitempty"`  // of VXLAN
	Port uint16       `json:"port,omitempty"` // UDP, of VXLAN, WireGuard and the UDP tunnel
	// PublicKey is WireGuard's; absent: no WireGuard answers for the device.
	PublicKey *overlay.WGKey `json:"publicKey,omitempty"`
	Peers     *int           `json:"peers,omitempty"` // of WireGuard
}

func (a *app) status() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show the state of twilld on this node",
		Long: `Show whether twilld on this node is ready and if not, why; its store, lease,
uplink, networks and peers; the former backends it accepts while the cluster
moves to another; its last pass over the kernel; Twill's devices and how many
objects the kernel holds; and every problem with its remedy.

Reads twilld's local API, the kernel, and to count peers by backend the leases in
the store, if twilld is connected to it.
` + exitCodes + `
Not ready, not connected to the store, a change that the kernel refused, and any
problem count as something wrong.`,
		Example: "  netctl status\n  netctl status -o json | jq .ready",
		Args:    noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.runStatus(c.Context())
		},
	}
}

func (a *app) runStatus(ctx context.Context) error {
	client := NewClient(a.socket)
	st, err := within(ctx, a.timeout, client.Status)
	if err != nil {
		return err
	}
	s := &sight{status: st}
	report := reportOf(st)
	if s.self, s.selfErr = within(ctx, a.timeout, client.Self); s.selfErr != nil {
		s.kernelErr = s.selfErr
	} else if s.have, s.kernelErr = a.observe(ctx, s.self); s.kernelErr == nil {
		report.Kernel = countKernel(s.have, s.accepted())
	}
	if st.Store.Connected {
		_ = a.readStore(ctx, s, false) // costs the counts of peers, no more
	}
	report.PeersBy, report.Accepts = s.peersBy(), s.acceptReports()
	if a.json() {
		err = a.printJSON(report)
	} else {
		err = a.printStatus(report)
	}
	if s.kernelErr != nil {
		a.note(s.kernelErr)
	}
	switch {
	case err != nil:
		return err
	case !st.Ready || !st.Store.Connected || len(st.Pass.Failures)+len(st.Problems) > 0:
		return errDiffers
	case s.kernelErr != nil:
		return errPartial
	}
	return nil
}

func reportOf(s overlay.Status) statusReport {
	s.Networks, s.Subnets = orEmpty(s.Networks), orEmpty(s.Subnets)
	s.Problems = orEmpty(s.Problems)
	s.Pass.Failures = orEmpty(s.Pass.Failures)
	s.Store.Endpoints = orEmpty(s.Store.Endpoints)
	u := s.Uplink
	return statusReport{
		Status: s,
		Uplink: uplinkReport{u.Name, u.MTU, u.V4, u.V6, orEmpty(u.OnLink), u.Why},
	}
}

func (a *app) printStatus(s statusReport) error {
	now := a.now()
	t := a.table()
	line := func(name string, st style, format string, args ...any) {
		t.row(cell{text: name}, cell{fmt.Sprintf(format, args...), st})
	}
	if s.Ready {
		line("ready", good, "yes")
	} else {
		line("ready", bad, "no: %s", s.Reason)
	}
	line("twilld", plain, "%s, pid %d, up for %s", s.Version, s.PID, span(now.Sub(s.Started)))
	store := fmt.Sprintf("%s %s %s", s.Store.Kind, strings.Join(s.Store.Endpoints, ","), s.Store.Prefix)
	since := span(now.Sub(s.Store.Since))
	if s.Store.Connected {
		line("store", plain, "%s, connected for %s, revision %d", store, since, s.Store.Revision)
	} else {
		line("store", bad, "%s, not connected for %s: %s", store, since, s.Store.Error)
	}
	line("lease", plain, "%s", orDash(s.Lease))
	line("public IP", plain, "%s", list(valid(s.PublicIP, s.PublicIPv6)))
	if s.Uplink.Name == "" {
		line("uplink", doubt, "none yet")
	} else {
		line("uplink", plain, "%s %s, MTU %d bytes, chosen by %s", s.Uplink.Name, list(valid(s.Uplink.V4, s.Uplink.V6)), s.Uplink.MTU, s.Uplink.Why)
	}
	line("networks", plain, "%s", list(s.Networks))
	line("subnets", plain, "%s", list(s.Subnets))
	if s.Backend == "" {
		line("backend", plain, "-")
	} else {
		line("backend", plain, "%s, pod MTU %d bytes", s.Backend, s.PodMTU)
	}
	line("peers", plain, "%s", s.peers())
	for _, b := range s.Accepts {
		line("accepts", plain, "%s", b)
	}
	a.passLines(s, line)
	if k := s.Kernel; k != nil {
		line("kernel", plain, "%s", k)
		for _, d := range k.Devices {
			line("device", d.style(), "%s", d)
		}
	}
	line("drift", plain, "%s repaired since the start", count(int(s.Drifts), "object", "objects"))
	if len(s.Problems) == 0 {
		line("problems", plain, "none")
	} else {
		line("problems", bad, "%d", len(s.Problems))
	}
	if err := t.print(a.stdout); err != nil {
		return err
	}
	a.printProblems(s.Problems)
	return nil
}

func (a *app) passLines(s statusReport, line func(name string, st style, format string, args ...any)) {
	p := s.Pass
	if p.Count == 0 {
		line("last pass", doubt, "none yet")
		return
	}
	now := a.now()
	line("last pass", plain, "%s ago, woken by %s: %s in %s; %s so far", span(now.Sub(p.At)), p.Why,
		count(p.Changes, "change", "changes"), span(p.Took), count(int(p.Count), "pass", "passes"))
	if !p.LastFull.IsZero() {
		line("full pass", plain, "%s ago", span(now.Sub(p.LastFull)))
	}
	for _, f := range p.Failures {
		line("refused", bad, "%s", f)
	}
}

func valid(addrs ...netip.Addr) []netip.Addr {
	return without(addrs, func(a netip.Addr) bool { return !a.IsValid() })
}
