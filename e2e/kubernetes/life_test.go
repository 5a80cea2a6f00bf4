package kubernetes

import (
	"encoding/json"
	"fmt"
	"testing"

	core "k8s.io/api/core/v1"

	"github.com/twill-net/twill/pkg/overlay"
)

// life is a cluster of two nodes through what may happen to nodes, one thing after the
// other, with a pod on each that must be reached again, or all the time.
type life struct {
	*Cluster
	pods []core.Pod // of the DaemonSet client, by node
}

// TestLife updates, reboots, renames and removes nodes, and takes the API away.
func TestLife(t *testing.T) {
	l := &life{Cluster: Start(t, Options{Nodes: 2, Stack: DualStack})}
	l.pods = l.startClients(t)
	for _, part := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"rolling update", l.rolling},
		{"API server away", l.apiAway},
		{"token refused", l.tokenRefused},
		{"reboot", l.reboot},
		{"reboot without API server", l.rebootAlone},
		{"registered again", l.registerAgain},
		{"address changed", l.moveNode},
		{"renamed", l.rename},
		{"removed", l.removeNode},
	} {
		if !t.Run(part.name, part.run) {
			t.Fatalf("%s failed: what follows has no cluster to stand on", part.name)
		}
		l.Mark("%s: done", part.name)
	}
}

// underProbes runs act while pods of both nodes send probes to each other.
func (l *life) underProbes(t *testing.T, act func(*testing.T)) {
	t.Helper()
	p := l.startProbes(t, l.pods[0], l.pods[1])
	act(t)
	p.stop(t)
	for _, n := range l.Nodes {
		l.checkReservations(t, n)
	}
}

// whole waits until each node's twilld is at its store, pods run on all nodes and reach
// each other, and no address is anybody's but theirs.
func (l *life) whole(t *testing.T) {
	t.Helper()
	must(t, l.WaitNodesReady(minutes(t, 3)))
	l.rolledOut(t)
	for _, n := range l.Nodes {
		l.waitStatus(t, n, "at its store", func(s overlay.Status) bool { return s.Ready && s.Store.Connected })
	}
	l.pods = l.clients(t)
	l.checkReach(t, l.pods, l.pods)
	for _, n := range l.Nodes {
		l.checkReservations(t, n)
	}
}

// status is what netctl tells on the node.
func (l *life) status(n *Node) (overlay.Status, error) {
	var s overlay.Status
	out, err := l.Twilld(n.Name, "netctl", "status", "-o", "json")
	if out != "" { // also with problems, which are an exit code
		err = json.Unmarshal([]byte(out), &s)
	}
	return s, err
}

// waitStatus waits until netctl status on the node is good.
func (l *life) waitStatus(t *testing.T, n *Node, what string, good func(overlay.Status) bool) {
	t.Helper()
	must(t, Eventually(minutes(t, 2), func() error {
		s, err := l.status(n)
		if err == nil && !good(s) {
			err = fmt.Errorf("%s is not %s: %+v", n.Name, what, s)
		}
		return err
	}))
}
