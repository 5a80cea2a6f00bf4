package wgtun

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/device"
)

// warnings hands on what wireguard-go complains of, one a while: it complains of
// each packet that it cannot send.
type warnings struct {
	log *slog.Logger

	mu      sync.Mutex
	next    time.Time
	dropped int
}

const warningPause = 10 * time.Second

func logger(log *slog.Logger) *device.Logger {
	l := &device.Logger{Verbosef: device.DiscardLogf, Errorf: (&warnings{log: log}).warn}
	if log.Enabled(context.Background(), slog.LevelDebug) {
		l.Verbosef = func(format string, args ...any) {
			log.Debug("wireguard-go", "message", fmt.Sprintf(format, args...))
		}
	}
	return l
}

func (w *warnings) warn(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	if now.Before(w.next) {
		w.dropped++
		return
	}
	w.log.Warn("wireguard-go", "error", fmt.Sprintf(format, args...), "unreported", w.dropped)
	w.next, w.dropped = now.Add(warningPause), 0
}
