package udptun_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/nettest"
)

// plane is a way from the first namespace to the second; they stand side by side
// and carry nothing but what is measured.
type plane struct {
	name string
	to   netip.Addr
}

// BenchmarkThroughput compares the tunnel with the bare cable, the kernel's VXLAN
// and the tunnel made of libraries, on one pair of namespaces. Run it with
// -benchtime 1x -count 5: each measurement takes two seconds, planes alternate.
func BenchmarkThroughput(b *testing.B) {
	p := newPair(b)
	planes := benchPlanes(b, p)
	for i := range p.ns {
		iperf := nettest.Program{Path: "iperf3", Args: []string{"-s"}, Name: "iperf3"}
		if i == 1 {
			if _, err := p.ns[i].Start(iperf); err != nil {
				b.Fatal(err)
			}
		}
	}
	for _, pl := range planes {
		p.start(b, 1, child{Role: "echo", To: netip.AddrPortFrom(pl.to, 7007)})
	}
	loads := []struct {
		name string
		unit string
		run  func(testing.TB, *pair, netip.Addr) float64
	}{
		{"tcp1", "Gb/s", iperf("-P", "1")},
		{"tcp4", "Gb/s", iperf("-P", "4")},
		{"udp", "Gb/s", iperf("-u", "-b", "0", "-l", "1300")},
		{"pingpong", "µs", pingpong},
	}
	for _, load := range loads {
		seen := map[string]float64{}
		for _, pl := range planes {
			b.Run(load.name+"/"+pl.name, func(b *testing.B) {
				var total float64
				for b.Loop() {
					total += load.run(b, p, pl.to)
				}
				v := total / float64(b.N)
				seen[pl.name] = v
				b.ReportMetric(v, load.unit)
				b.ReportMetric(0, "ns/op")
				if vx := seen["vxlan"]; vx > 0 {
					b.ReportMetric(v/vx, "x-vxlan")
				}
			})
		}
	}
}

func benchPlanes(b *testing.B, p *pair) []plane {
	for i := range p.ns {
		p.ip(b, i, fmt.Sprintf("link add vx type vxlan id 7 dstport 4789 local %s remote %s", p.addrs[i][0], p.addrs[1-i][0]))
		p.ip(b, i, fmt.Sprintf("addr add 10.6.0.%d/24 dev vx", i+1))
		p.ip(b, i, "link set vx up")
		p.addDevice(b, i)
		p.ip(b, i, "link set "+device+" mtu 1472")
		queues, _ := strconv.Atoi(os.Getenv("UDPTUN_QUEUES"))
		p.start(b, i, child{Role: "tunnel", Device: device, Port: port, Queues: queues, Peers: p.peers(i, 0), Profile: os.Getenv("UDPTUN_PROFILE")})
		p.start(b, i, child{Role: "library", Device: "lib0", Port: 9285, To: netip.AddrPortFrom(p.addrs[1-i][0], 9285)})
		p.ip(b, i, fmt.Sprintf("addr add 10.7.0.%d/24 dev lib0", i+1))
		p.ip(b, i, "link set lib0 mtu 1472 up")
	}
	return []plane{{"bare", p.addrs[1][0]}, {"vxlan", addr("10.6.0.2")}, {"udptun", inner(1)[0]}, {"library", addr("10.7.0.2")}}
}

// iperf measures what the receiver got, in Gbit/s.
func iperf(args ...string) func(testing.TB, *pair, netip.Addr) float64 {
	return func(t testing.TB, p *pair, to netip.Addr) float64 {
		t.Helper()
		out := p.run(t, 0, "timeout", append([]string{"10", "iperf3", "-J", "-t", "2", "-c", to.String()}, args...)...)
		var r struct {
			End struct {
				Received struct {
					Bits float64 `json:"bits_per_second"`
				} `json:"sum_received"`
			} `json:"end"`
		}
		if err := json.Unmarshal([]byte(out), &r); err != nil {
			t.Fatal(err)
		}
		return r.End.Received.Bits / 1e9
	}
}

func pingpong(t testing.TB, p *pair, to netip.Addr) float64 {
	t.Helper()
	c := child{Role: "pingpong", To: netip.AddrPortFrom(to, 7007)}
	prog := c.program(t)
	out := p.run(t, 0, "env", append(prog.Env, prog.Path)...)
	v, err := strconv.ParseFloat(strings.TrimSpace(out), 64)
	if err != nil {
		t.Fatal(err)
	}
	return v
}
