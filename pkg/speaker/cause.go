package speaker

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"

	"github.com/twill-net/twill/pkg/overlay"
)

// cause is why a session is not established.
type cause struct {
	kind   causeKind
	detail string // of the kernel or of the protocol
}

type causeKind int

// The first ones say little and do not replace the later.
const (
	nothing  causeKind = iota
	awaited            // it is for the neighbour to dial
	lost               // the connection ended, nobody said why
	closed             // the neighbour took the connection and closed it
	refused            // no one listens
	silent             // no answer
	unsent             // this node's kernel cannot send
	mute               // connected, and no answer to what is sent
	notified           // a notification, sent or received
	rejected           // the neighbour did not like our OPEN
	expired            // hold timer
	badAS
)

// or returns the one that says more. What the kernel says of the next attempt is
// always news.
func (c cause) or(o cause) cause {
	if o.kind > c.kind || o.kind >= refused {
		return o
	}
	return c
}

// ofEvent reads the reason that gobgp gives for the end of a session or an attempt.
func ofEvent(r api.PeerState_DisconnectReason, message string) cause {
	switch r {
	case api.PeerState_DISCONNECT_REASON_BAD_PEER_AS:
		return cause{badAS, ""}
	case api.PeerState_DISCONNECT_REASON_HOLD_TIMER_EXPIRED:
		return cause{expired, ""}
	case api.PeerState_DISCONNECT_REASON_NOTIFICATION_SENT:
		return cause{notified, message}
	case api.PeerState_DISCONNECT_REASON_NOTIFICATION_RECEIVED, api.PeerState_DISCONNECT_REASON_HARD_RESET,
		api.PeerState_DISCONNECT_REASON_READ_FAILED, api.PeerState_DISCONNECT_REASON_WRITE_FAILED,
		api.PeerState_DISCONNECT_REASON_GRACEFUL_RESTART, api.PeerState_DISCONNECT_REASON_RESTART_TIMER_EXPIRED:
		return cause{lost, ""}
	}
	return cause{}
}

// ofDial reads what the kernel says of a connection attempt.
func ofDial(text string) cause {
	switch {
	case strings.Contains(text, "connection refused"):
		return cause{refused, ""}
	case strings.Contains(text, "i/o timeout"), strings.Contains(text, "timed out"):
		return cause{silent, ""}
	}
	// "dial tcp 198.51.100.11:0->203.0.113.9:179: connect: network is unreachable"
	if i := strings.LastIndex(text, ": "); i >= 0 {
		text = text[i+2:]
	}
	return cause{unsent, text}
}

// text says it in words that an operator can act on. counters are the kernel's of
// signatures, or nil.
func (c cause) text(n overlay.BGPNeighbor, counters map[string]uint64) string {
	a, us := n.Address, "this node"
	if n.Local.IsValid() {
		us = n.Local.String()
	}
	switch c.kind {
	case awaited:
		return fmt.Sprintf("no connection from %s yet: is its BGP daemon running, and does a firewall let TCP port %d pass?%s", a, n.Port, signatures(n, counters))
	case lost:
		return fmt.Sprintf("%s has closed the connection without a word: it is restarting, or the network between is broken", a)
	case closed:
		return fmt.Sprintf("%s closes the connection at once: check that it has %s as its neighbour; it may also be waiting after an earlier error", a, us)
	case refused:
		return fmt.Sprintf("%s refuses TCP port %d: is its BGP daemon running?", a, n.Port)
	case silent:
		return fmt.Sprintf("no answer from %s, TCP port %d: is it up, and does a firewall let TCP port %d pass?%s", a, n.Port, n.Port, signatures(n, counters))
	case unsent:
		return fmt.Sprintf("no connection to %s, TCP port %d: %s", a, n.Port, c.detail)
	case mute:
		limit := fmt.Sprintf("Multihop (%d)", max(n.Multihop, 1))
		if n.TTLSecurity > 0 {
			limit = fmt.Sprintf("TTLSecurity (%d)", n.TTLSecurity)
		}
		return fmt.Sprintf("%s is connected but does not answer: it may be more hops away than %s says, or the path carries small packets alone", a, limit)
	case notified:
		return fmt.Sprintf("session to %s ended: %s", a, c.detail)
	case rejected:
		return fmt.Sprintf("%s rejects this node's OPEN: check that it has %s as its neighbour, and the AS number it expects of it", a, us)
	case expired:
		return fmt.Sprintf("hold timer expired: nothing was heard from %s for the hold time; is it overloaded, or the network between broken?", a)
	case badAS:
		return fmt.Sprintf("%s says it is in another AS than the configured %d: correct ASNumber in %s, or its own", a, n.ASNumber, n.Name)
	}
	return ""
}

// signatures says what may be wrong with the password (RFC 2385): the kernel drops a
// segment with a bad signature without a word, at either end.
func signatures(n overlay.BGPNeighbor, counters map[string]uint64) string {
	var seen string
	if bad := counters["TCPMD5Failure"] + counters["TCPMD5NotFound"]; bad > 0 && n.Password != "" {
		seen = fmt.Sprintf("; this node's kernel has dropped %d TCP segments with a wrong signature or none", bad)
	}
	if signed := counters["TCPMD5Unexpected"]; signed > 0 && n.Password == "" {
		return fmt.Sprintf(" This node's kernel has dropped %d signed TCP segments: if they are its, it has a password for this session and this node has none", signed)
	}
	if n.Password == "" {
		return ""
	}
	return " A password is set: check that both ends have the same" + seen
}

// since returns what has been counted after the earlier reading.
func since(now, earlier map[string]uint64) map[string]uint64 {
	out := map[string]uint64{}
	for k, v := range now {
		out[k] = v - earlier[k]
	}
	return out
}

// signatureCounters reads the kernel's counters of dropped segments (this network
// namespace, since its start).
func signatureCounters() map[string]uint64 {
	f, err := os.Open("/proc/net/netstat")
	if err != nil {
		return nil // a hint less
	}
	defer f.Close()
	return parseCounters(f)
}

// parseCounters reads pairs of lines: names, then values.
func parseCounters(r io.Reader) map[string]uint64 {
	out := map[string]uint64{}
	in := bufio.NewScanner(r)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		names := strings.Fields(in.Text())
		if !in.Scan() {
			break
		}
		values := strings.Fields(in.Text())
		for i := 1; i < min(len(names), len(values)); i++ {
			if v, err := strconv.ParseUint(values[i], 10, 64); err == nil && strings.HasPrefix(names[i], "TCPMD5") {
				out[names[i]] = v
			}
		}
	}
	return out
}

// logHandler hears what gobgp logs. gobgp says nowhere else why a connection attempt
// failed; all but its errors ends here.
type logHandler struct {
	out      *slog.Logger
	peers    *sessions
	neighbor netip.Addr
}

func (h *logHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h *logHandler) WithGroup(string) slog.Handler { return h }

func (h *logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *h
	for _, a := range attrs {
		if a.Key != "Key" {
			continue
		}
		if n, err := netip.ParseAddr(a.Value.String()); err == nil {
			c.neighbor = n
		}
	}
	return &c
}

func (h *logHandler) Handle(ctx context.Context, r slog.Record) error {
	attrs := func() map[string]string {
		m := map[string]string{}
		r.Attrs(func(a slog.Attr) bool { m[a.Key] = a.Value.String(); return true })
		return m
	}
	switch r.Message {
	case "failed to connect":
		h.note(ofDial(attrs()["Error"]))
	case "outgoing connection IO error":
		h.note(cause{closed, ""})
	case "sent notification":
		h.notified(attrs())
	case "received notification":
		// Of a neighbour that wants its routes kept (RFC 8538) gobgp does not say it again.
		c := cause{notified, notification(attrs()) + " was received from it"}
		h.peers.update(h.neighbor, func(s *session) { s.farewell = c })
	case "failed to set md5":
		h.out.Warn("BGP password cannot be set on the listening socket; only this node can open the session", "neighbor", attrs()["Key"], "error", attrs()["Err"])
	default:
		if r.Level >= slog.LevelError {
			h.out.Warn("gobgp: "+r.Message, "neighbor", h.neighbor, "details", attrs())
		}
	}
	return nil
}

func (h *logHandler) note(c cause) {
	h.peers.update(h.neighbor, func(s *session) {
		if s.up {
			return
		}
		s.why = s.why.or(c)
		s.refused = s.refused || c.kind == refused
	})
}

// notified reads what was sent in answer to the neighbour's OPEN. Instead of one, a
// neighbour that rejects ours sends a notification, which is out of turn for gobgp.
func (h *logHandler) notified(attrs map[string]string) {
	code, _ := strconv.Atoi(attrs["Code"])
	sub, _ := strconv.Atoi(attrs["Subcode"])
	switch {
	case code == bgp.BGP_ERROR_OPEN_MESSAGE_ERROR && sub == bgp.BGP_ERROR_SUB_BAD_PEER_AS:
		h.note(cause{badAS, ""})
	case code == bgp.BGP_ERROR_FSM_ERROR:
		h.note(cause{rejected, ""})
	default:
		h.note(cause{notified, notification(attrs) + " was sent to it"})
	}
}

// notification is its code in words: "code 6(cease) subcode 2(administrative shutdown)".
func notification(attrs map[string]string) string {
	code, _ := strconv.ParseUint(attrs["Code"], 10, 8)
	sub, _ := strconv.ParseUint(attrs["Subcode"], 10, 8)
	return bgp.NewNotificationErrorCode(uint8(code), uint8(sub)).String()
}
