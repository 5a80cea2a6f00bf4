package ipam

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
)

// hostLocal is the reference: Debian's containernetworking-plugins.
const hostLocal = "/usr/lib/cni/host-local"

func runHostLocal(t *testing.T, verb, dir, id string) (string, error) {
	t.Helper()
	conf := fmt.Sprintf(`{"cniVersion":"1.0.0","name":"net","type":"x","ipam":{"type":"host-local","dataDir":%q,"ranges":[[{"subnet":"%s"}],[{"subnet":"%s"}]]}}`,
		dir, dualStack[0], dualStack[1])
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
		got, err := runHostLocal(t, verb, dir, id)
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
	want(allocate(t, d, "twill-1", dualStack...), 3)
	want(reference("ADD", "flannel-2"), 4)
	want(allocate(t, d, "twill-2", dualStack...), 5)
	reference("CHECK", "twill-1")
	if o, err := d.Owner(netip.MustParseAddr("fd00:18:1::4")); err != nil || o != (Owner{"flannel-2", "eth0"}) {
		t.Fatalf("owner of host-local's reservation: %v, %v", o, err)
	}
	// Each releases the other's.
	reference("DEL", "twill-1")
	if err := d.Release(Owner{"flannel-1", "eth0"}, nil); err != nil {
		t.Fatal(err)
	}
	if got, w := reserved(t, d), []string{"198.18.1.4", "198.18.1.5", "fd00:18:1::4", "fd00:18:1::5"}; !slices.Equal(got, w) {
		t.Fatalf("reserved %v, want %v", got, w)
	}
	// Each wraps around at the end of the range and skips what the other has.
	for _, turn := range []func(id string) string{
		func(id string) string { return reference("ADD", id) },
		func(id string) string { return allocate(t, d, id, dualStack...) },
	} {
		for set, last := range []string{"198.18.1.254", "fd00:18:1::ffff:ffff:ffff:ffff"} {
			if err := os.WriteFile(d.lastFile(set), []byte(last), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		want(turn("after-wrap"), 2)
		for set, last := range []string{"198.18.1.3", "fd00:18:1::3"} {
			if err := os.WriteFile(d.lastFile(set), []byte(last), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		want(turn("after-skip"), 6)
		for _, id := range []string{"after-wrap", "after-skip"} {
			if err := d.Release(Owner{id, "eth0"}, nil); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// The last addresses are the same, and so is the refusal after them.
func TestHostLocalAgreesOnTheEnd(t *testing.T) {
	requireHostLocal(t)
	dir := t.TempDir()
	d := NewDir(dir, "net")
	for i := range 126 {
		if _, err := runHostLocal(t, "ADD", dir, fmt.Sprint("f", i)); err != nil {
			t.Fatal(err)
		}
		allocate(t, d, fmt.Sprint("t", i), dualStack...)
	}
	if got, want := allocate(t, d, "last", dualStack...), "198.18.1.254/24 fd00:18:1::fe/64"; got != want {
		t.Fatalf("last address %s, want %s", got, want)
	}
	if out, err := runHostLocal(t, "ADD", dir, "more"); err == nil {
		t.Errorf("host-local found %s in a range that is full for twill", out)
	}
	if out, err := d.Allocate(Owner{"more", "eth0"}, dualStack); err == nil {
		t.Errorf("twill found %s in a range that is full for host-local", out)
	}
}

// Both hold one lock: no address is given twice.
func TestHostLocalConcurrent(t *testing.T) {
	requireHostLocal(t)
	dir := t.TempDir()
	d := NewDir(dir, "net")
	if _, err := d.Allocate(Owner{"first", "eth0"}, dualStack); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var got []string
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for j := range 10 {
				addr, err := runHostLocal(t, "ADD", dir, fmt.Sprintf("f%d-%d", i, j))
				if err != nil {
					t.Error(err)
				}
				ps, err := d.Allocate(Owner{fmt.Sprintf("t%d-%d", i, j), "eth0"}, dualStack)
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				got = append(got, addr, strings.Trim(fmt.Sprint(ps), "[]"))
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	slices.Sort(got)
	if n := len(slices.Compact(got)); n != 80 {
		t.Errorf("%d different addresses for 80 pods", n)
	}
}
