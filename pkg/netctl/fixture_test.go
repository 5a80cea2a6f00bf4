package netctl

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/twill-net/twill/pkg/kernel"
	"github.com/twill-net/twill/pkg/overlay"
)

// world is what netctl looks at: a daemon on a real unix socket, and a store and
// a kernel that hold what a test puts there.
type world struct {
	now    time.Time
	status overlay.Status
	self   SelfReply
	drift  []overlay.Drift
	snap   *overlay.Snapshot
	have   overlay.State

	storeErr, kernelErr error
	daemonAway          bool
	daemonHangs         bool
	daemonFails         string // path that is answered with an error

	opened storeConfig // what the store was opened with
	scope  kernel.Scope
	env    map[string]string
}

type fakeStore struct{ w *world }

func (s fakeStore) Snapshot(context.Context, overlay.Config) (*overlay.Snapshot, error) {
	if s.w.storeErr != nil {
		return nil, s.w.storeErr
	}
	return s.w.snap, nil
}

func (s fakeStore) Expiry(_ context.Context, leases []*overlay.Lease) ([]time.Duration, error) {
	left := make([]time.Duration, len(leases))
	for i, l := range leases {
		if !l.Reserved() {
			left[i] = 23*time.Hour + 59*time.Minute - time.Duration(i)*time.Hour
		}
	}
	return left, nil
}

func (fakeStore) Close() error { return nil }

type fakeKernel struct{ w *world }

func (k fakeKernel) Observe(_ context.Context, scope kernel.Scope) (overlay.State, error) {
	k.w.scope = scope
	return k.w.have, k.w.kernelErr
}

func (fakeKernel) Close() error { return nil }

// serve starts the daemon's API.
func (w *world) serve(t *testing.T) (socket string) {
	socket = filepath.Join(t.TempDir(), "twilld.sock")
	if w.daemonAway {
		return socket
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	answer := func(v any) http.HandlerFunc {
		return func(rw http.ResponseWriter, r *http.Request) {
			switch {
			case w.daemonHangs:
				<-r.Context().Done()
			case w.daemonFails == r.URL.Path:
				http.Error(rw, "the disk is on fire", http.StatusInternalServerError)
			default:
				if err := json.NewEncoder(rw).Encode(v); err != nil {
					t.Error(err)
				}
			}
		}
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", answer(w.status))
	mux.HandleFunc("GET /v1/self", answer(w.self))
	mux.HandleFunc("GET /v1/drift", answer(w.drift))
	s := &http.Server{Handler: mux}
	done := make(chan error)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return socket
}

// netctl runs a command line in the world. The socket's name is not a golden
// matter.
func (w *world) netctl(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	socket := w.serve(t)
	var out, errs bytes.Buffer
	a := &app{
		stdout: &out, stderr: &errs, built: "v0.1.0",
		now: func() time.Time { return w.now },
		getenv: func(k string) string {
			if k == "TWILL_SOCKET" {
				return socket
			}
			return w.env[k]
		},
		openStore:  func(c storeConfig) (Store, error) { w.opened = c; return fakeStore{w}, nil },
		openKernel: func() (Kernel, error) { return fakeKernel{w}, nil },
	}
	code = a.run(t.Context(), args, strings.NewReader(""))
	return out.String(), strings.ReplaceAll(errs.String(), socket, DefaultSocket), code
}

const networkConfig = `{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:5::/48",
	"Backend": {"Type": "vxlan", "Port": 4789}}`

// newWorld is a cluster of four nodes in which all is well.
func newWorld(t *testing.T) *world {
	cfg, _, err := overlay.ParseConfig([]byte(networkConfig))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	w := &world{now: now, snap: &overlay.Snapshot{Revision: 120, Config: cfg}}
	for i, key := range []string{"10.5.1.0-24&fd00:5:0:1::-64", "10.5.2.0-24&fd00:5:0:2::-64", "10.5.3.0-24&fd00:5:0:3::-64", "10.5.4.0-24&fd00:5:0:4::-64"} {
		w.snap.Leases = append(w.snap.Leases, lease(t, key, byte(i+1)))
	}
	own := w.snap.Leases[0]
	uplink := overlay.Uplink{
		Name: "eth0", Index: 2, MTU: 1500, MAC: overlay.MAC{0x52, 0x54, 0, 0, 0, 1}, V4: own.PublicIP, V6: own.PublicIPv6,
		OnLink: []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}, Why: "default route",
	}
	w.self = SelfReply{Config: cfg, Self: overlay.Self{
		Subnets: own.Subnets, Uplink: uplink, PublicIP: own.PublicIP, PublicV6: own.PublicIPv6, MAC: own.VTEP.MAC, MACv6: own.VTEPv6.MAC,
		Options: overlay.Options{IPMasq: true, RandomFully: true, ForwardRules: true, Nexthops: true},
	}}
	w.status = overlay.Status{
		Version: "v0.1.0", Started: now.Add(-3*time.Hour - 12*time.Minute), PID: 4711, Ready: true, Reason: "ok",
		Store: overlay.StoreStatus{
			Kind: "etcd", Endpoints: []string{"http://198.51.100.250:2379"}, Prefix: "/coreos.com/network",
			Connected: true, Since: now.Add(-50 * time.Hour), Revision: 118,
		},
		Uplink: uplink, Lease: own.Key(), PublicIP: own.PublicIP, PublicIPv6: own.PublicIPv6,
		Networks: cfg.Networks(), Subnets: own.All(), Backend: "vxlan", PodMTU: 1430, Peers: 3,
		Pass: overlay.PassStatus{At: now.Add(-2 * time.Second), Count: 1234, Why: "store", Took: 1234567, LastFull: now.Add(-12 * time.Second)},
	}
	w.settle(t)
	return w
}

// settle makes the kernel what the leases want.
func (w *world) settle(t *testing.T) {
	w.have, _ = overlay.Desired(w.snap, w.self.Self)
	w.have.Foreign = []overlay.Route{{Dst: w.self.Self.V4, Link: overlay.Bridge, Protocol: 2}}
	if plan, _ := overlay.Diff(w.have, w.have); len(plan) > 0 {
		t.Fatalf("a settled kernel differs from itself:\n%s", plan)
	}
}

// lease is that of node n, renewed with the etcd lease 1000+n.
func lease(t *testing.T, key string, n byte) *overlay.Lease {
	t.Helper()
	subnets, err := overlay.ParseKey(key)
	if err != nil {
		t.Fatal(err)
	}
	l := &overlay.Lease{
		Subnets: subnets, Created: 100 + int64(n), Modified: 110 + int64(n), Grant: 1000 + int64(n),
		Attrs: overlay.Attrs{
			PublicIP: netip.AddrFrom4([4]byte{198, 51, 100, n}), Backend: "vxlan",
			VTEP: overlay.VTEP{VNI: 1, MAC: overlay.MAC{0x0e, 0x2a, 0, 0, 4, n}},
		},
	}
	if subnets.V6.IsValid() {
		l.PublicIPv6 = netip.MustParseAddr("2001:db8::").Next()
		for range n - 1 {
			l.PublicIPv6 = l.PublicIPv6.Next()
		}
		l.VTEPv6 = overlay.VTEP{VNI: 1, MAC: overlay.MAC{0x0e, 0x2a, 0, 0, 6, n}}
	}
	return l
}

// inKubernetes makes the leases those of Nodes, one with annotations that are none,
// and one that publishes nothing but its address, as udp does.
func inKubernetes(t *testing.T, w *world) {
	w.status.Store.Kind, w.status.Store.Node, w.status.Store.Endpoints = "kubernetes", "node-1", []string{"https://198.51.100.210:6443"}
	w.snap.Leases = append(w.snap.Leases, lease(t, "10.5.5.0-24&fd00:5:0:5::-64", 5), lease(t, "10.5.6.0-24&fd00:5:0:6::-64", 6))
	for i, l := range w.snap.Leases {
		l.Grant, l.Node = 0, fmt.Sprintf("node-%d", i+1)
	}
	w.snap.Leases[4].Attrs, w.snap.Leases[4].Err = overlay.Attrs{}, errors.New("annotations: they have neither flannel.alpha.coreos.com/public-ip nor flannel.alpha.coreos.com/public-ipv6")
	w.snap.Leases[5].Backend, w.snap.Leases[5].VTEP, w.snap.Leases[5].VTEPv6 = "", overlay.VTEP{}, overlay.VTEP{}
	w.settle(t)
}

// sabotage is what happens to a cluster in life, once each.
func (w *world) sabotage(t *testing.T) {
	second, third := w.snap.Leases[1], w.snap.Leases[2]
	h := &w.have
	h.Routes = without(h.Routes, func(r overlay.Route) bool { return r.Dst == second.V4 })
	h.Neighs = without(h.Neighs, func(n overlay.Neigh) bool { return n.IP == second.V6.Addr() })
	for i := range h.FDB {
		if h.FDB[i].MAC == third.VTEP.MAC {
			h.FDB[i].Dst = netip.MustParseAddr("203.0.113.9")
		}
	}
	h.Routes = append(h.Routes, overlay.Route{Dst: netip.MustParsePrefix("10.5.99.0/24"), NH: 0x54<<24 | 99, Protocol: overlay.Protocol})
	h.Nexthops = append(h.Nexthops, overlay.Nexthop{ID: 0x54<<24 | 99, Gateway: netip.MustParseAddr("10.5.99.0"), Link: "flannel.1", OnLink: true})
	h.Neighs = append(h.Neighs, overlay.Neigh{Link: "flannel.1", IP: netip.MustParseAddr("10.5.99.0"), MAC: overlay.MAC{0x0e, 0x2a, 0, 0, 4, 99}})
	h.FDB = append(h.FDB, overlay.FDB{Link: "flannel.1", MAC: overlay.MAC{0x0e, 0x2a, 0, 0, 4, 99}, Dst: netip.MustParseAddr("198.51.100.99")})
	h.Foreign = append(h.Foreign, overlay.Route{Dst: netip.MustParsePrefix("10.5.6.0/24"), Gateway: netip.MustParseAddr("198.51.100.77"), Link: "eth0", Protocol: 4})
	h.Links[0].MTU = 1400
	h.Normalize()

	reserved := lease(t, "10.5.5.0-24", 5)
	reserved.Grant, reserved.Backend, reserved.VTEP = 0, "", overlay.VTEP{}
	taken := lease(t, "10.5.6.0-24&fd00:5:0:6::-64", 6)
	otherVNI := lease(t, "10.5.7.0-24&fd00:5:0:7::-64", 7)
	otherVNI.VTEP.VNI, otherVNI.VTEPv6.VNI = 7, 7
	late := lease(t, "10.5.8.0-24&fd00:5:0:8::-64", 8)
	late.Modified = 119
	w.snap.Leases = append(w.snap.Leases, reserved, taken, otherVNI, late)
	w.snap.Problems = []overlay.Problem{{Object: "key /coreos.com/network/subnets/rubbish", Reason: "is not a subnet", Remedy: "delete it"}}
}
