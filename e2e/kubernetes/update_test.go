package kubernetes

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// rolling updates the DaemonSet in all the ways there are, under probes.
func (l *life) rolling(t *testing.T) {
	_, ref, err := l.Image()
	must(t, err)
	next := ref[:strings.LastIndex(ref, ":")] + ":next"
	for _, n := range l.Nodes {
		n.shell(t, fmt.Sprintf("ctr -n k8s.io images tag --force %s %s", ref, next))
	}
	for _, act := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"another image", func(t *testing.T) {
			l.twillctl(t, "set", "image", "daemonset/twill", "twilld="+next, "install-cni="+next)
			l.rolledOut(t)
		}},
		{"another argument", func(t *testing.T) {
			l.twillctl(t, "patch", "daemonset", "twill", "--type=json",
				`--patch=[{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": "--log-level=debug"}]`)
			l.rolledOut(t)
		}},
		{"all its pods deleted at once", func(t *testing.T) {
			l.twillctl(t, "delete", "pods", "--selector=app=twill", "--wait=true", "--timeout=3m")
			l.rolledOut(t)
		}},
		{"kill -9", func(t *testing.T) {
			for _, n := range l.Nodes {
				l.killTwilld(t, n)
			}
			l.rolledOut(t)
		}},
	} {
		t.Run(act.name, func(t *testing.T) {
			began := time.Now()
			l.underProbes(t, act.run)
			l.Mark("update by %s took %.1f s", act.name, time.Since(began).Seconds())
		})
	}
}

// twillctl runs kubectl on Twill's namespace.
func (l *life) twillctl(t testing.TB, args ...string) string {
	t.Helper()
	return l.kubectl(t, append([]string{"--namespace=twill-system"}, args...)...)
}

// rolledOut waits until the DaemonSet's pods are new and Ready on all nodes.
func (l *life) rolledOut(t testing.TB) {
	t.Helper()
	l.twillctl(t, "rollout", "status", "daemonset/twill", "--timeout=3m")
	_, err := l.WaitPodsRunning(minutes(t, 3), "twill-system", "app=twill", len(l.Nodes))
	must(t, err)
}

// killTwilld kills twilld on the node and waits until its container is there again.
func (l *life) killTwilld(t testing.TB, n *Node) {
	t.Helper()
	old := strings.TrimSpace(n.shell(t, "pidof twilld"))
	n.shell(t, "kill -9 "+old)
	must(t, Eventually(minutes(t, 2), func() error {
		now, err := n.Run("pidof", "twilld")
		if err == nil && strings.TrimSpace(now) == old {
			err = fmt.Errorf("twilld on %s is still the old one", n.Name)
		}
		return err
	}))
}
