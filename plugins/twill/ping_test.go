package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"
)

func mustPing(t testing.TB, from *namespace, to netip.Addr, size int) {
	t.Helper()
	if err := ping(from, to, size); err != nil {
		t.Error(err)
	}
}

// ping sends one ICMP echo request with size bytes of payload and returns nil when
// the answer has come. There is no second try.
func ping(from *namespace, to netip.Addr, size int) error {
	network, request, reply := "ip4:icmp", byte(8), byte(0)
	if to.Is6() {
		network, request, reply = "ip6:ipv6-icmp", 128, 129
	}
	var conn *net.IPConn
	err := from.do(func() (err error) {
		conn, err = net.DialIP(network, nil, &net.IPAddr{IP: to.AsSlice()})
		return err
	})
	if err != nil {
		return fmt.Errorf("ping %s: %w", to, err)
	}
	defer conn.Close()
	msg := append([]byte{request, 0, 0, 0, 0x84, 0x84, 0, 1}, bytes.Repeat([]byte("tw"), size/2)...)
	if to.Is4() { // the kernel fills in ICMPv6's
		var sum uint32
		for i := 0; i+1 < len(msg); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(msg[i:]))
		}
		sum = sum&0xffff + sum>>16
		binary.BigEndian.PutUint16(msg[2:], ^uint16(sum+sum>>16))
	}
	if _, err := conn.Write(msg); err != nil {
		return fmt.Errorf("ping %s: %w", to, err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return err
	}
	buf := make([]byte, 65536)
	for {
		n, err := conn.Read(buf)
		if err != nil {
			return fmt.Errorf("ping %s with %d bytes: %w", to, size, err)
		}
		got := buf[:n]
		if to.Is4() && n > 20 && got[0]>>4 == 4 {
			got = got[20:]
		}
		if len(got) == len(msg) && got[0] == reply && bytes.Equal(got[4:], msg[4:]) {
			return nil
		}
	}
}
