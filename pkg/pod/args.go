package pod

import (
	"fmt"
	"hash/fnv"
	"net"
	"net/netip"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/twill-net/twill/pkg/ipam"
	"github.com/twill-net/twill/pkg/overlay"
)

// maxContainerID leaves room for the container's name in a link's alias, of which
// the kernel takes 255 bytes.
const maxContainerID = 230

// attachment names what a verb works on: one interface of one container.
type attachment struct {
	ipam.Owner
	netns string // path; empty or gone at DEL of a dead container
	pod   string // "namespace/name" as Kubernetes tells, else empty
	// What CNI_ARGS ask for.
	wanted []netip.Addr
	mac    net.HardwareAddr
}

func parseArgs(a *skel.CmdArgs) (attachment, error) {
	at := attachment{Owner: ipam.Owner{ContainerID: a.ContainerID, IfName: a.IfName}, netns: a.Netns}
	if len(a.ContainerID) > maxContainerID {
		return at, fail(types.ErrInvalidEnvironmentVariables, "CNI_CONTAINERID has %d characters, must have at most %d", len(a.ContainerID), maxContainerID)
	}
	known := map[string]string{}
	for pair := range strings.SplitSeq(a.Args, ";") {
		if pair == "" {
			continue
		}
		k, v, ok := strings.Cut(pair, "=")
		if !ok {
			return at, fail(types.ErrInvalidEnvironmentVariables, "CNI_ARGS: %q is not KEY=VALUE", pair)
		}
		known[k] = v
	}
	ignore := known["IgnoreUnknown"]
	for k := range known {
		if k != "IgnoreUnknown" && k != "IP" && k != "MAC" && !strings.HasPrefix(k, "K8S_POD_") && ignore != "1" && !strings.EqualFold(ignore, "true") {
			return at, fail(types.ErrInvalidEnvironmentVariables, "CNI_ARGS: unknown key %s; add IgnoreUnknown=1 if it is not meant for Twill", k)
		}
	}
	if name := known["K8S_POD_NAME"]; name != "" {
		at.pod = known["K8S_POD_NAMESPACE"] + "/" + name
	}
	var err error
	if at.wanted, err = parseWanted(quote(known["IP"])); err != nil {
		return at, fail(types.ErrInvalidEnvironmentVariables, "CNI_ARGS: IP=%s: %v", known["IP"], err)
	}
	if at.mac, err = parseMAC(quote(known["MAC"])); err != nil {
		return at, fail(types.ErrInvalidEnvironmentVariables, "CNI_ARGS: MAC=%s: %v", known["MAC"], err)
	}
	return at, nil
}

func (at attachment) String() string {
	s := fmt.Sprintf("container %s interface %s", at.ContainerID, at.IfName)
	if at.pod != "" {
		s = "pod " + at.pod + " (" + s + ")"
	}
	return s
}

// hostLink is the name of the host's end of the pod's veth. It depends on the
// attachment alone, so that DEL finds it with nothing else to go by.
func (at attachment) hostLink() string {
	h := fnv.New64a()
	h.Write([]byte(at.Owner.String()))
	sum := h.Sum64()
	return fmt.Sprintf("veth%08x", uint32(sum>>32)^uint32(sum))
}

const aliasPrefix = overlay.Alias + ":"

// alias marks the host's end as ours, and says whose it is.
func (at attachment) alias() string { return aliasPrefix + at.Owner.String() }

// ownerOf reads an alias back.
func ownerOf(alias string) (ipam.Owner, bool) {
	s, ok := strings.CutPrefix(alias, aliasPrefix)
	if !ok {
		return ipam.Owner{}, false
	}
	id, ifname, ok := strings.Cut(s, "/")
	return ipam.Owner{ContainerID: id, IfName: ifname}, ok && id != "" && ifname != ""
}
