//go:build linux && amd64

package main

// scenario is a way to attach a pod.
type scenario struct {
	name string
	conf map[string]any
	// run is the runtimeConfig of the pod, again that of the same pod in a new
	// sandbox before the old one is gone, neighbour that of another pod. They differ
	// in host ports, of which there is one each.
	run, again, neighbour map[string]any
	// warm: a bridged pod runs already, so the bridge is there. Else each ADD makes it.
	warm bool
	// gone: DEL, which alone is walked, is called when the namespace is gone, and
	// without the result of ADD.
	gone bool
	// from: only what follows the first step with these words is walked. What is
	// before is so in other scenarios.
	from string
	// flannel: the configuration is flannel's, with a subnet.env.
	flannel bool
	// rests: what is kept of a released address may stay.
	rests bool
}

func scenarios() []scenario {
	ports := func(tcp, udp int) map[string]any {
		return map[string]any{"portMappings": []any{
			map[string]any{"hostPort": tcp, "containerPort": 80, "protocol": "tcp"},
			map[string]any{"hostPort": udp, "containerPort": 53, "protocol": "udp"},
		}}
	}
	const mbit = 1_000_000
	mine, again, neighbour := ports(8080, 8053), ports(8081, 8054), ports(8082, 8055)
	limits := map[string]any{"bandwidth": map[string]any{
		"ingressRate": 10 * mbit, "ingressBurst": 2 * mbit, "egressRate": 20 * mbit, "egressBurst": 2 * mbit,
	}}
	return []scenario{
		{name: "bridged, first pod"},
		{name: "bridged, namespace gone", warm: true, gone: true},
		{name: "routed, beside a bridged pod", conf: map[string]any{"mode": "routed"}, warm: true},
		{name: "bandwidth", run: limits, again: limits, neighbour: limits, from: "ifb", warm: true},
		{name: "host ports by nftables", conf: map[string]any{"firewall": "nftables"}, run: mine, again: again, neighbour: neighbour, from: "/.twill/ports", warm: true},
		{name: "host ports by iptables", conf: map[string]any{"firewall": "iptables", "mode": "routed"}, run: mine, again: again, neighbour: neighbour, from: "/.twill/ports"},
		{name: "sticky address, cool-down", conf: map[string]any{"ipam": map[string]any{"sticky": true, "coolDown": "10s"}}, warm: true, rests: true},
		{name: "flannel's configuration", flannel: true, conf: map[string]any{
			"type": "flannel", "delegate": map[string]any{"hairpinMode": true, "isDefaultGateway": true}, "handoffFile": nil,
		}},
	}
}
