package daemon

import (
	"context"
	"fmt"

	"github.com/twill-net/twill/pkg/overlay"
	"github.com/twill-net/twill/pkg/wgtun"
)

// outside is a program of user space that carries packets or routes for the node.
// Like the kernel it is brought to what is wanted in every pass, whole.
type outside interface {
	// prepare makes what the kernel's state will stand on: it runs before the
	// kernel is read and changed.
	prepare(ctx context.Context, want *overlay.State) error
	// retire lets go of what is not wanted any more, when no packet goes there.
	retire(ctx context.Context, want *overlay.State)
}

// prepare brings every outside program to what is wanted.
func (l *loop) prepare(ctx context.Context) (failures []string) {
	for _, o := range l.outside {
		if err := o.prepare(ctx, l.want); err != nil {
			failures = append(failures, err.Error())
		}
	}
	return failures
}

// wireGuards runs the WireGuard devices that the kernel cannot.
type wireGuards struct {
	*Daemon
	devices map[string]*wgtun.Device
}

func (w *wireGuards) prepare(_ context.Context, want *overlay.State) error {
	for _, link := range want.Links {
		if link.Kind != overlay.KindTUN || link.WG.Port == 0 {
			continue
		}
		if d := w.devices[link.Name]; d != nil {
			select {
			case <-d.Done(): // somebody deleted it
				d.Close()
			default:
				continue
			}
		}
		d, err := wgtun.Open(wgtun.Options{Name: link.Name, MTU: link.MTU, Log: w.log})
		if err != nil {
			return fmt.Errorf("run WireGuard in user space: %w", err)
		}
		w.devices[link.Name] = d
	}
	return nil
}

func (w *wireGuards) retire(_ context.Context, want *overlay.State) {
	for name, d := range w.devices {
		if !want.HasLink(name) {
			d.Close()
			delete(w.devices, name)
		}
	}
}
