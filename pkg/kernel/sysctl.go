package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/twill-net/twill/pkg/overlay"
)

const sysctlRoot = "/proc/sys"

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
	if err != nil {
		return err
	}
	_, err = f.WriteString(s.Value)
	return errors.Join(err, f.Close())
}

func sysctlPath(key string) string { return filepath.Join(sysctlRoot, key) }

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
