package store

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"unique"

	corev1 "k8s.io/api/core/v1"

	"github.com/twill-net/twill/pkg/overlay"
)

// annotations are the names of flannel's annotations on Nodes: their prefix.
type annotations string

// What flannel writes on a Node, and what an operator may write.
const (
	managedName             = "kube-subnet-manager" // "true": the node has joined
	backendTypeName         = "backend-type"
	backendDataName         = "backend-data"
	backendV6DataName       = "backend-v6-data"
	publicIPName            = "public-ip"
	publicIPv6Name          = "public-ipv6"
	publicIPOverwriteName   = "public-ip-overwrite" // the operator's: wins over all
	publicIPv6OverwriteName = "public-ipv6-overwrite"
	nodePublicIPName        = "node-public-ip" // the operator's or the cloud's
	nodePublicIPv6Name      = "node-public-ipv6"
)

var annotationPrefix = regexp.MustCompile(`^([a-z0-9_-]+\.)+[a-z0-9_-]+/([a-z0-9_-]+-)?$`)

// newAnnotations completes a prefix by flannel's rules: without a "/" it is a
// domain; with one, what follows begins each name.
func newAnnotations(prefix string) (annotations, error) {
	full := prefix
	if !strings.Contains(full, "/") {
		full += "/"
	}
	if !strings.HasSuffix(full, "/") && !strings.HasSuffix(full, "-") {
		full += "-"
	}
	if !annotationPrefix.MatchString(full) {
		return "", fmt.Errorf("--kube-annotation-prefix=%q: must be a domain like %s, or one and a name like example.com/net: lower case, digits, - and _", prefix, defaultAnnotationPrefix)
	}
	return annotations(full), nil
}

func (a annotations) of(name string) string { return string(a) + name }

// kubeNode is what is kept of a Node: of 10,000, little enough. Comparable, the
// lease apart: a Node that says nothing new wakes nobody.
type kubeNode struct {
	said
	// lease is what the last Snapshot has of it.
	lease *overlay.Lease
}

// said is what a Node says.
type said struct {
	name     string
	created  int64 // Unix time in seconds
	subnets  overlay.Subnets
	badCIDRs string // why podCIDRs are no Subnets
	managed  bool   // it runs flannel or twilld
	attrs    overlay.Attrs
	badAttrs string // why the annotations are no Attrs
	own      ownSaid
}

// ownSaid is what only this node's Node is asked for.
type ownSaid struct {
	facts     overlay.NodeFacts
	overwrite string // why an address the operator has set is none
}

// newSaid reads a Node.
func (a annotations) said(n *corev1.Node) said {
	s := said{name: n.Name, created: n.CreationTimestamp.Unix(), managed: n.Annotations[a.of(managedName)] == "true"}
	var err error
	if s.subnets, err = podCIDRs(n.Spec); err != nil {
		s.badCIDRs = err.Error()
	}
	if !s.managed {
		return s
	}
	s.attrs, err = overlay.ParseFields(overlay.Fields{
		PublicIP: n.Annotations[a.of(publicIPName)], PublicIPv6: n.Annotations[a.of(publicIPv6Name)],
		Backend: n.Annotations[a.of(backendTypeName)],
		Data:    n.Annotations[a.of(backendDataName)], DataV6: n.Annotations[a.of(backendV6DataName)],
	})
	if err != nil {
		s.badAttrs = a.inAnnotations(err)
	}
	s.attrs.Backend = unique.Make(s.attrs.Backend).Value() // thousands say "vxlan"
	return s
}

// inAnnotations says an error of lease fields with the names of the annotations.
func (a annotations) inAnnotations(err error) string {
	return "annotations: " + strings.NewReplacer(
		"BackendV6Data", a.of(backendV6DataName), "BackendData", a.of(backendDataName),
		"PublicIPv6", a.of(publicIPv6Name), "PublicIP", a.of(publicIPName), "value has", "they have",
	).Replace(err.Error())
}

// podCIDRs reads the subnets of a Node: at most one of each family.
func podCIDRs(spec corev1.NodeSpec) (overlay.Subnets, error) {
	texts := spec.PodCIDRs
	if len(texts) == 0 && spec.PodCIDR != "" {
		texts = []string{spec.PodCIDR}
	}
	var out overlay.Subnets
	for _, text := range texts {
		p, err := netip.ParsePrefix(text)
		if err != nil || p != p.Masked() || p.Addr().Is4In6() {
			return overlay.Subnets{}, fmt.Errorf("podCIDR %.50q is not a subnet like 10.244.1.0/24", text)
		}
		of := &out.V6
		if p.Addr().Is4() {
			of = &out.V4
		}
		if of.IsValid() {
			return overlay.Subnets{}, fmt.Errorf("podCIDRs %s has two %s subnets; a node has one of each family", strings.Join(texts, ","), overlay.FamilyOf(p.Addr()))
		}
		*of = p
	}
	return out, nil
}

// own reads what only this node's Node is asked for.
func (a annotations) own(n *corev1.Node, condition bool) ownSaid {
	var o ownSaid
	var errs []error
	address := func(f overlay.Family, names ...string) netip.Addr {
		for _, name := range names {
			text := n.Annotations[a.of(name)]
			if text == "" {
				continue
			}
			addr, err := netip.ParseAddr(text)
			if err == nil && addr.IsGlobalUnicast() && overlay.FamilyOf(addr) == f && !addr.Is4In6() && addr.Zone() == "" {
				return addr
			}
			errs = append(errs, fmt.Errorf("annotation %s: %.50q is not an %s address that other nodes reach", a.of(name), text, f))
		}
		return netip.Addr{}
	}
	o.facts.PublicIP = address(overlay.IPv4, publicIPOverwriteName, nodePublicIPName)
	o.facts.PublicIPv6 = address(overlay.IPv6, publicIPv6OverwriteName, nodePublicIPv6Name)
	if err := errors.Join(errs...); err != nil {
		o.overwrite = strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	o.facts.Unavailable = condition
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeNetworkUnavailable && c.Status == corev1.ConditionFalse {
			o.facts.Unavailable = false
		}
	}
	return o
}

// fields are the annotations of a node that publishes attrs, byte for byte as
// flannel writes them: data that a backend does not have is the JSON null. What
// does not apply is nil, and removed.
func (a annotations) fields(attrs overlay.Attrs) map[string]any {
	f := attrs.Fields()
	out := map[string]any{a.of(managedName): "true", a.of(backendTypeName): f.Backend}
	family := func(ip, data, ipName, dataName string) {
		out[a.of(ipName)], out[a.of(dataName)] = nil, nil
		if ip == "" {
			return
		}
		if data == "" {
			data = "null"
		}
		out[a.of(ipName)], out[a.of(dataName)] = ip, data
	}
	family(f.PublicIP, f.Data, publicIPName, backendDataName)
	family(f.PublicIPv6, f.DataV6, publicIPv6Name, backendV6DataName)
	return out
}
