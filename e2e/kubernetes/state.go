package kubernetes

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// State is what a node holds that a pod may leave behind, a line each: addresses that are
// given out, links, routes, permanent neighbours, rules, network namespaces, files. Rules
// of kube-proxy are not in it, which follow Services.
type State []string

// State reads it. What is there before a pod is made is the pair to compare with.
func (n *Node) State() (State, error) {
	out, err := n.Run("sh", "-c", stateScript)
	if err != nil {
		return nil, fmt.Errorf("read state of %s: %w", n.Name, err)
	}
	var s State
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(volatile.ReplaceAllString(line, ""))
		if line != "" && !strings.Contains(line, "KUBE-") {
			s = append(s, line)
		}
	}
	slices.Sort(s)
	return slices.Compact(s), nil
}

// Left is what is there now and was not before.
func (s State) Left(before State) []string {
	return slices.DeleteFunc(slices.Clone(s), func(line string) bool { return slices.Contains(before, line) })
}

// volatile is what changes by itself: counters, and the handles of nft's objects.
var volatile = regexp.MustCompile(`\[\d+:\d+\]| # handle \d+|packets \d+ bytes \d+`)

// stateScript prefixes each line with its kind. Interface indexes are left out by brief
// output of ip(8).
const stateScript = `
find /var/lib/cni -type f ! -name lock ! -name 'last_reserved_ip.*' | sed 's/^/file /'
find /run/flannel /run/twill -type f 2>/dev/null | sed 's/^/file /' || true
ls /run/netns | sed 's/^/namespace /'
ip -brief link | awk '{ sub("@.*", "", $1); print "link " $1 }'
ip -4 route show table all | sed 's/^/route /'
ip -6 route show table all | grep -v '^multicast' | sed 's/^/route /'
ip rule | sed 's/^/ip rule /'
ip neigh show nud permanent | sed 's/^/neighbour /'
ip nexthop | sed 's/^/nexthop /'
for t in iptables-nft ip6tables-nft iptables-legacy ip6tables-legacy; do
	$t-save 2>/dev/null | grep '^[-:]' | sed "s/^/$t /" || true
done
nft list tables | while read -r _ family name; do
	case $name in
	kube-proxy | filter | nat | mangle | raw) ;; # iptables' tables are listed above
	*) nft list table "$family" "$name" | sed "s/^[[:space:]]*/nft $family $name: /" ;;
	esac
done
`
