package portmap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// lockSeconds bounds the wait for the xtables lock, which every iptables command of
// every program on the node takes.
const lockSeconds = 5

var errLocked = errors.New("another program has held the xtables lock")

// process is a firewall tool at work.
type process struct {
	cmd    *exec.Cmd
	stdout bytes.Buffer
	stderr bytes.Buffer
	err    error
}

// tools starts firewall tools. They share the lock of the directory: if this process
// is killed, nobody else writes until the last of them has ended.
type tools struct{ lock *os.File }

// start starts a tool in the network namespace of the calling thread, so that two
// can run side by side. What goes wrong is said by wait.
func (t tools) start(ctx context.Context, stdin, name string, args ...string) *process {
	p := &process{}
	path, err := exec.LookPath(name)
	if err != nil {
		pkg := "iptables"
		if name == "nft" {
			pkg = "nftables"
		}
		p.err = fmt.Errorf("find %s: %w: install the %s package", name, err, pkg)
		return p
	}
	p.cmd = exec.CommandContext(ctx, path, args...)
	p.cmd.WaitDelay = time.Second
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	if t.lock != nil {
		p.cmd.ExtraFiles = []*os.File{t.lock}
	}
	if stdin != "" {
		in, err := document(stdin)
		if err != nil {
			p.err = fmt.Errorf("hand rules to %s: %w", name, err)
			return p
		}
		defer in.Close()
		p.cmd.Stdin = in
	}
	p.err = p.cmd.Start()
	return p
}

// document is a file in memory with the text. In a pipe, a tool whose caller is
// killed would find the first part of it.
func document(text string) (*os.File, error) {
	fd, err := unix.MemfdCreate("rules", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "rules")
	_, err = f.WriteString(text)
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// wait returns when the tool has ended. Its message is part of the error.
func (p *process) wait() error {
	if p.err != nil {
		return p.err
	}
	if err := p.cmd.Wait(); err != nil {
		text := strings.TrimSpace(p.stderr.String())
		if strings.Contains(text, "xtables lock") {
			err = fmt.Errorf("%w for %d s (fuser /run/xtables.lock names it): %w", errLocked, lockSeconds, err)
		}
		return fmt.Errorf("run %s: %w: %s", p.cmd, err, text)
	}
	return nil
}

// exitStatus is for after wait; -1 says that the tool did not come to its end.
func (p *process) exitStatus() int {
	if p.cmd == nil || p.cmd.ProcessState == nil {
		return -1
	}
	return p.cmd.ProcessState.ExitCode()
}

func installed(name string) bool {
	_, err := exec.LookPath(name)
	return err == nil
}
