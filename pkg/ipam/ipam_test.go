package ipam

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

var dualStack = []netip.Prefix{netip.MustParsePrefix("198.18.1.0/24"), netip.MustParsePrefix("fd00:18:1::/64")}

func allocate(t *testing.T, d Dir, id string, subnets ...netip.Prefix) string {
	t.Helper()
	got, err := d.Allocate(Owner{ContainerID: id, IfName: "eth0"}, subnets)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Trim(fmt.Sprint(got), "[]")
}

// reserved lists the addresses that have a file.
func reserved(t *testing.T, d Dir) []string {
	t.Helper()
	entries, err := os.ReadDir(d.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		if e.Name() != "lock" && !strings.HasPrefix(e.Name(), "last_reserved_ip.") {
			out = append(out, e.Name())
		}
	}
	return out
}

func TestRoundRobin(t *testing.T) {
	d := NewDir(t.TempDir(), "net")
	for i := range 3 {
		want := fmt.Sprintf("198.18.1.%d/24 fd00:18:1::%d/64", i+2, i+2)
		if got := allocate(t, d, fmt.Sprint("c", i), dualStack...); got != want {
			t.Fatalf("allocated %s, want %s", got, want)
		}
	}
	if err := d.Release(Owner{"c0", "eth0"}, nil); err != nil {
		t.Fatal(err)
	}
	if got, want := allocate(t, d, "c3", dualStack...), "198.18.1.5/24 fd00:18:1::5/64"; got != want {
		t.Fatalf("allocated %s, want %s: an address just released must rest", got, want)
	}
	b, err := os.ReadFile(filepath.Join(d.path, "198.18.1.5"))
	if err != nil || string(b) != "c3\r\neth0" {
		t.Fatalf("reservation holds %q, %v", b, err)
	}
}

func TestWholeRange(t *testing.T) {
	for _, tt := range []struct {
		subnet      string
		first, last string
		n           int
	}{
		{"198.18.1.0/29", "198.18.1.2/29", "198.18.1.6/29", 5}, // without .0, .1 and .7
		{"198.18.1.0/30", "198.18.1.2/30", "198.18.1.2/30", 1},
		{"fd00::/125", "fd00::2/125", "fd00::7/125", 6}, // no broadcast in IPv6
	} {
		t.Run(tt.subnet, func(t *testing.T) {
			d := NewDir(t.TempDir(), "net")
			subnet := netip.MustParsePrefix(tt.subnet)
			var got []string
			for i := range tt.n {
				if err := d.Free(subnet, 0); err != nil {
					t.Fatal(err)
				}
				got = append(got, allocate(t, d, fmt.Sprint("c", i), subnet))
			}
			if got[0] != tt.first || got[len(got)-1] != tt.last {
				t.Errorf("allocated %v, want %s to %s", got, tt.first, tt.last)
			}
			_, err := d.Allocate(Owner{"one", "more"}, []netip.Prefix{subnet})
			for _, err := range []error{err, d.Free(subnet, 0)} {
				var full *ExhaustedError
				if !errors.As(err, &full) || full.InUse != tt.n || full.Subnet != subnet || full.Dir != d.path {
					t.Errorf("full range: %v", err)
				}
			}
			// The one that comes free is found from wherever the round robin stands.
			if err := d.Release(Owner{"c0", "eth0"}, nil); err != nil {
				t.Fatal(err)
			}
			if got := allocate(t, d, "again", subnet); got != tt.first {
				t.Errorf("allocated %s, want %s", got, tt.first)
			}
		})
	}
}

func TestAllOrNothing(t *testing.T) {
	d := NewDir(t.TempDir(), "net")
	subnets := []netip.Prefix{dualStack[0], netip.MustParsePrefix("fd00::/126")}
	allocate(t, d, "c0", subnets...)
	allocate(t, d, "c1", subnets...)
	before := reserved(t, d)
	if _, err := d.Allocate(Owner{"c2", "eth0"}, subnets); err == nil {
		t.Fatal("allocated from a full subnet")
	}
	if after := reserved(t, d); !slices.Equal(before, after) {
		t.Errorf("reserved %v, then a failure, then %v", before, after)
	}
}

func TestBadSubnets(t *testing.T) {
	for _, s := range []string{"198.18.1.1/24", "198.18.1.0/31", "198.18.1.0/32", "fd00::/127"} {
		d := NewDir(t.TempDir(), "net")
		if _, err := d.Allocate(Owner{"c", "eth0"}, []netip.Prefix{netip.MustParsePrefix(s)}); err == nil {
			t.Errorf("%s: allocated", s)
		}
		if got := reserved(t, d); len(got) != 0 {
			t.Errorf("%s: reserved %v", s, got)
		}
	}
}

// A writer that is killed before its one write leaves an empty file.
func TestKilledWriter(t *testing.T) {
	d := NewDir(t.TempDir(), "net")
	allocate(t, d, "c0", dualStack[0])
	dead := filepath.Join(d.path, "198.18.1.3")
	if err := os.WriteFile(dead, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, want := allocate(t, d, "c1", dualStack[0]), "198.18.1.3/24"; got != want {
		t.Errorf("allocated %s, want %s, which is nobody's", got, want)
	}
	if err := os.WriteFile(dead, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.Release(Owner{"c1", "eth0"}, nil); err != nil {
		t.Fatal(err)
	}
	if got := reserved(t, d); !slices.Equal(got, []string{"198.18.1.2"}) {
		t.Errorf("reserved %v", got)
	}
	for _, junk := range []string{"", "\r\n", "fd00::99", "198.18.2.9", "junk"} {
		if err := os.WriteFile(d.lastFile(0), []byte(junk), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := allocate(t, d, "c2", dualStack[0]); got != "198.18.1.3/24" {
			t.Errorf("round robin file %q: allocated %s", junk, got)
		}
		if err := d.Release(Owner{"c2", "eth0"}, nil); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRelease(t *testing.T) {
	d := NewDir(t.TempDir(), "net")
	mine, other := Owner{"c0", "eth0"}, Owner{"c0", "eth1"}
	addrs := func(ps []netip.Prefix, err error) []netip.Addr {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return []netip.Addr{ps[0].Addr(), ps[1].Addr()}
	}
	if err := d.Release(mine, nil); err != nil {
		t.Errorf("release without a directory: %v", err)
	}
	addrs(d.Allocate(mine, dualStack))
	theirs := addrs(d.Allocate(other, dualStack))
	// Told a wrong place, it searches, and never takes what is somebody else's.
	if err := d.Release(mine, theirs); err != nil {
		t.Fatal(err)
	}
	if got := reserved(t, d); !slices.Equal(got, []string{theirs[0].String(), theirs[1].String()}) {
		t.Errorf("reserved %v, want the other's %v", got, theirs)
	}
	first := addrs(d.Allocate(mine, dualStack))
	for range 2 {
		if err := d.Release(mine, first); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := d.Owner(first[0]); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("owner of a free address: %v", err)
	}
	// host-local before 0.8 wrote the container alone.
	if err := os.WriteFile(d.Path(first[0]), []byte("c7"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.Release(Owner{"c7", "eth0"}, nil); err != nil {
		t.Fatal(err)
	}
	if got := len(reserved(t, d)); got != 2 {
		t.Errorf("%d reserved, want 2", got)
	}
}

func TestSweep(t *testing.T) {
	d := NewDir(t.TempDir(), "net")
	if freed, err := d.Sweep(func(Owner) bool { return false }); err != nil || len(freed) != 0 {
		t.Errorf("sweep without a directory: %v, %v", freed, err)
	}
	for i := range 4 {
		allocate(t, d, fmt.Sprint("c", i), dualStack[0])
	}
	notes := filepath.Join(d.path, "README")
	if err := os.WriteFile(notes, []byte("hands off"), 0o600); err != nil {
		t.Fatal(err)
	}
	freed, err := d.Sweep(func(o Owner) bool { return o.ContainerID == "c1" })
	if err != nil || fmt.Sprint(freed) != "[198.18.1.2 198.18.1.4 198.18.1.5]" {
		t.Errorf("freed %v, %v", freed, err)
	}
	if got := reserved(t, d); !slices.Equal(got, []string{"198.18.1.3", "README"}) {
		t.Errorf("left %v", got)
	}
}

// The test's executable is the other process, when told to.
func TestMain(m *testing.M) {
	if dir := os.Getenv("IPAM_TEST_DIR"); dir != "" {
		d := NewDir(dir, "net")
		for i := range 20 {
			if _, err := d.Allocate(Owner{os.Getenv("IPAM_TEST_ID"), fmt.Sprint("eth", i)}, dualStack); err != nil {
				fmt.Println(err)
				os.Exit(1)
			}
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestConcurrentProcesses(t *testing.T) {
	dir := t.TempDir()
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), "IPAM_TEST_DIR="+dir, fmt.Sprint("IPAM_TEST_ID=p", i))
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("process %d: %v: %s", i, err, out)
			}
		})
	}
	wg.Wait()
	d := NewDir(dir, "net")
	seen := map[Owner]int{}
	for _, name := range reserved(t, d) {
		o, err := d.Owner(netip.MustParseAddr(name))
		if err != nil {
			t.Fatal(err)
		}
		seen[o]++
	}
	if len(seen) != 160 {
		t.Errorf("%d owners, want 160", len(seen))
	}
	for o, n := range seen {
		if n != 2 {
			t.Errorf("%s has %d addresses, want 2", o, n)
		}
	}
}

func FuzzReservation(f *testing.F) {
	for _, s := range []string{"", "\r\n", "abc\r\neth0", "abc", "abc\neth0", " abc \r\n eth0 \r\n", "a\r\nb\r\nc"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		o, ok := parse(b)
		if ok != (o.ContainerID != "") {
			t.Errorf("%q: owner %q, %t", b, o, ok)
		}
		if !ok || strings.Contains(o.ContainerID, "\r\n") {
			return
		}
		if again, ok := parse(format(o)); !ok || again != o {
			t.Errorf("%q: %q written and read gives %q", b, o, again)
		}
	})
}
