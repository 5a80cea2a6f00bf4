package store

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// login is a user's session. The etcd client has its own, which cannot be used: it
// sends the old token along when it asks for a new one, which etcd 3.4 refuses, so
// that a token once run out (after five minutes) is never replaced; and it
// logs in before there is anything to do, which fails while etcd is away.
//
// It is a PerRPCCredentials: every call but the login carries the token.
type login struct {
	name, password string

	renewing sync.Mutex
	token    atomic.Pointer[string] // never nil
}

const (
	noToken = ""
	// authOff is the token of an etcd that does not ask who we are.
	authOff = "auth is off"
)

func newLogin(name, password string) *login {
	l := &login{name: name, password: password}
	l.set(noToken)
	return l
}

func (l *login) set(token string) { l.token.Store(&token) }

// renew returns a token other than the stale one, by logging in unless somebody
// else just did.
func (l *login) renew(ctx context.Context, cc *grpc.ClientConn, stale string) (string, error) {
	l.renewing.Lock()
	defer l.renewing.Unlock()
	if t := *l.token.Load(); t != stale {
		return t, nil
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	r, err := pb.NewAuthClient(cc).Authenticate(ctx, &pb.AuthenticateRequest{Name: l.name, Password: l.password})
	switch {
	case errors.Is(rpctypes.Error(err), rpctypes.ErrAuthNotEnabled):
		l.set(authOff)
	case err != nil:
		return "", err
	default:
		l.set(r.Token)
	}
	return *l.token.Load(), nil
}

// call makes a call with a token, and once more with a new one if it is refused.
func (l *login) call(ctx context.Context, cc *grpc.ClientConn, invoke func() error) error {
	token := *l.token.Load()
	if token == noToken {
		var err error
		if token, err = l.renew(ctx, cc, noToken); err != nil {
			return err
		}
	}
	err := invoke()
	if !tokenRefused(err) {
		return err
	}
	if _, err := l.renew(ctx, cc, token); err != nil {
		return err
	}
	return invoke()
}

// tokenRefused reports whether etcd did nothing because of the token.
func tokenRefused(err error) bool {
	err = rpctypes.Error(err)
	return errors.Is(err, rpctypes.ErrInvalidAuthToken) || errors.Is(err, rpctypes.ErrAuthOldRevision) || errors.Is(err, rpctypes.ErrUserEmpty)
}

// GetRequestMetadata returns the token.
func (l *login) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	info, ok := credentials.RequestInfoFromContext(ctx)
	if !ok {
		return nil, fmt.Errorf("log in to etcd: a call without a name")
	}
	token := *l.token.Load()
	if token == noToken || token == authOff || info.Method == pb.Auth_Authenticate_FullMethodName {
		return nil, nil
	}
	return map[string]string{rpctypes.TokenFieldNameGRPC: token}, nil
}

// RequireTransportSecurity is false: flannel's users may have a password and no
// TLS. OpenEtcd warns of it.
func (l *login) RequireTransportSecurity() bool { return false }
