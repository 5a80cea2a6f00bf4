package wgtun

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

const cloneDevice = "/dev/net/tun"

// openTUN makes the TUN or attaches to it. wireguard-go could do so itself, but
// leaves a file open on each failure, and the daemon tries again and again.
func openTUN(name string) (*os.File, error) {
	request, err := unix.NewIfreq(name)
	if err != nil {
		return nil, fmt.Errorf("name of the link: %w", err)
	}
	fd, err := unix.Open(cloneDevice, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w%s", cloneDevice, err, openRemedy(err))
	}
	// With virtio-net headers the kernel hands over and takes segments of 64 KB. The
	// flags are the same at each start: a TUN with others cannot be attached to.
	request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("attach to TUN %s: %w%s", name, err, attachRemedy(name, err))
	}
	return os.NewFile(uintptr(fd), cloneDevice), nil
}

func openRemedy(err error) string {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return "; load the kernel module tun, and mount " + cloneDevice + " into the container"
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return "; the container must be allowed to use the device " + cloneDevice + ", and needs CAP_NET_ADMIN"
	}
	return ""
}

func attachRemedy(name string, err error) string {
	switch {
	case errors.Is(err, unix.EPERM):
		return "; needs CAP_NET_ADMIN"
	case errors.Is(err, unix.ENOTTY):
		return "; " + cloneDevice + " is another device here: in a container allow and mount the real one, and give CAP_NET_ADMIN"
	case errors.Is(err, unix.EBUSY):
		return "; another process carries its packets: end it"
	case errors.Is(err, unix.EINVAL) && linkExists(name):
		return "; the name is taken by a link of another kind: ip link delete " + name
	}
	return ""
}

func linkExists(name string) bool {
	_, err := net.InterfaceByName(name)
	return err == nil
}

// persist makes the kernel keep the TUN when nobody reads it.
func persist(file *os.File) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return fmt.Errorf("make TUN persistent: %w", err)
	}
	var failed error
	if err := raw.Control(func(fd uintptr) {
		failed = unix.IoctlSetInt(int(fd), unix.TUNSETPERSIST, 1)
	}); err != nil {
		return fmt.Errorf("make TUN persistent: %w", err)
	}
	if failed != nil {
		return fmt.Errorf("make TUN persistent: %w", failed)
	}
	return nil
}
