package udptun

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

const cloneDevice = "/dev/net/tun"

const tunFlags = unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_MULTI_QUEUE

// attach opens one more queue of the existing device.
func attach(name string) (int, error) {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return -1, fmt.Errorf("attach to %q: not a device name", name)
	}
	if err := checkExists(name); err != nil {
		return -1, err
	}
	fd, err := openClone()
	if err != nil {
		return -1, err
	}
	ifr.SetUint16(tunFlags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		unix.Close(fd)
		return -1, attachError(name, err)
	}
	return fd, nil
}

func openClone() (int, error) {
	fd, err := unix.Open(cloneDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return -1, fmt.Errorf("open %s: %w: load the kernel module tun; in a container also mount %s", cloneDevice, err, cloneDevice)
	case errors.Is(err, fs.ErrPermission):
		return -1, fmt.Errorf("open %s: %w: in a container allow the device %s", cloneDevice, err, cloneDevice)
	case err != nil:
		return -1, fmt.Errorf("open %s: %w", cloneDevice, err)
	}
	return fd, nil
}

// checkExists refuses a name that no device has: attaching would make one, which
// nobody has configured and which goes with us.
func checkExists(name string) error {
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(s)
	ifr, err := unix.NewIfreq(name)
	if err == nil {
		err = unix.IoctlIfreq(s, unix.SIOCGIFINDEX, ifr)
	}
	if err != nil {
		return fmt.Errorf("attach to %s: no such device: make it with `ip tuntap add mode tun multi_queue vnet_hdr name %s`: %w", name, name, err)
	}
	return nil
}

func attachError(name string, err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("attach to %s: %w: needs CAP_NET_ADMIN", name, err)
	case errors.Is(err, unix.ENOTTY):
		return fmt.Errorf("attach to %s: %w: %s is another device here: in a container allow and mount the real one, and give CAP_NET_ADMIN", name, err, cloneDevice)
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("attach to %s: %w: it is no TUN device with several queues and virtio headers: delete it and make it with `ip tuntap add mode tun multi_queue vnet_hdr name %s`", name, err, name)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("attach to %s: %w: another program has it; flanneld still running?", name, err)
	case errors.Is(err, unix.E2BIG):
		return fmt.Errorf("attach to %s: %w: all its queues are taken", name, err)
	}
	return fmt.Errorf("attach to %s: %w", name, err)
}

// setOffloads asks the kernel for unsegmented packets without checksums. It
// reports whether the device takes UDP segments (Linux 6.2).
func setOffloads(fd int) (udp bool, err error) {
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, vnetLen); err != nil {
		return false, fmt.Errorf("set size of virtio header: %w", err)
	}
	const tcp = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_TSO_ECN
	if unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tcp|unix.TUN_F_USO4|unix.TUN_F_USO6) == nil {
		return true, nil
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tcp); err != nil {
		return false, fmt.Errorf("set offloads: %w", err)
	}
	return false, nil
}

// tunName returns the device that a descriptor is a queue of.
func tunName(fd int) (string, bool) {
	ifr, err := unix.NewIfreq("")
	if err != nil {
		return "", false
	}
	if err := unix.IoctlIfreq(fd, unix.TUNGETIFF, ifr); err != nil {
		return "", false
	}
	return ifr.Name(), ifr.Uint16()&tunFlags == tunFlags
}
