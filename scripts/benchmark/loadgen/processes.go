package main

import (
	"bytes"
	"os"
	"strconv"
	"strings"
)

const ticksPerSecond = 100 // USER_HZ; the same on every Linux that runs these proxies

// usage is CPU time so far, in seconds, and memory now.
type usage struct {
	proxy, server, load, machine float64
	rss                          float64 // MB
	descriptors                  int
}

type process struct {
	parent int
	cpu    float64 // its own, plus its reaped children
}

func sample() usage {
	processes := map[int]process{}
	entries, _ := os.ReadDir("/proc")
	for _, entry := range entries {
		if pid, err := strconv.Atoi(entry.Name()); err == nil {
			if p, ok := look(entry.Name()); ok {
				processes[pid] = p
			}
		}
	}
	var result usage
	for pid := range family(processes, *pids) {
		result.proxy += processes[pid].cpu
		name := "/proc/" + strconv.Itoa(pid)
		if content, err := os.ReadFile(name + "/statm"); err == nil {
			if fields := strings.Fields(string(content)); len(fields) > 1 {
				pages, _ := strconv.Atoi(fields[1])
				result.rss += float64(pages) * float64(os.Getpagesize()) / 1e6
			}
		}
		if open, err := os.ReadDir(name + "/fd"); err == nil {
			result.descriptors += len(open)
		}
	}
	for pid := range family(processes, *serverPids) {
		result.server += processes[pid].cpu
	}
	result.load = processes[os.Getpid()].cpu
	result.machine = machine()
	return result
}

func look(name string) (process, bool) {
	content, err := os.ReadFile("/proc/" + name + "/stat")
	if err != nil {
		return process{}, false
	}
	// The name in parentheses may contain anything.
	fields := bytes.Fields(content[bytes.LastIndexByte(content, ')')+1:])
	if len(fields) < 15 {
		return process{}, false
	}
	value := func(i int) float64 {
		n, _ := strconv.ParseFloat(string(fields[i]), 64)
		return n
	}
	return process{
		parent: int(value(1)), cpu: (value(11) + value(12) + value(13) + value(14)) / ticksPerSecond,
	}, true
}

// family is the processes named and all that descend from them.
func family(processes map[int]process, named string) map[int]bool {
	members := map[int]bool{}
	for _, name := range strings.Split(named, ",") {
		if pid, err := strconv.Atoi(name); err == nil {
			members[pid] = true
		}
	}
	for grown := len(members) > 0; grown; {
		grown = false
		for pid, p := range processes {
			if members[p.parent] && !members[pid] {
				members[pid] = true
				grown = true
			}
		}
	}
	return members
}

// machine is the CPU time that all processes of the machine have had.
func machine() float64 {
	content, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	line, _, _ := bytes.Cut(content, []byte("\n"))
	total := 0.0
	for i, field := range bytes.Fields(line) {
		n, _ := strconv.ParseFloat(string(field), 64)
		// user nice system idle iowait irq softirq; steal is other machines', guest is in user
		if i >= 1 && i != 4 && i != 5 && i <= 7 {
			total += n
		}
	}
	return total / ticksPerSecond
}
