//go:build linux && amd64

package main

// faultErrors are those that only the kernel brings about: out of memory, a disk that
// is full.
func faultErrors() []failure {
	with := func(key string, value any) func(*host, *namespace) call {
		return func(h *host, p *namespace) call { return addPod(h, p).with(key, value) }
	}
	return []failure{
		{name: "zz1", at: "NOSUCH", call: with("promiscMode", true)},
		{name: "zz2", at: "NOSUCH", call: with("mode", "routed")},
		{name: "zz3", at: "NOSUCH", call: attached("DEL", func(h *host, p *namespace) error { return nil })},
	}
}
