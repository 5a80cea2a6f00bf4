package daemon

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// fdName is what the tunnel's files are called in the service manager's store.
const fdName = "twill-udp"

// keptFiles returns what the service manager kept for us, once (sd_listen_fds(3)).
func keptFiles() []*os.File { return activation.Files(true) }

// keepFiles gives the files to the service manager, which holds them open while no
// twilld runs (FDSTORE in sd_notify(3); FileDescriptorStoreMax= in the unit). It
// closes ours. Without a service manager there is nobody to hold them.
func keepFiles(files []*os.File) error {
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	socket := os.Getenv("NOTIFY_SOCKET")
	if socket == "" {
		return nil
	}
	forgetFiles() // those of an earlier tunnel
	// Package net passes files over unconnected datagram sockets alone.
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("reach the service manager: %w", err)
	}
	defer conn.Close()
	for _, f := range files {
		_, _, e := conn.WriteMsgUnix([]byte("FDSTORE=1\nFDNAME="+fdName), unix.UnixRights(int(f.Fd())), &net.UnixAddr{Name: socket, Net: "unixgram"})
		err = errors.Join(err, e)
	}
	if err != nil {
		return fmt.Errorf("give files to the service manager: %w", err)
	}
	return nil
}

// forgetFiles has the service manager close what it holds.
func forgetFiles() { _, _ = daemon.SdNotify(false, "FDSTOREREMOVE=1\nFDNAME="+fdName) }
