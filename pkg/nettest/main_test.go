package nettest

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"
)

// TestMain lets this test program be the child that TestSweep kills.
func TestMain(m *testing.M) {
	if os.Getenv("NETTEST_CHILD") != "" {
		if err := child(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// child makes a lab with processes of all kinds and waits to be killed.
func child() error {
	l, err := New(Options{Keep: os.Getenv("NETTEST_CHILD") == "keep"})
	if err != nil {
		return err
	}
	h, err := l.NewHost()
	if err != nil {
		return err
	}
	p, err := h.NewPodNS("p1")
	if err != nil {
		return err
	}
	if _, err := l.NewCgroup(h.Name, "child"); err != nil {
		return err
	}
	if err := l.Setenv("LAB_GREETING", "hello"); err != nil {
		return err
	}
	started, err := h.Start(Program{Path: "sleep", Args: []string{"600"}})
	if err != nil {
		return err
	}
	// Detached from this process: only its namespaces tell where it belongs.
	stray := p.Command(context.Background(), "setsid", "-f", "sleep", "601")
	if err := stray.Run(); err != nil {
		return err
	}
	fmt.Println(l.ID, started.Pid())
	time.Sleep(time.Hour)
	return nil
}
