package pod

import (
	"encoding/json"
	"net/netip"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/twill-net/twill/pkg/ipam"
)

// rangeConf is a range as host-local's configuration and the ipRanges capability
// write it.
type rangeConf struct {
	Subnet     string `json:"subnet"`
	RangeStart string `json:"rangeStart"`
	RangeEnd   string `json:"rangeEnd"`
	Gateway    string `json:"gateway"`
}

// ipam reads how addresses are chosen: host-local's keys and Twill's own.
func (f fields) ipam(c *Config) error {
	in, err := f.within("ipam")
	if err != nil {
		return err
	}
	const yesNo = "must be true or false"
	for _, get := range []func() error{
		func() error { return in.ranges("ranges", &c.IPAM.Ranges) },
		func() error { return in.exclude(&c.IPAM.Exclude) },
		func() error { return decode(in, "sticky", yesNo, &c.IPAM.Sticky) },
		func() error { return in.coolDown(&c.IPAM.CoolDown) },
		func() error {
			var more []*types.Route
			err := in.routes(&more)
			c.Routes = append(more, c.Routes...)
			return err
		},
	} {
		if err := get(); err != nil {
			return err
		}
	}
	return nil
}

func (f fields) ranges(key string, dst *[][]ipam.Range) error {
	const rule = "must be a list of lists of {subnet, rangeStart, rangeEnd, gateway}; a pod gets one address of each inner list"
	var sets [][]rangeConf
	if err := decode(f, key, rule, &sets); err != nil {
		return err
	}
	for _, set := range sets {
		var ranges []ipam.Range
		for _, conf := range set {
			r, err := conf.parse()
			if err != nil {
				return badValue(key, f[key], err.Error()+"; "+rule)
			}
			ranges = append(ranges, r)
		}
		if len(ranges) == 0 {
			return badValue(key, f[key], "an inner list is empty; "+rule)
		}
		*dst = append(*dst, ranges)
	}
	return nil
}

func (c rangeConf) parse() (ipam.Range, error) {
	var r ipam.Range
	var err error
	if r.Subnet, err = netip.ParsePrefix(c.Subnet); err != nil {
		return r, err
	}
	r.Subnet = r.Subnet.Masked()
	for _, a := range []struct {
		text string
		dst  *netip.Addr
	}{{c.RangeStart, &r.First}, {c.RangeEnd, &r.Last}, {c.Gateway, &r.Gateway}} {
		if a.text == "" {
			continue
		}
		if *a.dst, err = netip.ParseAddr(a.text); err != nil {
			return r, err
		}
	}
	return r, nil
}

func (f fields) exclude(dst *[]netip.Prefix) error {
	const key, rule = "exclude", `must be a list of addresses or prefixes, like ["10.5.1.8", "10.5.1.64/28"]`
	var list []string
	if err := decode(f, key, rule, &list); err != nil {
		return err
	}
	for _, text := range list {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			var a netip.Addr
			if a, err = netip.ParseAddr(text); err == nil {
				p = netip.PrefixFrom(a, a.BitLen())
			}
		}
		if err != nil {
			return badValue(key, f[key], rule)
		}
		*dst = append(*dst, p.Masked())
	}
	return nil
}

func (f fields) coolDown(dst *time.Duration) error {
	const key, rule = "coolDown", `must be how long a released address rests, like "90s" or "10m", at most 24h`
	text := "0s"
	if err := decode(f, key, rule, &text); err != nil {
		return err
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < 0 || d > 24*time.Hour {
		return badValue(key, f[key], rule)
	}
	*dst = d
	return nil
}

// rangeSets are the range sets that pods of this node get their addresses from: those of
// the configuration, which must lie in the node's subnets, or these whole.
func (w *wiring) rangeSets() ([][]ipam.Range, error) {
	var out [][]ipam.Range
	if w.IPAM.Ranges == nil {
		for _, subnet := range w.subnets {
			out = append(out, []ipam.Range{{Subnet: subnet, Exclude: w.IPAM.Exclude}})
		}
		return out, nil
	}
	for _, set := range w.IPAM.Ranges {
		var own []ipam.Range
		for _, r := range set {
			in, ok := w.inSubnet(r)
			if !ok {
				shown, _ := json.Marshal(r.Subnet)
				return nil, badValue("ranges", shown, "is not within this node's subnets, so other nodes would not send there: leave ranges out, or take them of the node's lease (netctl leases)")
			}
			own = append(own, in)
		}
		out = append(out, own)
	}
	return out, nil
}

// inSubnet puts a range into the subnet of the node that it lies in, whose length
// and gateway the pods get.
func (w *wiring) inSubnet(r ipam.Range) (ipam.Range, bool) {
	for _, subnet := range w.subnets {
		if !subnet.Contains(r.Subnet.Addr()) || r.Subnet.Bits() < subnet.Bits() {
			continue
		}
		if r.Subnet != subnet {
			if !r.First.IsValid() {
				r.First = r.Subnet.Addr()
			}
			if !r.Last.IsValid() {
				r.Last = ipam.Last(r.Subnet)
			}
		}
		r.Subnet, r.Gateway, r.Exclude = subnet, netip.Addr{}, w.IPAM.Exclude
		return r, true
	}
	return r, false
}
