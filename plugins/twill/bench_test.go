package main

import (
	"bytes"
	"fmt"
	"os/exec"
	"testing"
	"time"
)

// BenchmarkPod is ADD and DEL of one pod, one after the other, on a node that has
// some pods already: Twill beside bridge + host-local in the same run.
func BenchmarkPod(b *testing.B) {
	for _, pods := range []int{0, 100} {
		b.Run(fmt.Sprintf("pods=%d/twill", pods), func(b *testing.B) {
			h := newHost(b)
			benchmarkPod(b, h, pods, func(verb, id string, p *namespace) *exec.Cmd {
				return h.command(call{verb: verb, id: id}.on(p))
			})
		})
		b.Run(fmt.Sprintf("pods=%d/reference", pods), func(b *testing.B) {
			h := newHost(b)
			benchmarkPod(b, h, pods, h.flannelCommand)
		})
	}
	b.Run("version", func(b *testing.B) {
		h := newHost(b)
		var t times
		for b.Loop() {
			t.run(b, h, h.command(call{verb: "VERSION"}))
		}
		t.report(b, "version")
	})
}

func benchmarkPod(b *testing.B, h *host, pods int, command func(verb, id string, p *namespace) *exec.Cmd) {
	for i := range pods {
		new(times).run(b, h, command("ADD", fmt.Sprint("there", i), newNamespace(b)))
	}
	new(times).run(b, h, command("ADD", "first", newNamespace(b)))
	p := newNamespace(b)
	var added, deleted times
	for b.Loop() {
		added.run(b, h, command("ADD", "c", p))
		deleted.run(b, h, command("DEL", "c", p))
	}
	added.report(b, "add")
	deleted.report(b, "del")
}

// times adds up what a number of processes take.
type times struct {
	n         int
	wall, cpu time.Duration
}

func (t *times) run(b *testing.B, h *host, cmd *exec.Cmd) {
	b.Helper()
	var out bytes.Buffer
	cmd.Stdout = &out
	begin := time.Now()
	err := h.do(cmd.Start)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		b.Fatalf("%v: %s", err, out.Bytes())
	}
	t.n++
	t.wall += time.Since(begin)
	t.cpu += cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
}

func (t *times) report(b *testing.B, what string) {
	each := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 / float64(t.n) }
	b.ReportMetric(each(t.wall), what+"-ms")
	b.ReportMetric(each(t.cpu), what+"-cpu-ms")
	b.ReportMetric(0, "ns/op")
}
