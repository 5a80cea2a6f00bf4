package kernel

import (
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/twill-net/twill/pkg/overlay"
)

func TestParseRule(t *testing.T) {
	for _, v := range []struct {
		line, comment, target string
		words                 int
	}{
		{`-A POSTROUTING -m comment --comment "twill:jump" -j TWILL-POSTRTG`, "twill:jump", "TWILL-POSTRTG", 8},
		{`-A POSTROUTING -m comment --comment twill:jump -j TWILL-POSTRTG -c 12 34`, "twill:jump", "TWILL-POSTRTG", 8},
		{`-A X -m comment --comment "say \"-j Y\" \\ it's" -g Z`, `say "-j Y" \ it's`, "Z", 8},
		{`-A X -m comment --comment "-j" -j RETURN`, "-j", "RETURN", 8},
		{`-A X -m comment --comment ""`, "", "", 6},
		{`-A X -m comment --comment "open`, "", "", 0},
		{`-A X -j`, "", "", 3},
		{`-A X -c 1 2`, "", "", 2},
	} {
		r := parseRule(v.line)
		if r.comment != v.comment || r.target != v.target || len(r.words) != v.words {
			t.Errorf("%s: got %+v", v.line, r)
		}
	}
}

// FuzzParseRule parses lines of iptables -S; what is parsed, printed and parsed
// again is the same, for what we print is what we delete.
func FuzzParseRule(f *testing.F) {
	f.Add(`-A POSTROUTING -m comment --comment "twill:jump" -j TWILL-POSTRTG`)
	f.Add(`-A X ! -s 10.5.0.0/16 -m comment --comment "a \"b\" \\ 'c'" -g Y -c 1 2`)
	f.Add("-A X\t-m comment --comment \"\" -j")
	f.Add(`-A X --comment "open`)
	f.Fuzz(func(t *testing.T, line string) {
		r := parseRule(line)
		if len(r.words) == 0 {
			return
		}
		again, ok := splitWords(joinWords(r.words))
		if !ok || !slices.Equal(again, r.words) {
			t.Errorf("%q: %q printed and parsed is %q", line, r.words, again)
		}
	})
}

// TestFirewallLock holds the xtables lock.
func TestFirewallLock(t *testing.T) {
	fwFlavour(t, "legacy")
	fwNamespace(t)
	f := fwOpen(t)
	plan := fwPlan(t, f, fwWanted(overlay.Iptables)[:1])
	lock, err := os.OpenFile(os.Getenv("XTABLES_LOCKFILE"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	failures := f.apply(t.Context(), plan)
	if len(failures) != 1 || !strings.Contains(failures[0].Err.Error(), "another program has held the xtables lock for 5 s") {
		t.Errorf("got %v", failures)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	fwReconcile(t, f, fwWanted(overlay.Iptables))
}
