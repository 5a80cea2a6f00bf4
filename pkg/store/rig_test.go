package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/twill-net/twill/pkg/nettest"
	"github.com/twill-net/twill/pkg/overlay"
)

const goodConfig = `{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}`

// rig is an etcd and one host to reach it from.
type rig struct {
	*nettest.Etcd
	lab  *nettest.Lab
	host *nettest.Host
}

func newRig(t testing.TB, opts nettest.EtcdOptions) *rig {
	t.Helper()
	lab, hosts := nettest.NewHosts(t, 1)
	e, err := lab.StartEtcd(opts)
	if err != nil {
		t.Fatal(err)
	}
	return &rig{e, lab, hosts[0]}
}

func (r *rig) config() EtcdConfig {
	return EtcdConfig{
		Endpoints: r.Endpoints(),
		Dial:      func(ctx context.Context, addr string) (net.Conn, error) { return r.host.DialContext(ctx, "tcp", addr) },
	}
}

// open opens the store of the rig, changed by the functions.
func (r *rig) open(t testing.TB, change ...func(*EtcdConfig)) *Etcd {
	t.Helper()
	cfg := r.config()
	for _, c := range change {
		c(&cfg)
	}
	e, err := OpenEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

func (r *rig) put(t testing.TB, key, value string, opts ...clientv3.OpOption) int64 {
	t.Helper()
	for begin := time.Now(); ; {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		p, err := r.Client().Put(ctx, defaultPrefix+"/"+key, value, opts...)
		cancel()
		if err == nil {
			return p.Header.Revision
		}
		if time.Since(begin) > 30*time.Second { // a new leader is elected in seconds
			t.Fatal(err)
		}
	}
}

func (r *rig) del(t testing.TB, key string) int64 {
	t.Helper()
	d, err := r.Client().Delete(t.Context(), defaultPrefix+"/"+key)
	if err != nil {
		t.Fatal(err)
	}
	return d.Header.Revision
}

// watcher is a store, as it is followed.
type watcher interface {
	Watch(ctx context.Context, emit func(*overlay.Snapshot)) error
}

// follower calls Watch as the daemon does and keeps what it emits.
type follower struct {
	mu      sync.Mutex
	last    *overlay.Snapshot
	emitted int
	errs    []error
	news    chan struct{}
}

func follow(t testing.TB, e watcher) *follower {
	t.Helper()
	f := &follower{news: make(chan struct{}, 1)}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			err := e.Watch(ctx, f.emit)
			f.mu.Lock()
			f.errs = append(f.errs, err)
			f.mu.Unlock()
			time.Sleep(50 * time.Millisecond)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	return f
}

func (f *follower) emit(s *overlay.Snapshot) {
	f.mu.Lock()
	f.last, f.emitted = s, f.emitted+1
	f.mu.Unlock()
	select {
	case f.news <- struct{}{}:
	default:
	}
}

func (f *follower) snapshot() *overlay.Snapshot {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.last
}

func (f *follower) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.emitted
}

func (f *follower) errors() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return errors.Join(f.errs...)
}

// wait waits for a Snapshot that fits.
func (f *follower) wait(t testing.TB, what string, fits func(*overlay.Snapshot) bool) *overlay.Snapshot {
	t.Helper()
	late := time.After(40 * time.Second)
	for {
		if s := f.snapshot(); s != nil && fits(s) {
			return s
		}
		select {
		case <-f.news:
		case <-late:
			t.Fatalf("no Snapshot with %s; the last is %s, errors: %v", what, describe(f.snapshot()), f.errors())
		}
	}
}

func (f *follower) reach(t testing.TB, revision int64) *overlay.Snapshot {
	t.Helper()
	return f.wait(t, fmt.Sprintf("revision %d", revision), func(s *overlay.Snapshot) bool { return s.Revision >= revision })
}

// eventually waits until the condition, which says what is missing, is content.
func eventually(t testing.TB, missing func() string) {
	t.Helper()
	for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		m := missing()
		if m == "" {
			return
		}
		if time.Since(begin) > 40*time.Second {
			t.Fatal(m)
		}
	}
}

// describe writes out all that a Snapshot says, for comparison.
func describe(s *overlay.Snapshot) string {
	if s == nil {
		return "none"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "revision %d\nconfig %+v\n", s.Revision, s.Config)
	for _, l := range s.Leases {
		fmt.Fprintf(&b, "%s %s err=%v created=%d modified=%d grant=%x\n", l.Key(), describeValue(l), l.Err, l.Created, l.Modified, l.Grant)
	}
	for _, p := range s.Problems {
		fmt.Fprintf(&b, "problem %s\n", p)
	}
	return b.String()
}

func describeValue(l *overlay.Lease) string {
	if l.Err != nil {
		return "-"
	}
	return string(l.Value())
}

// node returns what node n publishes.
func node(t testing.TB, n int) overlay.Attrs {
	t.Helper()
	a, err := overlay.ParseAttrs([]byte(nodeValue(n)))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func nodeValue(n int) string {
	return fmt.Sprintf(`{"PublicIP":"198.18.%d.%d","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:2a:00:00:%02x:%02x"}}`,
		n>>8, n&255, n>>8, n&255)
}

// logs collects log lines.
type logs struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *logs) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, nil))
}
