package nettest

import (
	"fmt"
	"os"
)

// DiskDir returns the lab's directory on a disk, for what must not be in memory. It
// is removed with the lab.
func (l *Lab) DiskDir() (string, error) {
	dir := diskDir(l.ID)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("make directory of lab %s: %w", l.ID, err)
	}
	return dir, nil
}
