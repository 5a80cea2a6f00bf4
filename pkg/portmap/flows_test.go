package portmap

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/twill-net/twill/pkg/nettest"
)

// client is a UDP client that keeps its port.
type client struct {
	net.Conn
}

func (n *node) client(ns *nettest.NS, to string) client {
	n.t.Helper()
	c, err := ns.DialContext(context.Background(), "udp", to)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { c.Close() })
	return client{c}
}

// ask sends once, and returns the answer, which is empty if there is none.
func (c client) ask(wait time.Duration) string {
	b := make([]byte, 256)
	c.SetDeadline(time.Now().Add(wait))
	for range 2 { // the first call may only fetch the error of the packet before
		if _, err := c.Write([]byte("?")); err == nil {
			break
		}
	}
	l, _ := c.Read(b)
	return string(b[:l])
}

// A client that sent before there was a pod, or to the one before, reaches the
// right one with its next packet. Flows that are nobody's of ours stay.
func TestFlows(t *testing.T) {
	eachFlavour(t, func(t *testing.T, f flavour) {
		n := newNode(t, f)
		n.track()
		first, second := n.pod(1), n.pod(2)
		n.serve(first, 53)
		n.serve(second, 53)
		n.listen(n.clients[1], "outside", 5353)
		n.listen(n.clients[1], "outside", 53)
		n.listen(n.host, "host", 5354)
		udp := Mapping{HostPort: 5353, ContainerPort: 53, Protocol: "udp"}
		a, b := first.entry(udp), second.entry(udp)

		for _, to := range []struct{ addr, source string }{{hostAddr, clientAddr}, {"[" + hostAddr6 + "]", clientAddr6}} {
			// These have the same port somewhere, and must be left alone: one
			// passes through the node, one is the node's own.
			through := n.client(n.clients[0], "203.0.113.2:5353")
			local := n.client(n.clients[0], hostAddr+":5354")
			c := n.client(n.clients[0], to.addr+":5353")
			if got := c.ask(silence); got != "" {
				t.Fatalf("answer %q without a pod", got)
			}
			if through.ask(patience) != "outside "+clientAddr || local.ask(patience) != "host "+clientAddr {
				t.Fatal("the foreign flows do not stand")
			}
			foreign := n.flows("203.0.113.2", "5354")
			for _, step := range []struct {
				do   func() error
				want string
			}{
				{func() error { return n.add(a) }, "pod1 " + to.source},
				{func() error { return n.remove(a) }, ""},
				{func() error { return n.add(b) }, "pod2 " + to.source},
				{func() error { return n.remove(b) }, ""},
			} {
				if err := step.do(); err != nil {
					t.Fatal(err)
				}
				wait := patience
				if step.want == "" {
					wait = silence
				}
				if got := c.ask(wait); got != step.want {
					t.Errorf("%s: answer %q, want %q", to.addr, got, step.want)
				}
			}
			if got := n.flows("203.0.113.2", "5354"); got != foreign || strings.Count(got, "\n") < 2 {
				t.Errorf("foreign flows:\n%swere:\n%s", got, foreign)
			}
			c.Close()
			through.Close()
			local.Close()
			n.sh(n.host, "conntrack -F 2>/dev/null")
		}
	})
}

// track makes the kernel track all flows, as it does for anybody's rule, and decide
// on NAT at each one's first packet.
func (n *node) track() {
	for _, family := range []string{"ip", "ip6"} {
		n.sh(n.host, "nft 'table "+family+" foreign { chain track { type nat hook prerouting priority 0; ct state new accept; }; }'")
	}
}

// flows lists the kernel's flows that name one of the words, by what identifies them.
func (n *node) flows(words ...string) string {
	var out strings.Builder
	for line := range strings.Lines(n.sh(n.host, "conntrack -L -o id 2>/dev/null")) {
		for _, w := range words {
			if strings.Contains(line, "="+w+" ") {
				fmt.Fprintln(&out, w, line[strings.LastIndex(line, "id="):])
			}
		}
	}
	return out.String()
}

// After somebody's flush the flows of the time between are forgotten too.
func TestFlowsAfterFlush(t *testing.T) {
	eachFlavour(t, func(t *testing.T, f flavour) {
		n := newNode(t, f)
		p := n.pod(1)
		n.serve(p, 53)
		if err := n.add(p.entry(Mapping{HostPort: 5353, ContainerPort: 53, Protocol: "udp"})); err != nil {
			t.Fatal(err)
		}
		n.track()
		n.sh(n.host, "nft delete table ip twill-hostport || true; for c in iptables ip6tables; do $c -t nat -F; $c -t nat -X; $c -F; $c -X; done 2>/dev/null || true")
		c := n.client(n.clients[0], hostAddr+":5353")
		if got := c.ask(silence); got != "" {
			t.Fatalf("answer %q without rules", got)
		}
		n.sync(nil)
		if got := c.ask(patience); got != "pod1 "+clientAddr {
			t.Errorf("answer %q", got)
		}
	})
}

// The kernel sends the flows to one port alone, of however many.
func TestManyFlows(t *testing.T) {
	n := newNode(t, flavours()[0])
	const flows = 100_000
	var doc bytes.Buffer
	for i := range flows {
		fmt.Fprintf(&doc, "-I -p udp -s 203.0.%d.%d -d 198.51.100.9 --sport %d --dport %d -t 600\n", i>>8&255, i&255, 1024+i>>16, 1000+i%1000)
	}
	n.must(func() error {
		cmd := exec.Command("conntrack", "-R", "-")
		cmd.Stdin = &doc
		return cmd.Run()
	})
	n.must(func() error {
		seen, begin := 0, time.Now()
		s := service{2, 17, 1234}
		err := s.dumpFrom(s.request(true), func(flow) { seen++ })
		t.Logf("%d of %d flows in %s", seen, flows, time.Since(begin))
		if err != nil || seen != flows/1000 {
			t.Errorf("%d flows, %v, want %d", seen, err, flows/1000)
		}
		// An older kernel sends all.
		seen, begin = 0, time.Now()
		err = s.dumpFrom(s.request(false), func(flow) { seen++ })
		t.Logf("without filter in %s", time.Since(begin))
		if err != nil || seen != flows/1000 {
			t.Errorf("without filter: %d flows, %v, want %d", seen, err, flows/1000)
		}
		return nil
	})
}

// While others' rules come and go, every new connection reaches its pod.
func TestNoGap(t *testing.T) {
	eachFlavour(t, func(t *testing.T, f flavour) {
		n := newNode(t, f)
		p := n.pod(1)
		n.serve(p, 53)
		n.listen(n.host, "host", 5353) // who answers if the rules are missing
		if err := n.add(p.entry(Mapping{HostPort: 5353, ContainerPort: 53, Protocol: "udp"})); err != nil {
			t.Fatal(err)
		}
		other := n.fake(2, tcp(8080, 80))
		other.Masquerade = []netip.Prefix{}
		var asked, wrong atomic.Int64
		stop := make(chan struct{})
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				select {
				case <-stop:
					return
				default:
				}
				c := n.client(n.clients[0], hostAddr+":5353")
				if got := c.ask(patience); got != "pod1 "+clientAddr {
					wrong.Add(1)
					t.Logf("answer %q", got)
				}
				asked.Add(1)
				c.Close()
			}
		}()
		for range 20 {
			if err := n.add(other); err != nil {
				t.Error(err)
			}
			if err := n.remove(other); err != nil {
				t.Error(err)
			}
		}
		close(stop)
		<-done
		if wrong.Load() > 0 || asked.Load() == 0 {
			t.Errorf("%d of %d connections went wrong", wrong.Load(), asked.Load())
		}
		t.Logf("%d connections", asked.Load())
	})
}
