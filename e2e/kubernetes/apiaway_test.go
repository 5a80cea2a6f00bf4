package kubernetes

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/twill-net/twill/pkg/overlay"
)

// staticPod is a pod of a kubelet's own, which needs no API server.
const staticPod = `apiVersion: v1
kind: Pod
metadata: {name: %[1]s, labels: {app: %[1]s}}
spec:
  terminationGracePeriodSeconds: 1
  enableServiceLinks: false
  containers:
  - {name: pause, image: "` + PauseImage + `"}
`

func (n *Node) staticFile(name string) string { return filepath.Join(n.Disk(), "static", name+".yaml") }

// addStatic has the node's kubelet run a pod, and returns without waiting.
func (n *Node) addStatic(t testing.TB, name string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(n.staticFile(name)), 0o755))
	hidden := filepath.Join(filepath.Dir(n.staticFile(name)), ".new")
	must(t, os.WriteFile(hidden, fmt.Appendf(nil, staticPod, name), 0o644))
	must(t, os.Rename(hidden, n.staticFile(name)))
}

// startStatic has the node's kubelet run a pod and returns the pod's addresses.
func (n *Node) startStatic(t testing.TB, name string) []netip.Addr {
	t.Helper()
	before := n.reserved(t)
	n.addStatic(t, name)
	want := 1
	if n.cluster.opts.Stack == DualStack {
		want = 2
	}
	var got []netip.Addr
	must(t, Eventually(minutes(t, 2), func() error {
		got = nil
		for _, a := range n.reserved(t) {
			if !slices.Contains(before, a) {
				got = append(got, netip.MustParseAddr(a))
			}
		}
		if len(got) != want {
			return fmt.Errorf("static pod %s on %s has addresses %v", name, n.Name, got)
		}
		return nil
	}))
	return got
}

// stopStatic removes the pod and waits until its addresses are free.
func (n *Node) stopStatic(t testing.TB, name string, addrs []netip.Addr) {
	t.Helper()
	must(t, os.Remove(n.staticFile(name)))
	must(t, Eventually(minutes(t, 2), func() error {
		for _, a := range addrs {
			if slices.Contains(n.reserved(t), a.String()) {
				return fmt.Errorf("%s of pod %s, which has gone, is still reserved on %s", a, name, n.Name)
			}
		}
		return nil
	}))
}

// apiAway takes the API server away under probes. Meanwhile pods come and go, and twilld
// starts without it.
func (l *life) apiAway(t *testing.T) {
	away := 40 * time.Second
	if long() {
		away = 5 * time.Minute
	}
	a, b := l.Nodes[0], l.Nodes[1]
	l.underProbes(t, func(t *testing.T) {
		must(t, l.APIServer.Stop())
		end := time.Now().Add(away)
		for round := 0; round == 0 || time.Now().Before(end); round++ {
			l.comeAndGo(t, a, fmt.Sprintf("before%d", round))
			if round == 0 { // the kubelet waits longer after each end
				for _, n := range l.Nodes {
					l.killTwilld(t, n)
				}
			}
			l.comeAndGo(t, b, fmt.Sprintf("after%d", round))
		}
		must(t, l.APIServer.Start())
		l.Mark("API server is back after %.0f s", away.Seconds())
		l.whole(t)
	})
}

// comeAndGo has a pod come, be reached from the other node, and go.
func (l *life) comeAndGo(t *testing.T, n *Node, name string) {
	t.Helper()
	addrs := n.startStatic(t, name)
	for _, p := range l.pods {
		for _, a := range addrs {
			must(t, Eventually(minutes(t, 1), func() error { return ping(l.netns(t, p), a) }))
		}
	}
	n.stopStatic(t, name, addrs)
}

// tokenRefused makes the tokens of all pods of Twill worth nothing, as a clock that jumps
// past their end does, under probes: each node says so, and new pods are the remedy.
func (l *life) tokenRefused(t *testing.T) {
	l.underProbes(t, func(t *testing.T) {
		accounts := l.Client.CoreV1().ServiceAccounts("twill-system")
		old, err := accounts.Get(t.Context(), "twill", meta.GetOptions{})
		must(t, err)
		must(t, accounts.Delete(t.Context(), "twill", meta.DeleteOptions{}))
		_, err = accounts.Create(t.Context(), &core.ServiceAccount{ObjectMeta: meta.ObjectMeta{Name: "twill", Labels: old.Labels}}, meta.CreateOptions{})
		must(t, err)
		must(t, l.APIServer.Stop()) // connections that are open would stay good
		must(t, l.APIServer.Start())
		for _, n := range l.Nodes {
			l.waitStatus(t, n, "refused by the API server", func(s overlay.Status) bool {
				return s.Ready && strings.Contains(s.Store.Error, "does not accept the service account token")
			})
			l.comeAndGo(t, n, "refused-"+n.Name)
		}
		l.twillctl(t, "rollout", "restart", "daemonset/twill")
		l.whole(t)
	})
}
