package udptun

import "golang.org/x/sys/unix"

// queue is one queue of the device and its sockets. One thread serves both
// directions: data and the acknowledgements that answer it keep the same thread
// awake, and to wake one on another processor costs more than to carry a packet.
type queue struct {
	sender   *sender
	receiver *receiver
	stop     *stopper
}

// patience is how often both directions may have nothing in a row before the thread
// sleeps: some microseconds on an idle processor. On a busy one each time lets those
// run who make the next packets, and no wake-up is needed.
const patience = 8

// run sleeps only when both directions are through.
func (q *queue) run() error {
	fds := q.stop.pollFds(unix.POLLIN, append([]int{q.sender.tun}, q.receiver.socks...)...)
	idle := 0
	for !q.stop.done.Load() {
		sent, err := q.sender.pull()
		if err != nil {
			return err
		}
		got, err := q.receiver.pull()
		if err != nil {
			return err
		}
		switch {
		case sent || got:
			idle = 0
		case idle < patience:
			idle++
			_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
		case !q.stop.wait(fds):
			return nil
		}
	}
	return nil
}
