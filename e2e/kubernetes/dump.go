package kubernetes

// dump shows what an operator would look at first when something does not work.
func (c *Cluster) dump() {
	for _, args := range [][]string{
		{"get", "nodes,pods,daemonsets,services", "-A", "-o", "wide"},
		{"get", "events", "-A", "--field-selector", "type!=Normal", "--sort-by=.lastTimestamp"},
		{"logs", "-n", "kube-system", "-l", "k8s-app=kube-dns", "--tail=40"},
		{"logs", "-n", "twill-system", "-l", "app=twill", "--all-containers", "--prefix", "--tail=60", "--ignore-errors"},
	} {
		out, err := c.Kubectl(append(args, "--request-timeout=10s")...)
		c.T.Logf("kubectl %v: %v\n%s", args, err, out)
	}
}
