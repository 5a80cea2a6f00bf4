package netctl

import (
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/twill-net/twill/pkg/install"
)

// Exit codes of the commands that change a cluster.
const clusterExitCodes = `Exit code: 0 done, or nothing to do; 1 with --dry-run, something would be changed;
2 could not, or is not finished.`

// clusterFlags say which cluster, and which values of the chart.
type clusterFlags struct {
	kubeconfig, context string

	files, sets                          []string
	podCIDR, podCIDRv6, backend          string
	image, namespace, kubernetesEndpoint string
}

func (f *clusterFlags) connectTo(s *pflag.FlagSet) {
	s.StringVar(&f.kubeconfig, "kubeconfig", "", "`file` with the way to the API server (default $KUBECONFIG, else ~/.kube/config)")
	s.StringVar(&f.context, "context", "", "`name` of a context in it (default its current one)")
	s.StringVar(&f.namespace, "namespace", install.DefaultNamespace, "`name` of Twill's namespace")
}

func (f *clusterFlags) valuesFrom(s *pflag.FlagSet) {
	s.StringArrayVarP(&f.files, "values", "f", nil, "`file` with values of the chart (manifests/helm/twill/values.yaml lists them); repeatable")
	s.StringArrayVar(&f.sets, "set", nil, "`key=value` of the chart, as in helm; repeatable")
	s.StringVar(&f.image, "image", "", "`reference` of the image, like registry.example.com/twill:v1.2.3")
	s.StringVar(&f.kubernetesEndpoint, "api-server", "", "`host:port` at which twilld finds the API server, where the Service kubernetes needs the network first")
}

// values are what files, --set and the flags say, the later ones first in rank.
func (f *clusterFlags) values() (install.Values, error) {
	v, err := install.ParseValues(f.files, f.sets, os.ReadFile)
	if err != nil {
		return nil, err
	}
	for path, value := range map[string]string{"podCidr": f.podCIDR, "podCidrv6": f.podCIDRv6, "twill.backend": f.backend} {
		if value != "" {
			v.Set(path, value)
		}
	}
	if f.podCIDRv6 != "" && f.podCIDR == "" && v["podCidr"] == nil {
		v.Set("podCidr", "") // IPv6 alone
	}
	if f.namespace != install.DefaultNamespace {
		v.Set("namespace", f.namespace)
	}
	if f.kubernetesEndpoint != "" {
		host, port, ok := cutPort(f.kubernetesEndpoint)
		if !ok {
			return nil, fmt.Errorf("--api-server %s: must be host:port", f.kubernetesEndpoint)
		}
		v.Set("kubernetesServiceHost", host)
		v.Set("kubernetesServicePort", port)
	}
	if f.image != "" {
		repository, tag := cutTag(f.image)
		if tag == "" {
			return nil, fmt.Errorf("--image %s: must name a tag, too, like %s:v1.2.3", f.image, f.image)
		}
		v.Set("twill.image.repository", repository)
		v.Set("twill.image.tag", tag)
	}
	return v, nil
}

// cutTag takes a reference apart; a colon before a slash is a port's.
func cutTag(image string) (repository, tag string) {
	i := strings.LastIndexByte(image, ':')
	if i < 0 || strings.Contains(image[i:], "/") {
		return image, ""
	}
	return image[:i], image[i+1:]
}

// cutPort takes host:port and [2001:db8::1]:port apart.
func cutPort(s string) (host, port string, ok bool) {
	i := strings.LastIndexByte(s, ':')
	if i <= 0 || i == len(s)-1 {
		return "", "", false
	}
	return strings.Trim(s[:i], "[]"), s[i+1:], true
}

// cluster connects, and tells progress on stderr, with the time that went by.
func (a *app) cluster(f clusterFlags) (*install.Cluster, error) {
	c, err := install.Connect(f.kubeconfig, f.context)
	if err != nil {
		return nil, err
	}
	begin := a.now()
	c.Progress = func(format string, args ...any) {
		fmt.Fprintf(a.stderr, "%6.1fs  %s\n", a.now().Sub(begin).Seconds(), fmt.Sprintf(format, args...))
	}
	return c, nil
}

// imageTag is the image that belongs to this netctl; what was not released has none.
func (a *app) imageTag() string {
	if a.built == "devel" {
		return ""
	}
	return a.built
}

// report prints what a run did, also if it failed on the way.
func (a *app) report(r install.Report, err error) error {
	for _, w := range r.Warnings {
		fmt.Fprintln(a.stderr, "warning:", w)
	}
	var printed error
	if a.json() {
		if r.Changes == nil {
			r.Changes = []install.Change{}
		}
		if r.Nodes == nil {
			r.Nodes = []install.NodeState{}
		}
		out := struct {
			install.Report
			Error string `json:"error,omitempty"`
		}{Report: r}
		if err != nil {
			out.Error = err.Error()
		}
		printed = a.printJSON(out)
	} else {
		printed = a.printReport(r)
	}
	switch {
	case err != nil:
		return err
	case printed != nil:
		return printed
	case r.DryRun && r.Changed():
		return errDiffers
	}
	return nil
}

func (a *app) printReport(r install.Report) error {
	if len(r.Changes) > 0 {
		t := a.table()
		t.header("KIND", "NAME", "RESULT")
		for _, c := range r.Changes {
			s := good
			if c.Result == "unchanged" || c.Result == "absent" {
				s = plain
			}
			t.row(cell{text: c.Kind}, cell{text: c.Name}, cell{c.Result, s})
		}
		if err := t.print(a.stdout); err != nil {
			return err
		}
		for _, c := range r.Changes {
			for _, f := range c.Fields {
				fmt.Fprintf(a.stdout, "  %s %s: %s\n", c.Kind, c.Name, f)
			}
		}
	}
	if len(r.Nodes) > 0 {
		t := a.table()
		t.header("NODE", "STATE")
		for _, n := range r.Nodes {
			state, s := "ready", good
			switch {
			case !n.Ready:
				state, s = n.Waits, bad
			case n.Waits != "":
				state = n.Waits
			}
			t.row(cell{text: n.Node}, cell{state, s})
		}
		if err := t.print(a.stdout); err != nil {
			return err
		}
	}
	if len(r.Changes) > 0 && !r.Changed() {
		fmt.Fprintln(a.stdout, "nothing had to be changed")
	}
	return nil
}

const defaultWait = 5 * time.Minute
