package daemon

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/twill-net/twill/pkg/overlay"
)

// extensions runs the commands of backend extension beside the loop: they may take
// their time.
type extensions struct {
	*Daemon
	runner *extensionRunner
	want   atomic.Pointer[overlay.Extension] // nil: none
	bell   bell
	failed atomic.Pointer[[]error] // by the last run

	// What PreStartupCommand said, and for which commands.
	asked  overlay.ExtensionConfig
	output string
	known  bool
}

const extensionRetry = 10 * time.Second

func newExtensions(d *Daemon) *extensions {
	return &extensions{Daemon: d, runner: newExtensionRunner(d.log), bell: newBell()}
}

// data returns what the node's lease tells the peers: the output of
// PreStartupCommand, which runs once for each configuration.
func (x *extensions) data(ctx context.Context, c overlay.ExtensionConfig) (string, error) {
	if x.known && x.asked == c {
		return x.output, nil
	}
	output, err := x.runner.preStartup(ctx, c)
	if err != nil {
		return "", fmt.Errorf("backend extension: %w", err)
	}
	x.asked, x.output, x.known = c, output, true
	return output, nil
}

func (x *extensions) prepare(_ context.Context, want *overlay.State) error {
	if x.want.Swap(want.Outside.Extension) != want.Outside.Extension {
		x.bell.ring("peers")
	}
	return nil
}

func (x *extensions) retire(context.Context, *overlay.State) {}

// run is the task that follows what prepare says.
func (x *extensions) run(ctx context.Context) error {
	for {
		var retry <-chan time.Time
		if errs := x.failed.Load(); errs != nil && len(*errs) > 0 {
			retry = time.After(jitter(extensionRetry))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-x.bell:
		case <-retry:
		}
		errs := x.runner.set(ctx, x.want.Load())
		if ctx.Err() != nil {
			return ctx.Err()
		}
		old := x.failed.Swap(&errs)
		if old != nil && len(*old) > 0 || len(errs) > 0 {
			x.storeBell.ring("extension") // so that the problems are told
		}
	}
}

// problems names the commands that failed.
func (x *extensions) problems() []overlay.Problem {
	errs := x.failed.Load()
	if errs == nil || len(*errs) == 0 {
		return nil
	}
	return []overlay.Problem{{
		Object: "backend extension", Reason: errors.Join(*errs...).Error(),
		Remedy: fmt.Sprintf("mend the command; it is tried again every %s", extensionRetry),
	}}
}
