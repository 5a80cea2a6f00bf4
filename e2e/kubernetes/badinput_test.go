package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// bad is a cluster of two nodes that is given what is wrong, one thing after the other.
// n1 is never meant; n2 is told why it does not go on, keeps its pods connected, and
// heals when the remedy is applied.
type bad struct {
	*life
	kernel string // n2's network
}

func TestBadInput(t *testing.T) {
	b := &bad{life: &life{Cluster: Start(t, Options{Nodes: 2})}}
	b.pods = b.startClients(t)
	b.whole(t)
	b.kernel = b.network(t)
	for _, part := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"no right to watch", b.noWatch},
		{"no right to patch", b.noPatch},
		{"garbage of a peer", b.badPeers},
		{"net-conf.json", b.badNetConf},
		{"credentials", b.badCredentials},
		{"read-only plugin directory", b.readOnly},
		{"another network first", b.otherFirst},
		{"both flavours of iptables", b.bothFlavours},
	} {
		if !t.Run(part.name, part.run) {
			t.Fatalf("%s failed: what follows has no cluster to stand on", part.name)
		}
		b.Mark("%s: done", part.name)
	}
}

// network prints what Twill has set up on n2.
func (b *bad) network(t *testing.T) string {
	t.Helper()
	return b.Nodes[1].shell(t, `ip -br link; ip route; ip nexthop; ip neigh show nud permanent; bridge fdb show dev flannel.1
		iptables-save | grep -i twill | grep -v '^:'; cat /run/flannel/subnet.env /etc/cni/net.d/10-twill.conflist; sha256sum /opt/cni/bin/twill`)
}

// unharmed checks that the fault has changed nothing: n2's network, and who reaches whom.
func (b *bad) unharmed(t *testing.T) {
	t.Helper()
	if now := b.network(t); now != b.kernel {
		t.Errorf("n2's network has changed; was\n%sis\n%s", b.kernel, now)
	}
	b.checkReach(t, b.pods, b.pods)
}

// healed waits until all is well again.
func (b *bad) healed(t *testing.T) {
	t.Helper()
	b.rolledOut(t)
	must(t, Eventually(minutes(t, 2), func() error {
		s, err := b.status(b.Nodes[1])
		if err == nil && (!s.Ready || len(s.Problems) > 0) {
			err = fmt.Errorf("n2 is not healed: ready %v, %s, problems %v", s.Ready, s.Reason, s.Problems)
		}
		return err
	}))
	b.unharmed(t)
}

// restart ends twilld's pod on n2 and returns the new one as soon as it is there.
func (b *bad) restart(t *testing.T) *core.Pod {
	t.Helper()
	old := b.twilldPod(t)
	b.twillctl(t, "delete", "pod", old.Name, "--wait=true", "--timeout=3m")
	var p *core.Pod
	must(t, Eventually(minutes(t, 1), func() error {
		p = b.twilldPod(t)
		if p == nil || p.UID == old.UID {
			return errors.New("there is no new pod of twilld on n2")
		}
		return nil
	}))
	return p
}

// twilldPod is n2's, or nil.
func (b *bad) twilldPod(t *testing.T) *core.Pod {
	t.Helper()
	list, err := b.Client.CoreV1().Pods("twill-system").List(t.Context(), meta.ListOptions{LabelSelector: "app=twill", FieldSelector: "spec.nodeName=n2"})
	must(t, err)
	for i := range list.Items {
		if list.Items[i].DeletionTimestamp == nil {
			return &list.Items[i]
		}
	}
	return nil
}

// logs waits until a container of n2's twilld pod says all of this in its log, also before
// it was started again.
func (b *bad) logs(t *testing.T, container string, words ...string) {
	t.Helper()
	b.says(t, "log of "+container, func(ctx context.Context) (string, error) {
		now, err := b.Kubectl("logs", "--namespace=twill-system", "--container="+container, b.twilldPod(t).Name)
		before, none := b.Kubectl("logs", "--namespace=twill-system", "--container="+container, "--previous", b.twilldPod(t).Name)
		if none == nil {
			err = nil
		}
		return before + now, err
	}, words...)
}

// problem waits until netctl status on a node says all of this.
func (b *bad) problem(t *testing.T, node string, words ...string) {
	t.Helper()
	b.says(t, "netctl status on "+node, func(context.Context) (string, error) {
		s, err := b.status(b.Node(node))
		return fmt.Sprintf("%s\n%s\n%v", s.Reason, s.Store.Error, s.Problems), err
	}, words...)
}

func (b *bad) says(t *testing.T, who string, ask func(context.Context) (string, error), words ...string) {
	t.Helper()
	ctx := minutes(t, 1)
	must(t, Eventually(ctx, func() error {
		said, err := ask(ctx)
		if err != nil {
			return err
		}
		for _, word := range words {
			if !strings.Contains(said, word) {
				return fmt.Errorf("%s has no %q: %s", who, word, said)
			}
		}
		return nil
	}))
}

// install does what messages tell to do: netctl install; by force, for it was somebody else
// who changed the objects.
func (b *bad) install(t *testing.T, args ...string) {
	t.Helper()
	_, ref, err := b.Image()
	must(t, err)
	_, err = b.NetctlInstall(b.NetConf(), append([]string{"--image", ref, "--force"}, args...)...)
	must(t, err)
}

// noWatch: twilld needs no list beside (WatchList). What is known stays, and a twilld that starts leaves all as it is.
func (b *bad) noWatch(t *testing.T) {
	b.takeRight(t, 0, "list")
	b.takeRight(t, 0, "watch")
	b.restart(t)
	b.logs(t, "twilld", "watch nodes: forbidden: system:serviceaccount:twill-system:twill has no right to it",
		"ClusterRole twill must allow the verb watch on nodes; netctl install applies it")
	b.unharmed(t)
	b.install(t)
	b.healed(t)
}

// takeRight takes a verb from a rule of the ClusterRole.
func (b *bad) takeRight(t *testing.T, rule int, verb string) {
	t.Helper()
	roles := b.Client.RbacV1().ClusterRoles()
	role, err := roles.Get(t.Context(), "twill", meta.GetOptions{})
	must(t, err)
	var left []string
	for _, v := range role.Rules[rule].Verbs {
		if v != verb {
			left = append(left, v)
		}
	}
	if len(left) == len(role.Rules[rule].Verbs) {
		t.Fatalf("rule %d allows %v, not %s", rule, left, verb)
	}
	if role.Rules[rule].Verbs = left; left == nil {
		role.Rules = append(role.Rules[:rule], role.Rules[rule+1:]...)
	}
	_, err = roles.Update(t.Context(), role, meta.UpdateOptions{})
	must(t, err)
}

// noPatch: the node cannot say how it is reached when that changes.
func (b *bad) noPatch(t *testing.T) {
	b.takeRight(t, 1, "patch")
	b.kubectl(t, "annotate", "node", "n2", "flannel.alpha.coreos.com/backend-type-")
	b.problem(t, "n2", "patch nodes/status n2", "forbidden", "ClusterRole twill must allow the verb patch on nodes/status; netctl install applies it")
	if now := b.network(t); now != b.kernel {
		t.Errorf("n2's network has changed; was\n%sis\n%s", b.kernel, now)
	}
	b.install(t)
	b.healed(t)
}

// badPeers are Nodes that tell garbage. Each is named, with the reason; others are not
// harmed.
func (b *bad) badPeers(t *testing.T) {
	node := func(name, cidr string, annotations map[string]string) {
		t.Helper()
		n := &core.Node{ObjectMeta: meta.ObjectMeta{Name: name, Annotations: map[string]string{"flannel.alpha.coreos.com/kube-subnet-manager": "true"}}}
		n.Spec.PodCIDR, n.Spec.PodCIDRs = cidr, []string{cidr}
		for key, value := range annotations {
			n.Annotations["flannel.alpha.coreos.com/"+key] = value
		}
		_, err := b.Client.CoreV1().Nodes().Create(t.Context(), n, meta.CreateOptions{})
		must(t, err)
	}
	good := map[string]string{"backend-type": "vxlan", "public-ip": "198.51.100.77", "backend-data": `{"VNI":1,"VtepMAC":"02:00:00:00:00:77"}`}
	node("garbage", "10.244.77.0/24", map[string]string{"backend-type": "vxlan", "public-ip": "198.51.100.78", "backend-data": `{"VNI":1,"VtepMAC":"nonsense"}`})
	node("outside", "10.99.7.0/24", good)
	for _, n := range b.Nodes {
		b.problem(t, n.Name, "node garbage", "flannel.alpha.coreos.com/backend-data", "nonsense",
			"node outside", "podCIDR 10.99.7.0/24", "of net-conf.json", "Network there and --cluster-cidr of kube-controller-manager must agree")
	}
	b.unharmed(t)
	b.kubectl(t, "delete", "node", "outside")
	b.kubectl(t, "annotate", "--overwrite", "node", "garbage", `flannel.alpha.coreos.com/backend-data={"VNI":1,"VtepMAC":"02:00:00:00:00:78"}`)
	must(t, Eventually(minutes(t, 1), func() error {
		s, err := b.status(b.Nodes[1])
		if err == nil && (s.Peers != 2 || len(s.Problems) > 0) {
			err = fmt.Errorf("n2 has %d peers, and problems %v", s.Peers, s.Problems)
		}
		return err
	}))
	b.kubectl(t, "delete", "node", "garbage")
	b.healed(t)
}

// badNetConf: what is there is kept, and what is not there yet waits.
func (b *bad) badNetConf(t *testing.T) {
	good := b.NetConf()
	must(t, b.SetNetConf(strings.Replace(good, `"Network"`, `"Netwrok"`, 1)))
	for _, n := range b.Nodes {
		b.problem(t, n.Name, "/etc/kube-flannel/net-conf.json", "Network", "the last good one stays in force")
	}
	b.unharmed(t)
	b.restart(t)
	b.logs(t, "twilld", "network configuration refused", "Network", "it is looked at again as soon as it is written")
	b.unharmed(t)

	must(t, b.SetNetConf(strings.Replace(good, "10.244.0.0/16", "10.99.0.0/16", 1)))
	b.problem(t, "n1", "10.99.0.0/16")
	b.logs(t, "twilld", "podCIDRs [10.244.", "of node n2", "10.99.0.0/16", "Network in net-conf.json and --cluster-cidr of kube-controller-manager must agree")
	b.unharmed(t)

	_, err := b.NetctlInstall(strings.Replace(good, "10.244.0.0/16", "10.99.0.0/16", 1))
	if want := "is not in the pods' network 10.99.0.0/16: name the one that kube-controller-manager has as --cluster-cidr (--pod-cidr)"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("netctl install says %v, want %q", err, want)
	}
	must(t, b.SetNetConf(good))
	b.healed(t)
}
