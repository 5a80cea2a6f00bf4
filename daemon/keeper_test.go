package daemon

import (
	"bytes"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
)

// lease is that of the subnet 10.5.n.0/24 on node 198.51.100.n.
func lease(n byte, created int64) *overlay.Lease {
	return &overlay.Lease{
		Subnets: overlay.Subnets{V4: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 5, n, 0}), 24)},
		Attrs:   overlay.Attrs{PublicIP: netip.AddrFrom4([4]byte{198, 51, 100, n})},
		Created: created,
	}
}

func TestKeeperHolds(t *testing.T) {
	var log bytes.Buffer
	k := &keeper{Daemon: newDaemon(&log)}
	k.fail("no lease", errors.New("why"))
	k.fail("no lease", errors.New("why"))
	if k.report.leaseErr != "no lease: why" || strings.Count(log.String(), "no lease: why") != 1 {
		t.Errorf("%q, log:\n%s", k.report.leaseErr, log.String())
	}
	first := lease(7, 1)
	first.Grant = 1
	k.hold(*first)
	if *k.held.Load() != first.Subnets || k.prefer != first.Subnets || k.report.leaseErr != "" || len(k.storeBell) != 1 {
		t.Errorf("held %v, preferred %v, %q", k.held.Load(), k.prefer, k.report.leaseErr)
	}
	k.renewAt = time.Now().Add(time.Hour)
	<-k.storeBell
	k.hold(*first)
	if len(k.storeBell) != 0 || k.renewAt.IsZero() {
		t.Error("the same lease again is news")
	}
	// Made anew: another life to renew, the same subnet for the pods.
	again := *first
	again.Grant = 2
	k.hold(again)
	if !k.renewAt.IsZero() || len(k.storeBell) != 0 {
		t.Error("a new lease of the same subnet is not renewed at once, or wakes the loop")
	}
	other := lease(8, 1)
	k.hold(*other)
	if len(k.storeBell) != 1 || !strings.Contains(log.String(), "pods of the old one must be restarted") {
		t.Errorf("another subnet goes unnoticed:\n%s", log.String())
	}
	if !other.Reserved() || k.renew(t.Context()) != 0 {
		t.Error("a reservation is renewed")
	}
}

// TestKeeperDecidesOnce sees that a Snapshot is acted on once, and one of a store
// whose revision went back as on any other.
func TestKeeperDecidesOnce(t *testing.T) {
	k := &keeper{Daemon: newDaemon(&bytes.Buffer{})}
	if k.decide(t.Context()) != 0 {
		t.Error("decided on nothing")
	}
	own := lease(7, 1)
	k.claim.Store(&claim{config: config(t, v4), attrs: own.Attrs})
	old := &overlay.Snapshot{Revision: 1000, Leases: []*overlay.Lease{own}}
	k.snapshot.Store(old)
	k.acted = old
	if k.decide(t.Context()); k.held.Load() != nil {
		t.Error("decided twice on one Snapshot")
	}
	k.snapshot.Store(&overlay.Snapshot{Revision: 2, Leases: []*overlay.Lease{own}})
	if k.decide(t.Context()); k.held.Load() == nil {
		t.Error("no decision on a store that was made anew")
	}
}
