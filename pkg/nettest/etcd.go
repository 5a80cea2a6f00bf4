package nettest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

// Users of an etcd with EtcdOptions.Auth. EtcdUser may read and write EtcdPrefix.
const (
	EtcdRoot         = "root"
	EtcdRootPassword = "root-secret"
	EtcdUser         = "flannel"
	EtcdUserPassword = "flannel-secret"
	EtcdPrefix       = "/coreos.com/network"
)

// Etcd is a running cluster.
type Etcd struct {
	Members []*Member
	PKI     *PKI // nil without TLS

	lab    *Lab
	opts   EtcdOptions
	client *clientv3.Client
}

// Member is one etcd process on a host of its own: Cut and Restore work on its
// cable, Kill9, Term, Start and Signal on the process.
type Member struct {
	*Host
	*Process
	ClientURL   string // on IPv4
	ClientURLv6 string
}

// Start starts the member's program again after it has ended.
func (m *Member) Start() error { return m.Process.Start() }

// Endpoints returns the members' client URLs.
func (e *Etcd) Endpoints() []string {
	var urls []string
	for _, m := range e.Members {
		urls = append(urls, m.ClientURL)
	}
	return urls
}

// Client returns a client with all rights. It reaches each member from that
// member's own namespace, so that no cut cable is in its way. The lab closes it.
func (e *Etcd) Client() *clientv3.Client { return e.client }

// NewClient returns a client of the endpoints, or of all if there are none, that
// acts as user; an empty user is nobody. The caller closes it.
func (e *Etcd) NewClient(user, password string, endpoints ...string) (*clientv3.Client, error) {
	if len(endpoints) == 0 {
		endpoints = e.Endpoints()
	}
	cfg := clientv3.Config{
		Endpoints:   endpoints,
		DialTimeout: 5 * time.Second,
		Username:    user, Password: password,
		DialOptions: []grpc.DialOption{grpc.WithContextDialer(e.dial)},
		// Benchmarks read all of 10,000 leases at once.
		MaxCallRecvMsgSize: 64 << 20,
		// Errors are returned; tests that cut cables would fill pages otherwise.
		Logger: zap.NewNop(),
	}
	if e.PKI != nil {
		var err error
		if cfg.TLS, err = e.PKI.clientTLS(); err != nil {
			return nil, fmt.Errorf("make etcd client: %w", err)
		}
	}
	c, err := clientv3.New(cfg)
	if err != nil {
		return nil, fmt.Errorf("make etcd client: %w", err)
	}
	return c, nil
}

func (e *Etcd) dial(ctx context.Context, addr string) (net.Conn, error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, fmt.Errorf("dial etcd: %w", err)
	}
	for _, m := range e.Members {
		if to.Addr() == m.IPv4 || to.Addr() == m.IPv6 {
			return m.DialContext(ctx, "tcp", addr)
		}
	}
	return nil, fmt.Errorf("dial etcd: %s is no member", addr)
}

// GRPCDialer returns the option that makes an etcd client connect from within the
// namespace. Its endpoints are numeric.
func (n *NS) GRPCDialer() []grpc.DialOption {
	return []grpc.DialOption{grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
		return n.DialContext(ctx, "tcp", addr)
	})}
}

// WaitReady waits until every member is up, has a leader and answers.
func (e *Etcd) WaitReady(ctx context.Context) error {
	for _, m := range e.Members {
		for {
			err := e.probe(ctx, m)
			if err == nil {
				break
			}
			select {
			case <-m.Done():
				return fmt.Errorf("start etcd %s: %w", m.Name, m.Wait())
			case <-ctx.Done():
				return fmt.Errorf("start etcd %s: %w", m.Name, err)
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
	return nil
}

// probe asks one member. It connects first by itself: a client that was refused
// waits longer and longer before it tries again.
func (e *Etcd) probe(ctx context.Context, m *Member) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	conn, err := m.DialContext(ctx, "tcp", netip.AddrPortFrom(m.IPv4, clientPort).String())
	if err != nil {
		return err
	}
	if err := conn.Close(); err != nil {
		return err
	}
	c, err := e.NewClient("", "", m.ClientURL)
	if err != nil {
		return err
	}
	defer c.Close()
	s, err := c.Status(ctx, m.ClientURL)
	if err == nil && s.Leader == 0 {
		err = errors.New("no leader")
	}
	return err
}

// Leader returns the member that leads.
func (e *Etcd) Leader(ctx context.Context) (*Member, error) {
	var errs []error
	for _, m := range e.Members {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		s, err := e.client.Status(ctx, m.ClientURL)
		cancel()
		if err != nil {
			errs = append(errs, err)
		} else if s.Leader == s.Header.MemberId {
			return m, nil
		}
	}
	return nil, fmt.Errorf("find etcd leader: none of %d members leads: %w", len(e.Members), errors.Join(errs...))
}

// Compact throws away all history before the present revision, in every member.
func (e *Etcd) Compact(ctx context.Context) error {
	r, err := e.client.Get(ctx, "/")
	if err != nil {
		return fmt.Errorf("compact etcd: %w", err)
	}
	if _, err := e.client.Compact(ctx, r.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
		return fmt.Errorf("compact etcd: %w", err)
	}
	return nil
}

// Stop ends all members in good order.
func (e *Etcd) Stop() error {
	return e.each(func(p *Process) error {
		err := p.Term()
		// Older releases tidy up and then end by the signal itself.
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGTERM {
			return nil
		}
		return err
	})
}

// Start starts all members again and waits until they are ready.
func (e *Etcd) Start(ctx context.Context) error {
	if err := e.each((*Process).Start); err != nil {
		return err
	}
	return e.WaitReady(ctx)
}

// Pause stops all members where they stand: connections stay open and nothing
// answers.
func (e *Etcd) Pause() error {
	return e.each((*Process).Pause)
}

// Resume lets all members go on.
func (e *Etcd) Resume() error {
	return e.each((*Process).Resume)
}

func (e *Etcd) each(f func(*Process) error) error {
	var errs []error
	for _, m := range e.Members {
		errs = append(errs, f(m.Process))
	}
	return errors.Join(errs...)
}
