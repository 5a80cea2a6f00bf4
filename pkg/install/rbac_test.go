package install

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// TestRights asks the API server, as Twill's ServiceAccount, what it may do: each call
// that twilld makes (pkg/store), and nothing else.
func TestRights(t *testing.T) {
	r := newRig(t)
	r.addNodes(t, threeNodes)
	calls := []string{"list nodes", "watch nodes", "patch nodes/status"}
	// Each call is written "verb resource", in a namespace "verb namespace/resource".
	allocating := append(slices.Clone(calls), "get nodes", "patch nodes", "create twill-system:leases", "list twill-system:leases", "delete twill-system:leases")
	everybody := r.rights(t, "kube-system", "somebody")
	for _, tt := range []struct {
		allocate bool
		want     []string
	}{{false, calls}, {true, allocating}, {false, calls}} {
		v := Values{}
		v.Set("twill.allocateSubnets", tt.allocate)
		_, err := r.Install(t.Context(), Options{Values: v})
		check(t, err)
		got := slices.DeleteFunc(r.rights(t, "twill-system", "twill"), func(right string) bool { return slices.Contains(everybody, right) })
		slices.Sort(tt.want)
		if !slices.Equal(got, tt.want) {
			t.Errorf("allocateSubnets %v: may %q, want %q", tt.allocate, got, tt.want)
		}
	}
}

// rights are all that a ServiceAccount may do.
func (r *rig) rights(t *testing.T, namespace, account string) []string {
	t.Helper()
	as := rest.CopyConfig(r.config)
	as.Impersonate.UserName = "system:serviceaccount:" + namespace + ":" + account
	as.Impersonate.Groups = []string{"system:serviceaccounts", "system:serviceaccounts:" + namespace, "system:authenticated"}
	client, err := kubernetes.NewForConfig(as)
	check(t, err)
	all, err := r.admin.Discovery().ServerPreferredResources()
	check(t, err)
	var out []string
	ask := func(a authorizationv1.ResourceAttributes) {
		review := &authorizationv1.SelfSubjectAccessReview{Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &a}}
		review, err := client.AuthorizationV1().SelfSubjectAccessReviews().Create(t.Context(), review, metav1.CreateOptions{})
		check(t, err)
		if review.Status.Allowed {
			resource := a.Resource
			if a.Subresource != "" {
				resource += "/" + a.Subresource
			}
			if a.Namespace != "" {
				resource = a.Namespace + ":" + resource
			}
			out = append(out, fmt.Sprintf("%s %s", a.Verb, resource))
		}
	}
	asked := 0
	for _, list := range all {
		group, version, _ := strings.Cut(list.GroupVersion, "/")
		if version == "" {
			group = ""
		}
		for _, resource := range list.APIResources {
			names := []authorizationv1.ResourceAttributes{{Group: group, Resource: resource.Name}}
			if group == "" && resource.Name == "nodes" {
				names = append(names, authorizationv1.ResourceAttributes{Resource: "nodes", Subresource: "status"}, authorizationv1.ResourceAttributes{Resource: "nodes", Subresource: "proxy"})
			}
			for _, a := range names {
				for _, a.Verb = range []string{"get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"} {
					if resource.Namespaced {
						// Cluster-wide rights show in any namespace, so one other is enough.
						for _, a.Namespace = range []string{"twill-system", "kube-system"} {
							ask(a)
							asked++
						}
					} else {
						ask(a)
						asked++
					}
				}
			}
		}
	}
	if asked < 300 {
		t.Fatalf("only %d questions", asked)
	}
	slices.Sort(out)
	return out
}
