package store

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"regexp"
	"strings"
	"syscall"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// access is one right that twilld needs.
type access struct {
	verb, resource string // "patch", "nodes/status"
	group          string // of the resource; empty: core
	namespace      string // empty: of the cluster
	name           string // of the object; may be empty
}

func (a access) String() string {
	text := a.verb + " " + a.resource
	switch {
	case a.name != "" && a.namespace != "":
		text += " " + a.namespace + "/" + a.name
	case a.name != "":
		text += " " + a.name
	case a.namespace != "":
		text += " in namespace " + a.namespace
	}
	return text
}

// rule is where the right is granted.
func (a access) rule() string {
	if a.resource == "pods" {
		return "set NODE_NAME in the environment (fieldRef spec.nodeName), which needs no right, or allow the verb get on pods in namespace " + a.namespace
	}
	what := a.resource
	if a.group != "" {
		what += " of " + a.group
	}
	role := "ClusterRole twill"
	if a.namespace != "" {
		role = "Role twill in namespace " + a.namespace
	}
	return fmt.Sprintf("%s must allow the verb %s on %s; netctl install applies it", role, a.verb, what)
}

// explain puts an error of client-go in plain words: what was done, why it failed,
// what to do about it.
func (k *kubeClient) explain(doing access, err error) error {
	var done *plainError
	if err == nil || errors.As(err, &done) || errors.Is(err, context.Canceled) {
		return err
	}
	if answer := k.answer(doing, err); answer != "" {
		return &plainError{doing.String() + ": " + answer, err}
	}
	reason, remedy := k.transport(err)
	text := doing.String() + ": Kubernetes API " + k.url + ": " + reason
	if remedy != "" {
		text += "; " + remedy
	}
	return &plainError{text, err}
}

var forbiddenUser = regexp.MustCompile(`User "([^"]*)" cannot`)

// answer words an error that the API itself returned, or returns "".
func (k *kubeClient) answer(doing access, err error) string {
	status := apierrors.APIStatus(nil)
	if !errors.As(err, &status) {
		return ""
	}
	message := status.Status().Message
	switch {
	case apierrors.IsForbidden(err):
		m := forbiddenUser.FindStringSubmatch(message)
		if m == nil { // an admission plugin has its own words
			return "forbidden: " + message
		}
		return fmt.Sprintf("forbidden: %s has no right to it; %s", m[1], doing.rule())
	case apierrors.IsUnauthorized(err):
		renew := "renew it"
		if k.inCluster { // the kubelet does, and twilld reads it again
			renew = "if the kubelet does not renew it, restart the pod"
		}
		return fmt.Sprintf("the API at %s does not accept %s: expired, revoked, or of another cluster; %s", k.url, k.credentials, renew)
	case apierrors.IsTooManyRequests(err):
		return "the API server is overloaded: " + message
	}
	if d := status.Status().Details; d != nil { // what is no answer of an API server
		for _, c := range d.Causes {
			if c.Type == metav1.CauseTypeUnexpectedServerResponse && c.Message != "unknown" {
				message += ": " + strings.TrimSpace(c.Message)
			}
		}
	}
	return "Kubernetes API " + k.url + ": " + message
}

// transport words an error of the way to the API.
func (k *kubeClient) transport(err error) (reason, remedy string) {
	var (
		unknown  x509.UnknownAuthorityError
		hostname x509.HostnameError
		invalid  x509.CertificateInvalidError
		dns      *net.DNSError
		timeout  net.Error
	)
	reason = inner(err)
	switch {
	case errors.As(err, &unknown):
		return "its certificate is of an authority that we do not trust", "the authority must be that in " + k.authority
	case errors.As(err, &hostname):
		return reason, "--kube-api-url, or the server in the kubeconfig, must use a name or address that stands in its certificate"
	case errors.As(err, &invalid):
		return reason, "renew the certificate, or set the clock"
	case errors.As(err, &dns):
		return reason, "twilld starts before the cluster's DNS does: use an address, or a name that the host's own resolver knows"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "connection refused", "is kube-apiserver running there?" + k.viaService()
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return reason, "is there a route to it?" + k.viaService()
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return "no answer in time", "is it up, and does no firewall stand between?" + k.viaService()
	case strings.Contains(reason, "server gave HTTP response to HTTPS client"):
		return "it speaks http, not https", "write http:// in --kube-api-url, or name the TLS port"
	case errors.Is(err, io.EOF), errors.Is(err, errBroken):
		return "it hangs up at once", "does it speak http, not https, or is it a load balancer with no API server behind it?"
	case strings.Contains(reason, "tls: "):
		return reason, "check " + k.credentials
	}
	return reason, ""
}

// viaService reminds of what stands between a pod and the API.
func (k *kubeClient) viaService() string {
	if !k.inCluster {
		return ""
	}
	return " A pod reaches it by the Service kubernetes, so kube-proxy must run on this node; or give --kube-api-url"
}

// inner is what went wrong without the request it belongs to.
func inner(err error) string {
	if u := (*url.Error)(nil); errors.As(err, &u) {
		err = u.Err
	}
	return strings.TrimPrefix(err.Error(), "tls: failed to verify certificate: ")
}
