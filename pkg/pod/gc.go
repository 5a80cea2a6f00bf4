package pod

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/vishvananda/netlink"

	"github.com/twill-net/twill/pkg/ipam"
	"github.com/twill-net/twill/pkg/portmap"
)

// GC removes the attachments that the runtime does not know any more. The runtime
// must not call ADD meanwhile (CNI specification, section 2, GC).
func GC(args *skel.CmdArgs) error {
	c, f, err := readBasics(args)
	if err != nil {
		return err
	}
	if err := f.attachments(c); err != nil {
		return err
	}
	if !c.ValidGiven {
		// cnitool does so, having called DEL for what it knows. To take "no list" for
		// "none" would cut every pod off when a runtime forgets the key.
		return nil
	}
	h, err := openNetlink()
	if err != nil {
		return err
	}
	defer h.Close()
	if err := c.collect(h); err != nil {
		return ioFail("remove what dead containers left", err)
	}
	return nil
}

// collect takes the attachments back that are not valid: those with a record; ports
// of the bridge without one, of a Twill before there were records; reservations and
// host ports without either.
func (c *Config) collect(h *netlink.Handle) error {
	var stuck []ipam.Owner
	errs := c.records().each(c.Name, func(rec *heldRecord) error {
		defer rec.release()
		if c.valid(rec.Owner) {
			return nil
		}
		err := c.discard(h, rec)
		if err != nil {
			stuck = append(stuck, rec.Owner)
		}
		return err
	})
	more, err := c.collectLinks(h)
	stuck, errs = append(stuck, more...), errors.Join(errs, err)
	keep := func(o ipam.Owner) bool { return c.valid(o) || slices.Contains(stuck, o) }
	_, err = c.reservations().Sweep(keep)
	errs = errors.Join(errs, err, c.collectScratch())
	_, err = c.portmap().Sync(context.Background(), func(e portmap.Entry) bool {
		name, ours := strings.CutPrefix(e.Attachment, c.Name+":")
		id, ifname, _ := strings.Cut(name, ":")
		return !ours || keep(ipam.Owner{ContainerID: id, IfName: ifname})
	})
	return errors.Join(errs, err)
}

// discard takes back an attachment that nobody will call DEL for.
func (c *Config) discard(h *netlink.Handle, rec *heldRecord) error {
	if err := c.takeBack(h, attachment{Owner: rec.Owner}, rec.Record, now); err != nil {
		return err
	}
	return rec.remove()
}

// valid reports whether the attachment stays. A reservation without an interface's
// name stays for any interface of its container.
func (c *Config) valid(o ipam.Owner) bool {
	return slices.ContainsFunc(c.Valid, func(v ipam.Owner) bool {
		return v == o || o.IfName == "" && v.ContainerID == o.ContainerID
	})
}

// collectLinks deletes our ports of the bridge whose attachments are not valid.
// It returns those it could not delete: they must keep their addresses.
func (c *Config) collectLinks(h *netlink.Handle) (stuck []ipam.Owner, errs error) {
	br, err := h.LinkByName(c.Bridge)
	if isNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	all, err := complete(h.LinkList)
	if err != nil {
		return nil, err
	}
	for _, l := range all {
		o, ours := ownerOf(l.Attrs().Alias)
		if !ours || l.Attrs().MasterIndex != br.Attrs().Index || c.valid(o) {
			continue
		}
		if err := deleteLink(h, l); err != nil {
			stuck, errs = append(stuck, o), errors.Join(errs, err)
		}
	}
	return stuck, errs
}
