package pod

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// What the plugin asks of the daemon, a line each, and gets a line for.
const (
	daemonStatus  = "status"  // could a pod be connected now? "ok", or why not
	daemonCollect = "collect" // delete the links of the doomed group soon: "ok"
	answerOK      = "ok"
)

// SocketFor returns where the daemon listens for the plugin: beside the hand-off.
func SocketFor(handoffFile string) string {
	return filepath.Join(filepath.Dir(handoffFile), "twill-cni.sock")
}

// daemonPatience bounds how long the daemon may take to answer.
const daemonPatience = 2 * time.Second

func askDaemon(handoffFile, question string) (answer string, err error) {
	d, err := dialDaemon(handoffFile)
	if err != nil {
		return "", err
	}
	defer d.close()
	return d.ask(question)
}

// daemonConn is a blocking socket with a time limit. Package net's dialer would make
// the plugin larger than all that is here.
type daemonConn int

func dialDaemon(handoffFile string) (daemonConn, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("call twilld: %w", err)
	}
	limit := unix.NsecToTimeval(daemonPatience.Nanoseconds())
	for _, option := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
		err = errors.Join(err, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, option, &limit))
	}
	if err == nil {
		err = unix.Connect(fd, &unix.SockaddrUnix{Name: SocketFor(handoffFile)})
	}
	if err != nil {
		return 0, errors.Join(fmt.Errorf("call twilld: %w", err), unix.Close(fd))
	}
	return daemonConn(fd), nil
}

func (d daemonConn) close() { unix.Close(int(d)) }

func (d daemonConn) ask(question string) (string, error) {
	if _, err := unix.Write(int(d), []byte(question+"\n")); err != nil {
		return "", fmt.Errorf("ask twilld: %w", err)
	}
	var line []byte
	part := make([]byte, 4096)
	for !bytes.HasSuffix(line, []byte("\n")) {
		n, err := unix.Read(int(d), part)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && n == 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return "", fmt.Errorf("ask twilld: %w", err)
		}
		line = append(line, part[:n]...)
	}
	return strings.TrimSpace(string(line)), nil
}

// Answer serves one connection of the plugin: the daemon's side of ask.
func Answer(conn net.Conn, status func() error, collect func()) error {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(daemonPatience))
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return fmt.Errorf("read the plugin's question: %w", err)
	}
	answer := answerOK
	switch strings.TrimSpace(line) {
	case daemonStatus:
		if err := status(); err != nil {
			answer = strings.ReplaceAll(err.Error(), "\n", "; ")
		}
	case daemonCollect:
		collect()
	default:
		answer = "unknown question"
	}
	_, err = fmt.Fprintln(conn, answer)
	return err
}
