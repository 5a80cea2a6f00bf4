package pod

import (
	"context"
	"fmt"

	"github.com/vishvananda/netlink"

	"github.com/twill-net/twill/pkg/overlay"
)

// CloseHostPorts removes the rules of the node's host ports, of whatever tool. The
// records stay: a daemon that starts again opens the ports of pods that still run.
func CloseHostPorts(ctx context.Context, dataDir string) error {
	return (&Config{DataDir: dataDir}).portmap().Cleanup(ctx)
}

// RemoveIdleBridge deletes the bridge if it is Twill's and no pod hangs on it. It
// returns how many do; removed says that it was there and is gone.
func RemoveIdleBridge(name string) (removed bool, ports int, err error) {
	br, err := netlink.LinkByName(name)
	if isNotFound(err) {
		return false, 0, nil
	}
	if err != nil {
		return false, 0, fmt.Errorf("look up bridge %s: %w", name, err)
	}
	if br.Type() != "bridge" || br.Attrs().Alias != overlay.Alias {
		return false, 0, nil
	}
	links, err := complete(netlink.LinkList)
	if err != nil {
		return false, 0, fmt.Errorf("list the ports of bridge %s: %w", name, err)
	}
	for _, l := range links {
		if l.Attrs().MasterIndex == br.Attrs().Index {
			ports++
		}
	}
	if ports > 0 {
		return false, ports, nil
	}
	if err := netlink.LinkDel(br); err != nil && !isNotFound(err) {
		return false, 0, fmt.Errorf("delete bridge %s: %w", name, err)
	}
	return true, 0, nil
}
