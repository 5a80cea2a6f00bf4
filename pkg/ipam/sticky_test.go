package ipam

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"
)

func TestSticky(t *testing.T) {
	n := newNode(t, true, 0)
	n.sets = newSets("198.18.1.0/29", "fd00::/64")
	for i, pod := range []string{"default/a", "default/b", "default/c", "default/d"} {
		n.want(n.add(pod), fmt.Sprintf("%d %d", i+2, i+2))
	}
	n.del("default/b", "default/a")
	if got := n.notes("sticky", "*"); len(got) != 2 {
		t.Errorf("kept: %v", got)
	}
	// In turn would be 6, then 2.
	n.want(n.add("default/a"), "2 2")
	n.want(n.add("default/e"), "6 6")
	n.want(n.add("default/b"), "3 3")
	if got := append(n.notes("sticky", "*"), n.notes("rest", "*")...); len(got) != 0 {
		t.Errorf("kept for pods that run: %v", got)
	}
	// The same name in another namespace, and the other interface, are others.
	n.del("default/a")
	n.want(n.add("other/a"), "2 7") // of the /29, nothing else is left
	if got := n.notes("sticky", "*"); len(got) != 1 {
		t.Errorf("what is left for default/a: %v", got)
	}
	n.del("default/b")
	n.want(n.add("default/a"), "3 2") // what is left of its own, and the other of b
	n.del("other/a")
	n.want(n.add("default/b"), "2 3")
}

// Each interface of a pod keeps its own.
func TestStickyInterfaces(t *testing.T) {
	n := newNode(t, true, 0)
	requests := map[string]Request{}
	for _, ifname := range []string{"eth0", "net1"} {
		req := n.request("default/a")
		req.Owner.IfName = ifname
		requests[ifname] = req
		request(t, n.Dir, req)
	}
	for _, req := range requests {
		if err := n.Release(req.Owner, nil, ReleaseOptions{Pod: req.Pod, Sticky: true}); err != nil {
			t.Fatal(err)
		}
	}
	n.want(n.add("default/b"), "4")
	n.want(request(t, n.Dir, requests["net1"]), "198.18.1.3/29")
	n.want(request(t, n.Dir, requests["eth0"]), "198.18.1.2/29")
}

// Addresses of pods that may come back are taken last, the oldest first, and never
// while they rest.
func TestStickyOfOthers(t *testing.T) {
	n := newNode(t, true, time.Minute)
	pods := []string{"default/a", "default/b", "default/c", "default/d", "default/e"}
	for i, pod := range pods {
		n.want(n.add(pod), fmt.Sprint(i+2))
	}
	for _, i := range []int{3, 1, 2} {
		n.del(pods[i])
		n.wait(30 * time.Second)
	}
	// d is free after 90 s, b after 60 s, c still rests.
	n.want(n.add("default/x"), "5")
	n.want(n.add("default/c"), "4") // its own, at rest or not
	n.want(n.add("default/y"), "3")
	n.want(n.add("default/z"), "5 in use, 0 at rest")
	if got := append(n.notes("sticky", "*"), n.notes("rest", "*")...); len(got) != 0 {
		t.Errorf("nobody's address is free, but kept are %v", got)
	}
	n.del("default/x")
	n.want(n.add("default/d"), "4 in use, 1 at rest")
	n.wait(time.Hour)
	n.want(n.add("default/d"), "5")
	// A free address that is nobody's comes first, wherever the round robin stands.
	n.del("default/a", "default/d")
	n.wait(time.Hour)
	if err := os.Remove(n.restFile(netip.MustParseAddr("198.18.1.5"))); err != nil {
		t.Fatal(err)
	}
	writeFile(t, n.lastFile(0), "198.18.1.6")
	n.want(n.add("default/w"), "5")
	// A pod without a name takes part, but keeps nothing.
	n.want(n.add(""), "2")
	n.del("")
	if got := n.notes("rest", "*"); len(got) != 1 {
		t.Errorf("at rest: %v", got)
	}
	n.wait(time.Hour)
	// An exclusion that was added later is respected.
	n.del("default/e")
	n.wait(time.Hour)
	n.sets[0][0].Exclude = prefixes("198.18.1.6/32")
	n.want(n.add("default/e"), "2")
}

// A requested address is no longer another's.
func TestWantedOfAnother(t *testing.T) {
	n := newNode(t, true, time.Minute)
	n.want(n.add("default/a"), "2")
	n.del("default/a")
	n.want(n.add("default/b", addrs("198.18.1.2")...), "2")
	n.del("default/b")
	n.want(n.add("default/a"), "3")
}

// A release that was killed half-way, and repeated, keeps both addresses.
func TestStickyRepeatedRelease(t *testing.T) {
	n := newNode(t, true, time.Minute)
	n.sets = newSets("198.18.1.0/29", "fd00::/64")
	n.want(n.add("default/a"), "2 2")
	n.del("default/a")
	writeFile(t, n.Path(netip.MustParseAddr("fd00::2")), "of-default/a\r\neth0")
	n.del("default/a")
	n.want(n.add("default/a"), "2 2")
}

// Names that are no file names are pods as any other.
func TestOddPodNames(t *testing.T) {
	n := newNode(t, true, 0)
	for _, pod := range []string{"../../../etc/passwd", "default/" + strings.Repeat("x", 300), "ns/ü \x00"} {
		n.want(n.add(pod), "2")
		n.del(pod)
		n.want(n.add("default/between"), "3")
		n.want(n.add(pod), "2")
		n.del(pod, "default/between")
		if err := os.RemoveAll(n.state); err != nil {
			t.Fatal(err)
		}
		writeFile(t, n.lastFile(0), "")
	}
	req := n.request("a\nb")
	req.Owner.ContainerID = "c"
	request(t, n.Dir, req)
	if err := n.Release(req.Owner, nil, ReleaseOptions{Pod: req.Pod, Sticky: true}); err != nil {
		t.Fatal(err)
	}
	if got := n.notes("sticky", "*"); len(got) != 0 {
		t.Errorf("kept for a pod without a name: %v", got)
	}
}
