package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/twill-net/twill/pkg/nettest"
)

// prober sends probes at a fixed rate and matches the answers.
type prober struct {
	to             netip.AddrPort
	rate, count    int
	duration, wait time.Duration

	conn   *net.UDPConn
	begin  time.Time
	errors int

	mu       sync.Mutex
	sent     []time.Duration // when each probe left, from begin
	trip     []time.Duration // its round trip time; 0: no answer yet
	received int
}

// A probe is its number, 8 bytes. hello is answered before the counting begins.
const hello = ^uint64(0)

func (p *prober) run(ctx context.Context) (nettest.ProbeResult, error) {
	local := "0.0.0.0:0"
	if p.to.Addr().Is6() {
		local = "[::]:0"
	}
	var err error
	if p.conn, err = listenUDP(local); err != nil {
		return nettest.ProbeResult{}, err
	}
	defer p.conn.Close()
	if err := p.greet(ctx); err != nil {
		return nettest.ProbeResult{}, err
	}
	fmt.Fprintln(os.Stderr, "answered")
	p.begin = time.Now()
	var reader sync.WaitGroup
	reader.Go(p.receive)
	p.send(ctx)
	p.linger()
	if err := p.conn.Close(); err != nil {
		return nettest.ProbeResult{}, err
	}
	reader.Wait()
	return p.result(), nil
}

// greet waits for a first answer.
func (p *prober) greet(ctx context.Context) error {
	buf := make([]byte, 8)
	for end := time.Now().Add(p.wait); time.Now().Before(end) && ctx.Err() == nil; {
		if err := p.write(hello); err != nil {
			time.Sleep(20 * time.Millisecond) // no route yet
			continue
		}
		if err := p.conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
			return err
		}
		n, err := p.conn.Read(buf)
		if err == nil && n == len(buf) {
			return p.conn.SetReadDeadline(time.Time{})
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
	}
	return errors.New("no answer")
}

func (p *prober) write(number uint64) error {
	_, err := p.conn.WriteToUDPAddrPort(binary.BigEndian.AppendUint64(nil, number), p.to)
	return err
}

// burst is how far behind its schedule a prober catches up. What is more it leaves out:
// thousands of packets at once, after a pause of the machine, are another test.
const burst = 100 * time.Millisecond

// send keeps to the schedule.
func (p *prober) send(ctx context.Context) {
	interval := time.Second / time.Duration(p.rate)
	timer := time.NewTimer(0)
	defer timer.Stop()
	var due time.Duration
	for i := 0; p.count == 0 || i < p.count; i++ {
		wait := due - time.Since(p.begin)
		if wait < -burst {
			due -= wait + burst
		}
		if p.duration > 0 && due >= p.duration {
			return
		}
		due += interval
		if wait > 0 {
			timer.Reset(wait)
			select {
			case <-timer.C:
			case <-ctx.Done():
				return
			}
		} else if ctx.Err() != nil {
			return
		}
		p.mu.Lock()
		p.sent = append(p.sent, time.Since(p.begin))
		p.trip = append(p.trip, 0)
		p.mu.Unlock()
		if p.write(uint64(i)) != nil {
			p.errors++
		}
	}
}

// receive ends when the socket is closed.
func (p *prober) receive() {
	buf := make([]byte, 8)
	for {
		n, from, err := p.conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		now := time.Since(p.begin)
		if n != len(buf) || from.Port() != p.to.Port() {
			continue
		}
		p.mu.Lock()
		// The number of a late hello is out of range; a second answer is none.
		if i := binary.BigEndian.Uint64(buf); i < uint64(len(p.trip)) && p.trip[i] == 0 {
			p.trip[i] = max(1, now-p.sent[i])
			p.received++
		}
		p.mu.Unlock()
	}
}

// linger waits for late answers: what is in the queue of race-built crypto is not lost.
func (p *prober) linger() {
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		p.mu.Lock()
		all := p.received == len(p.sent)
		p.mu.Unlock()
		if all {
			return
		}
	}
}

func (p *prober) result() nettest.ProbeResult {
	r := nettest.ProbeResult{Sent: len(p.sent), Received: p.received, Errors: p.errors, LostAt: []float64{}}
	r.Lost = r.Sent - r.Received
	var trips []time.Duration
	var last time.Duration // when the last answered probe was sent
	lost := false
	for i, trip := range p.trip {
		if trip == 0 {
			lost = true
			r.LostAt = append(r.LostAt, ms(p.sent[i]))
			continue
		}
		if lost {
			r.LongestGap = max(r.LongestGap, ms(p.sent[i]-last))
		}
		last, lost = p.sent[i], false
		trips = append(trips, trip)
	}
	if lost { // to the end
		r.LongestGap = max(r.LongestGap, ms(p.sent[len(p.sent)-1]-last))
	}
	if n := len(p.sent); n > 0 {
		r.LastAt = ms(p.sent[n-1])
	}
	if n := len(trips); n > 0 {
		slices.Sort(trips)
		r.P50, r.P99 = ms(trips[n/2])*1000, ms(trips[n*99/100])*1000
	}
	return r
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
