package pod

import (
	"encoding/json"
	"net"
	"net/netip"
	"strings"

	"github.com/twill-net/twill/pkg/portmap"
)

// Annotations of a pod that Twill reads. containerd hands them over if the plugin's
// configuration has the capability io.kubernetes.cri.pod-annotations.
const (
	addressAnnotation = "twill.net/addresses" // "10.5.1.9,fd00:5:0:1::9"
	macAnnotation     = "twill.net/mac"
)

// runtimeConfig reads what is of the single pod: the capabilities' arguments, as the
// CNI conventions name them, and args.cni.
func (f fields) runtimeConfig(c *Config) error {
	run, err := f.within("runtimeConfig")
	if err != nil {
		return err
	}
	if c.Ports, err = portmap.ParseMappings(run["portMappings"]); err != nil {
		return badValue("runtimeConfig.portMappings", run["portMappings"], err.Error())
	}
	if c.Bandwidth, err = parseBandwidth(run["bandwidth"]); err != nil {
		return badValue("runtimeConfig.bandwidth", run["bandwidth"], err.Error())
	}
	if err := run.ranges("ipRanges", &c.IPAM.Ranges); err != nil {
		return err
	}
	var dns struct{ Servers, Searches, Options []string }
	if err := decode(run, "dns", "must be an object of servers, searches and options", &dns); err != nil {
		return err
	}
	if len(dns.Servers)+len(dns.Searches)+len(dns.Options) > 0 {
		c.DNS.Nameservers, c.DNS.Search, c.DNS.Options = dns.Servers, dns.Searches, dns.Options
	}
	return f.ask(c, run)
}

// ask reads the addresses and the MAC that are asked for: first the capabilities,
// then the pod's annotations, then args.cni, then the network configuration.
func (f fields) ask(c *Config, run fields) error {
	notes := map[string]string{}
	const noteKey = "io.kubernetes.cri.pod-annotations"
	if err := decode(run, noteKey, "must be an object of texts", &notes); err != nil {
		return err
	}
	args, err := f.within("args")
	if err != nil {
		return err
	}
	cni, err := args.within("cni")
	if err != nil {
		return err
	}
	for _, from := range []struct {
		name string
		raw  json.RawMessage
	}{{"runtimeConfig.ips", run["ips"]}, {"annotation " + addressAnnotation, quote(notes[addressAnnotation])}, {"args.cni.ips", cni["ips"]}} {
		if c.Wanted != nil {
			break
		}
		if c.Wanted, err = parseWanted(from.raw); err != nil {
			return badValue(from.name, from.raw, err.Error())
		}
	}
	for _, from := range []struct {
		name string
		raw  json.RawMessage
	}{{"runtimeConfig.mac", run["mac"]}, {"annotation " + macAnnotation, quote(notes[macAnnotation])}, {"args.cni.mac", cni["mac"]}, {"mac", f["mac"]}} {
		if c.MAC != nil {
			break
		}
		if c.MAC, err = parseMAC(from.raw); err != nil {
			return badValue(from.name, from.raw, err.Error())
		}
	}
	return nil
}

func quote(s string) json.RawMessage {
	if s == "" {
		return nil
	}
	raw, _ := json.Marshal(s)
	return raw
}

// parseWanted reads requested addresses: a list, or a text with commas between. A
// prefix length is passed over, for the node's subnet has its own.
func parseWanted(raw json.RawMessage) ([]netip.Addr, error) {
	var list []string
	var text string
	switch {
	case len(raw) == 0 || string(raw) == "null":
		return nil, nil
	case json.Unmarshal(raw, &list) == nil:
	case json.Unmarshal(raw, &text) == nil:
		list = strings.Split(text, ",")
	default:
		return nil, errWanted
	}
	var out []netip.Addr
	for _, s := range list {
		s = strings.TrimSpace(s)
		a, err := netip.ParseAddr(s)
		if p, perr := netip.ParsePrefix(s); perr == nil {
			a, err = p.Addr(), nil
		}
		if err != nil || a.Zone() != "" {
			return nil, errWanted
		}
		out = append(out, a.Unmap())
	}
	return out, nil
}

func parseMAC(raw json.RawMessage) (net.HardwareAddr, error) {
	var text string
	if len(raw) == 0 || string(raw) == "null" {
		return nil, nil
	}
	if json.Unmarshal(raw, &text) != nil {
		return nil, errMAC
	}
	if text == "" {
		return nil, nil
	}
	mac, err := net.ParseMAC(text)
	if err != nil || len(mac) != 6 || mac[0]&1 != 0 || mac.String() == "00:00:00:00:00:00" {
		return nil, errMAC
	}
	return mac, nil
}
