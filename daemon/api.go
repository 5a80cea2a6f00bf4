package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/twill-net/twill/pkg/overlay"
)

// server is an HTTP server with its listener.
type server struct {
	http     *http.Server
	listener net.Listener
}

// listen opens the local API, for root alone, and the health port if there is one.
func (d *Daemon) listen() ([]server, error) {
	if err := os.MkdirAll(filepath.Dir(d.cfg.Socket), 0o755); err != nil {
		return nil, fmt.Errorf("make the directory of --socket: %w", err)
	}
	// We hold the node's lock: a socket that is there belongs to nobody.
	if err := os.Remove(d.cfg.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove the old socket: %w", err)
	}
	local, err := net.Listen("unix", d.cfg.Socket)
	if err != nil {
		return nil, fmt.Errorf("open the local API: %w", err)
	}
	if err := os.Chmod(d.cfg.Socket, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("protect the local API: %w", err), local.Close())
	}
	mux := d.health()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, d.Status()) })
	mux.HandleFunc("GET /v1/self", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, d.selfAndConfig()) })
	mux.HandleFunc("GET /v1/bgp", func(w http.ResponseWriter, r *http.Request) {
		s, err := d.bgp.status(r.Context())
		if err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		writeJSON(w, s)
	})
	mux.HandleFunc("GET /v1/drift", func(w http.ResponseWriter, _ *http.Request) {
		entries, _ := d.drift.list()
		writeJSON(w, entries)
	})
	servers := []server{newServer(local, mux)}
	if d.cfg.HealthAddr == "" {
		return servers, nil
	}
	public, err := net.Listen("tcp", d.cfg.HealthAddr)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open --healthz-port: %w; is it in use?", err), local.Close())
	}
	return append(servers, newServer(public, d.health())), nil
}

func newServer(l net.Listener, h http.Handler) server {
	return server{listener: l, http: &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second}}
}

func (s server) serve(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { s.http.Close() })
	defer stop()
	err := s.http.Serve(s.listener)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return fmt.Errorf("serve %s: %w", s.listener.Addr(), err)
}

// health serves /healthz: the loop turns; /readyz: pods can be connected;
// /metrics.
func (d *Daemon) health() *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { answer(w, d.alive()) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) { answer(w, d.unready()) })
	mux.Handle("GET /metrics", promhttp.HandlerFor(d.metrics.registry, promhttp.HandlerOpts{}))
	return mux
}

func answer(w http.ResponseWriter, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	fmt.Fprintln(w, "ok")
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the reader went away: nobody to tell
}

// alive fails if the loop has made no pass for several times its period.
func (d *Daemon) alive() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	last := d.report.heartbeat
	if last.IsZero() {
		last = d.started
	}
	if age := time.Since(last); age > 3*d.cfg.Resync {
		return fmt.Errorf("no pass of the reconcile loop for %s", age.Round(time.Second))
	}
	return nil
}

// unready says why a pod could not be connected now. A store that is away is no
// reason: the node goes on with what it knows.
func (d *Daemon) unready() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	r := &d.report
	switch {
	case r.waiting != "":
		return fmt.Errorf("waiting for %s", r.waiting)
	case r.pass.Count == 0:
		return errors.New("waiting for the first pass")
	case !r.clean && len(r.pass.Failures) > 0:
		more := ""
		if n := len(r.pass.Failures) - 1; n > 0 {
			more = fmt.Sprintf(" (and %d more)", n)
		}
		return fmt.Errorf("a change failed: %s%s", r.pass.Failures[0], more)
	case !r.clean:
		return errors.New("the last pass did not finish")
	}
	return nil
}

// Status is what the daemon says of itself.
func (d *Daemon) Status() overlay.Status {
	s := overlay.Status{Version: d.version, Started: d.started, PID: os.Getpid(), Ready: true, Reason: "ok", Store: d.store.Status()}
	if err := d.unready(); err != nil {
		s.Ready, s.Reason = false, err.Error()
	}
	snap := d.snapshot.Load()
	_, s.Drifts = d.drift.list()
	d.mu.Lock()
	defer d.mu.Unlock()
	r := &d.report
	s.Uplink, s.PublicIP, s.PublicIPv6 = r.self.Uplink, r.self.PublicIP, r.self.PublicV6
	s.Networks, s.Backend, s.PodMTU = r.config.Networks(), r.config.Backend.Type, r.podMTU
	if r.self.Subnets != (overlay.Subnets{}) {
		s.Lease, s.Subnets = r.self.Key(), r.self.All()
	}
	s.Pass, s.Problems = r.pass, r.problems
	if r.leaseErr != "" {
		s.Problems = append(s.Problems[:len(s.Problems):len(s.Problems)], overlay.Problem{Object: "lease", Reason: r.leaseErr})
	}
	if snap != nil {
		s.Peers = len(snap.Leases)
		if snap.Lease(r.self.Subnets) != nil {
			s.Peers--
		}
	}
	return s
}

// selfAndConfig is what netctl diff computes the daemon's next plan from.
func (d *Daemon) selfAndConfig() any {
	d.mu.Lock()
	defer d.mu.Unlock()
	return struct {
		Self   overlay.Self   `json:"self"`
		Config overlay.Config `json:"config"`
	}{d.report.self, d.report.config}
}
