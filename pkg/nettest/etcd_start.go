package nettest

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// EtcdOptions say what kind of etcd to start. The zero value is one member, plain
// text, open to all.
type EtcdOptions struct {
	Members    int  // 1 or 3; 0 is 1
	TLS        bool // between all, with Etcd.PKI
	ClientAuth bool // clients must show a certificate; needs TLS
	Auth       bool // clients must log in: EtcdRoot, EtcdUser
	// Binary is the path of another etcd, Debian's 3.4 for instance. Empty is that
	// in TWILL_ETCD_BINARY or, without it, the one in the lab program.
	Binary string
	// Durable puts the data on a disk and waits for it. Otherwise it is in
	// memory, and writes are faster than any real etcd's.
	Durable bool
}

// StartEtcd starts an etcd cluster, each member on its own host etcd1, etcd2, …
// with the addresses 198.51.100.200, …201, …, and waits until it is ready.
// A lab has at most one.
func (l *Lab) StartEtcd(opts EtcdOptions) (*Etcd, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	opts.Members = max(1, opts.Members)
	e := &Etcd{lab: l, opts: opts}
	err := e.addHosts()
	if err == nil {
		err = e.startMembers()
	}
	if err == nil {
		err = e.WaitReady(ctx)
	}
	if err == nil && opts.Auth {
		err = e.enableAuth(ctx)
	}
	if err == nil {
		e.client, err = e.rootClient()
	}
	if err != nil {
		return nil, fmt.Errorf("start etcd: %w", err)
	}
	l.onClose(e.client.Close)
	return e, nil
}

func (e *Etcd) rootClient() (*clientv3.Client, error) {
	if e.opts.Auth {
		return e.NewClient(EtcdRoot, EtcdRootPassword)
	}
	return e.NewClient("", "")
}

// etcd's own ports.
const (
	clientPort = 2379
	peerPort   = 2380
)

func (e *Etcd) addHosts() error {
	var addrs []netip.Addr
	for i := range e.opts.Members {
		h, err := e.lab.newHost(fmt.Sprintf("etcd%d", i+1), firstEtcd+i)
		if err != nil {
			return err
		}
		e.Members = append(e.Members, &Member{
			Host: h, ClientURL: e.url(h.IPv4, clientPort), ClientURLv6: e.url(h.IPv6, clientPort),
		})
		addrs = append(addrs, h.IPv4, h.IPv6)
	}
	if !e.opts.TLS {
		return nil
	}
	var err error
	e.PKI, err = newPKI(filepath.Join(e.lab.Dir, "pki"), append(addrs, loopback))
	return err
}

func (e *Etcd) url(a netip.Addr, port uint16) string {
	scheme := "http"
	if e.opts.TLS {
		scheme = "https"
	}
	return scheme + "://" + netip.AddrPortFrom(a, port).String()
}

// startMembers starts all: three wait for each other.
func (e *Etcd) startMembers() error {
	program := Program{Path: cmp.Or(e.opts.Binary, os.Getenv("TWILL_ETCD_BINARY")), Name: "etcd"}
	if program.Path == "" {
		path, err := e.lab.Program()
		if err != nil {
			return err
		}
		program.Path, program.Args = path, []string{"etcd"}
	}
	for _, m := range e.Members {
		file := filepath.Join(e.lab.Dir, m.Name+".json")
		b, err := json.MarshalIndent(e.config(m), "", "  ")
		if err == nil {
			err = os.WriteFile(file, b, 0o644)
		}
		if err != nil {
			return err
		}
		p := program
		p.Args = append(p.Args[:len(p.Args):len(p.Args)], "--config-file", file)
		if m.Process, err = m.Host.Start(p); err != nil {
			return err
		}
	}
	return nil
}

// config is etcd's own configuration file, which all its releases read.
func (e *Etcd) config(m *Member) map[string]any {
	var cluster []string
	for _, o := range e.Members {
		cluster = append(cluster, o.Name+"="+e.url(o.IPv4, peerPort))
	}
	data := e.lab.Dir
	if e.opts.Durable {
		data = diskDir(e.lab.ID)
	}
	cfg := map[string]any{
		"name":                        m.Name,
		"data-dir":                    filepath.Join(data, m.Name),
		"unsafe-no-fsync":             !e.opts.Durable, // since 3.5; unknown to 3.4
		"listen-client-urls":          m.ClientURL + "," + m.ClientURLv6 + "," + e.url(loopback, clientPort),
		"advertise-client-urls":       m.ClientURL,
		"listen-peer-urls":            e.url(m.IPv4, peerPort),
		"initial-advertise-peer-urls": e.url(m.IPv4, peerPort),
		"initial-cluster":             strings.Join(cluster, ","),
		"initial-cluster-token":       e.lab.ID,
		"initial-cluster-state":       "new",
		"logger":                      "zap",
		"log-level":                   "warn",
		"log-outputs":                 []string{"stderr"},
	}
	if len(e.Members) == 1 {
		// Alone it need not leave others time to answer: up in 0.1 s, not in 1 s.
		cfg["heartbeat-interval"], cfg["election-timeout"] = 10, 100
	}
	if p := e.PKI; p != nil {
		files := map[string]any{"cert-file": p.ServerCert, "key-file": p.ServerKey, "trusted-ca-file": p.CA}
		cfg["peer-transport-security"] = files
		client := map[string]any{"cert-file": p.ServerCert, "key-file": p.ServerKey}
		if e.opts.ClientAuth {
			client["trusted-ca-file"], client["client-cert-auth"] = p.CA, true
		}
		cfg["client-transport-security"] = client
	}
	return cfg
}

var loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// enableAuth makes the users and then asks everybody to log in.
func (e *Etcd) enableAuth(ctx context.Context) error {
	c, err := e.NewClient("", "")
	if err != nil {
		return err
	}
	defer c.Close()
	for _, u := range [][2]string{{EtcdRoot, EtcdRootPassword}, {EtcdUser, EtcdUserPassword}} {
		if _, err := c.RoleAdd(ctx, u[0]); err != nil {
			return fmt.Errorf("add role %s: %w", u[0], err)
		}
		if _, err := c.UserAdd(ctx, u[0], u[1]); err != nil {
			return fmt.Errorf("add user %s: %w", u[0], err)
		}
		if _, err := c.UserGrantRole(ctx, u[0], u[0]); err != nil {
			return fmt.Errorf("grant role %s: %w", u[0], err)
		}
	}
	_, err = c.RoleGrantPermission(ctx, EtcdUser, EtcdPrefix+"/", clientv3.GetPrefixRangeEnd(EtcdPrefix+"/"),
		clientv3.PermissionType(clientv3.PermReadWrite))
	if err != nil {
		return fmt.Errorf("grant %s: %w", EtcdPrefix, err)
	}
	if _, err := c.AuthEnable(ctx); err != nil {
		return fmt.Errorf("enable auth: %w", err)
	}
	return nil
}
