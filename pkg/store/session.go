package store

import (
	"context"
	"fmt"
	"sync/atomic"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// session is one Watch, as seen from its gRPC stream. The etcd client resumes the
// stream by itself and tells nobody; here is where it is seen.
type session struct {
	*Etcd
	ctx      context.Context // of the Watch
	cluster  uint64
	revision atomic.Int64 // folded so far
}

type sessionKey struct{}

func (s *session) lost(err error) {
	if s.ctx.Err() == nil {
		s.health.down(s.cfg.explain("watch", s.cfg.Prefix, err))
	}
}

// caller is between the etcd client and the network.
type caller struct {
	login *login // nil: no user
}

// unary makes calls fail with the reason when no member can be reached. The etcd
// client's own habit is to wait until the deadline and then to say only that.
func (c caller) unary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	call := func() error {
		return invoke(ctx, method, req, reply, cc, append(opts, grpc.WaitForReady(false))...)
	}
	if c.login == nil || method == pb.Auth_Authenticate_FullMethodName {
		return call()
	}
	return c.login.call(ctx, cc, call)
}

// stream does the same for streams, and looks into that of a Watch. A stream has
// no second try: its token must be good, so it is a new one.
func (c caller) stream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	var stream grpc.ClientStream
	var err error
	if c.login != nil {
		_, err = c.login.renew(ctx, cc, *c.login.token.Load())
	}
	if err == nil {
		stream, err = open(ctx, desc, cc, method, append(opts, grpc.WaitForReady(false))...)
	}
	s, ok := ctx.Value(sessionKey{}).(*session)
	if !ok {
		return stream, err
	}
	if err != nil {
		s.lost(err)
		return nil, err
	}
	return &watchStream{stream, s}, nil
}

// watchStream is the stream of a Watch.
type watchStream struct {
	grpc.ClientStream
	session *session
}

// RecvMsg fails for good if the store is not the one that was read, or an older
// state of it: a cluster made anew, or restored from a backup. To go on watching
// it would be to wait for revisions that come in months, if ever.
func (w *watchStream) RecvMsg(m any) error {
	s := w.session
	if err := w.ClientStream.RecvMsg(m); err != nil {
		s.lost(err)
		return err
	}
	r, ok := m.(*pb.WatchResponse)
	if !ok || !r.Created || r.Canceled {
		return nil
	}
	if folded := s.revision.Load(); r.Header.ClusterId != s.cluster || r.Header.Revision < folded {
		return status.Error(codes.DataLoss, fmt.Sprintf("etcd is not what it was: cluster %x at revision %d, after cluster %x at revision %d",
			r.Header.ClusterId, r.Header.Revision, s.cluster, folded))
	}
	s.health.up()
	return nil
}
