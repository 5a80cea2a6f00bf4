package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strings"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/twill-net/twill/pkg/nettest"
)

// Traffic asks every way there is between the pods of WebManifest, the nodes and the
// outside. It stops at nothing: the error names all that did not work.
type Traffic struct {
	*Cluster
	Pods []core.Pod // one on each node
	Asks int        // how many questions were asked
	errs []error
}

func (t *Traffic) expect(what, got string, err error, good func(string) bool) {
	t.Asks++
	switch {
	case err != nil:
		t.errs = append(t.errs, fmt.Errorf("%s: %w", what, err))
	case !good(got):
		t.errs = append(t.errs, fmt.Errorf("%s: answer %q", what, got))
	}
}

func is(want string) func(string) bool { return func(got string) bool { return got == want } }

func isHost(a netip.Addr) func(string) bool      { return func(got string) bool { return sameHost(got, a) } }
func sameFamily(a netip.Addr, b netip.Addr) bool { return a.Is4() == b.Is4() }

// gateway is the node's address in a pod's subnet: the first one.
func gateway(pod netip.Addr) netip.Addr {
	bits := 64
	if pod.Is4() {
		bits = 24
	}
	return netip.PrefixFrom(pod, bits).Masked().Addr().Next()
}

func familyOf(list []netip.Addr, a netip.Addr) netip.Addr {
	for _, b := range list {
		if sameFamily(a, b) {
			return b
		}
	}
	return netip.Addr{}
}

// Check asks all questions, once every kube-proxy knows every pod.
func (t *Traffic) Check(ctx context.Context) error {
	if err := t.waitProxies(ctx); err != nil {
		return err
	}
	t.podToPod(ctx)
	t.services(ctx)
	t.hostPorts(ctx)
	t.nodePorts(ctx)
	return errors.Join(t.errs...)
}

// waitProxies waits until each node leads its NodePorts to all pods, and to the DNS.
func (t *Traffic) waitProxies(ctx context.Context) error {
	for _, p := range t.Pods {
		n := t.Node(p.Spec.NodeName)
		err := Eventually(ctx, func() error {
			try := Traffic{Cluster: t.Cluster, Pods: t.Pods}
			for _, a := range t.addrs(n.Host) {
				try.all(func() (string, error) { return AskFromHost(ctx, t.Outside.NS, port(a, 30080), AskName) }, "NodePort of "+n.Name)
			}
			// By TCP, which is refused at once before kube-proxy knows CoreDNS. A question
			// that is lost costs 5 s.
			dns, err := n.DialContext(ctx, "tcp", net.JoinHostPort(t.opts.Stack.first(dnsIPv4, dnsIPv6), "53"))
			if err == nil {
				err = dns.Close()
			}
			return errors.Join(append(try.errs, err)...)
		})
		if err != nil {
			return fmt.Errorf("wait for kube-proxy on %s: %w", n.Name, err)
		}
	}
	t.Mark("each kube-proxy knows all pods")
	return nil
}

// podToPod: each pod to each, in both families, and it is the client's own address that
// arrives.
func (t *Traffic) podToPod(ctx context.Context) {
	for _, from := range t.Pods {
		for _, to := range t.Pods {
			for _, a := range addrs(&to) {
				got, err := t.AskFromPod(ctx, &from, port(a, 8080), AskClient)
				t.expect("pod to pod", got, err, isHost(familyOf(addrs(&from), a)))
			}
		}
	}
}

// services: each pod and each node reaches the Service by its address, in both families,
// and is answered by all pods, also by the one that asks (hairpin). It is a pod's own
// address that arrives, but at itself, where kube-proxy has it masqueraded. Pods reach the
// Service by its names, too.
func (t *Traffic) services(ctx context.Context) {
	service, err := t.Client.CoreV1().Services("default").Get(ctx, "web", meta.GetOptions{})
	if err != nil {
		t.errs = append(t.errs, err)
		return
	}
	for _, ip := range service.Spec.ClusterIPs {
		a := netip.MustParseAddr(ip)
		for _, from := range t.Pods {
			t.all(func() (string, error) { return t.AskFromPod(ctx, &from, port(a, 80), AskName) },
				fmt.Sprintf("pod %s to Service %s", from.Name, ip))
			for range 2 * len(t.Pods) {
				own := familyOf(addrs(&from), a)
				got, err := t.AskFromPod(ctx, &from, port(a, 80), AskClient)
				t.expect("client of a Service", got, err, func(client string) bool {
					return sameHost(client, own) || sameHost(client, gateway(own))
				})
			}
		}
		for _, n := range t.Nodes {
			t.all(func() (string, error) { return AskFromHost(ctx, n.NS, port(a, 80), AskName) },
				fmt.Sprintf("node %s to Service %s", n.Name, ip))
		}
	}
	for _, from := range t.Pods {
		for _, name := range []string{"web", "web.default", "web.default.svc.cluster.local"} {
			got, err := t.AskFromPod(ctx, &from, name+":80", AskName)
			t.expect("Service by its name "+name, got, err, t.isPod)
		}
	}
}

// all asks until each pod has answered. Any pod may answer any time: that one of three has
// not after a hundred times is as good as impossible.
func (t *Traffic) all(ask func() (string, error), what string) {
	seen := map[string]bool{}
	for range 100 {
		got, err := ask()
		t.expect(what, got, err, t.isPod)
		if err != nil {
			return
		}
		if seen[got] = true; len(seen) == len(t.Pods) {
			return
		}
	}
	t.errs = append(t.errs, fmt.Errorf("%s: only %v of %d pods answered", what, seen, len(t.Pods)))
}

func (t *Traffic) isPod(name string) bool {
	for _, p := range t.Pods {
		if p.Name == name {
			return true
		}
	}
	return false
}

// hostPorts: a port of the node leads to its pod from outside, from other nodes, and from
// every pod, also from its own.
func (t *Traffic) hostPorts(ctx context.Context) {
	for _, to := range t.Pods {
		for _, a := range t.addrs(t.Node(to.Spec.NodeName).Host) {
			got, err := AskFromHost(ctx, t.Outside.NS, port(a, 8088), AskName)
			t.expect("hostPort from outside", got, err, is(to.Name))
			got, err = AskFromHost(ctx, t.Outside.NS, port(a, 8088), AskClient)
			t.expect("client of a hostPort", got, err, isHost(familyOf(t.addrs(t.Outside), a)))
			for _, from := range t.Pods {
				got, err := t.AskFromPod(ctx, &from, port(a, 8088), AskName)
				t.expect("hostPort from a pod", got, err, is(to.Name))
				got, err = AskFromHost(ctx, t.Node(from.Spec.NodeName).NS, port(a, 8088), AskName)
				t.expect("hostPort from a node", got, err, is(to.Name))
			}
		}
	}
}

// nodePorts: from outside, each node's port leads to all pods. With the policy Local, it
// leads to the node's own, which sees the client's address.
func (t *Traffic) nodePorts(ctx context.Context) {
	for _, p := range t.Pods {
		for _, a := range t.addrs(t.Node(p.Spec.NodeName).Host) {
			t.all(func() (string, error) { return AskFromHost(ctx, t.Outside.NS, port(a, 30080), AskName) },
				"NodePort of "+p.Spec.NodeName+" from outside")
			got, err := AskFromHost(ctx, t.Outside.NS, port(a, 30081), AskName)
			t.expect("NodePort with policy Local", got, err, is(p.Name))
			got, err = AskFromHost(ctx, t.Outside.NS, port(a, 30081), AskClient)
			t.expect("client of a NodePort with policy Local", got, err, isHost(familyOf(t.addrs(t.Outside), a)))
		}
	}
}

// Masquerade checks that the outside sees a pod by its node's address.
func (t *Traffic) Masquerade(ctx context.Context) error {
	server, err := t.Outside.Start(nettest.Program{Path: filepath.Join(t.programs, "agnhost"), Args: []string{"netexec", "--http-port=8080"}})
	if err != nil {
		return err
	}
	defer server.Kill9()
	if err := Eventually(ctx, func() error {
		_, err := AskFromHost(ctx, t.Outside.NS, port(t.addrs(t.Outside)[0], 8080), AskName)
		return err
	}); err != nil {
		return err
	}
	for _, from := range t.Pods {
		for _, a := range t.addrs(t.Outside) {
			got, err := t.AskFromPod(ctx, &from, port(a, 8080), AskClient)
			t.expect("pod to outside", got, err, isHost(familyOf(t.addrs(t.Node(from.Spec.NodeName).Host), a)))
		}
	}
	return errors.Join(t.errs...)
}

// Tools checks what kubelets do for an operator: logs and commands.
func (t *Traffic) Tools() error {
	for _, p := range t.Pods {
		got, err := t.Exec(p.Name, "hostname")
		t.expect("kubectl exec", strings.TrimSpace(got), err, is(p.Name))
		got, err = t.Kubectl("logs", p.Name)
		t.expect("kubectl logs", got, err, func(s string) bool { return strings.Contains(s, "8080") })
	}
	return errors.Join(t.errs...)
}
