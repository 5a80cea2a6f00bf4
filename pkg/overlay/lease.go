package overlay

import (
	"cmp"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Lease is one node's claim to its pod subnets and what it publishes of itself.
type Lease struct {
	Subnets
	Attrs
	// Node is the name of the node, where the store knows it: in Kubernetes.
	Node string
	// Err is set if the key names a subnet but the value does not parse. The
	// subnet is taken all the same.
	Err error

	// Where the lease stands in the store.
	Created  int64 // revision at which the key was made: the older of two claimants wins
	Modified int64 // revision of the last write: later writes are fenced by it
	Grant    int64 // etcd lease id; 0 is a reservation, which never expires
}

// Reserved reports whether the lease never expires.
func (l *Lease) Reserved() bool { return l.Grant == 0 }

// object names the lease, or its node where that has a name, in a Problem.
func (l *Lease) object() string {
	if l.Node != "" {
		return "node " + l.Node
	}
	return "lease " + l.Key()
}

// deleteNode is how to take a Node away, where the leases are Nodes.
func (l *Lease) deleteNode() string {
	if l.Node == "" {
		return ""
	}
	return "if the node is gone or has another name now, kubectl delete node " + l.Node
}

// holder names the lease and its node.
func (l *Lease) holder() string {
	if l.Err != nil {
		return l.Key() + ", whose value does not parse"
	}
	return l.Key() + " of " + cmp.Or(l.Node, l.address().String())
}

// Attrs is what a node publishes: the value of its lease. Comparable.
type Attrs struct {
	PublicIP, PublicIPv6 netip.Addr // where peers send the outer packet
	Backend              string     // flannel's BackendType; empty for udp, alloc and an untaken reservation
	Data, DataV6         string     // flannel's BackendData and BackendV6Data: JSON, or empty
	// VTEP and VTEPv6 are Data and DataV6 of a vxlan lease, decoded.
	VTEP, VTEPv6 VTEP
	// WireGuard and WireGuardV6 are those of a wireguard lease.
	WireGuard, WireGuardV6 WireGuardNode
	BGP                    BGPNode // Data of a bgp lease
}

// VTEP is a node's VXLAN tunnel end point (RFC 7348).
type VTEP struct {
	VNI uint32
	MAC MAC
}

// leaseValue is the stored form; field order and omissions are flannel's.
type leaseValue struct {
	PublicIP    *string
	PublicIPv6  *string
	BackendType string          `json:",omitempty"`
	Data        json.RawMessage `json:"BackendData,omitempty"`
	DataV6      json.RawMessage `json:"BackendV6Data,omitempty"`
}

type vtepValue struct {
	VNI     uint32
	VtepMAC string
}

// ParseKey reads the last element of a lease's key: "10.5.52.0-24" or, in dual
// stack, "10.5.52.0-24&fd00:5:0:34::-64".
func ParseKey(key string) (Subnets, error) {
	var n Subnets
	first, second, dual := strings.Cut(key, "&")
	var err error
	n.V4, err = keyPrefix(first, IPv4)
	if dual && err == nil {
		n.V6, err = keyPrefix(second, IPv6)
	}
	if err != nil {
		return Subnets{}, fmt.Errorf("key %q %w", key, err)
	}
	return canonical(key, n)
}

// canonical refuses the other spellings of a key (leading zeros, an uncompressed
// IPv6 address): they could not be written back, and two of them would be two
// leases of one name.
func canonical(key string, n Subnets) (Subnets, error) {
	if want := n.Key(); want != key {
		return Subnets{}, fmt.Errorf("key %q is not how the subnet %s is written", key, want)
	}
	return n, nil
}

// keyPrefix reads an address and a length. Its error goes on from "key x".
func keyPrefix(text string, f Family) (netip.Prefix, error) {
	addr, bits, _ := strings.Cut(text, "-")
	a, err := netip.ParseAddr(addr)
	digits := strings.Trim(bits, "0123456789") == "" && bits != ""
	if err != nil || !digits || a.Is4() != (f == IPv4) || a.Is4In6() {
		return netip.Prefix{}, errors.New("is not a subnet like 10.5.52.0-24 or 10.5.52.0-24&fd00:5:0:34::-64")
	}
	longest := a.BitLen() - 1
	n, err := strconv.Atoi(bits)
	if err != nil || n < 1 || n > longest {
		return netip.Prefix{}, fmt.Errorf("has the prefix length %s, which is not in 1..%d", bits, longest)
	}
	p := netip.PrefixFrom(a, n)
	if p != p.Masked() {
		return netip.Prefix{}, fmt.Errorf("is %s, which has bits set behind its prefix length; the subnet is %s", p, p.Masked())
	}
	return p, nil
}

// Key is the inverse of ParseKey. Subnets of IPv6 alone, which etcd's keys cannot
// name, have just their second half.
func (n Subnets) Key() string {
	var parts []string
	for _, p := range n.All() {
		parts = append(parts, fmt.Sprintf("%s-%d", p.Addr(), p.Bits()))
	}
	return strings.Join(parts, "&")
}

// ParseAttrs reads the value of a lease.
func ParseAttrs(value []byte) (Attrs, error) {
	var v leaseValue
	if err := json.Unmarshal(value, &v); err != nil {
		return Attrs{}, fmt.Errorf("value is not a lease: %w", err)
	}
	return v.attrs()
}

func (v leaseValue) attrs() (Attrs, error) {
	a := Attrs{Backend: v.BackendType, Data: compact(v.Data), DataV6: compact(v.DataV6)}
	var err error
	if a.PublicIP, err = publicIP("PublicIP", v.PublicIP, IPv4); err != nil {
		return Attrs{}, err
	}
	if a.PublicIPv6, err = publicIP("PublicIPv6", v.PublicIPv6, IPv6); err != nil {
		return Attrs{}, err
	}
	if !a.PublicIP.IsValid() && !a.PublicIPv6.IsValid() {
		return Attrs{}, fmt.Errorf("value has neither PublicIP nor PublicIPv6")
	}
	if err := a.parseData(); err != nil {
		return Attrs{}, err
	}
	return a, nil
}

// Fields are Attrs as text, each by itself: a node's annotations.
type Fields struct{ PublicIP, PublicIPv6, Backend, Data, DataV6 string }

// ParseFields reads the annotations of a node. flannel writes absent data as null.
func ParseFields(f Fields) (Attrs, error) {
	for name, data := range map[string]string{"BackendData": f.Data, "BackendV6Data": f.DataV6} {
		if data != "" && !json.Valid([]byte(data)) {
			return Attrs{}, fmt.Errorf("%s: %.40q is not JSON", name, data)
		}
	}
	return leaseValue{
		PublicIP: &f.PublicIP, PublicIPv6: &f.PublicIPv6, BackendType: f.Backend,
		Data: json.RawMessage(f.Data), DataV6: json.RawMessage(f.DataV6),
	}.attrs()
}

// Fields is the inverse of ParseFields. What a does not say is empty.
func (a Attrs) Fields() Fields {
	f := Fields{Backend: a.Backend, Data: a.Data, DataV6: a.DataV6}
	if a.PublicIP.IsValid() {
		f.PublicIP = a.PublicIP.String()
	}
	if a.PublicIPv6.IsValid() {
		f.PublicIPv6 = a.PublicIPv6.String()
	}
	return f
}

// parseData decodes the backend's data.
func (a *Attrs) parseData() error {
	var err4, err6 error
	switch a.Backend {
	case "vxlan":
		a.VTEP, err4 = parseVTEP("BackendData", a.Data)
		a.VTEPv6, err6 = parseVTEP("BackendV6Data", a.DataV6)
	case "wireguard":
		a.WireGuard, err4 = parseWireGuardNode("BackendData", a.Data)
		a.WireGuardV6, err6 = parseWireGuardNode("BackendV6Data", a.DataV6)
	case "bgp":
		a.BGP, err4 = parseBGPNode(a.Data)
	}
	return cmp.Or(err4, err6)
}

// publicIP reads an address that a node can be reached at. flannel writes an
// absent IPv4 address as 0.0.0.0 or "".
func publicIP(field string, s *string, f Family) (netip.Addr, error) {
	if s == nil || *s == "" {
		return netip.Addr{}, nil
	}
	a, err := netip.ParseAddr(*s)
	if err != nil {
		return a, fmt.Errorf("%s: %w", field, err)
	}
	a = a.Unmap()
	if a.IsUnspecified() {
		return netip.Addr{}, nil
	}
	if FamilyOf(a) != f || a.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("%s: %s is not an %s address", field, a, f)
	}
	if !a.IsGlobalUnicast() && !(a.Is4() && a.IsLinkLocalUnicast()) {
		return netip.Addr{}, fmt.Errorf("%s: %s cannot be a node's address", field, a)
	}
	return a, nil
}

func parseVTEP(field, data string) (VTEP, error) {
	if data == "" || data == "null" {
		return VTEP{}, nil
	}
	var v vtepValue
	if err := json.Unmarshal([]byte(data), &v); err != nil {
		return VTEP{}, fmt.Errorf("%s: %w", field, err)
	}
	mac, err := ParseMAC(v.VtepMAC)
	if err != nil {
		return VTEP{}, fmt.Errorf("%s: VtepMAC: %w", field, err)
	}
	return VTEP{VNI: v.VNI, MAC: mac}, nil
}

// ParseMAC reads a unicast Ethernet address in the usual colon form.
func ParseMAC(s string) (MAC, error) {
	var m MAC
	b, err := hex.DecodeString(strings.ReplaceAll(s, ":", ""))
	if err == nil {
		copy(m[:], b)
	}
	if err != nil || m.String() != strings.ToLower(s) {
		return MAC{}, fmt.Errorf("%q is not an Ethernet address like 0e:2a:00:00:00:01", s)
	}
	if m == (MAC{}) || m[0]&1 != 0 {
		return MAC{}, fmt.Errorf("%s is not a unicast Ethernet address", s)
	}
	return m, nil
}

// Value is the stored form of a: byte for byte what flannel writes.
func (a Attrs) Value() []byte {
	v := leaseValue{PublicIP: new(string), BackendType: a.Backend}
	*v.PublicIP = "0.0.0.0"
	if a.PublicIP.IsValid() {
		*v.PublicIP = a.PublicIP.String()
	}
	if a.PublicIPv6.IsValid() {
		s := a.PublicIPv6.String()
		v.PublicIPv6 = &s
	}
	if a.Data != "" {
		v.Data = json.RawMessage(a.Data)
	}
	if a.DataV6 != "" {
		v.DataV6 = json.RawMessage(a.DataV6)
	}
	b, err := json.Marshal(v)
	if err != nil { // Data that is not JSON: Attrs were not made by ParseAttrs or a backend
		panic(fmt.Sprintf("marshal lease value: %v", err))
	}
	return b
}

// data returns the BackendData that publishes v.
func (v VTEP) data() string {
	b, err := json.Marshal(vtepValue{VNI: v.VNI, VtepMAC: v.MAC.String()})
	if err != nil {
		panic(fmt.Sprintf("marshal VTEP: %v", err))
	}
	return string(b)
}

// compact returns JSON as Value writes it, so that what is read and what is to
// be written compare with ==.
func compact(raw json.RawMessage) string {
	if len(raw) == 0 {
		return ""
	}
	b, err := json.Marshal(raw)
	if err != nil || string(b) == "null" {
		return ""
	}
	return string(b)
}
