package portmap

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"net"
	"net/netip"
	"time"

	"github.com/twill-net/twill/pkg/nettest"
)

// The kernel under the tests may have no SCTP sockets. INIT and INIT ACK, the first
// two packets of an association (RFC 9260, section 3.3), are enough for NAT and are
// sent by hand; the state cookie of the second carries the answer.

const (
	chunkInit    = 1
	chunkInitAck = 2
	headerLen    = 12 // common header
	initLen      = 20 // chunk header and fixed fields of INIT and INIT ACK
	cookieType   = 7
)

func sctpPacket(from, to uint16, tag uint32, kind byte, params []byte) []byte {
	b := make([]byte, headerLen+initLen, headerLen+initLen+len(params)+3)
	binary.BigEndian.PutUint16(b, from)
	binary.BigEndian.PutUint16(b[2:], to)
	binary.BigEndian.PutUint32(b[4:], tag)
	c := b[headerLen:]
	c[0] = kind
	binary.BigEndian.PutUint16(c[2:], uint16(initLen+len(params)))
	binary.BigEndian.PutUint32(c[4:], rand.Uint32()|1) // initiate tag, never 0
	binary.BigEndian.PutUint32(c[8:], 1<<16)           // receiver window
	binary.BigEndian.PutUint16(c[12:], 1)
	binary.BigEndian.PutUint16(c[14:], 1)
	b = append(b, params...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return b
}

// initAck answers an INIT for the port.
func initAck(b []byte, port uint16, text string) []byte {
	if len(b) < headerLen+initLen || b[headerLen] != chunkInit || binary.BigEndian.Uint16(b[2:]) != port {
		return nil
	}
	param := binary.BigEndian.AppendUint16(nil, cookieType)
	param = binary.BigEndian.AppendUint16(param, uint16(4+len(text)))
	tag := binary.BigEndian.Uint32(b[headerLen+4:])
	return sctpPacket(port, binary.BigEndian.Uint16(b), tag, chunkInitAck, append(param, text...))
}

func askSCTP(ns *nettest.NS, to string, wait time.Duration) (string, error) {
	dst, err := netip.ParseAddrPort(to)
	if err != nil {
		return "", err
	}
	network := "ip4:132"
	if dst.Addr().Is6() {
		network = "ip6:132"
	}
	var c net.PacketConn
	if err := ns.Do(func() (err error) { c, err = net.ListenPacket(network, ""); return err }); err != nil {
		return "", err
	}
	defer c.Close()
	port := uint16(20000 + rand.IntN(20000))
	if _, err := c.WriteTo(sctpPacket(port, dst.Port(), 0, chunkInit, nil), &net.IPAddr{IP: dst.Addr().AsSlice()}); err != nil {
		return "", err
	}
	c.SetDeadline(time.Now().Add(wait))
	b := make([]byte, 2048)
	for {
		l, from, err := c.ReadFrom(b)
		if err != nil {
			return "", err
		}
		if l < headerLen+initLen || b[headerLen] != chunkInitAck || binary.BigEndian.Uint16(b[2:]) != port {
			continue
		}
		if from.String() != dst.Addr().String() || binary.BigEndian.Uint16(b) != dst.Port() {
			return "", errors.New("answer from " + from.String())
		}
		n := int(binary.BigEndian.Uint16(b[headerLen+2:]))
		return string(b[headerLen+initLen+4 : headerLen+n]), nil
	}
}
