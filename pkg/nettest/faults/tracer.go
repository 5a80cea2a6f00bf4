//go:build linux && amd64

package faults

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// tracer follows a program, all its threads and all that it forks.
type tracer struct {
	pid     int
	fault   Fault
	out     Outcome
	threads map[int]*thread
	procs   map[int]*process
	held    []int // threads of helpers that wait for the killed program to be gone
	gone    bool  // the program itself
}

type process struct {
	pid     int
	name    string
	threads int
	// netlink holds the protocol of each netlink socket by its descriptor.
	netlink map[uint64]uint64
	// asked is what was last sent on a netlink socket.
	asked map[uint64]effect
}

type thread struct {
	tid    int
	number int
	proc   *process
	call   syscallInfo // the one it is in
	inject syscall.Errno
	kill   bool // when the call is done
}

func newTracer(pid int, f Fault) *tracer {
	return &tracer{pid: pid, fault: f, threads: map[int]*thread{}, procs: map[int]*process{}}
}

const traceOptions = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_EXITKILL | unix.PTRACE_O_TRACECLONE |
	unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK | unix.PTRACE_O_TRACEEXEC

// trace returns when the program and all its helpers have ended.
func (t *tracer) trace() error {
	// The program stops when it has been executed.
	tid, ws, err := t.wait()
	if err != nil {
		return err
	}
	if tid != t.pid || !ws.Stopped() {
		return fmt.Errorf("process %d did not stop at its start: status %#x", tid, ws)
	}
	if err := unix.PtraceSetOptions(tid, traceOptions); err != nil {
		return fmt.Errorf("set ptrace options: %w", err)
	}
	if _, err := t.newThread(tid); err != nil {
		return err
	}
	if err := t.resume(tid, 0); err != nil {
		return err
	}
	for {
		tid, ws, err := t.wait()
		if errors.Is(err, unix.ECHILD) {
			return nil
		}
		if err != nil {
			return err
		}
		if !ws.Stopped() {
			if err := t.ended(tid, ws); err != nil {
				return err
			}
			continue
		}
		sig, err := t.stopped(tid, ws)
		if err == nil && !slices.Contains(t.held, tid) {
			err = t.resume(tid, sig)
		}
		if err != nil && !isVanished(err) {
			return err
		}
	}
}

// wait returns what happened to a thread next. The process group and WNOTHREAD
// keep it from taking the end of some other child of this process.
func (t *tracer) wait() (int, unix.WaitStatus, error) {
	for {
		var ws unix.WaitStatus
		tid, err := unix.Wait4(-t.pid, &ws, unix.WALL|unix.WNOTHREAD, nil)
		if !errors.Is(err, unix.EINTR) {
			return tid, ws, err
		}
	}
}

// drain reaps what is left of a killed group.
func (t *tracer) drain() error {
	for {
		tid, ws, err := t.wait()
		if errors.Is(err, unix.ECHILD) {
			return nil
		}
		if err != nil {
			return err
		}
		if ws.Stopped() {
			_ = unix.Kill(tid, unix.SIGKILL)
			_ = t.resume(tid, 0)
		}
	}
}

// isVanished reports that a thread was killed while it was looked at.
func isVanished(err error) bool { return errors.Is(err, unix.ESRCH) || errors.Is(err, os.ErrNotExist) }

func (t *tracer) resume(tid int, sig syscall.Signal) error {
	if err := unix.PtraceSyscall(tid, int(sig)); err != nil && !isVanished(err) {
		return fmt.Errorf("resume thread %d: %w", tid, err)
	}
	return nil
}

func (t *tracer) newThread(tid int) (*thread, error) {
	pid, err := groupOf(tid)
	if err != nil {
		return nil, err
	}
	p := t.procs[pid]
	if p == nil {
		p = &process{pid: pid, netlink: map[uint64]uint64{}, asked: map[uint64]effect{}}
		t.procs[pid] = p
		p.name = programOf(pid)
	}
	p.threads++
	th := &thread{tid: tid, number: p.threads, proc: p}
	t.threads[tid] = th
	return th, nil
}

// groupOf returns the process that a thread belongs to.
func groupOf(tid int) (int, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if v, ok := strings.CutPrefix(line, "Tgid:"); ok {
			return strconv.Atoi(strings.TrimSpace(v))
		}
	}
	return 0, fmt.Errorf("thread %d has no group", tid)
}

func programOf(pid int) string {
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return "?"
	}
	return filepath.Base(exe)
}

func (t *tracer) ended(tid int, ws unix.WaitStatus) error {
	delete(t.threads, tid)
	if tid != t.pid {
		return nil
	}
	t.gone = true
	t.out.ExitCode, t.out.Killed = ws.ExitStatus(), ws.Signaled()
	held := t.held
	t.held = nil
	for _, tid := range held {
		if err := t.resume(tid, 0); err != nil {
			return err
		}
	}
	return nil
}

// stopped handles a thread that has stopped, and returns the signal it is to get
// when it goes on.
func (t *tracer) stopped(tid int, ws unix.WaitStatus) (syscall.Signal, error) {
	sig := ws.StopSignal()
	th := t.threads[tid]
	if th == nil {
		var err error
		if th, err = t.newThread(tid); err != nil {
			return 0, err
		}
		if sig == unix.SIGSTOP {
			return 0, nil // of ptrace, for a new thread
		}
	}
	switch sig {
	case unix.SIGTRAP | 0x80:
		return 0, t.atSyscall(th)
	case unix.SIGTRAP:
		if ws.TrapCause() == unix.PTRACE_EVENT_EXEC {
			th.proc.name = programOf(tid)
		}
		if ws.TrapCause() != 0 {
			return 0, nil
		}
	case unix.SIGSTOP, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU:
		if isGroupStop(tid) {
			return 0, nil
		}
	}
	return sig, nil
}

// isGroupStop tells a thread that is stopped by such a signal from one that is
// about to get it: ptrace(2), "Group-stop".
func isGroupStop(tid int) bool {
	var info [128]byte
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_GETSIGINFO, uintptr(tid), 0, uintptr(unsafe.Pointer(&info)), 0, 0)
	return errno == unix.EINVAL
}

// syscallInfo is struct ptrace_syscall_info, of Linux 5.3.
type syscallInfo struct {
	op     uint8
	_      [3]uint8
	arch   uint32
	ip, sp uint64
	nr     uint64 // at the end of a call: what it returned
	args   [6]uint64
	_      [8]uint8
}

func (t *tracer) atSyscall(th *thread) error {
	var info syscallInfo
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_GET_SYSCALL_INFO, uintptr(th.tid),
		unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)), 0, 0)
	if errno != 0 {
		return fmt.Errorf("get system call of thread %d: %w", th.tid, errno)
	}
	switch info.op {
	case unix.PTRACE_SYSCALL_INFO_ENTRY:
		return t.enter(th, info)
	case unix.PTRACE_SYSCALL_INFO_EXIT:
		return t.leave(th, int64(info.nr))
	}
	return nil
}

// enter is called before a system call is made.
func (t *tracer) enter(th *thread, info syscallInfo) error {
	th.call = info
	s, ok := th.step(th.proc == t.procs[t.pid])
	if !ok {
		return nil
	}
	s.Number, s.Program, s.Thread = len(t.out.Steps)+1, th.proc.name, th.number
	t.out.Steps = append(t.out.Steps, s)
	if t.fault.Kind == None || t.fault.Step != s.Number || t.gone {
		return nil
	}
	t.out.Hit = &s
	switch t.fault.Kind {
	case Fail:
		th.inject = s.Err
		if t.fault.Err != 0 {
			th.inject = t.fault.Err
		}
		return setRegisters(th.tid, func(r *unix.PtraceRegs) { r.Orig_rax = noCall })
	case KillBefore:
		if err := setRegisters(th.tid, func(r *unix.PtraceRegs) { r.Orig_rax = noCall }); err != nil {
			return err
		}
		return t.kill(th)
	case KillAfter:
		th.kill = true
	}
	return nil
}

// noCall is the number of no system call: the kernel does nothing.
const noCall = ^uint64(0)

// leave is called when a system call is done, before it returns.
func (t *tracer) leave(th *thread, result int64) error {
	if th.inject != 0 {
		errno := th.inject
		th.inject = 0
		return setRegisters(th.tid, func(r *unix.PtraceRegs) { r.Rax = -uint64(errno) })
	}
	if th.call.nr == unix.SYS_SOCKET && result >= 0 {
		if th.call.args[0] == unix.AF_NETLINK {
			th.proc.netlink[uint64(result)] = th.call.args[2]
		} else {
			delete(th.proc.netlink, uint64(result))
		}
	}
	if th.kill {
		th.kill = false
		return t.kill(th)
	}
	return nil
}

func setRegisters(tid int, set func(*unix.PtraceRegs)) error {
	var r unix.PtraceRegs
	if err := unix.PtraceGetRegs(tid, &r); err != nil {
		return fmt.Errorf("read registers of thread %d: %w", tid, err)
	}
	set(&r)
	if err := unix.PtraceSetRegs(tid, &r); err != nil {
		return fmt.Errorf("set registers of thread %d: %w", tid, err)
	}
	return nil
}

// kill ends the program. A helper that is at the step waits until it is gone.
func (t *tracer) kill(th *thread) error {
	if t.gone {
		t.out.Hit = nil // the step of a helper that has outlived it
		return nil
	}
	if th.proc != t.procs[t.pid] {
		t.held = append(t.held, th.tid)
	}
	return unix.Kill(t.pid, unix.SIGKILL)
}
