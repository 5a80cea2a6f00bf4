package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

const (
	sysctlRoot = "/proc/sys"
	// hostRoot is where the DaemonSet mounts the host's /proc/sys/net: that of a
	// container is read-only unless it is privileged. Both show the network
	// namespace of whoever opens a file.
	hostRoot = "/host"
)

// readSysctls returns the values of the sysctls that are there. One that is not
// is an error, unless it belongs to IPv6 in a kernel without it or to an
// interface that does not exist.
func readSysctls(keys []string) ([]overlay.Sysctl, error) {
	var out []overlay.Sysctl
	for _, key := range keys {
		b, err := os.ReadFile(sysctlPath(key))
		switch {
		case errors.Is(err, fs.ErrNotExist) && unneeded(key):
		case err != nil:
			return nil, fmt.Errorf("read sysctl %s: %w", key, err)
		default:
			out = append(out, overlay.Sysctl{Key: key, Value: strings.TrimSpace(string(b))})
		}
	}
	return out, nil
}

func writeSysctl(s overlay.Sysctl) error {
	// O_TRUNC and O_CREATE mean nothing in /proc/sys.
	f, err := os.OpenFile(sysctlPath(s.Key), os.O_WRONLY, 0)
	if errors.Is(err, unix.EROFS) {
		f, err = os.OpenFile(filepath.Join(hostRoot, sysctlPath(s.Key)), os.O_WRONLY, 0)
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s is read-only, as in a container; mount the host's /proc/sys/net at %s/proc/sys/net", sysctlRoot, hostRoot)
		}
	}
	if err != nil {
		return err
	}
	_, err = f.WriteString(s.Value)
	return errors.Join(err, f.Close())
}

func sysctlPath(key string) string { return filepath.Join(sysctlRoot, key) }

// forwardingOff tells from an RTM_NEWNETCONF (linux/netconf.h) that the node has
// stopped forwarding packets in one family, the only change of a sysctl that the
// kernel announces to us and pods cannot wait for.
func forwardingOff(body []byte) string {
	const fixed, ifindex, forwarding, all = 4, 1, 2, ^uint32(0)
	var index, on uint32 = 0, 1
	for typ, v := range attrs(body, fixed) {
		switch typ {
		case ifindex:
			index = u32Of(v)
		case forwarding:
			on = u32Of(v)
		}
	}
	if index != all || on != 0 {
		return ""
	}
	family := overlay.IPv4
	if body[0] == unix.AF_INET6 {
		family = overlay.IPv6
	}
	return fmt.Sprintf("%s forwarding turned off", family)
}

// unneeded reports whether a sysctl's absence has a reason.
func unneeded(key string) bool {
	part := strings.Split(key, "/")
	if len(part) < 4 || part[0] != "net" || part[2] != "conf" {
		return strings.HasPrefix(key, "net/ipv6/") && missing("net/ipv6")
	}
	return missing(strings.Join(part[:2], "/")) || missing(strings.Join(part[:4], "/"))
}

func missing(key string) bool {
	_, err := os.Stat(sysctlPath(key))
	return errors.Is(err, fs.ErrNotExist)
}
