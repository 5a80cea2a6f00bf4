package pod

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/ipam"
)

// Record is what is written down of an attachment, so that whoever finds it knows
// what to take back: DEL without a prevResult, GC, the daemon's sweep after a
// reboot. It is the first thing an ADD makes and the last that a DEL removes.
//
// Its file is <data dir>/.twill/attachments/<network>/<container id>:<interface>.
// Whoever works on the attachment holds its flock(2), which the kernel drops when
// a process dies: a record that is free and not complete is of an ADD that was
// killed. Nothing is synced to disk, for no pod survives the power either.
type Record struct {
	ipam.Owner
	Network   string       `json:"network"`
	Pod       string       `json:"pod,omitempty"` // "namespace/name"
	Boot      string       `json:"boot"`          // the kernel's boot id
	Namespace Namespace    `json:"namespace"`     // of the pod
	Bridge    string       `json:"bridge,omitempty"`
	Addrs     []netip.Addr `json:"addresses,omitempty"`
	Scratch   string       `json:"scratch,omitempty"` // directory of flannel's scratch files
	Sticky    bool         `json:"sticky,omitempty"`
	CoolDown  int          `json:"coolDown,omitempty"` // seconds
	Complete  bool         `json:"complete"`           // ADD has succeeded
}

// Namespace is a network namespace: where it was mounted and which one it was,
// for a path may be used again.
type Namespace struct {
	Path   string `json:"path"`
	Device uint64 `json:"device"`
	Inode  uint64 `json:"inode"`
}

func (n Namespace) alive() bool {
	var st unix.Stat_t
	return n.Path != "" && unix.Stat(n.Path, &st) == nil && st.Dev == n.Device && st.Ino == n.Inode
}

// records are the records of all networks of a node.
type records struct{ dir string }

func recordsIn(dataDir string) records {
	return records{filepath.Join(dataDir, ".twill", "attachments")}
}

func (r Record) coolDown() time.Duration { return time.Duration(r.CoolDown) * time.Second }

// heldRecord is a record whose lock this process holds.
type heldRecord struct {
	Record
	path  string
	file  *os.File
	found bool // it was there before
}

// hold locks the record of an attachment, which is made if it is missing. It waits
// for another verb on the same attachment to end.
func (r records) hold(network string, o ipam.Owner) (*heldRecord, error) {
	path := filepath.Join(r.dir, network, o.ContainerID+":"+o.IfName)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("write down the attachment: %w", err)
	}
	_, err := os.Lstat(path)
	made := absent(err)
	h, err := holdFile(path, os.O_RDWR|os.O_CREATE, unix.LOCK_EX)
	if err != nil && made {
		err = errors.Join(err, removeFile(path))
	}
	return h, err
}

// find locks the record of an attachment. It is nil if there is none.
func (r records) find(network string, o ipam.Owner) (*heldRecord, error) {
	h, err := holdFile(filepath.Join(r.dir, network, o.ContainerID+":"+o.IfName), os.O_RDWR, unix.LOCK_EX)
	if absent(err) {
		return nil, nil
	}
	return h, err
}

// holdFile opens and locks a record. The file may have been removed by the one we
// waited for: then another is opened.
func holdFile(path string, flags, how int) (*heldRecord, error) {
	for {
		f, err := os.OpenFile(path, flags, 0o600)
		if err != nil {
			return nil, fmt.Errorf("open record of the attachment: %w", err)
		}
		if err := flock(f, how); err != nil {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err == nil && st.Nlink == 0 {
			f.Close()
			continue
		}
		h := &heldRecord{path: path, file: f}
		if err := h.read(); err != nil {
			f.Close()
			return nil, err
		}
		return h, nil
	}
}

func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); err != unix.EINTR {
			return err
		}
	}
}

// read decodes the record. What a killed process left half-written counts as
// nothing but its name.
func (h *heldRecord) read() error {
	content, err := os.ReadFile(h.path)
	if err != nil && !absent(err) {
		return fmt.Errorf("read record of the attachment: %w", err)
	}
	h.found = len(content) > 0
	line, _, _ := bytes.Cut(content, []byte("\n"))
	if json.Unmarshal(line, &h.Record) != nil {
		h.Record = Record{}
	}
	h.Network = filepath.Base(filepath.Dir(h.path))
	h.ContainerID, h.IfName, _ = cutLast(filepath.Base(h.path), ":")
	return nil
}

func (h *heldRecord) write() error {
	content, err := json.Marshal(h.Record)
	content = append(content, '\n')
	// The new before the old is cut off: whoever is killed between the two leaves a
	// line that is whole, and what follows it is passed over.
	if err == nil {
		_, err = h.file.WriteAt(content, 0)
	}
	if err == nil {
		err = h.file.Truncate(int64(len(content)))
	}
	if err != nil {
		return fmt.Errorf("write down the attachment: %w", err)
	}
	return nil
}

// remove deletes the record and frees it.
func (h *heldRecord) remove() error {
	if err := os.Remove(h.path); err != nil && !absent(err) {
		return fmt.Errorf("remove record of the attachment: %w", err)
	}
	h.release()
	return nil
}

func (h *heldRecord) release() { h.file.Close() }

// mark is a file which says that every reservation of a network has a record.
func (r records) mark(network string) string {
	return filepath.Join(filepath.Dir(r.dir), "recorded", network)
}

// setMark is the daemon's, which looks from time to time.
func (r records) setMark(network string, all bool) error {
	mark := r.mark(network)
	if all == r.marked(network) {
		return nil
	}
	if !all {
		return removeFile(mark)
	}
	err := os.MkdirAll(filepath.Dir(mark), 0o700)
	if err == nil {
		err = os.WriteFile(mark, nil, 0o600)
	}
	return err
}

func (r records) marked(network string) bool {
	_, err := os.Lstat(r.mark(network))
	return err == nil
}

// networks lists the networks that have records.
func (r records) networks() ([]string, error) { return names(r.dir) }

// each locks the records of a network one after the other and calls f, which
// releases or removes them. A record that a verb works on is passed over.
func (r records) each(network string, f func(*heldRecord) error) error {
	list, err := names(filepath.Join(r.dir, network))
	if err != nil {
		return err
	}
	var errs error
	for _, name := range list {
		h, err := holdFile(filepath.Join(r.dir, network, name), os.O_RDWR, unix.LOCK_EX|unix.LOCK_NB)
		if absent(err) || errors.Is(err, unix.EWOULDBLOCK) {
			continue
		}
		if err == nil {
			err = f(h)
		}
		errs = errors.Join(errs, err)
	}
	return errs
}

// owners lists whose records a network has, working ones included.
func (r records) owners(network string) (map[ipam.Owner]bool, error) {
	list, err := names(filepath.Join(r.dir, network))
	out := map[ipam.Owner]bool{}
	for _, name := range list {
		id, ifname, _ := cutLast(name, ":")
		out[ipam.Owner{ContainerID: id, IfName: ifname}] = true
	}
	return out, err
}

// names lists a directory; none is an empty one.
func names(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !absent(err) {
		return nil, fmt.Errorf("list records: %w", err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out, nil
}

func absent(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR)
}

func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

// bootID is the kernel's name for the time since it was started.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
