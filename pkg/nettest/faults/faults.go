//go:build linux && amd64

// Package faults runs a program under ptrace(2) and makes one of its steps fail,
// or kills it there. A step is a system call that changes the world or asks it
// something: netlink, files, sockets, helper programs. What Go's runtime and a
// program's loader do for themselves is none. The kernel, the program and its
// files are the real ones.
//
// A program is walked by asking for step 1, 2, and so on, until a fault was not
// reached any more (Outcome.Hit is nil). Its threads may change the order of the
// steps from run to run; the number says where a fault goes, Hit what it met.
package faults

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Kind is what happens at a step.
type Kind int

const (
	// None only lists the steps.
	None Kind = iota
	// Fail has the system call do nothing and return an error.
	Fail
	// KillBefore kills the program when it makes the call, which does nothing.
	KillBefore
	// KillAfter kills the program when the call is done and has not returned.
	KillAfter
)

func (k Kind) String() string {
	return [...]string{"no fault", "error at", "kill before", "kill after"}[k]
}

// Fault is one fault. A kill is SIGKILL to the program itself, as by a runtime
// whose patience ended: a helper that it started goes on, unless it asked to die
// with its parent, and then it dies before it makes its next call.
type Fault struct {
	Kind Kind
	Step int           // from 1
	Err  syscall.Errno // of Fail; 0: one that fits the call
}

// Step is one system call of the program or of a helper.
type Step struct {
	Number  int
	Program string // "twill", or the helper's name
	Thread  int    // of that program, from 1
	Call    string // "sendto RTM_NEWLINK veth12345678"
	// Changes tells calls that may change something outside of the program from
	// those that only ask. A kill beside one that asks is a kill beside the last
	// one that changed.
	Changes bool
	Err     syscall.Errno // that fits the call
}

func (s Step) String() string {
	return fmt.Sprintf("%d %s/%d %s", s.Number, s.Program, s.Thread, s.Call)
}

// Outcome is how a run went.
type Outcome struct {
	Steps          []Step
	Hit            *Step // where the fault was; nil if the run had fewer steps
	ExitCode       int   // -1 if killed
	Killed         bool  // by a signal
	Stdout, Stderr []byte
}

// limit is the time after which a program that hangs is killed.
const limit = 30 * time.Second

// Run starts the program and returns when it and all its helpers have ended. It is
// called on the thread in whose namespaces the program is to be. It sets cmd's
// Stdout and Stderr, and a process group of the program's own, which helpers must
// not leave.
func Run(cmd *exec.Cmd, f Fault) (*Outcome, error) {
	// The kernel takes ptrace requests from the thread alone that started the program.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Ptrace, cmd.SysProcAttr.Setpgid = true, true
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	pid := cmd.Process.Pid
	t := newTracer(pid, f)
	watchdog := time.AfterFunc(limit, func() { _ = unix.Kill(-pid, unix.SIGKILL) })
	err := t.trace()
	if err != nil {
		_ = unix.Kill(-pid, unix.SIGKILL)
		err = errors.Join(err, t.drain())
	}
	if !watchdog.Stop() && err == nil {
		err = fmt.Errorf("it hung and was killed after %s", limit)
	}
	_ = cmd.Wait() // the tracer has reaped it; this waits for the output
	t.out.Stdout, t.out.Stderr = stdout.Bytes(), stderr.Bytes()
	if err != nil {
		return &t.out, fmt.Errorf("trace %s: %w", cmd.Path, err)
	}
	return &t.out, nil
}
