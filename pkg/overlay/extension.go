package overlay

import (
	"encoding/json"
	"fmt"
	"net/netip"
)

// Extension is what the operator's commands of backend extension are told.
type Extension struct {
	ExtensionConfig
	Networks, Subnets    []netip.Prefix
	PublicIP, PublicIPv6 netip.Addr
	Peers                []ExtensionPeer
}

// ExtensionPeer is a peer as SubnetAddCommand and SubnetRemoveCommand see it.
type ExtensionPeer struct {
	Subnet   netip.Prefix
	PublicIP netip.Addr
	Data     string // the peer's BackendData, decoded: the output of its PreStartupCommand
}

// extension leaves the carrying to commands of the operator. It knows IPv4, as in
// flannel.
type extension struct {
	linkless
	ExtensionConfig
}

func (extension) attrs(c Config, self Self) Attrs {
	a := public(c, self, "extension")
	if self.ExtensionData != "" {
		data, err := json.Marshal(self.ExtensionData)
		if err != nil {
			panic(fmt.Sprintf("marshal output of PreStartupCommand: %v", err))
		}
		a.Data = string(data)
	}
	return a
}

func (e extension) own(d *draft) {
	d.state.Outside.Extension = &Extension{
		ExtensionConfig: e.ExtensionConfig, Networks: d.cfg.Networks(), Subnets: d.self.All(),
		PublicIP: d.self.PublicIP, PublicIPv6: d.self.PublicV6,
	}
}

func (e extension) peer(d *draft, l *Lease, f Family) error {
	if f != IPv4 {
		return fmt.Errorf("the commands of backend extension are told of IPv4 subnets alone")
	}
	var data string
	if l.Data != "" && json.Unmarshal([]byte(l.Data), &data) != nil {
		return fmt.Errorf("its BackendData is not a JSON string: %.40s", l.Data)
	}
	x := d.state.Outside.Extension
	x.Peers = append(x.Peers, ExtensionPeer{Subnet: l.V4, PublicIP: l.PublicIP, Data: data})
	return nil
}
