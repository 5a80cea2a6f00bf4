package udptun_test

import (
	"testing"
)

func TestQuick(t *testing.T) {
	p := newPair(t)
	for i := range p.ns {
		p.addDevice(t, i)
		p.start(t, i, child{Role: "tunnel", Device: device, Port: port, Peers: p.peers(i, 0)})
	}
	out, err := p.ns[0].Run("timeout", "3", "strace", "-V")
	_ = out
	out, err = p.ns[0].Run("ping", "-c", "1", "-W", "1", inner(1)[0].String())
	t.Log(out, err)
	t.Log(p.run(t, 0, "ip", "-s", "link"))
	t.Log(p.run(t, 1, "ip", "-s", "link"))
	t.Log(p.run(t, 1, "nstat", "-a"))
}
