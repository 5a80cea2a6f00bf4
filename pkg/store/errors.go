package store

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ErrLeaseGone is the error of Renew when etcd has ended the lease: it ran out, or
// somebody revoked it. The key is gone with it.
var ErrLeaseGone = errors.New("the lease is gone")

// plainError is an error of the client in words for people. Unwrap gives the
// client's own.
type plainError struct {
	text  string
	cause error
}

func (e *plainError) Error() string { return e.text }
func (e *plainError) Unwrap() error { return e.cause }

// explain puts an error of the client in plain words: what was done, why it
// failed, what to do about it. key is the key concerned, if there is one.
func (c EtcdConfig) explain(doing, key string, err error) error {
	var done *plainError
	if err == nil || errors.As(err, &done) || errors.Is(err, context.Canceled) {
		return err
	}
	text := doing
	if key != "" {
		text += " " + key
	}
	if status.Code(err) == codes.Canceled {
		return &plainError{text + ": the etcd store is closed", err}
	}
	if answer := c.answer(key, err); answer != "" {
		return &plainError{text + ": " + answer, err}
	}
	text += ": etcd " + strings.Join(c.Endpoints, ", ") + ": "
	// etcd 3.4 sends its own impatience as a text.
	if status.Code(err) == codes.DeadlineExceeded || strings.Contains(err.Error(), context.DeadlineExceeded.Error()) {
		return &plainError{text + "no answer in time", err}
	}
	reason := transportReason(err)
	remedy := transportRemedy(reason)
	if remedy == "" {
		remedy = c.brokenRemedy(err.Error())
	}
	if remedy != "" {
		reason += "; " + remedy
	}
	return &plainError{text + reason, err}
}

// answer words an error that etcd itself returned, or returns "".
func (c EtcdConfig) answer(key string, err error) string {
	switch err = rpctypes.Error(err); {
	case errors.Is(err, rpctypes.ErrPermissionDenied):
		who := fmt.Sprintf("user %q", c.Username)
		if c.Username == "" {
			who = fmt.Sprintf("the user named by the client certificate %q", c.CertFile)
		}
		return fmt.Sprintf("permission denied: %s has no right to it; grant it: etcdctl role grant-permission ROLE readwrite --prefix %s", who, c.grantable(key))
	case errors.Is(err, rpctypes.ErrUserEmpty):
		return "etcd wants a user name and a password; give --etcd-username and --etcd-password"
	case errors.Is(err, rpctypes.ErrAuthFailed):
		return fmt.Sprintf("wrong password, or there is no user %q; check --etcd-username and --etcd-password", c.Username)
	case errors.Is(err, rpctypes.ErrNoLeader):
		return "etcd has no leader: too few of its members are up and see each other"
	case errors.Is(err, rpctypes.ErrCompacted):
		return "etcd has compacted the history since the last event"
	case errors.Is(err, rpctypes.ErrNoSpace):
		return "etcd's disk quota is used up; compact, defragment, then etcdctl alarm disarm"
	}
	var known rpctypes.EtcdError
	if errors.As(err, &known) {
		return strings.TrimPrefix(known.Error(), "etcdserver: ")
	}
	return ""
}

func (c EtcdConfig) grantable(key string) string {
	if strings.HasPrefix(key, c.Prefix+"/subnets/") || key == "" {
		return c.Prefix + "/subnets/"
	}
	return key
}

// connecting stands in gRPC's errors about connections that never stood.
const connecting = "connection error: desc = "

// transportReason digs the cause out of the layers that gRPC wraps around it.
func transportReason(err error) string {
	text := err.Error()
	if s, ok := status.FromError(err); ok {
		text = s.Message()
	}
	for _, layer := range []string{"latest balancer error: ", "last connection error: ", connecting} {
		if _, inner, found := strings.Cut(text, layer); found {
			text = inner
		}
	}
	text = strings.Trim(text, `"`)
	for _, layer := range []string{"transport: Error while dialing: ", "transport: authentication handshake failed: "} {
		text = strings.TrimPrefix(text, layer)
	}
	return strings.ReplaceAll(text, `\"`, `"`)
}

// transportRemedy says what the operator can do, or "".
func transportRemedy(reason string) string {
	has := func(s string) bool { return strings.Contains(reason, s) }
	switch {
	case has("unknown authority"):
		return "--etcd-cafile must name the authority that signed etcd's certificate"
	case has("certificate is valid for"), has("doesn't contain any IP SANs"), has("not valid for any names"):
		return "--etcd-endpoints must use a name or address that stands in etcd's certificate"
	case has("certificate has expired"), has("expired certificate"):
		return "renew the certificate, or set the clock"
	case has("first record does not look like a TLS handshake"):
		return "this endpoint speaks http, not https"
	case has("certificate required"), has("bad certificate"), has("unknown certificate"):
		return "etcd wants a client certificate of its own authority that has not expired: --etcd-certfile and --etcd-keyfile"
	case reason == "EOF": // what etcd without TLS answers to a TLS handshake
		return "it hangs up at once; does it speak http, not https?"
	case has("connection refused"):
		return "is etcd running there?"
	}
	return ""
}

// brokenRemedy is for a connection that was taken and then broke, which says
// nothing itself. In TLS 1.3 the server refuses a client's certificate after the
// handshake, and its reason may be lost.
func (c EtcdConfig) brokenRemedy(text string) string {
	secure := strings.HasPrefix(c.Endpoints[0], "https://")
	switch broken := strings.HasSuffix(text, "broken pipe") || strings.HasSuffix(text, "connection reset by peer"); {
	case secure && (broken || strings.Contains(text, connecting)):
		return "if etcd asks for client certificates, ours must be of its authority: --etcd-certfile and --etcd-keyfile"
	case strings.Contains(text, connecting):
		return "does this endpoint want https?"
	}
	return ""
}

// refused reports whether etcd has answered that it did not do what was asked.
// After any other error the outcome is unknown: the request may still be carried
// out.
func refused(err error) bool {
	code := status.Code(err)
	var known rpctypes.EtcdError
	if errors.As(rpctypes.Error(err), &known) {
		code = known.Code()
	}
	switch code {
	case codes.PermissionDenied, codes.Unauthenticated, codes.InvalidArgument, codes.FailedPrecondition,
		codes.NotFound, codes.OutOfRange, codes.ResourceExhausted:
		return true
	}
	return false
}
