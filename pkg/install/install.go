package install

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Options say what Install does.
type Options struct {
	Values     Values // those given now
	Reset      bool   // forget those of earlier runs
	Apply      ApplyOptions
	SkipChecks bool
	Wait       time.Duration // for the rollout; 0: not at all
	DefaultTag string        // of the image, unless a value names one; empty: the chart's

	besideFlannel bool // another network is no error
}

// Report is what a run did.
type Report struct {
	Changes  []Change    `json:"changes"`
	Nodes    []NodeState `json:"nodes"`
	Warnings []string    `json:"warnings,omitempty"`
	DryRun   bool        `json:"dryRun,omitempty"`
}

// Changed reports whether anything was, or would be, done.
func (r Report) Changed() bool {
	for _, c := range r.Changes {
		if c.Result != "unchanged" && c.Result != "absent" {
			return true
		}
	}
	return false
}

// Install applies the chart's objects, and waits until every node runs them. First it
// looks at the cluster; if it must not go on, nothing is changed.
func (c *Cluster) Install(ctx context.Context, o Options) (Report, error) {
	report := Report{DryRun: o.Apply.DryRun}
	if err := c.checkServer(); err != nil {
		return report, err
	}
	given := Values{}.merged(o.Values)
	namespace := given.Namespace()
	if !o.Reset {
		kept, err := c.KeptValues(ctx, namespace)
		if err != nil {
			return report, err
		}
		if err := given.checkAgainst(kept); err != nil {
			return report, err
		}
		given = kept.merged(given)
	}
	if !o.SkipChecks && !o.besideFlannel {
		if err := c.checkOthers(ctx, namespace); err != nil {
			return report, err
		}
	}
	if err := c.fillNetworks(ctx, given); err != nil {
		return report, err
	}
	rendered, warnings, err := c.render(ctx, given, o)
	report.Warnings = warnings
	if err != nil {
		return report, err
	}
	report.Changes, err = c.Apply(ctx, rendered.Objects, o.Apply)
	if err != nil || o.Apply.DryRun || o.Wait == 0 {
		return report, err
	}
	limited, cancel := context.WithTimeoutCause(ctx, o.Wait, fmt.Errorf("it is not done within %s: go on waiting with the same command, or look at the pods: kubectl -n %s describe pods -l %s", o.Wait, namespace, podSelector))
	defer cancel()
	report.Nodes, err = c.waitRollout(limited, namespace)
	if err == nil {
		report.Warnings = append(report.Warnings, c.initWarnings(ctx, namespace)...)
	}
	return report, err
}

// initWarnings are those of install-cni on the nodes, like another network's
// configuration that comes before ours. They are told once, however many nodes say the
// same.
func (c *Cluster) initWarnings(ctx context.Context, namespace string) []string {
	pods, err := c.core.Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: podSelector})
	if err != nil {
		return nil // the rollout is done, and no kubelet needs to be asked for that
	}
	nodes := map[string][]string{}
	for _, p := range pods.Items {
		p.Spec.Containers = nil // the init container alone
		for line := range strings.Lines(c.logs(ctx, &p)) {
			if w, ok := strings.CutPrefix(strings.TrimSpace(line), "warning: "); ok {
				nodes[w] = append(nodes[w], nodeOf(p))
			}
		}
	}
	var out []string
	for _, w := range slices.Sorted(maps.Keys(nodes)) {
		slices.Sort(nodes[w])
		out = append(out, strings.Join(nodes[w], ", ")+": "+w)
	}
	return out
}

// render renders the values, keeps them with the objects and checks the nodes.
func (c *Cluster) render(ctx context.Context, given Values, o Options) (*Rendered, []string, error) {
	rendered, err := Render(given.WithTag(o.DefaultTag))
	if err != nil {
		return nil, nil, err
	}
	if err := keep(rendered.Objects, given); err != nil {
		return nil, nil, err
	}
	conf, warnings, err := networkConfig(rendered.Objects)
	if err != nil || o.SkipChecks {
		return rendered, warnings, err
	}
	nodes, err := c.nodes(ctx)
	if err != nil {
		return nil, warnings, err
	}
	return rendered, warnings, checkNodes(nodes, conf, rendered.allocates())
}

func (r *Rendered) twill(key string) any {
	t, _ := r.Values["twill"].(map[string]any)
	return t[key]
}

func (r *Rendered) allocates() bool {
	yes, _ := r.twill("allocateSubnets").(bool)
	return yes
}

// fillNetworks sets podCidr and podCidrv6, unless they are given, to what the rest of
// the cluster was told.
func (c *Cluster) fillNetworks(ctx context.Context, v Values) error {
	t, _ := v["twill"].(map[string]any)
	if v.has("podCidr") || v.has("podCidrv6") || t["netConfJson"] != nil {
		return nil
	}
	cidrs, from, err := c.podNetworks(ctx)
	if err != nil {
		return err
	}
	if len(cidrs) == 0 {
		return c.fitDefault(ctx, v)
	}
	v["podCidr"], v["podCidrv6"] = "", ""
	for _, p := range cidrs {
		if p.Addr().Is4() {
			v["podCidr"] = p.String()
		} else {
			v["podCidrv6"] = p.String()
		}
	}
	c.Progress("pods' network %s, from %s", join(cidrs), from)
	return nil
}

// fitDefault takes the chart's default if the nodes' subnets lie there. What network
// other subnets are parts of cannot be told from them.
func (c *Cluster) fitDefault(ctx context.Context, v Values) error {
	rendered, err := Render(v)
	if err != nil {
		return err
	}
	conf, _, err := networkConfig(rendered.Objects)
	if err != nil {
		return err
	}
	nodes, err := c.nodes(ctx)
	if err != nil {
		return err
	}
	for _, n := range nodes {
		subnets, err := subnetsOf(n)
		if err != nil {
			return err
		}
		for _, p := range subnets {
			if p.Addr().Is4() && conf.V4.Network.Contains(p.Addr()) {
				continue
			}
			return fmt.Errorf("find the pods' network: node %s has podCIDR %s, and neither kube-controller-manager's pod nor kubeadm's configuration tells of what network that is a part: name it, %s=…", n.Name, join(subnets), flagOfPrefix(p))
		}
	}
	c.Progress("pods' network %s, the default, in which all nodes' podCIDRs lie", conf.V4.Network)
	return nil
}

func flagOfPrefix(p netip.Prefix) string {
	if p.Addr().Is4() {
		return "--pod-cidr"
	}
	return "--pod-cidr and --pod-cidr-v6"
}

func join(list []netip.Prefix) string {
	var s []string
	for _, p := range list {
		s = append(s, p.String())
	}
	return strings.Join(s, ",")
}
