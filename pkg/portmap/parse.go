package portmap

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// ParseMappings reads runtimeConfig.portMappings (CNI conventions, "port
// mappings"). An entry without host port asks for nothing and is left out. No
// protocol means tcp, as in Kubernetes.
func ParseMappings(raw json.RawMessage) ([]Mapping, error) {
	if len(raw) == 0 || string(raw) == "null" {
		return nil, nil
	}
	var list []struct {
		HostPort, ContainerPort int
		Protocol, HostIP        string
	}
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, fmt.Errorf("portMappings: %w: must be a list of {hostPort, containerPort, protocol, hostIP}", err)
	}
	var out []Mapping
	for i, e := range list {
		bad := func(key string, value any, rule string) error {
			return fmt.Errorf("portMappings[%d]: %s: %v: %s", i, key, value, rule)
		}
		const ports = "must be a port, 1 to 65535"
		if e.HostPort < 0 || e.HostPort > 65535 {
			return nil, bad("hostPort", e.HostPort, ports+", or 0 for none")
		}
		if e.ContainerPort < 1 || e.ContainerPort > 65535 {
			return nil, bad("containerPort", e.ContainerPort, ports)
		}
		m := Mapping{HostPort: uint16(e.HostPort), ContainerPort: uint16(e.ContainerPort), Protocol: strings.ToLower(e.Protocol)}
		if m.Protocol == "" {
			m.Protocol = "tcp"
		}
		if !slices.Contains(protocols(), m.Protocol) {
			return nil, bad("protocol", e.Protocol, "must be tcp, udp or sctp")
		}
		if e.HostIP != "" {
			a, err := netip.ParseAddr(e.HostIP)
			if err != nil || a.Zone() != "" || a.IsMulticast() {
				return nil, bad("hostIP", e.HostIP, "must be an address of the node, without zone; leave it out for all addresses")
			}
			m.HostIP = a.Unmap()
		}
		if m.HostPort == 0 {
			continue
		}
		if slices.ContainsFunc(out, m.overlaps) {
			return nil, fmt.Errorf("portMappings[%d]: host port %s is mapped twice: remove one of the two", i, m)
		}
		out = append(out, m)
	}
	return out, nil
}
