package pod

import (
	"bufio"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"time"
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
	conn, err := dialDaemon(handoffFile)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	return ask(conn, question)
}

func dialDaemon(handoffFile string) (net.Conn, error) {
	conn, err := net.DialTimeout("unix", SocketFor(handoffFile), daemonPatience)
	if err != nil {
		return nil, fmt.Errorf("call twilld: %w", err)
	}
	return conn, nil
}

func ask(conn net.Conn, question string) (string, error) {
	_ = conn.SetDeadline(time.Now().Add(daemonPatience))
	if _, err := fmt.Fprintln(conn, question); err != nil {
		return "", fmt.Errorf("ask twilld: %w", err)
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("ask twilld: %w", err)
	}
	return strings.TrimSpace(line), nil
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
