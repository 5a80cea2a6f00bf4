package nettest

import (
	"net/netip"
	"slices"
	"testing"
)

func TestCapture(t *testing.T) {
	CheckLeaks(t)
	_, hosts := NewHosts(t, 2)
	c, err := hosts[1].Capture(CaptureOptions{})
	if err != nil {
		t.Fatal(err)
	}
	run(t, hosts[0].NS, "ping", "-c", "1", "-s", "100", "-M", "do", hosts[1].IPv4.String())
	f, err := c.Wait(t.Context(), func(f Frame) bool { return f.Proto == ProtoICMP && !f.Out })
	if err != nil {
		t.Fatal(err)
	}
	const ipAndICMP = 20 + 8
	if f.Src != hosts[0].IPv4 || f.Dst != hosts[1].IPv4 || f.Length != 100+ipAndICMP || !f.DF || f.EtherType != EtherTypeIPv4 {
		t.Errorf("captured %v", &f)
	}
	all, err := c.Stop()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []func(Frame) bool{
		func(f Frame) bool {
			return f.EtherType == EtherTypeARP && f.Src == hosts[0].IPv4 && f.Dst == hosts[1].IPv4
		},
		func(f Frame) bool { return f.Proto == ProtoICMP && f.Out && f.Src == hosts[1].IPv4 },
	} {
		if !slices.ContainsFunc(all, want) {
			t.Errorf("ARP request or echo reply is not in %v", all)
		}
	}
}

// TestCaptureVXLAN makes the tunnel with ip(8) and looks at it from the outside.
func TestCaptureVXLAN(t *testing.T) {
	tests := []struct {
		name  string
		addr  func(*Host) netip.Addr
		port  string
		inner []string // addresses of the two ends
	}{
		{"v4 in v4", func(h *Host) netip.Addr { return h.IPv4 }, "4789", []string{"203.0.113.1/24", "203.0.113.2/24"}},
		{"v6 in v6", func(h *Host) netip.Addr { return h.IPv6 }, "8472", []string{"fd00:5::1/64", "fd00:5::2/64"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, hosts := NewHosts(t, 2)
			for i, h := range hosts {
				run(t, h.NS, "ip", "link", "add", "vx", "type", "vxlan", "id", "7", "dstport", tt.port,
					"local", tt.addr(h).String(), "remote", tt.addr(hosts[1-i]).String())
				run(t, h.NS, "ip", "addr", "add", tt.inner[i], "dev", "vx", "nodad")
				run(t, h.NS, "ip", "link", "set", "vx", "up")
			}
			port := netip.MustParseAddrPort("0.0.0.0:" + tt.port).Port()
			c, err := hosts[0].Capture(CaptureOptions{
				VXLANPort: port,
				Keep:      func(f Frame) bool { return f.Inner != nil },
			})
			if err != nil {
				t.Fatal(err)
			}
			dst := netip.MustParsePrefix(tt.inner[1]).Addr()
			run(t, hosts[0].NS, "ping", "-c", "1", dst.String())
			f, err := c.Wait(t.Context(), func(f Frame) bool { return f.Inner.Dst == dst && f.Inner.Proto != ProtoTCP && f.Out })
			if err != nil {
				t.Fatal(err)
			}
			if f.VNI != 7 || f.DstPort != port || f.Proto != ProtoUDP || f.Dst != tt.addr(hosts[1]) ||
				f.Length < f.Inner.Length+14+8+8 {
				t.Errorf("captured %v", &f)
			}
		})
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte{})
	f.Add(vxlanFrame())
	f.Fuzz(func(t *testing.T, b []byte) {
		d := decoder{vxlanPort: 4789}
		if e := d.ethernet(b); e.Inner != nil && (e.Proto != ProtoUDP || e.DstPort != 4789) {
			t.Errorf("%v has an inner frame", e)
		}
		_ = d.bare(b).String()
	})
}

func TestDecode(t *testing.T) {
	whole := vxlanFrame()
	f := decoder{vxlanPort: 4789}.ethernet(whole)
	if want := "198.51.100.11 > 198.51.100.12 proto 17 length 64 ports 50000 > 4789 DF vni 1 { 10.5.1.2 > 10.5.2.3 proto 1 length 20 }"; f.String() != want {
		t.Errorf("decoded %v, want %s", f, want)
	}
	if f := (decoder{vxlanPort: 8472}).ethernet(whole); f.Inner != nil {
		t.Errorf("another port was decoded: %v", f)
	}
}

// vxlanFrame is an empty ICMP packet in VXLAN 1, by hand from the RFCs.
func vxlanFrame() []byte {
	return slices.Concat(
		make([]byte, 12), []byte{0x08, 0x00}, // MAC addresses, EtherType
		[]byte{0x45, 0, 0, 64, 0, 0, 0x40, 0, 64, 17, 0, 0}, []byte{198, 51, 100, 11, 198, 51, 100, 12},
		[]byte{0xc3, 0x50, 0x12, 0xb5, 0, 44, 0, 0}, // ports 50000, 4789
		[]byte{8, 0, 0, 0, 0, 0, 1, 0},              // VNI 1
		make([]byte, 12), []byte{0x08, 0x00},
		[]byte{0x45, 0, 0, 20, 0, 0, 0, 0, 64, 1, 0, 0}, []byte{10, 5, 1, 2, 10, 5, 2, 3},
	)
}
