// Package store keeps the nodes' leases in etcd v3, on flannel's schema: it folds
// what etcd holds into complete Snapshots and makes conditional writes.
package store

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

// EtcdConfig is how to reach etcd: flannel's --etcd-… flags.
type EtcdConfig struct {
	Endpoints []string // http://host:port or https://host:port
	Prefix    string   // default /coreos.com/network
	// CAFile signs the servers. KeyFile and CertFile are ours, read again for
	// each connection, so that they may be renewed. Any of the three means TLS.
	KeyFile, CertFile, CAFile string
	Username, Password        string
	TTL                       time.Duration // of our own lease; default 24 h, whole seconds
	Log                       *slog.Logger
	// Dial connects to host:port. Nil dials from the network namespace of the
	// process.
	Dial func(ctx context.Context, addr string) (net.Conn, error)
}

const (
	defaultPrefix = "/coreos.com/network"
	defaultTTL    = 24 * time.Hour

	// callTimeout bounds one RPC. It is longer than etcd's own limit of 7 s, so
	// that etcd's reason arrives and not only our impatience.
	callTimeout = 10 * time.Second
	// A silent connection is given up after both: etcd allows a ping every 5 s,
	// gRPC one every 10 s. etcd ends connections that ping without a call in
	// progress ("too many pings"), so pings are sent with a call only; while a
	// Watch runs, there is one.
	keepaliveTime    = 10 * time.Second
	keepaliveTimeout = 5 * time.Second
	// connectTimeout is for TCP and TLS; a host that is gone does not refuse.
	connectTimeout = 5 * time.Second
	// lastPause bounds the pause between two attempts to connect: etcd's return is
	// noticed that soon.
	firstPause, lastPause = 100 * time.Millisecond, time.Second
)

// normalize returns the configuration with its defaults.
func (c EtcdConfig) normalize() (EtcdConfig, error) {
	if c.Prefix == "" {
		c.Prefix = defaultPrefix
	}
	c.Prefix = path.Clean(c.Prefix)
	if c.Prefix == "/" || c.Prefix == "." || strings.HasPrefix(c.Prefix, "..") {
		return c, fmt.Errorf("etcd prefix %q names no directory; flannel's is %s", c.Prefix, defaultPrefix)
	}
	if c.TTL == 0 {
		c.TTL = defaultTTL
	}
	if c.TTL < time.Second || c.TTL%time.Second != 0 {
		return c, fmt.Errorf("etcd lease TTL %s: must be whole seconds, at least 1s", c.TTL)
	}
	if (c.Username == "") != (c.Password == "") {
		return c, fmt.Errorf("etcd user %q: user name and password go together; give both --etcd-username and --etcd-password, or neither", c.Username)
	}
	if (c.KeyFile == "") != (c.CertFile == "") {
		return c, fmt.Errorf("etcd client certificate %q with key %q: they go together; give both --etcd-certfile and --etcd-keyfile, or neither", c.CertFile, c.KeyFile)
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	var err error
	c.Endpoints, err = c.endpoints()
	return c, err
}

// endpoints returns the endpoints with their schemes. All are of one scheme: what
// is meant for TLS, a password above all, never goes out in clear.
func (c EtcdConfig) endpoints() ([]string, error) {
	if len(c.Endpoints) == 0 {
		return nil, errors.New("etcd endpoints: there are none; give --etcd-endpoints=http://host:2379")
	}
	secure := c.CAFile != "" || c.CertFile != ""
	why := "TLS files are given"
	for _, e := range c.Endpoints {
		if !secure && strings.HasPrefix(e, "https://") {
			secure, why = true, e+" is https"
		}
	}
	var out []string
	for _, e := range c.Endpoints {
		scheme, rest, found := strings.Cut(e, "://")
		if !found { // flannel takes host:port too
			scheme, rest = "http", e
			if secure {
				scheme = "https"
			}
		}
		if err := checkEndpoint(scheme, rest); err != nil {
			return nil, fmt.Errorf("etcd endpoint %q: %w", redact(e), err)
		}
		if secure && scheme == "http" {
			return nil, fmt.Errorf("etcd endpoint %q would be spoken to in clear, but %s; write https://", e, why)
		}
		out = append(out, scheme+"://"+strings.TrimSuffix(rest, "/"))
	}
	return out, nil
}

func checkEndpoint(scheme, rest string) error {
	if scheme != "http" && scheme != "https" {
		return fmt.Errorf("scheme %q is unknown; write http://host:port or https://host:port", scheme)
	}
	u, err := url.Parse(scheme + "://" + rest)
	if err != nil {
		return fmt.Errorf("it is not a URL like http://host:2379")
	}
	if u.User != nil {
		return errors.New("it holds a user; use --etcd-username and --etcd-password")
	}
	if u.Hostname() == "" || u.Port() == "" || u.Port() == "0" || u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "" {
		return errors.New("it must be a host and a port, like http://host:2379")
	}
	if _, err := net.LookupPort("tcp", u.Port()); err != nil {
		return fmt.Errorf("port %s is not in 1..65535", u.Port())
	}
	return nil
}

// redact keeps a password out of the log.
func redact(endpoint string) string {
	scheme, rest, found := strings.Cut(endpoint, "://")
	if i := strings.LastIndexByte(rest, '@'); found && i >= 0 {
		return scheme + "://…" + rest[i:]
	}
	return endpoint
}

// tls returns the TLS configuration, or nil for none.
func (c EtcdConfig) tls() (*tls.Config, error) {
	if !strings.HasPrefix(c.Endpoints[0], "https://") {
		return nil, nil
	}
	t := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CAFile != "" {
		pem, err := os.ReadFile(c.CAFile)
		if err != nil {
			return nil, fmt.Errorf("read --etcd-cafile: %w", err)
		}
		t.RootCAs = x509.NewCertPool()
		if !t.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("read --etcd-cafile: %s holds no PEM certificate", c.CAFile)
		}
	}
	if c.CertFile == "" {
		return t, nil
	}
	load := func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		cert, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("read --etcd-certfile %s and --etcd-keyfile %s: %w", c.CertFile, c.KeyFile, err)
		}
		return &cert, nil
	}
	if _, err := load(nil); err != nil {
		return nil, err
	}
	t.GetClientCertificate = load
	return t, nil
}

// client returns the configuration of the etcd client.
func (c EtcdConfig) client(security *tls.Config) clientv3.Config {
	connect := grpc.ConnectParams{
		Backoff:           backoff.Config{BaseDelay: firstPause, Multiplier: 1.6, Jitter: 0.2, MaxDelay: lastPause},
		MinConnectTimeout: connectTimeout,
	}
	options := []grpc.DialOption{
		grpc.WithConnectParams(connect),
		grpc.WithNoProxy(), // HTTPS_PROXY is there for images, not for the cluster's own traffic
	}
	var calls caller
	if c.Username != "" {
		calls.login = newLogin(c.Username, c.Password)
		options = append(options, grpc.WithPerRPCCredentials(calls.login))
	}
	options = append(options, grpc.WithChainUnaryInterceptor(calls.unary), grpc.WithChainStreamInterceptor(calls.stream))
	if c.Dial != nil {
		options = append(options, grpc.WithContextDialer(c.Dial))
	}
	return clientv3.Config{
		Endpoints:            c.Endpoints,
		TLS:                  security,
		DialKeepAliveTime:    keepaliveTime,
		DialKeepAliveTimeout: keepaliveTimeout,
		MaxUnaryRetries:      uint(len(c.Endpoints)) + 1,
		DialOptions:          options,
		Logger:               zap.NewNop(),
	}
}
