package daemon

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
)

// TestFormerExpires follows a move from vxlan to host-gw: vxlan stays as long as a
// peer publishes it, and a minute longer.
func TestFormerExpires(t *testing.T) {
	lease := func(key, value string) *overlay.Lease {
		n, err := overlay.ParseKey(key)
		if err != nil {
			t.Fatal(err)
		}
		a, err := overlay.ParseAttrs([]byte(value))
		if err != nil {
			t.Fatal(err)
		}
		return &overlay.Lease{Subnets: n, Attrs: a, Grant: 1}
	}
	own := lease("10.5.1.0-24", `{"PublicIP":"198.51.100.1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:00:00:00:00:01"}}`)
	old := lease("10.5.2.0-24", `{"PublicIP":"198.51.100.2","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:00:00:00:00:02"}}`)
	moved := lease("10.5.2.0-24", `{"PublicIP":"198.51.100.2","BackendType":"host-gw"}`)
	vxlan, to := config(t, v4).Backend, config(t, hostGW).Backend

	now := time.Now()
	f := former{file: filepath.Join(t.TempDir(), "backends.json")}
	f.add(vxlan, to, now)
	for i, step := range []struct {
		after  time.Duration
		leases []*overlay.Lease
		kept   int
	}{
		{0, []*overlay.Lease{own, old}, 1},
		{time.Hour, []*overlay.Lease{own, old}, 1}, // a node that does not follow
		{time.Hour + 50*time.Second, []*overlay.Lease{own, moved}, 1},
		{time.Hour + 61*time.Second, []*overlay.Lease{own, moved}, 0}, // our own lease keeps nothing
	} {
		f.expire(step.leases, own.Subnets, now.Add(step.after))
		if len(f.all) != step.kept {
			t.Fatalf("step %d: %d former backends, want %d", i, len(f.all), step.kept)
		}
	}
}

// TestFormerSurvivesARestart: the next process accepts what this one did.
func TestFormerSurvivesARestart(t *testing.T) {
	file := filepath.Join(t.TempDir(), "backends.json")
	vxlan, to := config(t, v4).Backend, config(t, hostGW).Backend
	f := former{file: file}
	f.add(vxlan, to, time.Now())
	if err := f.save(to); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file that may hold keys: %v, %v", info.Mode(), err)
	}
	next := former{file: file}
	next.load(to, time.Now())
	if got := next.backends(); len(got) != 1 || got[0].Type != "vxlan" || got[0].VXLAN != vxlan.VXLAN {
		t.Errorf("after a restart: %+v", got)
	}
	// The configuration was changed while no daemon ran.
	back := former{file: file}
	back.load(vxlan, time.Now())
	if got := back.backends(); len(got) != 0 {
		t.Errorf("beside vxlan: %+v, want nothing: host-gw needs no device", got)
	}
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	broken := former{file: file}
	if broken.load(to, time.Now()); len(broken.all) != 0 {
		t.Errorf("from a broken file: %+v", broken.all)
	}
}
