package kubernetes

import (
	"strings"
	"testing"
	"time"
)

// reboot cuts a node's power and switches it on again.
func (l *life) reboot(t *testing.T) {
	n := l.Nodes[1]
	before := l.pods[1]
	must(t, n.Kill())
	must(t, n.Start())
	began := time.Now()
	l.whole(t)
	l.Mark("pods are back %.1f s after the reboot: %s had %s, has %s", time.Since(began).Seconds(), before.Name, before.Status.PodIP, l.pods[1].Status.PodIP)
	if !long() {
		return
	}
	// Once more with a pod that is deleted from the API while its node is off.
	must(t, n.Kill())
	l.kubectl(t, "delete", "pod", l.pods[1].Name, "--force", "--grace-period=0")
	must(t, n.Start())
	l.whole(t)
}

// rebootAlone reboots a node while the API server is away. The kubelet then knows of no
// pod but its own, so not of twilld, and without that there is no network yet: pods wait,
// and are told why.
func (l *life) rebootAlone(t *testing.T) {
	n := l.Nodes[1]
	must(t, n.Kill())
	must(t, l.APIServer.Stop())
	must(t, n.Start())
	n.addStatic(t, "alone")
	log := n.Disk() + "/log/" + n.Name + "-kubelet.log"
	must(t, Eventually(minutes(t, 2), func() error {
		_, err := n.Run("sh", "-c", "tail -n +1 "+log+" | grep -q 'alone.*twill'")
		return err
	}))
	out := n.shell(t, "grep 'alone.*twill' "+log+" | tail -n 1")
	t.Logf("the kubelet says: %s", strings.TrimSpace(out))
	must(t, l.APIServer.Start())
	l.whole(t)
	must(t, Eventually(minutes(t, 2), func() error {
		_, err := l.Kubectl("wait", "--for=condition=Ready", "pod/alone-"+n.Name, "--timeout=1s")
		return err
	}))
	l.checkReservations(t, n)
	n.stopStatic(t, "alone", nil)
	must(t, l.WaitPodsGone(minutes(t, 2), "default", "app=alone"))
	l.checkReservations(t, n)
}
