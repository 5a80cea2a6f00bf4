package netctl

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"strings"
	"syscall"

	"github.com/twill-net/twill/pkg/overlay"
)

// DefaultSocket is where twilld serves its local API.
const DefaultSocket = "/run/flannel/twilld.sock"

// Client asks twilld over its unix socket.
type Client struct {
	socket string
	http   http.Client
}

// SelfReply is the answer to GET /v1/self: what the daemon gives Desired beside
// the leases.
type SelfReply struct {
	Self   overlay.Self   `json:"self"`
	Config overlay.Config `json:"config"`
}

// NewClient returns a client of the daemon that listens on socket. It holds no
// connection between requests.
func NewClient(socket string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}
	return &Client{socket: socket, http: http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}}
}

// Status returns what the daemon says of itself.
func (c *Client) Status(ctx context.Context) (overlay.Status, error) {
	return get[overlay.Status](ctx, c, "/v1/status")
}

// Self returns the node as the daemon sees it.
func (c *Client) Self(ctx context.Context) (SelfReply, error) {
	return get[SelfReply](ctx, c, "/v1/self")
}

// Drift returns the repaired deviations, the oldest first.
func (c *Client) Drift(ctx context.Context) ([]overlay.Drift, error) {
	return get[[]overlay.Drift](ctx, c, "/v1/drift")
}

func get[T any](ctx context.Context, c *Client, path string) (T, error) {
	var out T
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://twilld"+path, nil)
	if err != nil {
		return out, fmt.Errorf("ask twilld for %s: %w", path, err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return out, c.explain(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10)) // a cut or empty reason is still one
		return out, fmt.Errorf("twilld on %s answers GET %s with %s: %s", c.socket, path, resp.Status, strings.TrimSpace(string(text)))
	}
	if err := json.NewDecoder(resp.Body).Decode(&out); err != nil {
		return out, fmt.Errorf("read twilld's answer to GET %s: %w; are twilld and netctl of the same version?", path, err)
	}
	return out, nil
}

// explain turns a failed request into what the operator can do about it.
func (c *Client) explain(err error) error {
	remedy := "is it running? systemctl status twilld"
	reason := err
	var errno syscall.Errno
	switch {
	case errors.Is(err, fs.ErrPermission):
		remedy = "run netctl as root"
		reason = fs.ErrPermission
	case errors.Is(err, context.DeadlineExceeded):
		remedy = "it may be hung: journalctl -u twilld"
		reason = errors.New("no answer in time")
	case errors.As(err, &errno):
		reason = errno
	}
	return fmt.Errorf("twilld does not answer on %s: %w; %s", c.socket, reason, remedy)
}
