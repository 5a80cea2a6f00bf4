package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
)

func probeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "probe",
		Short: "Count lost UDP packets, 1,000 a second",
		Example: `  lab probe server --listen 127.0.0.1:7007 &
  lab probe client --to 127.0.0.1:7007 --count 2000`,
	}
	cmd.AddCommand(probeServerCommand(), probeClientCommand())
	return cmd
}

func probeServerCommand() *cobra.Command {
	var listen string
	cmd := &cobra.Command{
		Use:   "server --listen ADDR:PORT",
		Short: "Send every UDP packet back to where it came from",
		Example: `  lab probe server --listen 10.5.1.2:7007
  lab probe server --listen '[fd00:5::2]:7007'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			return echo(ctx, listen)
		},
	}
	cmd.Flags().StringVar(&listen, "listen", "", "address and port, 0 for any free one")
	_ = cmd.MarkFlagRequired("listen") // the flag exists
	return cmd
}

// echo announces its address on standard output and answers until ctx ends.
func echo(ctx context.Context, listen string) error {
	conn, err := listenUDP(listen)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	fmt.Println("listening", conn.LocalAddr())
	buf := make([]byte, 1<<16)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(buf)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read probe: %w", err)
		}
		// An answer that cannot be sent is a lost probe, which the client counts.
		_, _ = conn.WriteToUDPAddrPort(buf[:n], from)
	}
}

// listenUDP returns a socket that holds a second's worth of probes, and to which
// no ICMP error is reported: it is not connected.
func listenUDP(addr string) (*net.UDPConn, error) {
	a, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, fmt.Errorf("parse address: %w", err)
	}
	conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(a))
	if err != nil {
		return nil, err
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	const buffer = 4 << 20 // bytes
	var set error
	err = raw.Control(func(fd uintptr) {
		set = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUFFORCE, buffer)
	})
	if err == nil {
		err = os.NewSyscallError("setsockopt SO_RCVBUFFORCE", set)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

func probeClientCommand() *cobra.Command {
	var to string
	p := prober{}
	cmd := &cobra.Command{
		Use:   "client --to ADDR:PORT",
		Short: "Send numbered probes and count the answers",
		Long: `Send numbered probes and count the answers, until the count, the duration or a signal
ends it; then wait for late answers and print the result as JSON. Counting begins with
the first answer.`,
		Example: `  lab probe client --to 10.5.1.2:7007 --duration 5s
  lab probe client --to '[fd00:5::2]:7007' --count 1000 --rate 200`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			var err error
			if p.to, err = netip.ParseAddrPort(to); err != nil {
				return fmt.Errorf("parse --to: %w", err)
			}
			if p.rate < 1 {
				return fmt.Errorf("parse --rate: %d is less than 1", p.rate)
			}
			result, err := p.run(ctx)
			if err != nil {
				return fmt.Errorf("probe %s: %w", p.to, err)
			}
			return json.NewEncoder(os.Stdout).Encode(result)
		},
	}
	f := cmd.Flags()
	f.StringVar(&to, "to", "", "address and port of the server")
	f.IntVar(&p.rate, "rate", 1000, "probes per second")
	f.IntVar(&p.count, "count", 0, "end after this many probes; 0: no limit")
	f.DurationVar(&p.duration, "duration", 0, "end after this time; 0: no limit")
	f.DurationVar(&p.wait, "wait", 10*time.Second, "how long to try for the first answer")
	_ = cmd.MarkFlagRequired("to") // the flag exists
	return cmd
}
