package main

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/nettest"
)

// road is one way through the network whose speed is taken: from one namespace to
// an address in another. This process makes the traffic itself, on blocking
// sockets. What Go's poller takes to wake a goroutine would be added to every
// round trip, on the bare path as on the others, and make them look alike.
type road struct {
	from, to *nettest.NS
	addr     netip.Addr
}

// speed is what a road carried.
type speed struct {
	TCP1   float64 `json:"tcp1_gbit_s"`
	TCP4   float64 `json:"tcp4_gbit_s"`
	UDP    float64 `json:"udp_kpps"`      // received
	Lost   float64 `json:"udp_lost"`      // of those sent, 0..1
	Packet float64 `json:"packet_cpu_us"` // see packetCost
	P50    float64 `json:"p50_us"`        // of a byte there and a byte back
	P99    float64 `json:"p99_us"`
}

// udpPayload makes packets that fit into every backend's MTU.
const udpPayload = 1400

// seats are the CPUs on which the two ends of a road run where it matters: by
// themselves they would run on one or on two as it comes, and a round trip take 20
// or 70 µs on the same road.
type seats struct{ sender, receiver int }

// measure takes all figures, in about two seconds.
func (r road) measure(s seats) (got speed, err error) {
	for _, f := range []func(seats, *speed) error{
		func(_ seats, got *speed) (err error) { got.TCP1, err = r.stream(1); return err },
		func(_ seats, got *speed) (err error) { got.TCP4, err = r.stream(4); return err },
		r.flood, r.packetCost, r.pingPong,
	} {
		if err := onOwnThread(func() error { return f(s, &got) }); err != nil {
			return got, err
		}
	}
	return got, nil
}

// onOwnThread calls f on a thread that ends with it, and with its CPU.
func onOwnThread(f func() error) error {
	errs := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // not unlocked: the thread ends with the goroutine
		if unix.Gettid() == unix.Getpid() {
			// The main thread never ends, and /proc/self is its. Hold it, so
			// that f gets another.
			errs <- onOwnThread(f)
			runtime.UnlockOSThread()
			return
		}
		errs <- f()
	}()
	return <-errs
}

// sit binds the calling goroutine's thread to a CPU for the rest of its life.
func sit(cpu int) {
	runtime.LockOSThread()
	var set unix.CPUSet
	set.Set(cpu)
	// One of the CPUs we may run on: it fails only if that changes now.
	_ = unix.SchedSetaffinity(0, &set)
}

// stream returns the Gbit/s that n TCP connections carry together, after a start
// that is not counted. Their threads run where they like.
func (r road) stream(n int) (float64, error) {
	const start, window = 200 * time.Millisecond, 400 * time.Millisecond
	l, port, err := r.listen(unix.SOCK_STREAM)
	if err != nil {
		return 0, err
	}
	defer unix.Close(l)
	var received atomic.Int64
	var work sync.WaitGroup
	var fds []int
	defer func() {
		for _, fd := range fds { // wakes who reads or writes
			_ = unix.Shutdown(fd, unix.SHUT_RDWR)
		}
		work.Wait()
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	}()
	for range n {
		out, in, err := r.connection(l, port)
		if err != nil {
			return 0, err
		}
		fds = append(fds, out, in)
		work.Go(func() { move(unix.Write, out, &atomic.Int64{}) })
		work.Go(func() { move(unix.Read, in, &received) })
	}
	time.Sleep(start)
	began, before := time.Now(), received.Load()
	time.Sleep(window)
	bytes := received.Load() - before
	if bytes == 0 {
		return 0, fmt.Errorf("send by TCP from %s to %s: nothing comes", r.from.Name, r.addr)
	}
	return float64(bytes) * 8 / 1e9 / time.Since(began).Seconds(), nil
}

// move writes or reads until the connection is shut down.
func move(call func(int, []byte) (int, error), fd int, moved *atomic.Int64) {
	block := make([]byte, 128<<10)
	for {
		n, err := again(call, fd, block)
		if n <= 0 || err != nil {
			return
		}
		moved.Add(int64(n))
	}
}

// flood sends UDP packets as fast as one thread can and counts those that come.
func (r road) flood(s seats, got *speed) error {
	const window, buffer = 400 * time.Millisecond, 4 << 20
	in, out, err := r.udp()
	if err != nil {
		return err
	}
	defer unix.Close(in)
	defer unix.Close(out)
	err = unix.SetsockoptInt(in, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, buffer)
	if err == nil { // the reader ends so long after the last packet
		err = unix.SetsockoptTimeval(in, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000})
	}
	if err != nil {
		return fmt.Errorf("prepare UDP socket: %w", err)
	}
	var done atomic.Bool
	var received int
	var reader sync.WaitGroup
	reader.Go(func() {
		sit(s.receiver)
		for buf := make([]byte, udpPayload); ; {
			_, err := unix.Read(in, buf)
			switch {
			case err == nil:
				received++
			case errors.Is(err, unix.EAGAIN) && done.Load():
				return
			}
		}
	})
	sit(s.sender)
	sent, began := 0, time.Now()
	for buf := make([]byte, udpPayload); time.Since(began) < window; {
		if _, err := unix.Write(out, buf); err == nil { // else a queue is full: none was sent
			sent++
		}
	}
	took := time.Since(began)
	done.Store(true)
	reader.Wait()
	if received == 0 {
		return fmt.Errorf("send UDP packets from %s to %s: none of %d comes", r.from.Name, r.addr, sent)
	}
	got.UDP, got.Lost = float64(received)/1e3/took.Seconds(), 1-float64(received)/float64(sent)
	return nil
}

// packetCost takes the CPU time that one UDP packet costs its sender, in
// microseconds, the least of many batches. Between namespaces the kernel carries
// a packet to the socket that it is for before the sender goes on, so this is the
// whole road: its length, hardly touched by what else runs on the machine. The
// socket is full, as waking a reader costs more on some days than on others. What
// passes through a process on its way (udp, wireguard) is not in it.
func (r road) packetCost(s seats, got *speed) error {
	const batches, size = 100, 100
	in, out, err := r.udp()
	if err != nil {
		return err
	}
	defer unix.Close(in)
	defer unix.Close(out)
	if err := unix.SetsockoptInt(in, unix.SOL_SOCKET, unix.SO_RCVBUF, 1); err != nil { // the least there is
		return fmt.Errorf("prepare UDP socket: %w", err)
	}
	sit(s.sender)
	least, buf := int64(math.MaxInt64), make([]byte, udpPayload)
	for range batches {
		before := threadTime()
		for range size {
			_, _ = unix.Write(out, buf) // lost by intention
		}
		least = min(least, threadTime()-before)
	}
	got.Packet = float64(least) / size / 1e3
	return nil
}

// threadTime is the CPU time of the calling thread in nanoseconds.
func threadTime() int64 {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t) // the clock exists
	return t.Nano()
}

// pingPong takes the time of a byte there and a byte back on one TCP connection.
// Both ends are on one CPU: how long an idle one takes to wake up is not the road's.
func (r road) pingPong(s seats, got *speed) error {
	const window = 300 * time.Millisecond
	l, port, err := r.listen(unix.SOCK_STREAM)
	if err != nil {
		return err
	}
	defer unix.Close(l)
	out, in, err := r.connection(l, port)
	if err != nil {
		return err
	}
	var echo sync.WaitGroup
	defer func() {
		_ = unix.Shutdown(out, unix.SHUT_RDWR)
		echo.Wait()
		_ = unix.Close(out)
		_ = unix.Close(in)
	}()
	echo.Go(func() {
		sit(s.sender)
		for b := make([]byte, 1); ; {
			if n, err := again(unix.Read, in, b); n <= 0 || err != nil {
				return
			}
			if _, err := again(unix.Write, in, b); err != nil {
				return
			}
		}
	})
	sit(s.sender)
	var trips []float64
	b := make([]byte, 1)
	for began := time.Now(); time.Since(began) < window; {
		sent := time.Now()
		n, err := again(unix.Write, out, b)
		if err == nil {
			n, err = again(unix.Read, out, b)
		}
		if n != 1 || err != nil {
			return fmt.Errorf("exchange a byte between %s and %s: %w", r.from.Name, r.addr, err)
		}
		trips = append(trips, float64(time.Since(sent).Nanoseconds())/1e3)
	}
	slices.Sort(trips)
	got.P50, got.P99 = trips[len(trips)/2], trips[len(trips)*99/100]
	return nil
}

// again repeats a call that a signal of the Go runtime has interrupted.
func again(call func(int, []byte) (int, error), fd int, b []byte) (int, error) {
	for {
		if n, err := call(fd, b); !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
