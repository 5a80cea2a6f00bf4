package kubernetes

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/twill-net/twill/pkg/nettest"
)

// migration is a cluster on its way from flannel to Twill and back.
type migration struct {
	*Cluster
	image   string
	clients []core.Pod // wired by flannel, they stay all the time
}

// TestMigration takes a cluster of flannel's over, node by node, and gives it back, while
// 1,000 packets a second go between all pods, both ways, and none is lost.
func TestMigration(t *testing.T) {
	c := Start(t, Options{CNI: "none"})
	m := startFlannel(t, c)
	before := map[string]string{}
	for _, n := range c.Nodes {
		before[n.Name] = n.shell(t, flannelIdentity)
	}

	packets := m.startAllProbes(t)
	m.migrate(t, "--node", "n1")
	c.Mark("n1 is Twill's")
	m.checkTwill(t, "n1", before["n1"])
	m.checkFlannel(t, "n2")
	m.checkFreshPods(t, "mixed")

	m.interruptMigration(t)
	m.migrate(t)
	c.Mark("all nodes are Twill's")
	for _, n := range c.Nodes {
		m.checkTwill(t, n.Name, before[n.Name])
	}
	m.checkFreshPods(t, "twill")
	m.checkWebAgain(t)
	packets.stop(t)
	c.Mark("to Twill: probes counted")

	packets = m.startAllProbes(t)
	m.migrate(t, "--back", "--node", "n1")
	c.Mark("n1 is flannel's again")
	m.checkFlannel(t, "n1")
	m.checkFreshPods(t, "back")
	m.migrate(t, "--back")
	for _, n := range c.Nodes {
		m.checkFlannel(t, n.Name)
		if now := n.shell(t, flannelIdentity); now != before[n.Name] {
			t.Errorf("%s is not as it was: was\n%sis\n%s", n.Name, before[n.Name], now)
		}
	}
	m.checkNoTwill(t)
	m.checkWebAgain(t)
	m.checkNoPods(t)
	packets.stop(t)
	c.Mark("back: probes counted")
	for _, n := range c.Nodes {
		c.checkReservations(t, n)
	}
}

// startFlannel makes it flannel's cluster, with pods that have host ports and others.
func startFlannel(t *testing.T, c *Cluster) *migration {
	t.Helper()
	archive, ref, err := c.Image()
	must(t, err)
	must(t, c.each(func(n *Node) error { return n.ImportImage(archive) }))
	must(t, c.InstallFlannel(minutes(t, 3), `{"Network": "10.244.0.0/16", "EnableNFTables": false, "Backend": {"Type": "vxlan"}}`))
	c.Mark("flannel runs")
	must(t, c.Apply(c.WebManifest()))
	m := &migration{Cluster: c, image: ref, clients: c.startClients(t)}
	m.web(t)
	for _, n := range c.Nodes {
		m.checkFlannel(t, n.Name)
	}
	c.checkReach(t, m.clients, m.clients)
	return m
}

// web waits for the pods that have host ports, and asks them by these.
func (m *migration) web(t *testing.T) []core.Pod {
	t.Helper()
	pods, err := m.WaitPodsRunning(minutes(t, 3), "default", "app=web", len(m.Nodes))
	must(t, err)
	for _, p := range pods {
		must(t, Eventually(minutes(t, 1), func() error {
			got, err := AskFromHost(t.Context(), m.Outside.NS, port(m.Node(p.Spec.NodeName).IPv4, 8088), AskName)
			if err == nil && got != p.Name {
				err = fmt.Errorf("host port of %s: %s answers, want %s", p.Spec.NodeName, got, p.Name)
			}
			return err
		}))
	}
	return pods
}

// checkWebAgain replaces the pods with host ports, which others have wired.
func (m *migration) checkWebAgain(t *testing.T) {
	t.Helper()
	m.kubectl(t, "delete", "pods", "--selector=app=web", "--timeout=2m")
	m.web(t)
	for _, n := range m.Nodes {
		m.checkReservations(t, n)
	}
}

// startAllProbes sends between all pairs of nodes.
func (m *migration) startAllProbes(t *testing.T) *probes {
	t.Helper()
	all := &probes{}
	for i, a := range m.clients {
		for _, b := range m.clients[i+1:] {
			p := m.startProbes(t, a, b)
			all.names, all.all = append(all.names, p.names...), append(all.all, p.all...)
		}
	}
	return all
}

func (m *migration) migrate(t *testing.T, args ...string) {
	t.Helper()
	out, err := m.Netctl(append([]string{"migrate-from-flannel", "--image", m.image}, args...)...)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// interruptMigration kills netctl when n2 is between the two.
func (m *migration) interruptMigration(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(minutes(t, 2))
	defer cancel()
	netctl := nettest.Build(t, "./daemon/cmd/netctl")
	cmd := m.ControlPlane.Command(ctx, netctl, "migrate-from-flannel", "--image", m.image, "--kubeconfig", m.Kubeconfig())
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(t, cmd.Start())
	must(t, Eventually(ctx, func() error {
		n, err := m.Client.CoreV1().Nodes().Get(ctx, "n2", meta.GetOptions{})
		if err == nil && n.Labels["twill.net/migration"] == "" {
			err = fmt.Errorf("n2 has labels %v", n.Labels)
		}
		return err
	}))
	cancel()
	if exit, ok := cmd.Wait().(*exec.ExitError); !ok || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Errorf("netctl was not killed: %v", cmd.ProcessState)
	}
	m.Mark("netctl killed at n2")
	m.checkFlannel(t, "n3")
}

// checkFreshPods starts a pod on each node, and they and the old ones reach each other.
func (m *migration) checkFreshPods(t *testing.T, name string) {
	t.Helper()
	manifest := strings.ReplaceAll(client, "client", name)
	must(t, m.Apply(manifest))
	fresh, err := m.WaitPodsRunning(minutes(t, 3), "default", "app="+name, len(m.Nodes))
	must(t, err)
	m.checkReach(t, fresh, m.clients)
	m.checkReach(t, m.clients, fresh)
	must(t, m.Delete(manifest))
}

// flannelIdentity prints what a node must keep: device, MAC, lease, addresses.
const flannelIdentity = `cat /sys/class/net/flannel.1/ifindex /sys/class/net/flannel.1/address /run/flannel/subnet.env
ip -4 -o addr show dev flannel.1 | grep -o 'inet.*/[0-9]*'; ip -4 -o addr show dev cni0 | grep -o 'inet.*/[0-9]*'; ls /etc/cni/net.d
`

// annotations of a node that are flannel's.
func (m *migration) annotations(t *testing.T, node string) map[string]string {
	t.Helper()
	n, err := m.Client.CoreV1().Nodes().Get(t.Context(), node, meta.GetOptions{})
	must(t, err)
	return n.Annotations
}

// checkAnnotations: whoever runs there, a peer reaches the node by what they say.
func (m *migration) checkAnnotations(t *testing.T, node string) {
	t.Helper()
	mac := strings.TrimSpace(m.Node(node).shell(t, "cat /sys/class/net/flannel.1/address"))
	have := m.annotations(t, node)
	for name, want := range map[string]string{
		"kube-subnet-manager": "true", "backend-type": "vxlan", "public-ip": m.Node(node).IPv4.String(),
		"backend-data": fmt.Sprintf(`{"VNI":1,"VtepMAC":"%s"}`, mac),
	} {
		if got := have["flannel.alpha.coreos.com/"+name]; got != want {
			t.Errorf("annotation %s of %s is %q, want %q", name, node, got, want)
		}
	}
}

func (m *migration) checkFlannel(t *testing.T, node string) {
	t.Helper()
	m.checkAnnotations(t, node)
	state := m.Node(node).shell(t, kernelState)
	checkHas(t, node, state, "FLANNEL-POSTRTG", "FLANNEL-FWD", "10-flannel.conflist")
	checkLacks(t, node, state, "TWILL-POSTRTG", "TWILL-FWD", "10-twill.conflist", "table ip twill", "proto 84")
	if strings.Contains(m.Node(node).shell(t, "ip -d link show dev flannel.1"), "alias") {
		t.Errorf("flannel.1 of %s is still Twill's", node)
	}
}

// checkNoPods: the last pod that Twill wired has taken everything along.
func (m *migration) checkNoPods(t *testing.T) {
	t.Helper()
	for _, n := range m.Nodes {
		checkLacks(t, n.Name, n.shell(t, kernelState), "TWILL-", "twill:", "alias twill")
		checkLacks(t, n.Name, n.shell(t, "cd /var/lib/cni; find networks flannel -type f"), "/attachments/cbr0/", ".tmp")
	}
}

func (m *migration) checkTwill(t *testing.T, node, before string) {
	t.Helper()
	m.checkAnnotations(t, node)
	state := m.Node(node).shell(t, kernelState)
	checkHas(t, node, state, "TWILL-", "alias twill", "10-twill.conflist")
	checkLacks(t, node, state, "FLANNEL", "flanneld", " 10-flannel.conflist")
	now := strings.ReplaceAll(m.Node(node).shell(t, flannelIdentity), "10-twill.conflist", "10-flannel.conflist")
	if now != before {
		t.Errorf("%s is not as flannel had it: was\n%sis\n%s", node, before, now)
	}
	if out, err := m.Twilld(node, "netctl", "status"); err != nil || !strings.Contains(out, "problems   none") {
		t.Errorf("netctl status on %s: %v\n%s", node, err, out)
	}
	if out, err := m.Twilld(node, "netctl", "diff"); err != nil {
		t.Errorf("netctl diff on %s: %v\n%s", node, err, out)
	}
}

// kernelState is where flannel and Twill leave traces.
const kernelState = `iptables-save; nft list ruleset; ip -d link; ip route; ip nexthop; cd /etc/cni/net.d; echo "" *`

func checkHas(t *testing.T, where, state string, words ...string) {
	t.Helper()
	for _, word := range words {
		if !strings.Contains(state, word) {
			t.Errorf("%s has no %q:\n%s", where, word, state)
		}
	}
}

func checkLacks(t *testing.T, where, state string, words ...string) {
	t.Helper()
	for _, word := range words {
		if strings.Contains(state, word) {
			t.Errorf("%s has %q:\n%s", where, word, state)
		}
	}
}

// checkNoTwill: after the last node, no object of Twill's is left, and flannel's are as
// they were.
func (m *migration) checkNoTwill(t *testing.T) {
	t.Helper()
	must(t, Eventually(minutes(t, 1), func() error {
		out, err := m.Kubectl("get", "namespace,clusterrole,clusterrolebinding", "-o", "name")
		if err == nil && strings.Contains(out, "twill") {
			err = fmt.Errorf("objects of Twill's are left:\n%s", out)
		}
		return err
	}))
	out := m.kubectl(t, "get", "daemonset,node", "-A", "-o", "yaml")
	checkLacks(t, "the cluster", out, "twill.net/")
}
