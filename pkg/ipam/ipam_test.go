package ipam

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var (
	onlyV4    = newSets("198.18.1.0/24")
	dualStack = newSets("198.18.1.0/24", "fd00:18:1::/64")
)

// request allocates for the request's owner, or for eth0 of its pod.
func request(t *testing.T, d Dir, req Request) string {
	t.Helper()
	if req.Owner == (Owner{}) {
		req.Owner = Owner{"of-" + req.Pod, "eth0"}
	}
	got, err := d.Allocate(req)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, a := range got {
		out = append(out, a.Prefix.String())
	}
	return strings.Join(out, " ")
}

func allocate(t *testing.T, d Dir, id string, sets [][]Range) string {
	t.Helper()
	return request(t, d, Request{Owner: Owner{id, "eth0"}, Sets: sets})
}

func release(t *testing.T, d Dir, id string) {
	t.Helper()
	if err := d.Release(Owner{id, "eth0"}, nil, ReleaseOptions{}); err != nil {
		t.Fatal(err)
	}
}

// reserved lists the addresses that have a file.
func reserved(t testing.TB, d Dir) []string {
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

func writeFile(t testing.TB, name, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestRoundRobin(t *testing.T) {
	d := NewDir(t.TempDir(), "net")
	for i := range 3 {
		want := fmt.Sprintf("198.18.1.%d/24 fd00:18:1::%d/64", i+2, i+2)
		if got := allocate(t, d, fmt.Sprint("c", i), dualStack); got != want {
			t.Fatalf("allocated %s, want %s", got, want)
		}
	}
	release(t, d, "c0")
	if got, want := allocate(t, d, "c3", dualStack), "198.18.1.5/24 fd00:18:1::5/64"; got != want {
		t.Fatalf("allocated %s, want %s: an address just released must rest", got, want)
	}
	b, err := os.ReadFile(filepath.Join(d.path, "198.18.1.5"))
	if err != nil || string(b) != "c3\r\neth0" {
		t.Fatalf("reservation holds %q, %v", b, err)
	}
	if _, err := os.Lstat(filepath.Join(d.path, "..", ".twill")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("nothing was to be remembered, but .twill is there: %v", err)
	}
}

func TestWholeRange(t *testing.T) {
	for _, tt := range []struct {
		set         string
		first, last string
		n           int
	}{
		{"198.18.1.0/29", "198.18.1.2/29", "198.18.1.6/29", 5}, // without .0, .1 and .7
		{"198.18.1.0/26", "198.18.1.2/26", "198.18.1.62/26", 61},
		{"fd00::/125", "fd00::2/125", "fd00::7/125", 6},
		{"198.18.1.0/29,203.0.113.0/27 - 203.0.113.20", "198.18.1.2/29", "203.0.113.20/27", 5 + 19},
	} {
		t.Run(tt.set, func(t *testing.T) {
			d := NewDir(t.TempDir(), "net")
			sets := newSets(tt.set)
			var got []string
			for i := range tt.n {
				if err := d.Free(Request{Sets: sets}); err != nil {
					t.Fatal(err)
				}
				got = append(got, allocate(t, d, fmt.Sprint("c", i), sets))
			}
			if got[0] != tt.first || got[len(got)-1] != tt.last {
				t.Errorf("allocated %v, want %s to %s", got, tt.first, tt.last)
			}
			_, err := d.Allocate(Request{Owner: Owner{"one", "more"}, Sets: sets})
			for _, err := range []error{err, d.Free(Request{Sets: sets})} {
				var full *ExhaustedError
				if !errors.As(err, &full) || full.InUse != tt.n || full.AtRest != 0 || !full.Next.IsZero() || full.Dir != d.path {
					t.Errorf("full range: %v", err)
				}
			}
			// The one that comes free is found from wherever the round robin stands.
			release(t, d, "c0")
			if got := allocate(t, d, "again", sets); got != tt.first {
				t.Errorf("allocated %s, want %s", got, tt.first)
			}
			// So is the one whose writer was killed.
			writeFile(t, d.Path(netip.MustParsePrefix(tt.last).Addr()), "")
			if err := d.Free(Request{Sets: sets}); err != nil {
				t.Errorf("an empty file is no reservation: %v", err)
			}
			if got := allocate(t, d, "heir", sets); got != tt.last {
				t.Errorf("allocated %s, want %s", got, tt.last)
			}
		})
	}
}

// A run of addresses in use is jumped over, however long it is.
func TestTakenBlock(t *testing.T) {
	for _, n := range []int{1, probes - 1, probes, probes + 1, 1000} {
		d := NewDir(t.TempDir(), "net")
		sets := newSets("198.18.0.0/16", "fd00:18::/64")
		a4, a6 := netip.MustParseAddr("198.18.0.2"), netip.MustParseAddr("fd00:18::2")
		for range n {
			writeFile(t, d.Path(a4), "x\r\neth0")
			writeFile(t, d.Path(a6), "x\r\neth0")
			a4, a6 = a4.Next(), a6.Next()
		}
		for i := range 3 {
			if got, want := allocate(t, d, fmt.Sprint("c", i), sets), a4.String()+"/16 "+a6.String()+"/64"; got != want {
				t.Errorf("behind %d: %s, want %s", n, got, want)
			}
			a4, a6 = a4.Next(), a6.Next()
		}
	}
}

func TestAllOrNothing(t *testing.T) {
	d := NewDir(t.TempDir(), "net")
	sets := newSets("198.18.1.0/24", "fd00::/126")
	allocate(t, d, "c0", sets)
	allocate(t, d, "c1", sets)
	before := reserved(t, d)
	_, err := d.Allocate(Request{Owner: Owner{"c2", "eth0"}, Sets: sets})
	var full *ExhaustedError
	if !errors.As(err, &full) || full.Ranges != "fd00::/126" {
		t.Fatalf("allocated from a full subnet: %v", err)
	}
	if after := reserved(t, d); !slices.Equal(before, after) {
		t.Errorf("reserved %v, then a failure, then %v", before, after)
	}
	if got, want := d.last(0).String(), "198.18.1.3"; got != want {
		t.Errorf("the round robin stands at %s, want %s: nothing was given", got, want)
	}
}

func TestBadOwner(t *testing.T) {
	d := NewDir(t.TempDir(), "net")
	for _, o := range []Owner{{}, {" ", "eth0"}, {"a\nb", "eth0"}, {"c", "eth0\r\n"}} {
		if got, err := d.Allocate(Request{Owner: o, Sets: dualStack}); err == nil {
			t.Errorf("%q got %v", o, got)
		}
	}
	if got := reserved(t, d); len(got) != 0 {
		t.Errorf("reserved %v", got)
	}
}

func TestGateway(t *testing.T) {
	d := NewDir(t.TempDir(), "net")
	got, err := d.Allocate(Request{Owner: Owner{"c", "eth0"}, Sets: newSets("198.18.1.0/24 - - 198.18.1.254", "fd00::/64")})
	if want := "[{198.18.1.1/24 198.18.1.254} {fd00::2/64 fd00::1}]"; err != nil || fmt.Sprint(got) != want {
		t.Errorf("%v, %v, want %s", got, err, want)
	}
}

func TestWanted(t *testing.T) {
	d := NewDir(t.TempDir(), "net")
	sets := newSets("198.18.1.0/24 198.18.1.0 198.18.1.255 198.18.1.254 198.18.1.64/26,203.0.113.0/24 203.0.113.10 203.0.113.20", "fd00:18:1::/64")
	allocate(t, d, "c0", sets)
	var out *OutOfRangeError
	var used *TakenError
	for _, tt := range []struct {
		wanted string
		want   string // addresses, or part of the error
		is     any
	}{
		{"198.18.1.9", "198.18.1.9/24 fd00:18:1::3/64", nil},
		{"198.18.1.70", "198.18.1.70/24 fd00:18:1::4/64", nil}, // excluded from automatic choice
		{"fd00:18:1::ffff 203.0.113.15", "203.0.113.15/24 fd00:18:1::ffff/64", nil},
		{"::ffff:198.18.1.10", "198.18.1.10/24 fd00:18:1::5/64", nil},
		{"fd00:18:1::", "it is the network address of fd00:18:1::/64", &out},
		{"198.18.1.254", "it is the gateway", &out},
		{"198.18.1.0", "it is the network address", &out},
		{"198.18.1.255", "it is the broadcast address", &out},
		{"198.18.1.11 198.18.2.1", "it lies in none of the ranges: request another of 198.18.1.0-", &out},
		{"203.0.113.21", "it lies in none", &out},
		{"fd00:18:1::9%eth0", "it lies in none", &out},
		{"198.18.1.11 203.0.113.11", "198.18.1.11 is requested too", &out},
		{"198.18.1.9", "in use by of-198.18.1.9/eth0", &used},
		{"198.18.1.12 fd00:18:1::ffff", "in use by of-fd00:18:1::ffff 203.0.113.15/eth0", &used},
	} {
		before := reserved(t, d)
		got, err := d.Allocate(Request{Owner: Owner{"of-" + tt.wanted, "eth0"}, Sets: sets, Wanted: addrs(tt.wanted)})
		if tt.is == nil {
			if err != nil || got[0].Prefix.String()+" "+got[1].Prefix.String() != tt.want {
				t.Errorf("requested %s, got %v, %v, want %s", tt.wanted, got, err, tt.want)
			}
			continue
		}
		if !errors.As(err, tt.is) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("requested %s: %v, want a %T with %q", tt.wanted, err, tt.is, tt.want)
		}
		if after := reserved(t, d); !slices.Equal(after, before) {
			t.Errorf("requested %s: reserved %v, a failure, %v", tt.wanted, before, after)
		}
	}
	// Requests do not turn the round robin.
	if got, want := allocate(t, d, "c1", sets), "198.18.1.2/24 fd00:18:1::6/64"; got != want {
		t.Errorf("then chosen: %s, want %s", got, want)
	}
}

// A writer that is killed before its one write leaves an empty file.
func TestKilledWriter(t *testing.T) {
	d := NewDir(t.TempDir(), "net")
	allocate(t, d, "c0", onlyV4)
	dead := netip.MustParseAddr("198.18.1.3")
	for _, junk := range []string{"", "\r\n", " "} {
		writeFile(t, d.Path(dead), junk)
		writeFile(t, d.lastFile(0), "198.18.1.2")
		if got, err := d.List(); err != nil || len(got) != 1 {
			t.Errorf("%q: %v reserved, %v", junk, got, err)
		}
		if got, want := allocate(t, d, "c1", onlyV4), "198.18.1.3/24"; got != want {
			t.Errorf("%q: allocated %s, want %s, which is nobody's", junk, got, want)
		}
		release(t, d, "c1")
		writeFile(t, d.Path(dead), junk)
		release(t, d, "c1")
		if got := reserved(t, d); !slices.Equal(got, []string{"198.18.1.2"}) {
			t.Errorf("%q: reserved %v", junk, got)
		}
	}
	// The shortest that host-local before 0.8 wrote is a reservation.
	writeFile(t, d.Path(dead), "x")
	writeFile(t, d.lastFile(0), "198.18.1.2")
	if got, want := allocate(t, d, "c1", onlyV4), "198.18.1.4/24"; got != want {
		t.Errorf("allocated %s, want %s", got, want)
	}
	release(t, d, "c1")
	release(t, d, "x")
	for _, junk := range []string{"", "\r\n", "fd00::99", "198.18.2.9", "junk"} {
		writeFile(t, d.lastFile(0), junk)
		if got := allocate(t, d, "c2", onlyV4); got != "198.18.1.3/24" {
			t.Errorf("round robin file %q: allocated %s", junk, got)
		}
		release(t, d, "c2")
	}
}

func TestRelease(t *testing.T) {
	d := NewDir(t.TempDir(), "net")
	mine, other := Owner{"c0", "eth0"}, Owner{"c0", "eth1"}
	take := func(o Owner) []netip.Addr {
		t.Helper()
		got, err := d.Allocate(Request{Owner: o, Sets: dualStack})
		if err != nil {
			t.Fatal(err)
		}
		return []netip.Addr{got[0].Prefix.Addr(), got[1].Prefix.Addr()}
	}
	if err := d.Release(mine, nil, ReleaseOptions{}); err != nil {
		t.Errorf("release without a directory: %v", err)
	}
	take(mine)
	theirs := take(other)
	// Told a wrong place, it searches, and never takes what is somebody else's.
	if err := d.Release(mine, theirs, ReleaseOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := reserved(t, d); !slices.Equal(got, []string{theirs[0].String(), theirs[1].String()}) {
		t.Errorf("reserved %v, want the other's %v", got, theirs)
	}
	first := take(mine)
	for range 2 {
		if err := d.Release(mine, first, ReleaseOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := d.Owner(first[0]); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("owner of a free address: %v", err)
	}
	// Told one of two places, it finds the other.
	second := take(mine)
	if err := d.Release(mine, []netip.Addr{second[0], first[1]}, ReleaseOptions{}); err != nil {
		t.Fatal(err)
	}
	// host-local before 0.8 wrote the container alone.
	writeFile(t, d.Path(first[0]), "c7")
	if err := d.Release(Owner{"c7", "eth0"}, nil, ReleaseOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := len(reserved(t, d)); got != 2 {
		t.Errorf("%d reserved, want 2", got)
	}
}

// A release that knows where to look reads no other file: one that cannot be read
// is not noticed.
func TestReleaseReadsItsOwnOnly(t *testing.T) {
	d := NewDir(t.TempDir(), "net")
	allocate(t, d, "c0", onlyV4)
	loop := d.Path(netip.MustParseAddr("198.18.1.9"))
	if err := os.Symlink(loop, loop); err != nil {
		t.Fatal(err)
	}
	if err := d.Release(Owner{"c0", "eth0"}, addrs("198.18.1.2"), ReleaseOptions{}); err != nil {
		t.Error(err)
	}
	if err := d.Release(Owner{"c0", "eth0"}, nil, ReleaseOptions{}); err == nil || !strings.Contains(err.Error(), loop) {
		t.Errorf("a reservation that cannot be read: %v", err)
	}
}

func TestSweep(t *testing.T) {
	d := NewDir(t.TempDir(), "net")
	if freed, err := d.Sweep(func(Owner) bool { return false }); err != nil || len(freed) != 0 {
		t.Errorf("sweep without a directory: %v, %v", freed, err)
	}
	if got, err := d.List(); err != nil || len(got) != 0 {
		t.Errorf("list without a directory: %v, %v", got, err)
	}
	for i := range 4 {
		allocate(t, d, fmt.Sprint("c", i), onlyV4)
	}
	for _, name := range []string{"README", "198.18.1.09", "FD00::1", "fe80::1%eth0"} {
		writeFile(t, filepath.Join(d.path, name), "hands off")
	}
	if got, err := d.List(); err != nil || fmt.Sprint(got) != "[{198.18.1.2 c0/eth0} {198.18.1.3 c1/eth0} {198.18.1.4 c2/eth0} {198.18.1.5 c3/eth0}]" {
		t.Errorf("list: %v, %v", got, err)
	}
	freed, err := d.Sweep(func(o Owner) bool { return o.ContainerID == "c1" })
	if err != nil || fmt.Sprint(freed) != "[198.18.1.2 198.18.1.4 198.18.1.5]" {
		t.Errorf("freed %v, %v", freed, err)
	}
	if got := reserved(t, d); !slices.Equal(got, []string{"198.18.1.09", "198.18.1.3", "FD00::1", "README", "fe80::1%eth0"}) {
		t.Errorf("left %v", got)
	}
}
