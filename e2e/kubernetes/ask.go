package kubernetes

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	core "k8s.io/api/core/v1"

	"github.com/twill-net/twill/pkg/nettest"
)

// What a web pod (WebManifest), or agnhost netexec anywhere, can be asked.
const (
	AskName   = "hostname" // its host name: a pod's name
	AskClient = "clientip" // the client's address and port
)

// AskFromHost asks the server at addr ("10.244.0.2:8080") from a namespace.
func AskFromHost(ctx context.Context, from *nettest.NS, addr, question string) (string, error) {
	answer, err := get(ctx, from, "http://"+addr+"/"+question)
	if err != nil {
		return "", fmt.Errorf("ask %s from %s: %w", addr, from.Name, err)
	}
	return answer, nil
}

// AskFromPod has a web pod ask the server at addr, whose host may be a name. The pod is
// told so by its node.
func (c *Cluster) AskFromPod(ctx context.Context, from *core.Pod, addr, question string) (string, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return "", err
	}
	query := url.Values{"host": {host}, "port": {port}, "request": {question}, "protocol": {"http"}, "tries": {"1"}}
	dial := "http://" + net.JoinHostPort(from.Status.PodIP, "8080") + "/dial?" + query.Encode()
	text, err := get(ctx, c.Node(from.Spec.NodeName).NS, dial)
	var answer struct{ Responses, Errors []string }
	if err == nil {
		err = json.Unmarshal([]byte(text), &answer)
	}
	if err == nil && len(answer.Responses) != 1 {
		err = fmt.Errorf("no answer: %s", strings.Join(answer.Errors, "; "))
	}
	if err != nil {
		return "", fmt.Errorf("ask %s from pod %s on %s: %w", addr, from.Name, from.Spec.NodeName, err)
	}
	return answer.Responses[0], nil
}

// get reads a page from within a namespace, over a connection of its own.
func get(ctx context.Context, from *nettest.NS, page string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	transport := &http.Transport{DialContext: from.DialContext, DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, page, nil)
	if err != nil {
		return "", err
	}
	response, err := (&http.Client{Transport: transport}).Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", response.Status, body)
	}
	return strings.TrimSpace(string(body)), err
}

// addrs of a pod, of both families if it has both.
func addrs(p *core.Pod) []netip.Addr {
	var out []netip.Addr
	for _, ip := range p.Status.PodIPs {
		out = append(out, netip.MustParseAddr(ip.IP))
	}
	return out
}

// addrs of a host that the cluster uses.
func (c *Cluster) addrs(h *nettest.Host) []netip.Addr {
	var out []netip.Addr
	for _, a := range []netip.Addr{h.IPv4, h.IPv6} {
		if c.opts.Stack.has(a) {
			out = append(out, a)
		}
	}
	return out
}

func port(a netip.Addr, n uint16) string { return netip.AddrPortFrom(a, n).String() }

// sameHost reports whether an address with a port, which may be in a longer form, is of a.
func sameHost(addr string, a netip.Addr) bool {
	p, err := netip.ParseAddrPort(addr)
	return err == nil && p.Addr().Unmap() == a
}
