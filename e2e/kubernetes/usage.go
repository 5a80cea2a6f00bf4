package kubernetes

import (
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// use is the memory and the processor time of processes of one name.
type use struct {
	pss       int // KiB, shared pages divided among those that share them
	ticks     int // of the processor, 100 a second
	processes int
}

// PrintUsage measures for a while what an idle cluster needs, and prints it: all nodes
// together, by program.
func (c *Cluster) PrintUsage(idle time.Duration) {
	before := c.usage()
	time.Sleep(idle)
	after := c.usage()
	var total use
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(after)) {
		a := after[name]
		a.ticks -= before[name].ticks
		fmt.Fprintf(&b, "\n%-28s %3d processes %7.1f MiB %6.1f mCPU", name, a.processes, float64(a.pss)/1024, float64(a.ticks)*10/idle.Seconds())
		total.pss, total.ticks, total.processes = total.pss+a.pss, total.ticks+a.ticks, total.processes+a.processes
	}
	c.Mark("idle: %d processes, %.0f MiB, %.0f mCPU%s", total.processes, float64(total.pss)/1024, float64(total.ticks)*10/idle.Seconds(), &b)
}

func (c *Cluster) usage() map[string]use {
	sum := map[string]use{}
	add := func(pid, name string) {
		u, err := readUse(pid)
		if err != nil {
			return // it has ended
		}
		s := sum[name]
		sum[name] = use{s.pss + u.pss, s.ticks + u.ticks, s.processes + 1}
	}
	for _, p := range c.control {
		add(fmt.Sprint(p.Pid()), "control plane: "+processName(fmt.Sprint(p.Pid())))
	}
	add(fmt.Sprint(c.Etcd.Members[0].Pid()), "control plane: etcd")
	for _, n := range c.Nodes {
		root := "/sys/fs/cgroup/pids" + c.Lab.CgroupPath(n.Name)
		// A group that is gone meanwhile had a process that has ended.
		_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.Name() != "cgroup.procs" {
				return nil
			}
			b, _ := os.ReadFile(path)
			for pid := range strings.FieldsSeq(string(b)) {
				kind := "pods: "
				if strings.HasPrefix(path, filepath.Join(root, "system")) {
					kind = "nodes: "
				}
				add(pid, kind+processName(pid))
			}
			return nil
		})
	}
	return sum
}

func processName(pid string) string {
	b, _ := os.ReadFile("/proc/" + pid + "/comm")
	return strings.TrimSpace(string(b))
}

func readUse(pid string) (use, error) {
	u := use{processes: 1}
	stat, err := os.ReadFile("/proc/" + pid + "/stat")
	if err != nil {
		return u, err
	}
	// Behind the name, which is in parentheses: fields 14 and 15 are 11 and 12.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	for _, f := range fields[11:13] {
		n, err := strconv.Atoi(f)
		if err != nil {
			return u, err
		}
		u.ticks += n
	}
	smaps, err := os.ReadFile("/proc/" + pid + "/smaps_rollup")
	if err != nil {
		return u, err
	}
	for line := range strings.Lines(string(smaps)) {
		if rest, ok := strings.CutPrefix(line, "Pss:"); ok {
			_, err = fmt.Sscan(rest, &u.pss)
		}
	}
	return u, err
}
