package nettest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// spawner starts processes from one thread that lives as long as the lab. The
// kernel's parent death signal, which ends them with a killed test, is sent when
// the thread that started them ends, not only when the process does.
type spawner struct {
	work chan func()
	quit chan struct{}
	done chan struct{}
}

var errClosed = errors.New("lab is closed")

func newSpawner() *spawner {
	s := &spawner{work: make(chan func()), quit: make(chan struct{}), done: make(chan struct{})}
	go func() {
		runtime.LockOSThread()
		defer close(s.done)
		for {
			select {
			case f := <-s.work:
				f()
			case <-s.quit:
				return
			}
		}
	}()
	return s
}

func (s *spawner) do(f func() error) error {
	errs := make(chan error, 1)
	select {
	case s.work <- func() { errs <- f() }:
		return <-errs
	case <-s.done:
		return errClosed
	}
}

// stop may be called again.
func (s *spawner) stop() {
	select {
	case s.quit <- struct{}{}:
		<-s.done
	case <-s.done:
	}
}

// Program says what to start and keep running.
type Program struct {
	Path string
	Args []string
	Env  []string // added to the environment, "NAME=value"
	// Files are open in the process from descriptor 3 on.
	Files []*os.File
	// Name of the process in its log's name; empty is the base name of Path.
	Name string
	// Stdout, if set, gets the standard output in place of the log.
	Stdout io.Writer
}

// Process is a long-running program in a namespace. Its output is appended to its
// log, which is shared by all its runs. Unless the lab is kept, it dies with the
// process that made the lab.
type Process struct {
	Log string // path of the log

	ns   *NS
	prog Program

	mu   sync.Mutex
	cmd  *exec.Cmd
	done chan struct{}
	err  error // valid once done is closed
	from int64 // where in the log this run begins
}

// Start starts a program inside.
func (n *NS) Start(prog Program) (*Process, error) {
	if prog.Name == "" {
		prog.Name = filepath.Base(prog.Path)
	}
	p := &Process{ns: n, prog: prog, Log: filepath.Join(n.lab.logDir(), n.Name+"-"+prog.Name+".log")}
	if err := p.Start(); err != nil {
		return nil, err
	}
	n.lab.mu.Lock()
	defer n.lab.mu.Unlock()
	n.lab.procs = append(n.lab.procs, p)
	return p, nil
}

// Start starts the program again after it has ended.
func (p *Process) Start() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.done != nil && !closed(p.done) {
		return fmt.Errorf("start %s in %s: already running", p.prog.Name, p.ns.Name)
	}
	if err := p.start(); err != nil {
		return fmt.Errorf("start %s in %s: %w", p.prog.Name, p.ns.Name, err)
	}
	return nil
}

func (p *Process) start() error {
	log, err := os.OpenFile(p.Log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	st, err := log.Stat()
	if err != nil {
		return err
	}
	cmd := p.ns.Command(context.Background(), p.prog.Path, p.prog.Args...)
	cmd.Env = append(cmd.Env, p.prog.Env...)
	cmd.ExtraFiles = p.prog.Files
	cmd.Stdout, cmd.Stderr = log, log
	if p.prog.Stdout != nil {
		cmd.Stdout = p.prog.Stdout
	}
	// Its own session: Ctrl-C at the terminal is for the lab's owner, which ends
	// its processes in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if !p.ns.lab.opts.Keep {
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	}
	if err := p.ns.lab.spawn.do(cmd.Start); err != nil {
		return err
	}
	done := make(chan struct{})
	p.cmd, p.done, p.from = cmd, done, st.Size()
	go func() {
		err := cmd.Wait()
		p.mu.Lock()
		p.err = err
		p.mu.Unlock()
		close(done)
	}()
	return nil
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// Pid returns the process id of the present or last run.
func (p *Process) Pid() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cmd.Process.Pid
}

// Done is closed when the present run has ended.
func (p *Process) Done() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.done
}

// Wait waits for the end of the present run. The error is that of exec.Cmd.Wait.
func (p *Process) Wait() error {
	<-p.Done()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// Signal sends a signal. It is os.ErrProcessDone if the process has ended.
func (p *Process) Signal(sig os.Signal) error {
	p.mu.Lock()
	proc := p.cmd.Process
	p.mu.Unlock()
	if err := proc.Signal(sig); err != nil {
		return fmt.Errorf("signal %s in %s: %w", p.prog.Name, p.ns.Name, err)
	}
	return nil
}

// Pause stops the process where it stands, with SIGSTOP, and waits until it has.
func (p *Process) Pause() error {
	if err := p.Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	for {
		// Its exit is left to exec.Cmd.Wait.
		err := unix.Waitid(unix.P_PID, p.Pid(), nil, unix.WSTOPPED, nil)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("pause %s in %s: %w", p.prog.Name, p.ns.Name, err)
		}
	}
}

// Resume lets a paused process go on.
func (p *Process) Resume() error { return p.Signal(syscall.SIGCONT) }

// Kill9 ends the process with SIGKILL and waits for its end. One that has ended
// is no error.
func (p *Process) Kill9() error {
	if err := p.Signal(syscall.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-p.Done()
	return nil
}

// Term ends the process with SIGTERM and returns what Wait returns: nil if it
// exited with status 0. One that has not ended after 20 s is killed, an error.
func (p *Process) Term() error {
	if err := p.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.Done():
		return p.Wait()
	case <-time.After(20 * time.Second):
		return errors.Join(fmt.Errorf("end %s in %s: still there 20 s after SIGTERM", p.prog.Name, p.ns.Name), p.Kill9())
	}
}

// Output returns what the present run has logged.
func (p *Process) Output() (string, error) {
	p.mu.Lock()
	from := p.from
	p.mu.Unlock()
	b, err := os.ReadFile(p.Log)
	if err != nil {
		return "", err
	}
	return string(b[min(from, int64(len(b))):]), nil
}

// WaitLog waits until the present run has logged a line that contains text, and
// returns the line. It is an error if the process ends without one.
func (p *Process) WaitLog(ctx context.Context, text string) (string, error) {
	done := p.Done()
	for {
		ended := closed(done) // before reading: what it logged last is seen
		log, err := p.Output()
		if err != nil {
			return "", err
		}
		for line := range strings.Lines(log) {
			// A line is complete with its newline.
			if whole, ok := strings.CutSuffix(line, "\n"); ok && strings.Contains(whole, text) {
				return whole, nil
			}
		}
		if ended {
			return "", fmt.Errorf("wait for %q of %s in %s: it has ended", text, p.prog.Name, p.ns.Name)
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("wait for %q of %s in %s: %w", text, p.prog.Name, p.ns.Name, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}
