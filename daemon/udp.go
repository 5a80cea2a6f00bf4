package daemon

import (
	"context"
	"fmt"
	"slices"

	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/udptun"
)

// udpTunnel runs the tunnel of backend udp.
type udpTunnel struct {
	*Daemon
	tunnel *udptun.Tunnel
	port   uint16
	peers  []overlay.UDPPeer // that the tunnel was given
}

func (u *udpTunnel) prepare(_ context.Context, want *overlay.State) error {
	udp := want.Outside.UDP
	if udp == nil {
		return nil
	}
	if u.tunnel != nil && (u.port != udp.Port || u.dead()) {
		u.close()
	}
	if u.tunnel == nil {
		err := udptun.Make(overlay.UDPLink)
		var t *udptun.Tunnel
		if err == nil {
			t, err = udptun.Open(udptun.Options{Device: overlay.UDPLink, Port: udp.Port, Log: u.log})
		}
		if err != nil {
			return fmt.Errorf("run the UDP tunnel: %w", err)
		}
		u.tunnel, u.port, u.peers = t, udp.Port, nil
	}
	if !slices.Equal(u.peers, udp.Peers) {
		var peers []udptun.Peer
		for _, p := range udp.Peers {
			peers = append(peers, udptun.Peer{Subnet: p.Subnet, Addr: p.Addr})
		}
		u.tunnel.SetPeers(peers)
		u.peers = udp.Peers
	}
	return nil
}

func (u *udpTunnel) retire(_ context.Context, want *overlay.State) {
	if want.Outside.UDP == nil && u.tunnel != nil {
		u.close()
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
