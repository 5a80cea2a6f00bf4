package pod

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
)

// Where flannel's plugin has its files.
const (
	DefaultSubnetFile = "/run/flannel/subnet.env"
	DefaultScratchDir = "/var/lib/cni/flannel"
)

// flannelNet is a network configuration of "type": "flannel"
// (https://github.com/flannel-io/cni-plugin). flannel's plugin makes of it the
// configuration of another plugin, the delegate, keeps that in the scratch file of
// the container, and has the delegate wire the pod. Twill takes the same first
// step, word for word, and then is the delegate itself:
//
//	ADD    delegate(env) → the scratch file (scratchConf), and
//	                     → addConf → Twill's own configuration
//	DEL    the scratch file, flannel's or ours → delConf → Twill's own configuration
//
// So a pod that flannel wired goes with Twill, and one that Twill wired goes with
// flannel. Nothing here reads or writes a file.
type flannelNet struct {
	SubnetFile string // subnet.env
	ScratchDir string

	conf flannelConf
}

// flannelConf are the keys of flannel's plugin, and those of the runtime. Like
// flannel's, keys match whatever their case.
type flannelConf struct {
	CNIVersion    string          `json:"cniVersion"`
	Name          string          `json:"name"`
	SubnetFile    string          `json:"subnetFile"`
	DataDir       string          `json:"dataDir"`
	Delegate      map[string]any  `json:"delegate"`
	IPAM          map[string]any  `json:"ipam"`
	RuntimeConfig map[string]any  `json:"runtimeConfig"`
	PrevResult    json.RawMessage `json:"prevResult"`
	Valid         json.RawMessage `json:"cni.dev/valid-attachments"`
}

func parseFlannel(stdin []byte) (flannelNet, error) {
	c := flannelConf{SubnetFile: DefaultSubnetFile, DataDir: DefaultScratchDir}
	if err := json.Unmarshal(stdin, &c); err != nil {
		return flannelNet{}, fmt.Errorf("flannel's network configuration: %w", plainJSON(err))
	}
	for key, path := range map[string]string{"subnetFile": c.SubnetFile, "dataDir": c.DataDir} {
		if !filepath.IsAbs(path) {
			return flannelNet{}, fmt.Errorf("flannel's network configuration: %s: %q: must be an absolute path", key, path)
		}
	}
	return flannelNet{SubnetFile: c.SubnetFile, ScratchDir: c.DataDir, conf: c}, nil
}

// delegate returns what flannel's plugin would give its delegate on this node.
func (n flannelNet) delegate(env SubnetEnv) ([]byte, error) {
	d := map[string]any{}
	for key, value := range n.conf.Delegate {
		d[key] = value
	}
	given := func(key string) bool { _, ok := d[key]; return ok }
	for _, key := range []string{"name", "ipam"} {
		if given(key) {
			return nil, fmt.Errorf("flannel's network configuration: delegate.%s: must not be given, it is made from the rest: remove it, or move it out of delegate", key)
		}
	}
	set := func(key string, value any) {
		if !given(key) {
			d[key] = value
		}
	}
	set("type", "bridge")
	if _, ok := d["type"].(string); !ok {
		return nil, fmt.Errorf("flannel's network configuration: delegate.type: %v: must be a text", d["type"])
	}
	set("ipMasq", !env.IPMasq) // one of the two masquerades
	set("mtu", env.MTU)
	if d["type"] == "bridge" {
		set("isGateway", true)
	}
	d["name"] = n.conf.Name
	if n.conf.CNIVersion != "" {
		d["cniVersion"] = n.conf.CNIVersion
	}
	if n.conf.RuntimeConfig != nil {
		d["runtimeConfig"] = n.conf.RuntimeConfig
	}
	ipam, err := n.ipam(env)
	if err != nil {
		return nil, err
	}
	d["ipam"] = ipam
	return json.Marshal(d)
}

// ipam is the delegate's: a range for each family, and routes to the networks.
func (n flannelNet) ipam(env SubnetEnv) (map[string]any, error) {
	out := map[string]any{}
	for key, value := range n.conf.IPAM {
		out[key] = value
	}
	if _, ok := out["type"]; !ok {
		out["type"] = "host-local"
	}
	var ranges [][]map[string]string
	for _, p := range env.Subnets {
		ranges = append(ranges, []map[string]string{{"subnet": p.String()}})
	}
	routes := []types.Route{}
	if given, ok := out["routes"]; ok {
		text, err := json.Marshal(given)
		if err == nil {
			err = json.Unmarshal(text, &routes)
		}
		if err != nil {
			return nil, fmt.Errorf("flannel's network configuration: ipam.routes: %s: must be a list of {dst, gw}: %w", text, err)
		}
	}
	for _, p := range env.Networks {
		routes = append(routes, types.Route{Dst: ipNet(p)})
	}
	out["ranges"], out["routes"] = ranges, routes
	return out, nil
}

// scratchConf returns what belongs in the scratch file of a pod that Twill wired: the
// delegate's configuration, except that nobody needs to masquerade. How Twill does
// that is not for the bridge plugin to take back, which in some releases fails over
// a rule that is not there (1.1.1 with nftables), and a pod that it cannot remove
// never goes.
func scratchConf(delegate []byte) ([]byte, error) {
	d := map[string]json.RawMessage{}
	if err := json.Unmarshal(delegate, &d); err != nil {
		return nil, fmt.Errorf("flannel's network configuration: delegate.%w", plainJSON(err))
	}
	d["ipMasq"] = json.RawMessage("false")
	return json.Marshal(d)
}

// bridgeConf are the keys that the plugins bridge and ptp have beside host-local's
// (https://www.cni.dev/plugins/current/main/bridge/). They ignore any other.
type bridgeConf struct {
	Name          string          `json:"name"`
	Type          string          `json:"type"`
	Bridge        string          `json:"bridge"`
	IsGateway     bool            `json:"isGateway"`
	IsDefaultGW   bool            `json:"isDefaultGateway"`
	IPMasq        bool            `json:"ipMasq"`
	IPMasqBackend string          `json:"ipMasqBackend"`
	MTU           int             `json:"mtu"`
	HairpinMode   bool            `json:"hairpinMode"`
	PromiscMode   bool            `json:"promiscMode"`
	PortIsolation bool            `json:"portIsolation"`
	DNS           json.RawMessage `json:"dns"`
	IPAM          hostLocalConf   `json:"ipam"`

	// Refused if they are set.
	Vlan        int               `json:"vlan"`
	VlanTrunk   []json.RawMessage `json:"vlanTrunk"`
	MacSpoofChk bool              `json:"macspoofchk"`
	EnableDAD   bool              `json:"enabledad"`
	NoInterface bool              `json:"disableContainerInterface"`

	// Of no effect: Twill renumbers the bridge if it is its own, and has no VLANs.
	ForceAddress        bool `json:"forceAddress"`
	PreserveDefaultVlan bool `json:"preserveDefaultVlan"`
}

// hostLocalConf are the keys of host-local.
type hostLocalConf struct {
	Type       string          `json:"type"`
	DataDir    string          `json:"dataDir"`
	ResolvConf string          `json:"resolvConf"`
	Subnet     string          `json:"subnet"`
	Ranges     json.RawMessage `json:"ranges"`
	Routes     json.RawMessage `json:"routes"`
}

// unable lists what the configuration asks for and Twill cannot do.
func (b bridgeConf) unable() []string {
	if b.Type != "bridge" && b.Type != "ptp" {
		return []string{fmt.Sprintf(`delegate.type: %q: must be "bridge" or "ptp", or left out; for another plugin keep flannel's own binary`, b.Type)}
	}
	var out []string
	for _, r := range []struct {
		asked  bool
		key    string
		value  any
		remedy string
	}{
		{b.Vlan != 0 || len(b.VlanTrunk) > 0, "delegate.vlan, vlanTrunk", b.Vlan, "Twill has no VLANs on the bridge: remove it"},
		{b.MacSpoofChk, "delegate.macspoofchk", true, "Twill does not check the pods' MAC addresses: remove it"},
		{b.EnableDAD, "delegate.enabledad", true, "Twill gives each address once, without asking the link: remove it"},
		{b.NoInterface, "delegate.disableContainerInterface", true, "Twill's pods have an address and an interface that is up: remove it"},
		{b.Type == "bridge" && !b.IsGateway && !b.IsDefaultGW, "delegate.isGateway", false, "Twill's bridge is its pods' gateway: remove it"},
		{b.IPMasqBackend != "" && b.IPMasqBackend != "iptables" && b.IPMasqBackend != "nftables", "delegate.ipMasqBackend", b.IPMasqBackend, "must be iptables or nftables"},
		{b.IPAM.Type != "host-local", "ipam.type", b.IPAM.Type, `Twill gives out the addresses itself, in host-local's files: must be "host-local", or left out`},
		{b.IPAM.Subnet != "", "ipam.subnet", b.IPAM.Subnet, "is what subnet.env says: remove it"},
		{b.IPAM.ResolvConf != "", "ipam.resolvConf", b.IPAM.ResolvConf, "Twill reads no such file: give delegate.dns, or remove it"},
	} {
		if r.asked {
			out = append(out, fmt.Sprintf("%s: %v: %s", r.key, r.value, r.remedy))
		}
	}
	return out
}

// twillConf is a network configuration in Twill's own keys.
type twillConf struct {
	CNIVersion    string          `json:"cniVersion,omitempty"`
	Name          string          `json:"name"`
	Type          string          `json:"type"`
	Mode          string          `json:"mode"`
	Bridge        string          `json:"bridge,omitempty"`
	IsDefaultGW   bool            `json:"isDefaultGateway"`
	HairpinMode   bool            `json:"hairpinMode"`
	PromiscMode   bool            `json:"promiscMode"`
	PortIsolation bool            `json:"portIsolation"`
	MTU           int             `json:"mtu,omitempty"`
	IPMasq        bool            `json:"ipMasq"`
	Firewall      string          `json:"firewall,omitempty"`
	DNS           json.RawMessage `json:"dns,omitempty"`
	IPAM          twillIPAM       `json:"ipam"`
	RuntimeConfig map[string]any  `json:"runtimeConfig,omitempty"`
	PrevResult    json.RawMessage `json:"prevResult,omitempty"`
	Valid         json.RawMessage `json:"cni.dev/valid-attachments,omitempty"`
}

type twillIPAM struct {
	DataDir string          `json:"dataDir,omitempty"`
	Ranges  json.RawMessage `json:"ranges,omitempty"`
	Routes  json.RawMessage `json:"routes,omitempty"`
}

// native starts Twill's configuration with what the runtime says.
func (n flannelNet) native(name, delegateType string) twillConf {
	c := twillConf{
		CNIVersion: n.conf.CNIVersion, Name: name, Type: "twill", Mode: "bridged",
		RuntimeConfig: n.conf.RuntimeConfig, PrevResult: n.conf.PrevResult, Valid: n.conf.Valid,
	}
	if delegateType == "ptp" {
		c.Mode = "routed"
	}
	return c
}

// addConf returns the delegate's configuration in Twill's keys, for ADD, CHECK and
// STATUS. What Twill cannot do is an error that names it.
func (n flannelNet) addConf(delegate []byte) ([]byte, error) {
	var b bridgeConf
	if err := json.Unmarshal(delegate, &b); err != nil {
		return nil, fmt.Errorf("flannel's network configuration: delegate.%w", plainJSON(err))
	}
	if unable := b.unable(); len(unable) > 0 {
		return nil, fmt.Errorf("flannel's network configuration: %s", strings.Join(unable, "; "))
	}
	c := n.native(b.Name, b.Type)
	c.MTU, c.IPMasq, c.Firewall, c.DNS = b.MTU, b.IPMasq, b.IPMasqBackend, b.DNS
	if b.Type == "bridge" {
		c.Bridge, c.IsDefaultGW = b.Bridge, b.IsDefaultGW
		c.HairpinMode, c.PromiscMode, c.PortIsolation = b.HairpinMode, b.PromiscMode, b.PortIsolation
	}
	c.IPAM = twillIPAM{DataDir: b.IPAM.DataDir, Ranges: b.IPAM.Ranges, Routes: b.IPAM.Routes}
	return json.Marshal(c)
}

// delConf returns what DEL and GC need, in Twill's keys: where the addresses are and
// how the pod was wired. The scratch file says so of the day of ADD, under which
// name and with which plugin whatsoever; without it (nil, or not readable as JSON)
// the configuration of today has to do, even one that ADD would refuse.
func (n flannelNet) delConf(scratch []byte) ([]byte, error) {
	var was struct {
		Name   string `json:"name"`
		Type   string `json:"type"`
		Bridge string `json:"bridge"`
		IPAM   struct {
			DataDir string `json:"dataDir"`
		} `json:"ipam"`
	}
	if json.Unmarshal(scratch, &was) != nil || was.Name == "" {
		was.Name = n.conf.Name
		was.Type, _ = n.conf.Delegate["type"].(string)
		was.Bridge, _ = n.conf.Delegate["bridge"].(string)
		was.IPAM.DataDir, _ = n.conf.IPAM["dataDir"].(string)
	}
	c := n.native(was.Name, was.Type)
	c.IPAM.DataDir = was.IPAM.DataDir
	if c.Mode == "bridged" {
		c.Bridge = was.Bridge
	}
	return json.Marshal(c)
}
