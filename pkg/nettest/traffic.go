package nettest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// ProbeResult is what `lab probe client` prints.
type ProbeResult struct {
	Sent     int `json:"sent"`
	Received int `json:"received"`
	Lost     int `json:"lost"`
	// Errors counts the probes that the kernel refused to send: no route, link
	// down. They are lost, too.
	Errors int `json:"send_errors"`
	// LongestGap is the longest time, in milliseconds, between the sending of two
	// answered probes with lost ones between them; 0 if none was lost.
	LongestGap float64 `json:"longest_gap_ms"`
	// Round trip times in microseconds.
	P50 float64 `json:"p50_us"`
	P99 float64 `json:"p99_us"`
	// LostAt says when each lost probe was sent, in milliseconds from the first, and
	// LastAt when the last of all was.
	LostAt []float64 `json:"lost_at"`
	LastAt float64   `json:"last_at"`
}

func (r ProbeResult) String() string {
	return fmt.Sprintf("%d of %d probes lost, longest gap %.0f ms, round trip %.0f µs (99%%: %.0f µs)",
		r.Lost, r.Sent, r.LongestGap, r.P50, r.P99)
}

// TransferResult is what `lab tcp client` prints.
type TransferResult struct {
	Bytes   int64   `json:"bytes"` // counted by the receiver
	Seconds float64 `json:"seconds"`
	MbitPS  float64 `json:"mbit_per_s"`
	CRC32C  string  `json:"crc32c"` // of the bytes received, the same as of those sent
}

// Probe sends numbered UDP packets and counts the answers, until it is stopped.
type Probe struct {
	server, client *Process
	out            *bytes.Buffer
}

// StartProbe is StartProbeAt with 1,000 probes a second.
func StartProbe(from, to *NS, addr netip.Addr) (*Probe, error) {
	return StartProbeAt(1000, from, to, addr)
}

// StartProbeAt sends that many probes a second from one namespace to an echo server
// at addr in the other. It returns when the first answer has come; what was lost
// before is not counted.
func StartProbeAt(rate int, from, to *NS, addr netip.Addr) (*Probe, error) {
	p := &Probe{out: &bytes.Buffer{}}
	var err error
	if p.server, p.client, err = startPair(from, to, addr, "probe", p.out, "--rate", strconv.Itoa(rate)); err != nil {
		return nil, fmt.Errorf("start probe %s to %s: %w", from.Name, addr, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	if _, err := p.client.WaitLog(ctx, "answered"); err != nil {
		return nil, errors.Join(err, p.client.Kill9(), p.server.Kill9())
	}
	return p, nil
}

// Stop ends the probe and returns its counts, after waiting for late answers.
func (p *Probe) Stop() (ProbeResult, error) {
	err := p.client.Signal(syscall.SIGTERM)
	if err == nil {
		err = p.client.Wait()
	}
	err = errors.Join(err, p.server.Kill9())
	var r ProbeResult
	if err == nil {
		err = json.Unmarshal(p.out.Bytes(), &r)
	}
	if err != nil {
		return r, fmt.Errorf("stop probe: %w", err)
	}
	return r, nil
}

// Transfer sends size bytes by TCP from one namespace to addr in the other, where
// they are counted and their checksum is compared. It has a minute's time.
func Transfer(from, to *NS, addr netip.Addr, size int64) (TransferResult, error) {
	var r TransferResult
	var out bytes.Buffer
	server, client, err := startPair(from, to, addr, "tcp", &out, "--bytes", strconv.FormatInt(size, 10))
	if err != nil {
		return r, fmt.Errorf("transfer %s to %s: %w", from.Name, addr, err)
	}
	select {
	case <-client.Done():
		err = client.Wait()
	case <-time.After(time.Minute):
		err = errors.Join(errors.New("not done after a minute"), client.Kill9())
	}
	if err == nil {
		err = json.Unmarshal(out.Bytes(), &r)
	} else {
		log, _ := client.Output()
		err = fmt.Errorf("%w: %s", err, strings.TrimSpace(log))
	}
	if err := errors.Join(err, server.Kill9()); err != nil {
		return r, fmt.Errorf("transfer %s to %s: %w", from.Name, addr, err)
	}
	return r, nil
}

// startPair starts `lab <tool> server` on a free port of addr and the client of
// it, which writes its result to out.
func startPair(from, to *NS, addr netip.Addr, tool string, out *bytes.Buffer, args ...string) (server, client *Process, err error) {
	path, err := from.lab.Program()
	if err != nil {
		return nil, nil, err
	}
	server, err = to.Start(Program{
		Path: path, Name: tool + "-server",
		Args: []string{tool, "server", "--listen", netip.AddrPortFrom(addr, 0).String()},
	})
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	const listening = "listening "
	line, err := server.WaitLog(ctx, listening)
	if err == nil {
		client, err = from.Start(Program{
			Path: path, Name: tool + "-client", Stdout: out,
			Args: append([]string{tool, "client", "--to", strings.TrimPrefix(line, listening)}, args...),
		})
	}
	if err != nil {
		return nil, nil, errors.Join(err, server.Kill9())
	}
	return server, client, nil
}
