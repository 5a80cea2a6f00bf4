package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

// manager is what a service manager does for twilld: it holds the files that it is
// given (sd_notify(3), FDSTORE).
type manager struct {
	socket string
	mu     sync.Mutex
	files  []*os.File
}

func newManager(t *testing.T) *manager {
	t.Helper()
	m := &manager{socket: filepath.Join(t.TempDir(), "notify")}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: m.socket, Net: "unixgram"})
	must(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for m.receive(conn) {
		}
	}()
	t.Cleanup(func() {
		conn.Close()
		<-done
		m.forget()
	})
	return m
}

func (m *manager) receive(conn *net.UnixConn) bool {
	text, oob := make([]byte, 4096), make([]byte, 4096)
	n, oobn, _, _, err := conn.ReadMsgUnix(text, oob)
	if err != nil {
		return false
	}
	switch message := string(text[:n]); {
	case strings.HasPrefix(message, "FDSTOREREMOVE=1"):
		m.forget()
	case strings.HasPrefix(message, "FDSTORE=1"):
		m.mu.Lock()
		defer m.mu.Unlock()
		m.files = append(m.files, received(oob[:oobn])...)
	}
	return true
}

func received(oob []byte) (out []*os.File) {
	messages, _ := unix.ParseSocketControlMessage(oob)
	for i := range messages {
		fds, _ := unix.ParseUnixRights(&messages[i])
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			out = append(out, os.NewFile(uintptr(fd), "kept"))
		}
	}
	return out
}

func (m *manager) forget() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, f := range m.files {
		f.Close()
	}
	m.files = nil
}

// start runs twilld as the manager does: with what it holds.
func (m *manager) start(t *testing.T, n *Node) {
	t.Helper()
	path, err := nettest.BuildProgram("./daemon/cmd/twilld")
	must(t, err)
	m.mu.Lock()
	defer m.mu.Unlock()
	args := append([]string{"-c", `LISTEN_PID=$$ exec "$0" "$@"`, path}, n.cluster.StoreArgs()...)
	n.Daemon, err = n.Host.Start(nettest.Program{
		Path: "/bin/sh", Args: append(args, "--ip-masq"), Name: "twilld", Files: m.files,
		Env: []string{"NOTIFY_SOCKET=" + m.socket, fmt.Sprintf("LISTEN_FDS=%d", len(m.files))},
	})
	must(t, err)
}

// echoes are a family's echo requests that a pod has sent, and the answers that it
// got. The kernel counts all of them; ping loses those that its socket has no room
// for while other programs keep it from the CPU.
type echoes struct{ sent, answered int }

func countEchoes(t *testing.T, p *Pod, f overlay.Family) echoes {
	t.Helper()
	sent, answered := "IcmpOutEchos", "IcmpInEchoReps"
	if f == overlay.IPv6 {
		sent, answered = "Icmp6OutEchos", "Icmp6InEchoReplies"
	}
	out, err := p.Run("nstat", "-a", "-s", "-z", "-j", sent, answered)
	must(t, err)
	var counters struct{ Kernel map[string]int }
	must(t, json.Unmarshal([]byte(out), &counters))
	return echoes{counters.Kernel[sent], counters.Kernel[answered]}
}

// TestUDPQueuesWhileDead kills twilld of backend udp and sends 200 packets of each
// family through the node while it is dead. The service manager has kept the
// tunnel's queues open, so all of them arrive when it is back: without the store,
// too.
func TestUDPQueuesWhileDead(t *testing.T) {
	c, ctx := startCluster(t, Options{Hosts: 2, Config: strings.Replace(ConfigDual, `"vxlan", "Port": 4789`, `"udp"`, 1)})
	pods := onePod(t, c)
	must(t, c.WaitPeers(ctx))
	n, m := c.Nodes[0], newManager(t)
	must(t, n.Daemon.Term())
	m.start(t, n)
	must(t, n.WaitReady(ctx))

	for _, store := range []string{"with etcd", "without etcd"} {
		t.Run(store, func(t *testing.T) {
			for _, f := range families(pods[0]) { // the nodes know each other's Ethernet address
				must(t, pods[0].Ping(pods[1].Addr(f), 2, 56))
			}
			must(t, n.Daemon.Kill9())
			if store == "without etcd" {
				must(t, c.Etcd.Stop())
			}
			before, pinged := map[overlay.Family]echoes{}, make(chan error)
			for _, f := range families(pods[0]) {
				before[f] = countEchoes(t, pods[0], f)
				go func() {
					_, err := pods[0].Run("ping", "-n", "-q", "-c", "200", "-i", "0.005", "-W", "0.1", pods[1].Addr(f).String())
					pinged <- err
				}()
			}
			for range before {
				if <-pinged == nil {
					t.Error("somebody answered while twilld was dead")
				}
			}
			m.start(t, n)
			for f, b := range before {
				var now echoes
				if err := Eventually(ctx, func() bool {
					now = countEchoes(t, pods[0], f)
					return now.sent-b.sent == 200 && now.answered-b.answered == 200
				}); err != nil {
					t.Errorf("%s: of %d packets that were sent while twilld was dead %d were answered", f, now.sent-b.sent, now.answered-b.answered)
				}
			}
		})
	}
}
