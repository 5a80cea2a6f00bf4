package ipam

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// hostLocal is the reference: Debian's containernetworking-plugins.
const hostLocal = "/usr/lib/cni/host-local"

// hostLocalRanges is the configuration of sets.
func hostLocalRanges(sets [][]Range) string {
	type hostRange struct {
		Subnet                        netip.Prefix `json:"subnet"`
		RangeStart, RangeEnd, Gateway string       `json:",omitempty"`
	}
	var out [][]hostRange
	text := func(a netip.Addr) string {
		if !a.IsValid() {
			return ""
		}
		return a.String()
	}
	for _, ranges := range sets {
		var set []hostRange
		for _, r := range ranges {
			set = append(set, hostRange{r.Subnet, text(r.First), text(r.Last), text(r.Gateway)})
		}
		out = append(out, set)
	}
	b, err := json.Marshal(out)
	if err != nil {
		panic(err)
	}
	return string(b)
}

// runHostLocal returns the addresses that it gave.
func runHostLocal(verb, dir, id string, sets [][]Range) (string, error) {
	conf := fmt.Sprintf(`{"cniVersion":"1.0.0","name":"net","type":"x","ipam":{"type":"host-local","dataDir":%q,"ranges":%s}}`, dir, hostLocalRanges(sets))
	cmd := exec.Command(hostLocal)
	cmd.Stdin = strings.NewReader(conf)
	cmd.Env = []string{"CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + id, "CNI_NETNS=/none", "CNI_IFNAME=eth0", "CNI_PATH=/usr/lib/cni"}
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("host-local %s: %w: %s", verb, err, out)
	}
	if verb != "ADD" {
		return "", nil
	}
	var res struct {
		IPs []struct{ Address netip.Prefix }
	}
	if err := json.Unmarshal(out, &res); err != nil {
		return "", err
	}
	var addrs []string
	for _, ip := range res.IPs {
		addrs = append(addrs, ip.Address.String())
	}
	return strings.Join(addrs, " "), nil
}

func requireHostLocal(t *testing.T) {
	t.Helper()
	if _, err := os.Stat(hostLocal); err != nil {
		t.Fatalf("apt-get install containernetworking-plugins: %v", err)
	}
}

// A node moves from flannel to Twill and back, pods running.
func TestHostLocalInterop(t *testing.T) {
	requireHostLocal(t)
	dir := t.TempDir()
	d := NewDir(dir, "net")
	reference := func(verb, id string) string {
		t.Helper()
		got, err := runHostLocal(verb, dir, id, dualStack)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	want := func(got string, n int) {
		t.Helper()
		if w := fmt.Sprintf("198.18.1.%d/24 fd00:18:1::%x/64", n, n); got != w {
			t.Fatalf("got %s, want %s", got, w)
		}
	}
	// One round robin, whoever turns it.
	want(reference("ADD", "flannel-1"), 2)
	want(allocate(t, d, "twill-1", dualStack), 3)
	want(reference("ADD", "flannel-2"), 4)
	want(allocate(t, d, "twill-2", dualStack), 5)
	reference("CHECK", "twill-1")
	if o, err := d.Owner(netip.MustParseAddr("fd00:18:1::4")); err != nil || o != (Owner{"flannel-2", "eth0"}) {
		t.Fatalf("owner of host-local's reservation: %v, %v", o, err)
	}
	// Each releases the other's.
	reference("DEL", "twill-1")
	if err := d.Release(Owner{"flannel-1", "eth0"}, nil, ReleaseOptions{CoolDown: 1}); err != nil {
		t.Fatal(err)
	}
	if got, w := reserved(t, d), []string{"198.18.1.4", "198.18.1.5", "fd00:18:1::4", "fd00:18:1::5"}; !slices.Equal(got, w) {
		t.Fatalf("reserved %v, want %v", got, w)
	}
	// Each wraps around at the end of the range and skips what the other has.
	for _, turn := range []func(id string) string{
		func(id string) string { return reference("ADD", id) },
		func(id string) string { return allocate(t, d, id, dualStack) },
	} {
		for set, last := range []string{"198.18.1.254", "fd00:18:1::ffff:ffff:ffff:ffff"} {
			writeFile(t, d.lastFile(set), last)
		}
		want(turn("after-wrap"), 2)
		for set, last := range []string{"198.18.1.3", "fd00:18:1::3"} {
			writeFile(t, d.lastFile(set), last)
		}
		want(turn("after-skip"), 6)
		for _, id := range []string{"after-wrap", "after-skip"} {
			release(t, d, id)
		}
	}
}

// With several sets of several ranges, gateways elsewhere, and requested
// addresses, both give the same addresses in the same order, all the way around,
// and the same refusal after the last one.
func TestHostLocalAgrees(t *testing.T) {
	requireHostLocal(t)
	for _, sets := range [][][]Range{
		newSets("198.18.1.0/28"),
		newSets("198.18.1.0/28 198.18.1.5 - 198.18.1.9", "fd00::/64 fd00::10 fd00::18"),
		newSets("198.18.1.0/24 198.18.1.20 198.18.1.22,203.0.113.0/29,198.18.1.0/24 198.18.1.9 198.18.1.10"),
		newSets("fd00:2::/125,fd00:1::/125 - - fd00:1::7", "198.18.1.0/27", "203.0.113.0/24"),
	} {
		ours, theirs := t.TempDir(), t.TempDir()
		d := NewDir(ours, "net")
		for i := 0; ; i++ {
			id := fmt.Sprint("c", i)
			want, wantErr := runHostLocal("ADD", theirs, id, sets)
			if wantErr != nil {
				if got, err := d.Allocate(Request{Owner: Owner{id, "eth0"}, Sets: sets}); err == nil {
					t.Errorf("%v: pod %d gets %v, and nothing of host-local: %v", sets, i, got, wantErr)
				}
				break
			}
			if got := allocate(t, d, id, sets); got != want {
				t.Fatalf("%v: pod %d gets %s, of host-local %s", sets, i, got, want)
			}
			if i%3 == 0 {
				release(t, d, id)
				if _, err := runHostLocal("DEL", theirs, id, sets); err != nil {
					t.Fatal(err)
				}
			}
		}
		// The directories are the same, but for where the turn of the refused one ended.
		for _, name := range append(reserved(t, d), "lock") {
			a, err := os.ReadFile(filepath.Join(ours, "net", name))
			b, err2 := os.ReadFile(filepath.Join(theirs, "net", name))
			if err != nil || err2 != nil || string(a) != string(b) {
				t.Errorf("%v: %s holds %q, %v, of host-local %q, %v", sets, name, a, err, b, err2)
			}
		}
		if got, want := reserved(t, d), reserved(t, NewDir(theirs, "net")); !slices.Equal(got, want) {
			t.Errorf("%v: %v, of host-local %v", sets, got, want)
		}
	}
}

// The last addresses are the same, and so is the refusal after them.
func TestHostLocalAgreesOnTheEnd(t *testing.T) {
	requireHostLocal(t)
	dir := t.TempDir()
	d := NewDir(dir, "net")
	for i := range 126 {
		if _, err := runHostLocal("ADD", dir, fmt.Sprint("f", i), dualStack); err != nil {
			t.Fatal(err)
		}
		allocate(t, d, fmt.Sprint("t", i), dualStack)
	}
	if got, want := allocate(t, d, "last", dualStack), "198.18.1.254/24 fd00:18:1::fe/64"; got != want {
		t.Fatalf("last address %s, want %s", got, want)
	}
	if out, err := runHostLocal("ADD", dir, "more", dualStack); err == nil {
		t.Errorf("host-local found %s in a range that is full for twill", out)
	}
	if out, err := d.Allocate(Request{Owner: Owner{"more", "eth0"}, Sets: dualStack}); err == nil {
		t.Errorf("twill found %s in a range that is full for host-local", out)
	}
}
