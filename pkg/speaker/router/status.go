package router

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
)

// Status asks the router for its sessions. It knows what was given to Set.
func (r *Router) Status(ctx context.Context) (overlay.BGPStatus, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := overlay.BGPStatus{
		ASNumber: r.last.ASNumber, RouterID: r.last.RouterID, ClusterID: r.last.ClusterID,
		Speaker: r.kind.name, Settled: r.reloaded, Announced: r.last.Own,
	}
	out, err := r.run(ctx, r.kind.show, r.config)
	if err != nil {
		return s, fmt.Errorf("ask %s for its sessions: %w; %s", r.kind.name, err, r.kind.remedy)
	}
	found, err := r.kind.sessions(out)
	if err != nil {
		return s, fmt.Errorf("read sessions of %s: %w", r.kind.name, err)
	}
	for _, n := range r.last.Neighbors {
		session, ok := found[n.Address.String()]
		if !ok {
			session = overlay.BGPSession{State: "idle", Error: r.kind.name + " does not know this neighbour"}
		}
		session.Neighbor = n
		session.Neighbor.Password = ""
		if session.State == "established" {
			session.Since = time.Now().Add(-session.Uptime)
		} else {
			s.Settled = false
		}
		s.Sessions = append(s.Sessions, session)
	}
	return s, nil
}

// frrSessions reads "show bgp summary json".
func frrSessions(out string) (map[string]overlay.BGPSession, error) {
	var summary map[string]struct {
		Peers map[string]struct {
			State       string
			PfxRcd      uint64
			PfxSnt      uint64
			Uptime      uint64 `json:"peerUptimeMsec"`
			MsgRcvd     uint64
			MsgSent     uint64
			Dropped     uint64 `json:"connectionsDropped"`
			Description string `json:"desc"`
		}
	}
	if err := json.Unmarshal([]byte(out), &summary); err != nil {
		return nil, err
	}
	all := map[string]overlay.BGPSession{}
	for _, family := range summary {
		for address, p := range family.Peers {
			s := overlay.BGPSession{
				State: strings.ToLower(p.State), Uptime: time.Duration(p.Uptime) * time.Millisecond, Accepted: p.PfxRcd, Received: p.PfxRcd,
				Announced: p.PfxSnt, MessagesIn: p.MsgRcvd, MessagesOut: p.MsgSent, Flaps: p.Dropped,
			}
			if s.State != "established" {
				s.Error = "FRR says: " + p.State
			}
			all[address] = s
		}
	}
	return all, nil
}

// birdSessions reads "show protocols all": a line for each protocol that begins at
// the margin, and below it lines "Name: value".
func birdSessions(out string) (map[string]overlay.BGPSession, error) {
	all := map[string]overlay.BGPSession{}
	for _, block := range strings.Split(out, "\n\n") {
		head, body, _ := strings.Cut(strings.TrimSpace(block), "\n")
		if f := strings.Fields(head); len(f) < 2 || f[1] != "BGP" {
			continue
		}
		address, s := birdSession(body)
		s.Uptime = birdUptime(head)
		if _, err := netip.ParseAddr(address); err != nil {
			return nil, fmt.Errorf("find neighbour's address in %q: %w", head, err)
		}
		all[address] = s
	}
	return all, nil
}

func birdSession(body string) (address string, s overlay.BGPSession) {
	for _, line := range strings.Split(body, "\n") {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		value = strings.TrimSpace(value)
		switch name {
		case "BGP state":
			s.State = strings.ToLower(value)
		case "Neighbor address":
			address = value
		case "Last error":
			s.Error = "BIRD says: " + value
		case "Routes": // "2 imported, 1 filtered, 1 exported, 2 preferred"
			for _, part := range strings.Split(value, ", ") {
				number, what, _ := strings.Cut(part, " ")
				n, err := strconv.ParseUint(number, 10, 64)
				if err != nil {
					continue
				}
				switch what {
				case "imported":
					s.Accepted = n
				case "exported":
					s.Announced = n
				}
				if what == "imported" || what == "filtered" {
					s.Received += n
				}
			}
		}
	}
	if s.State == "established" {
		s.Error = ""
	}
	return address, s
}

// birdUptime reads since when a protocol has been up, which the built-in template
// makes BIRD print as a date and a time.
func birdUptime(head string) time.Duration {
	f := strings.Fields(head) // name, BGP, table, up, date, time, Established
	if len(f) < 6 || f[3] != "up" {
		return 0
	}
	since, err := time.ParseInLocation(time.DateTime, f[4]+" "+f[5], time.Local)
	if err != nil {
		return 0
	}
	return time.Since(since)
}
