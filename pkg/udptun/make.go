package udptun

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Make makes the TUN device that Open attaches to, unless it is there. It stays
// until somebody deletes it: its addresses and routes survive a restart.
func Make(name string) error {
	if checkExists(name) == nil {
		return nil
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return fmt.Errorf("make %q: not a device name", name)
	}
	fd, err := openClone()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr.SetUint16(tunFlags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return attachError(name, err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil {
		return fmt.Errorf("make %s persistent: %w", name, err)
	}
	return nil
}
