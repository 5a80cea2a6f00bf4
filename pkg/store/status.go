package store

import (
	"log/slog"
	"sync"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
)

// complainEvery is the least time between two log lines about one outage.
const complainEvery = time.Minute

// health is the state of the connection. Safe for concurrent use.
type health struct {
	log *slog.Logger

	mu         sync.Mutex
	status     overlay.StoreStatus
	config     string    // why there is no good configuration
	complained time.Time // last time that an outage was logged
}

func newHealth(c EtcdConfig) *health {
	return &health{log: c.Log, status: overlay.StoreStatus{
		Kind: "etcd", Endpoints: c.Endpoints, Prefix: c.Prefix, Since: time.Now(), Error: "not connected yet",
		CAFile: c.CAFile, CertFile: c.CertFile, KeyFile: c.KeyFile, Username: c.Username,
	}}
}

func (h *health) get() overlay.StoreStatus {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.status
	if s.Connected {
		s.Error = h.config
	}
	return s
}

// up says that etcd answers.
func (h *health) up() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.status.Connected {
		return
	}
	h.status.Connected, h.status.Since, h.status.Error = true, time.Now(), ""
	h.complained = time.Time{}
	h.log.Info("etcd connected", "endpoints", h.status.Endpoints)
}

// down says that it does not, and why. An outage is logged when it begins, and now
// and then if its reason changes.
func (h *health) down(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := &h.status
	if !s.Connected && s.Error == err.Error() {
		return
	}
	if s.Connected {
		s.Connected, s.Since = false, time.Now()
	}
	s.Error = err.Error()
	if time.Since(h.complained) > complainEvery {
		h.complained = time.Now()
		h.log.Warn("etcd unavailable; what is set up stays as it is", "error", err)
	}
}

// folded notes what the last batch of events brought.
func (h *health) folded(f *fold) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.status.Revision = f.revision
	h.config = ""
	if f.config.refused != nil {
		h.config = f.configProblem().String()
	}
}
