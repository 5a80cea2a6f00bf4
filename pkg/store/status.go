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

func newHealth(log *slog.Logger, s overlay.StoreStatus) *health {
	s.Since, s.Error = time.Now(), "not connected yet"
	return &health{log: log, status: s}
}

func (c EtcdConfig) status() overlay.StoreStatus {
	return overlay.StoreStatus{
		Kind: "etcd", Endpoints: c.Endpoints, Prefix: c.Prefix,
		CAFile: c.CAFile, CertFile: c.CertFile, KeyFile: c.KeyFile, Username: c.Username,
	}
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

// at says where the store is now.
func (h *health) at(endpoint string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.status.Endpoints = []string{endpoint}
}

// up says that the store answers.
func (h *health) up() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.status.Connected {
		return
	}
	h.status.Connected, h.status.Since, h.status.Error = true, time.Now(), ""
	h.complained = time.Time{}
	h.log.Info(h.status.Kind+" connected", "endpoints", h.status.Endpoints)
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
		h.log.Warn(h.status.Kind+" unavailable; what is set up stays as it is", "error", err)
	}
}

// folded notes what the last batch of events brought, and why there is no good
// configuration.
func (h *health) folded(revision int64, fault error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.status.Revision = revision
	h.config = ""
	if fault != nil {
		h.config = fault.Error()
	}
}
