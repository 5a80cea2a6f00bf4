package kernel

import (
	"bytes"
	"encoding/hex"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

// iprouteIPIP is IFLA_LINKINFO in the message by which
//
//	ip link add flannel.ipip mtu 1480 type ipip local 198.51.100.1 dev eth0
//
// of iproute2 6.1.0 asks for the device (seen by strace, little endian; eth0 is 3).
const iprouteIPIP = "68001280" + // IFLA_LINKINFO
	"08000100" + "69706970" + // kind ipip
	"5c000280" + // data
	"0500090000000000" + // protocol 0
	"08000200c6336401" + // local
	"05000a0001000000" + // pmtudisc 1
	"0500050000000000" + // tos 0
	"0500040000000000" + // ttl 0
	"0800010003000000" + // link
	"0800140000000000" + // fwmark 0
	"06000f0000000000" + "0600100000000000" + "0600110000000000" + "0600120000000000" // no encapsulation

func recorded(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func ipipLink() overlay.Link {
	return overlay.Link{
		Name: "flannel.ipip", MTU: 1480, Kind: overlay.KindIPIP,
		IPIP: overlay.IPIP{Local: netip.MustParseAddr("198.51.100.1"), Parent: "eth0"},
	}
}

// TestDecodeIPIP reads what iproute2 wrote, and the same with a fixed peer.
func TestDecodeIPIP(t *testing.T) {
	info := recorded(t, iprouteIPIP)
	for _, remote := range []string{"", "0800030000000000", "08000300c6336402"} {
		message := append(make([]byte, unix.SizeofIfInfomsg), info...)
		message = append(message, recorded(t, "11000300666c616e6e656c2e6970697000000000"+"08000400c8050000"+"08000100c6336401")...)
		if remote != "" { // into IFLA_INFO_DATA, which is last in IFLA_LINKINFO
			at := unix.SizeofIfInfomsg
			message = append(message[:at+len(info):at+len(info)], append(recorded(t, remote), message[at+len(info):]...)...)
			native.PutUint16(message[at:], uint16(len(info)+8))
			native.PutUint16(message[at+12:], native.Uint16(message[at+12:])+8)
		}
		got := decodeLink(message)
		if got.parent != 3 {
			t.Errorf("parent %d", got.parent)
		}
		got.setParent("eth0")
		want := ipipLink()
		if strings.HasSuffix(remote, "c6336402") {
			want.IPIP.Local = netip.Addr{}
		}
		if got.Link != want || !got.candidate() {
			t.Errorf("remote %q: got  %+v\nwant %+v", remote, got.Link, want)
		}
	}
}

// TestEncodeIPIP looks for each attribute that is written in what iproute2 writes:
// what is left out has the same value there as the kernel's default.
func TestEncodeIPIP(t *testing.T) {
	theirs := map[uint16][]byte{}
	for typ, v := range attrs(recorded(t, iprouteIPIP), 4+8+4) {
		theirs[typ] = v
	}
	var e encoder
	encodeNewLink(&e, ipipLink(), 3)
	e.end(1)
	kind, n := "", 0
	messages(e.buf, func(_ header, body []byte) {
		if got := decodeLink(body); got.Name != "flannel.ipip" || got.MTU != 1480 || got.MAC != (overlay.MAC{}) {
			t.Errorf("wrote %+v", got)
		}
		for typ, info := range attrs(body, unix.SizeofIfInfomsg) {
			if typ != unix.IFLA_LINKINFO {
				continue
			}
			for typ, v := range attrs(info, 0) {
				if typ == unix.IFLA_INFO_KIND {
					kind = stringOf(v)
					continue
				}
				for typ, v := range attrs(v, 0) {
					n++
					if !bytes.Equal(v, theirs[typ]) {
						t.Errorf("attribute %d: % x, iproute2 has % x", typ, v, theirs[typ])
					}
				}
			}
		}
	})
	if kind != "ipip" || n != 2 {
		t.Errorf("kind %q with %d attributes", kind, n)
	}
}
