package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/xtables"
)

// A fingerprint changes whenever a rule does.
type fingerprint struct {
	generation uint32         // of nftables, iptables-nft included
	tables     [4]legacyTable // of legacy iptables, if in use
}

type legacyTable struct {
	shape    xtablesInfo
	contents uint64 // a hash of the entries without their counters
}

// xtablesInfo is struct ipt_getinfo of linux/netfilter_ipv4/ip_tables.h and its
// equal for IPv6. It stays the same if a rule is replaced by one of its size.
type xtablesInfo struct {
	name       [32]byte
	validHooks uint32
	hookEntry  [5]uint32
	underflow  [5]uint32
	entries    uint32
	size       uint32
}

// From the same headers: IPT_SO_GET_INFO, IPT_SO_GET_ENTRIES, and the length of
// struct ipt_get_entries before the entries.
const (
	soGetInfo     = 64
	soGetEntries  = 65
	getEntriesLen = 40
)

// fingerprinter asks the kernel through sockets that belong to the namespace of
// the thread that made them. It is not safe for concurrent use.
type fingerprinter struct {
	netfilter int
	legacy    []legacySocket
	unused    []legacySocket // of families that use the other flavour
	sequence  uint32
	request   encoder
	buffer    [4096]byte
	entries   []byte
	seed      maphash.Seed
}

// legacySocket is where the tables of one family are read. An entry begins with
// its match, matchLen bytes long; the counters come countersAt.
type legacySocket struct {
	family                          overlay.Family
	fd, level, matchLen, countersAt int
}

// newFingerprinter opens the sockets: the one to nftables, one for each family whose
// iptables is legacy, and one for each that could be, but is not.
func newFingerprinter(legacy, unused map[overlay.Family]bool) (*fingerprinter, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open netfilter socket: %w", err)
	}
	p := &fingerprinter{netfilter: fd, seed: maphash.MakeSeed()}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		return nil, errors.Join(fmt.Errorf("set up netfilter socket: %w", err), p.close())
	}
	for _, v := range []struct {
		domain int
		legacySocket
	}{
		{unix.AF_INET, legacySocket{family: overlay.IPv4, level: unix.SOL_IP, matchLen: 84, countersAt: 96}},
		{unix.AF_INET6, legacySocket{family: overlay.IPv6, level: unix.SOL_IPV6, matchLen: 136, countersAt: 152}},
	} {
		if !legacy[v.family] && !unused[v.family] {
			continue
		}
		fd, err := unix.Socket(v.domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("open raw socket: %w", err), p.close())
		}
		v.fd = fd
		if legacy[v.family] {
			p.legacy = append(p.legacy, v.legacySocket)
		} else {
			p.unused = append(p.unused, v.legacySocket)
		}
	}
	return p, nil
}

// close may be called again.
func (p *fingerprinter) close() error {
	if p.netfilter < 0 {
		return nil
	}
	err := unix.Close(p.netfilter)
	for _, s := range slices.Concat(p.legacy, p.unused) {
		err = errors.Join(err, unix.Close(s.fd))
	}
	p.netfilter, p.legacy, p.unused = -1, nil, nil // a watch that still runs must not use them
	return err
}

// read returns the fingerprint of the moment. A legacy table of more than limit
// bytes is known by its shape alone.
func (p *fingerprinter) read(limit uint32) (fingerprint, error) {
	var out fingerprint
	var err error
	if out.generation, err = p.generation(); err != nil {
		return out, fmt.Errorf("read nftables generation: %w", err)
	}
	n := 0
	for _, s := range p.legacy {
		for _, table := range legacyTables() {
			if out.tables[n], err = p.table(s, table, limit); err != nil {
				return out, fmt.Errorf("read legacy table %s: %w", table, err)
			}
			n++
		}
	}
	return out, nil
}

// unusedPrint is that of legacy tables which are not used.
type unusedPrint struct {
	names  [2]string // of the tables
	shapes [2][3]xtablesInfo
}

// readUnused asks for no table that is not there: that would make it. It must be
// called by a thread in the namespace of newFingerprinter.
func (p *fingerprinter) readUnused() (unusedPrint, error) {
	var out unusedPrint
	for i, s := range p.unused {
		names := xtables.LegacyTables(s.family)
		out.names[i] = strings.Join(names, " ")
		for n, table := range [...]string{"nat", "filter", "mangle"} {
			if !slices.Contains(names, table) {
				continue
			}
			var err error
			if out.shapes[i][n], err = s.info(table); err != nil {
				return out, fmt.Errorf("read legacy table %s: %w", table, err)
			}
		}
	}
	return out, nil
}

func legacyTables() [2]string { return [...]string{"nat", "filter"} }

func (p *fingerprinter) table(s legacySocket, name string, limit uint32) (legacyTable, error) {
	for {
		shape, err := s.info(name)
		if err != nil || shape.size == 0 || shape.size > limit {
			return legacyTable{shape: shape}, err
		}
		size := getEntriesLen + int(shape.size)
		p.entries = slices.Grow(p.entries[:0], size)[:size]
		clear(p.entries) // the kernel leaves gaps as they are
		copy(p.entries, shape.name[:])
		native.PutUint32(p.entries[len(shape.name):], shape.size)
		switch err := getsockopt(s.fd, s.level, soGetEntries, unsafe.Pointer(&p.entries[0]), size); err {
		case nil:
			entries := p.entries[getEntriesLen:]
			s.clearCounters(entries)
			return legacyTable{shape, maphash.Bytes(p.seed, entries)}, nil
		case unix.EAGAIN: // its size changed meanwhile
		default:
			return legacyTable{}, err
		}
	}
}

// clearCounters zeroes in struct ipt_entry or ip6t_entry what packets change and
// what only means something to the kernel (comefrom). Behind the match stand
// nfcache, then target_offset and next_offset of 2 bytes, then comefrom.
func (s legacySocket) clearCounters(entries []byte) {
	const countersLen = 16
	for len(entries) >= s.countersAt+countersLen {
		clear(entries[s.matchLen+8 : s.countersAt+countersLen])
		next := int(native.Uint16(entries[s.matchLen+6:]))
		if next == 0 {
			return
		}
		entries = entries[min(next, len(entries)):]
	}
}

// info describes a legacy table; one that does not exist has no contents.
func (s legacySocket) info(table string) (xtablesInfo, error) {
	var out xtablesInfo
	copy(out.name[:], table)
	switch err := getsockopt(s.fd, s.level, soGetInfo, unsafe.Pointer(&out), int(unsafe.Sizeof(out))); err {
	case nil:
		return out, nil
	case unix.ENOENT, unix.ENOPROTOOPT:
		return xtablesInfo{}, nil
	default:
		return out, err
	}
}

// getsockopt hands the kernel a structure that is both question and answer, which
// none of package unix's functions does.
func getsockopt(fd, level, option int, value unsafe.Pointer, size int) error {
	length := uint32(size)
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(value), uintptr(unsafe.Pointer(&length)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// generation asks for the number that each nftables transaction raises. It is 0
// on a kernel without nftables.
func (p *fingerprinter) generation() (uint32, error) {
	p.sequence++
	p.request.reset()
	p.request.begin(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETGEN, 0, nfgenmsgLen)
	p.request.end(p.sequence)
	if err := unix.Sendto(p.netfilter, p.request.buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return 0, err
	}
	for {
		n, _, err := unix.Recvfrom(p.netfilter, p.buffer[:], 0)
		if errors.Is(err, unix.EINTR) {
			continue
		} else if err != nil {
			return 0, err
		}
		var generation uint32
		answered := false
		messages(p.buffer[:n], func(h header, body []byte) {
			if h.seq == p.sequence { // else the answer to a request that was given up
				generation, err = generationOf(h, body)
				answered = true
			}
		})
		if answered {
			return generation, err
		}
	}
}

func generationOf(h header, body []byte) (uint32, error) {
	if h.typ == unix.NLMSG_ERROR {
		errno := unix.Errno(-int32(u32Of(body)))
		if errno == unix.EINVAL || errno == unix.EOPNOTSUPP {
			return 0, nil // no nftables in this kernel
		}
		return 0, errno
	}
	for kind, value := range attrs(body, nfgenmsgLen) {
		if kind == unix.NFTA_GEN_ID && len(value) == 4 {
			return binary.BigEndian.Uint32(value), nil
		}
	}
	return 0, fmt.Errorf("unexpected answer of type %#x", h.typ)
}

// nfgenmsgLen is the size of struct nfgenmsg, the fixed part of each message.
const nfgenmsgLen = 4
