package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"

	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/pod"
	"github.com/twill-net/twill/pkg/udptun"
)

// udpTunnel runs the tunnel of backend udp. No packet passes while no process does,
// so it comes back before anything else: with the peers that a file remembers,
// without the store, and with the queues that the service manager kept.
type udpTunnel struct {
	*Daemon
	file    string
	tunnel  *udptun.Tunnel
	set     overlay.UDP       // what the tunnel was given
	leaving []overlay.UDPPeer // that it has besides, until the kernel has moved away
}

func newUDPTunnel(d *Daemon) *udpTunnel {
	return &udpTunnel{Daemon: d, file: udpFile(d.cfg.SubnetFile)}
}

// udpFile is beside subnet.env.
func udpFile(subnetFile string) string {
	return filepath.Join(filepath.Dir(subnetFile), "twill-udp.json")
}

// resume goes on where the last process stopped, if it ran a tunnel.
func (u *udpTunnel) resume() {
	content, err := os.ReadFile(u.file)
	if err != nil {
		return
	}
	var last overlay.UDP
	if err = json.Unmarshal(content, &last); err == nil {
		err = u.open(last)
	}
	if err != nil {
		u.log.Warn("the UDP tunnel waits for the store", "error", err)
	}
}

func (u *udpTunnel) prepare(_ context.Context, want *overlay.State) error {
	next := want.Outside.UDP
	if next == nil {
		return nil
	}
	if u.tunnel != nil && (u.set.Port != next.Port || u.dead()) {
		u.close()
	}
	if u.tunnel == nil {
		if err := u.open(*next); err != nil {
			return err
		}
	} else if !reflect.DeepEqual(u.set, *next) {
		// The kernel still sends by the tunnel to a peer that is about to leave it:
		// retire lets go of that one.
		u.leaving = without(u.set.Peers, next.Peers)
		u.tunnel.SetOwn(next.Own)
		u.tunnel.SetPeers(append(peersOf(u.leaving), peersOf(next.Peers)...))
		u.set = *next
	}
	return u.remember()
}

// without returns the peers that more has no entry for.
func without(peers, more []overlay.UDPPeer) (out []overlay.UDPPeer) {
	has := make(map[netip.Prefix]bool, len(more))
	for _, p := range more {
		has[p.Subnet] = true
	}
	for _, p := range peers {
		if !has[p.Subnet] {
			out = append(out, p)
		}
	}
	return out
}

func (u *udpTunnel) open(next overlay.UDP) error {
	if err := udptun.Make(overlay.UDPLink); err != nil {
		return fmt.Errorf("run the UDP tunnel: %w", err)
	}
	kept := keptFiles()
	t, err := udptun.Open(udptun.Options{
		Device: overlay.UDPLink, Port: next.Port, Own: next.Own, Peers: peersOf(next.Peers), Files: kept, Log: u.log,
	})
	for _, f := range kept {
		f.Close()
	}
	if err != nil {
		return fmt.Errorf("run the UDP tunnel: %w", err)
	}
	u.tunnel, u.set = t, next
	files, err := t.Files()
	if err == nil {
		err = keepFiles(files)
	}
	if err != nil {
		u.log.Warn("the service manager does not keep the tunnel's queues: a restart drops packets", "error", err)
	}
	return nil
}

func peersOf(peers []overlay.UDPPeer) []udptun.Peer {
	out := make([]udptun.Peer, 0, len(peers))
	for _, p := range peers {
		out = append(out, udptun.Peer{Subnet: p.Subnet, Addr: p.Addr})
	}
	return out
}

// remember writes the tunnel's peers down for the next process.
func (u *udpTunnel) remember() error {
	content, err := json.Marshal(u.set)
	if err != nil {
		return err
	}
	if old, err := os.ReadFile(u.file); err == nil && string(old) == string(content) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(u.file), 0o755); err != nil {
		return err
	}
	return pod.ReplaceFile(u.file, content, 0o644)
}

func (u *udpTunnel) retire(_ context.Context, want *overlay.State) {
	if u.tunnel == nil {
		return
	}
	if want.Outside.UDP != nil {
		if len(u.leaving) > 0 {
			u.tunnel.SetPeers(peersOf(u.set.Peers))
			u.leaving = nil
		}
		return
	}
	u.close()
	forgetFiles()
	if err := os.Remove(u.file); err != nil && !errors.Is(err, os.ErrNotExist) {
		u.log.Warn("forget the UDP tunnel's peers", "error", err)
	}
}

// dead reports whether somebody deleted the device.
func (u *udpTunnel) dead() bool {
	select {
	case <-u.tunnel.Done():
		return true
	default:
		return false
	}
}

func (u *udpTunnel) close() {
	if err := u.tunnel.Close(); err != nil {
		u.log.Warn("close the UDP tunnel", "error", err)
	}
	u.tunnel = nil
}
