package overlay

import (
	"cmp"
	"fmt"
)

// backend is one way to carry packets: what our lease publishes, our own devices,
// and one peer in, its objects out.
type backend interface {
	attrs(Config, Self) Attrs
	mtu(Self, Family) int // of a pod's packet, bytes
	own(*draft)
	peer(*draft, *Lease, Family) error
}

// CheckBackend says why the configured backend cannot be used, or nil.
func (c Config) CheckBackend() error {
	if c.Backend.Type == "ipip" && !c.V4.Enabled() {
		return fmt.Errorf("Backend.Type: ipip: carries IPv4 alone, and EnableIPv4 is false")
	}
	_, err := c.Backend.backend()
	return err
}

func (b BackendConfig) backend() (backend, error) {
	switch b.Type {
	case "vxlan":
		return newVXLAN(b.VXLAN), nil
	case "host-gw":
		return hostGW{}, nil
	case "udp":
		return udp{b.UDPPort}, nil
	case "bgp":
		return bgp{BGPConfig: b.BGP}, nil
	case "wireguard":
		return wireguard{b.WireGuard}, nil
	case "ipip":
		return ipip{b.IPIP}, nil
	case "extension":
		return extension{ExtensionConfig: b.Extension}, nil
	case "alloc":
		return alloc{}, nil
	}
	return nil, fmt.Errorf("Backend.Type: %s: Twill has no such backend; use vxlan, host-gw, udp, bgp, wireguard, ipip, extension or alloc", b.Type)
}

// Coexists reports whether a node can accept packets by both at once, as it does
// while the cluster moves from one to the other: they share no device.
func (b BackendConfig) Coexists(o BackendConfig) bool {
	if b.Type != o.Type {
		return true
	}
	return b.Type == "vxlan" && b.VXLAN.VNI != o.VXLAN.VNI
}

// Bare reports whether a node needs nothing of its own to receive packets by b.
func (b BackendConfig) Bare() bool { return b.Type == "host-gw" || b.Type == "alloc" }

// Carries reports whether a peer with that lease is sent to by b.
func (b BackendConfig) Carries(l *Lease) bool {
	switch b.Type {
	case "udp", "alloc": // flannel leaves the type out for these
		return l.Backend == ""
	case "vxlan":
		v4, v6 := l.VTEP.VNI, l.VTEPv6.VNI
		return l.Backend == "vxlan" && (v4 == b.VXLAN.VNI || v6 == b.VXLAN.VNI)
	}
	return l.Backend == b.Type
}

// carrier is a backend with the configuration that says whom it carries to.
type carrier struct {
	BackendConfig
	backend
}

// carriers returns the configured backend, then the former ones, then those that
// need no device: a peer that can be reached without one is reached, whatever our
// own configuration says.
func (d *draft) carriers() ([]carrier, error) {
	var out []carrier
	b, err := d.cfg.Backend.backend()
	if err != nil {
		return nil, err
	}
	out = append(out, carrier{d.cfg.Backend, b})
	for _, c := range d.self.Former {
		if b, err := c.backend(); err == nil {
			out = append(out, carrier{c, b})
		}
	}
	return out, nil
}

// carrierOf returns the backend that reaches a peer.
func (d *draft) carrierOf(own []carrier, l *Lease) (backend, error) {
	for _, c := range own {
		if c.Carries(l) {
			return c.backend, nil
		}
	}
	switch {
	case d.cfg.Backend.Type == "alloc":
		return alloc{}, nil
	case l.Backend == "host-gw":
		return hostGW{}, nil
	case l.Backend == "bgp":
		return bgp{}, nil
	case l.Backend == "vxlan" && own[0].Type == "vxlan": // of another VNI: to be said why not
		return own[0].backend, nil
	}
	return nil, fmt.Errorf("its backend is %s, ours is %s; it takes the stored configuration up when its daemon reads it", cmp.Or(l.Backend, "udp or alloc"), d.cfg.Backend.Type)
}
