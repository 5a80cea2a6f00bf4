package kernel

import (
	"context"
	"strings"
	"testing"

	"github.com/twill-net/twill/pkg/overlay"
)

func TestSysctls(t *testing.T) {
	inNode(t, func(k *Kernel) {
		ctx := context.Background()
		const ofLink = "net/ipv6/conf/flannel.1/accept_ra"
		scope := testScope()
		scope.Sysctls = append(scope.Sysctls, ofLink)
		have, err := k.Observe(ctx, scope)
		if err != nil {
			t.Fatal(err)
		}
		if len(have.Sysctls) != 1 {
			t.Errorf("sysctls %v before the link is there", have.Sysctls)
		}
		// A plan sets sysctls before it makes the link of one of them.
		want := dualWorld(1).state()
		want.Sysctls = append(want.Sysctls, overlay.Sysctl{Key: ofLink, Value: "0"})
		for pass := range 2 {
			if have, err = k.Observe(ctx, scope); err != nil {
				t.Fatal(err)
			}
			p, _ := overlay.Diff(have, want)
			if f := k.Apply(ctx, p); len(f) > 0 || pass == 1 && len(p) > 0 {
				t.Fatalf("pass %d: failures %v, plan\n%s", pass, f, p)
			}
		}
		for _, key := range []string{"net/ipv4/nonsense", "net/ipv4/conf/eth0/nonsense"} {
			scope.Sysctls = []string{key}
			if _, err := k.Observe(ctx, scope); err == nil || !strings.Contains(err.Error(), key) {
				t.Errorf("observe %s: %v", key, err)
			}
			f := k.Apply(ctx, overlay.Plan{{Verb: overlay.Change, Object: overlay.Sysctl{Key: key, Value: "1"}}})
			if len(f) != 1 {
				t.Errorf("write %s: %v", key, f)
			}
		}
	})
}
