package speaker

import (
	"strings"
	"testing"
)

// TestSpan: what an export rule and the pod networks have in common.
func TestSpan(t *testing.T) {
	pods := inside(prefix("10.5.0.0/16"))
	for _, tt := range []struct {
		rule, want span
		ok         bool
	}{
		{span{prefix("0.0.0.0/0"), 0, 32}, span{prefix("10.5.0.0/16"), 16, 32}, true},
		{span{prefix("10.5.0.0/16"), 16, 24}, span{prefix("10.5.0.0/16"), 16, 24}, true},
		{span{prefix("10.5.4.0/22"), 24, 24}, span{prefix("10.5.4.0/22"), 24, 24}, true},
		{span{prefix("10.0.0.0/8"), 8, 15}, span{}, false},
		{span{prefix("10.6.0.0/16"), 16, 32}, span{}, false},
	} {
		got, ok := tt.rule.and(pods)
		if ok != tt.ok || ok && got != tt.want {
			t.Errorf("%v: got %v %t, want %v %t", tt.rule, got, ok, tt.want, tt.ok)
		}
	}
}

func TestCounters(t *testing.T) {
	const netstat = `TcpExt: SyncookiesSent TCPMD5NotFound TCPMD5Unexpected TCPMD5Failure
TcpExt: 1 2 3 18446744073709551615
IpExt: InNoRoutes TCPMD5Odd
IpExt: 0
`
	got := parseCounters(strings.NewReader(netstat))
	if len(got) != 3 || got["TCPMD5NotFound"] != 2 || got["TCPMD5Unexpected"] != 3 || got["TCPMD5Failure"] != 1<<64-1 {
		t.Errorf("%v", got)
	}
	if d := since(got, map[string]uint64{"TCPMD5NotFound": 2}); d["TCPMD5NotFound"] != 0 || d["TCPMD5Unexpected"] != 3 {
		t.Errorf("%v", d)
	}
	if got := parseCounters(strings.NewReader("TcpExt: TCPMD5Failure\n")); len(got) != 0 {
		t.Errorf("names without values: %v", got)
	}
}
