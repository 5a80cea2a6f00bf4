package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/pod"
)

const (
	// sweepEvery is the time between two looks for what dead pods left.
	sweepEvery = time.Minute
	// collectPause is how long links that are to be deleted wait for more: many of
	// them go as fast as one.
	collectPause = 50 * time.Millisecond
	// portsPause bounds how often the host ports are looked at.
	portsPause = time.Second
)

// listenPlugin opens the socket at which the CNI plugin hands over links to delete,
// and asks whether a pod could be connected. It is for root alone. Without it the
// plugin does its work by itself.
func (d *Daemon) listenPlugin() (net.Listener, error) {
	path := pod.SocketFor(d.cfg.HandoffFile())
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("make the directory of --subnet-file: %w", err)
	}
	// We hold the node's lock: a socket that is there belongs to nobody.
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove the old socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("open the plugin's socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("protect the plugin's socket: %w", err), l.Close())
	}
	return l, nil
}

func (d *Daemon) servePlugin(ctx context.Context) error {
	l, err := d.listenPlugin()
	if err != nil {
		return err
	}
	defer l.Close()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var answers sync.WaitGroup
	defer answers.Wait()
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			return fmt.Errorf("serve the plugin: %w", err)
		}
		// Of a plugin that was killed nothing comes, which must not hold the others up.
		answers.Go(func() {
			if err := pod.Answer(conn, d.unready, d.collect); err != nil {
				d.log.Debug("question of the plugin not answered", "error", err)
			}
		})
	}
}

// collect is what the plugin asks for when it has handed a pod's links over.
func (d *Daemon) collect() {
	d.metrics.handed.Inc()
	d.podBell.ring("collect")
}

// tidy deletes the links that the plugin handed over, and from time to time looks for
// what dead pods left. That waits for the first pass, which knows where the firewall
// is.
func (d *Daemon) tidy(ctx context.Context) error {
	s := &pod.Sweeper{DataDir: d.cfg.CNIDataDir, HandoffFile: d.cfg.HandoffFile()}
	written := d.written
	timer := time.NewTimer(sweepEvery)
	defer timer.Stop()
	d.collectLinks() // of a daemon that was killed
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-d.podBell:
			if !sleep(ctx, collectPause) {
				return ctx.Err()
			}
			d.collectLinks()
			continue
		case <-written:
			written = nil
		case <-timer.C:
		}
		if written == nil {
			d.sweepPods(ctx, s)
		}
		timer.Reset(jitter(sweepEvery))
	}
}

// keepPorts restores the pods' host ports when somebody has flushed them. A bell rings
// for what the plugin writes, too; then there is nothing to do.
func (d *Daemon) keepPorts(ctx context.Context) error {
	s := &pod.Sweeper{DataDir: d.cfg.CNIDataDir, HandoffFile: d.cfg.HandoffFile()}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-d.firewallBell:
		}
		s.Firewall = d.firewallTool()
		done, err := s.SyncPorts(ctx)
		d.reportSweep(done, err)
		if !sleep(ctx, portsPause) {
			return ctx.Err()
		}
	}
}

func (d *Daemon) collectLinks() {
	if err := pod.DeleteDoomed(); err != nil {
		d.log.Error("links of pods not deleted", "error", err)
	}
}

func (d *Daemon) sweepPods(ctx context.Context, s *pod.Sweeper) {
	s.Firewall = d.firewallTool()
	d.reportSweep(s.Sweep(ctx))
}

func (d *Daemon) reportSweep(done []string, err error) {
	for _, what := range done {
		d.log.Info("swept", "what", what)
	}
	d.metrics.swept.Add(float64(len(done)))
	if err != nil {
		d.log.Error("not all could be swept that dead pods left", "error", err)
	}
}

// firewallTool is where the daemon has its rules, and the plugin shall have its.
func (d *Daemon) firewallTool() overlay.Tool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.kernel.FirewallTool(d.report.config.Tool())
}
