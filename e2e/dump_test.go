package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// dumpScript prints all that Twill could have changed on a host, except which
// address is tried next.
const dumpScript = `set -e
for x in "-d link" "-d addr" "-d route show table all" "-d -6 route show table all" \
	"neigh show nud permanent" "-6 neigh show nud permanent" "nexthop" "rule" "-6 rule"; do
	echo "# ip $x"; ip $x
done
echo "# fdb"; bridge fdb show
echo "# iptables"; iptables-save
echo "# ip6tables"; ip6tables-save
echo "# nft"; nft list ruleset
echo "# sysctl"; sysctl net.ipv4.ip_forward net.ipv6.conf.all.forwarding net.ipv6.conf.eth0.accept_ra
echo "# files"; find /run/flannel /run/twill /var/lib/cni /etc/cni -type f ! -name 'last_reserved_ip.*' -exec sha256sum {} +`

// restless is what changes by itself: link-local addresses, timers, counters, dates.
var restless = regexp.MustCompile(`(?m)^.*\bfe80::.*\n|_timer +\S+|\[\d+:\d+\]|^# (Generated|Completed).*$|expires \d+sec|\bfdb_n_learned \d+|packets \d+ bytes \d+`)

func (n *Node) dumpKernel() (string, error) {
	out, err := n.Run("sh", "-c", dumpScript)
	return restless.ReplaceAllString(out, ""), err
}

// dump is the host's kernel and files, and all that etcd holds.
func (n *Node) dump(t *testing.T) string {
	t.Helper()
	out, err := n.dumpKernel()
	must(t, err)
	return out + n.cluster.keys(t)
}

// keys prints all that etcd holds.
func (c *Cluster) keys(t *testing.T) string {
	t.Helper()
	r, err := c.Etcd.Client().Get(t.Context(), "", clientv3.WithPrefix())
	must(t, err)
	var b strings.Builder
	fmt.Fprintln(&b, "# etcd")
	for _, kv := range r.Kvs {
		fmt.Fprintf(&b, "%s %s %d %x\n", kv.Key, kv.Value, kv.ModRevision, kv.Lease)
	}
	return b.String()
}

// unchanged fails if anything differs from what dump gave before.
func (n *Node) unchanged(t *testing.T, before string) {
	t.Helper()
	sameLines(t, n.Name, before, n.dump(t))
}

// settled waits until kernel and files are as dumpKernel gave them before.
func (n *Node) settled(t *testing.T, before string) {
	t.Helper()
	var now string
	if Eventually(t.Context(), func() bool {
		var err error
		now, err = n.dumpKernel()
		must(t, err)
		return now == before
	}) != nil {
		sameLines(t, n.Name, before, now)
	}
}

func sameLines(t *testing.T, what, before, after string) {
	t.Helper()
	if before == after {
		return
	}
	had := map[string]bool{}
	for _, l := range strings.Split(before, "\n") {
		had[l] = true
	}
	has := map[string]bool{}
	for _, l := range strings.Split(after, "\n") {
		if has[l] = true; !had[l] {
			t.Errorf("%s: new: %s", what, l)
		}
	}
	for l := range had {
		if !has[l] {
			t.Errorf("%s: gone: %s", what, l)
		}
	}
	if !t.Failed() {
		t.Errorf("%s: changed order:\n%s\n%s", what, before, after)
	}
}

// waitUnready waits until the daemon says on /readyz, in its log and to netctl why
// it is not ready, and sees that it is alive.
func (n *Node) waitUnready(t *testing.T, words ...string) {
	t.Helper()
	var body string
	var code int
	err := Eventually(t.Context(), func() bool {
		var err error
		body, code, err = n.Get("/readyz")
		return err == nil && code == http.StatusServiceUnavailable && containsAll(body, words)
	})
	if err != nil {
		log, _ := n.Daemon.Output()
		t.Fatalf("/readyz of %s says %d %q, want %q\n%s", n.Name, code, body, words, log)
	}
	if body, code, err := n.Get("/healthz"); err != nil || code != http.StatusOK {
		t.Errorf("/healthz says %d %q, error %v", code, body, err)
	}
	var out string
	if Eventually(t.Context(), func() bool {
		out, _ = n.Daemon.Output()
		return containsAll(strings.ReplaceAll(out, `\"`, `"`), words)
	}) != nil {
		t.Errorf("the log does not say %q:\n%s", words, out)
	}
	if Eventually(t.Context(), func() bool {
		out, code, err = n.Netctl("status")
		return err == nil && code == 1 && containsAll(out, words)
	}) != nil {
		t.Errorf("netctl status says %d, %v, without %q:\n%s", code, err, words, out)
	}
}

func containsAll(s string, words []string) bool {
	for _, w := range words {
		if !strings.Contains(s, w) {
			return false
		}
	}
	return true
}

// waitProblem waits until netctl status has a problem with these words, or none.
func (n *Node) waitProblem(ctx context.Context, words ...string) error {
	return n.WaitStatus(ctx, fmt.Sprintf("showing problem %q", words), func(s overlay.Status) bool {
		for _, p := range s.Problems {
			if containsAll(p.String(), words) {
				return true
			}
		}
		return len(words) == 0 && len(s.Problems) == 0
	})
}

// exited waits for the daemon's end and wants its exit code and words.
func (n *Node) exited(t *testing.T, code int, words ...string) {
	t.Helper()
	select {
	case <-n.Daemon.Done():
	case <-time.After(20 * time.Second):
		log, _ := n.Daemon.Output()
		t.Fatalf("twilld still runs:\n%s", log)
	}
	out, err := n.Daemon.Output()
	must(t, err)
	var exit *exec.ExitError
	if err := n.Daemon.Wait(); !errors.As(err, &exit) || exit.ExitCode() != code {
		t.Errorf("twilld ended with %v, want exit code %d:\n%s", err, code, out)
	}
	if !containsAll(strings.ReplaceAll(out, `\"`, `"`), words) {
		t.Errorf("twilld did not say %q:\n%s", words, out)
	}
}

func twilld(t *testing.T) string { return nettest.Build(t, "./daemon/cmd/twilld") }
