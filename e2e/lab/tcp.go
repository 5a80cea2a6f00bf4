package main

import (
	"context"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/twill-net/twill/pkg/nettest"
)

func tcpCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "tcp",
		Short: "Send bytes by TCP and verify that they arrived",
		Example: `  lab tcp server --listen 127.0.0.1:7008 &
  lab tcp client --to 127.0.0.1:7008 --bytes 100000000`,
	}
	cmd.AddCommand(tcpServerCommand(), tcpClientCommand())
	return cmd
}

// receipt is what the server answers when all bytes have come.
type receipt struct {
	Bytes int64  `json:"bytes"`
	CRC   uint32 `json:"crc"`
}

func tcpServerCommand() *cobra.Command {
	var listen string
	cmd := &cobra.Command{
		Use:     "server --listen ADDR:PORT",
		Short:   "Receive bytes and answer with their count and checksum",
		Example: `  lab tcp server --listen 10.5.1.2:7008`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			return sink(ctx, listen)
		},
	}
	cmd.Flags().StringVar(&listen, "listen", "", "address and port, 0 for any free one")
	_ = cmd.MarkFlagRequired("listen") // the flag exists
	return cmd
}

// sink serves one connection after the other until ctx ends.
func sink(ctx context.Context, listen string) error {
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	defer l.Close()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	fmt.Println("listening", l.Addr())
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		if err := count(c); err != nil {
			fmt.Fprintf(os.Stderr, "receive from %s: %v\n", c.RemoteAddr(), err)
		}
	}
}

func count(c net.Conn) error {
	defer c.Close()
	sum := crc32.New(crc32.MakeTable(crc32.Castagnoli))
	// Only the reader: the connection's own WriteTo would go around the buffer.
	n, err := io.CopyBuffer(sum, struct{ io.Reader }{c}, make([]byte, 1<<20))
	if err != nil {
		return err
	}
	return json.NewEncoder(c).Encode(receipt{n, sum.Sum32()})
}

func tcpClientCommand() *cobra.Command {
	var to string
	var limit int64
	var d time.Duration
	cmd := &cobra.Command{
		Use:   "client --to ADDR:PORT",
		Short: "Send bytes and compare count and checksum with the server's",
		Example: `  lab tcp client --to 10.5.1.2:7008 --bytes 1000000
  lab tcp client --to '[fd00:5::2]:7008' --duration 5s`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			addr, err := netip.ParseAddrPort(to)
			if err != nil {
				return fmt.Errorf("parse --to: %w", err)
			}
			result, err := transfer(ctx, addr, limit, d)
			if err != nil {
				return fmt.Errorf("send to %s: %w", addr, err)
			}
			return json.NewEncoder(os.Stdout).Encode(result)
		},
	}
	f := cmd.Flags()
	f.StringVar(&to, "to", "", "address and port of the server")
	f.Int64Var(&limit, "bytes", 0, "how many bytes to send")
	f.DurationVar(&d, "duration", 0, "how long to send")
	_ = cmd.MarkFlagRequired("to") // the flag exists
	cmd.MarkFlagsOneRequired("bytes", "duration")
	cmd.MarkFlagsMutuallyExclusive("bytes", "duration")
	return cmd
}

// transfer sends limit bytes, or for d if limit is 0.
func transfer(ctx context.Context, to netip.AddrPort, limit int64, d time.Duration) (nettest.TransferResult, error) {
	var r nettest.TransferResult
	conn, err := dial(ctx, to)
	if err != nil {
		return r, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	begin := time.Now()
	sent, crc, err := fill(conn, limit, d)
	if err != nil {
		return r, err
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		return r, err
	}
	var got receipt
	if err := json.NewDecoder(conn).Decode(&got); err != nil {
		return r, fmt.Errorf("read receipt: %w", err)
	}
	if got != (receipt{sent, crc}) {
		return r, fmt.Errorf("compare: sent %d bytes with checksum %08x, received %d with %08x", sent, crc, got.Bytes, got.CRC)
	}
	r.Bytes, r.Seconds, r.CRC32C = got.Bytes, time.Since(begin).Seconds(), fmt.Sprintf("%08x", got.CRC)
	r.MbitPS = float64(r.Bytes) * 8 / 1e6 / r.Seconds
	return r, nil
}

// dial tries for ten seconds: the server may just be starting.
func dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", to.String())
		if err == nil {
			return conn, nil
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// fill writes the same megabyte of noise again and again.
func fill(w io.Writer, limit int64, d time.Duration) (sent int64, crc uint32, err error) {
	block := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{}).Read(block)
	table := crc32.MakeTable(crc32.Castagnoli)
	end := time.Now().Add(d)
	for limit > 0 && sent < limit || limit == 0 && time.Now().Before(end) {
		b := block
		if limit > 0 {
			b = b[:min(int64(len(b)), limit-sent)]
		}
		n, err := w.Write(b)
		sent += int64(n)
		crc = crc32.Update(crc, table, b[:n])
		if err != nil {
			return sent, crc, err
		}
	}
	return sent, crc, nil
}
