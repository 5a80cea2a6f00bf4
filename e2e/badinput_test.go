package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
)

func TestBadConfigAtStart(t *testing.T) {
	for _, x := range []struct {
		name, config string
		words        []string
	}{
		{"none", "", []string{"/coreos.com/network/config", "there is none", "etcdctl put"}},
		{"not JSON", `{"Network": "10.5.0.0/16",`, []string{"/coreos.com/network/config", "not JSON", "correct it"}},
		{"no network", `{"Backend": {"Type": "vxlan"}}`, []string{"Network", "must be an IPv4 CIDR"}},
		{"bad value", `{"Network": "10.5.0.0/16", "SubnetLen": 31, "Backend": {"Type": "vxlan"}}`, []string{"SubnetLen: 31: must be 18..30", "correct it"}},
		{"unknown backend", `{"Network": "10.5.0.0/16", "Backend": {"Type": "geneve"}}`, []string{"Backend.Type", "geneve", "must be one of vxlan"}},
		{"unsupported backend", `{"Network": "10.5.0.0/16", "Backend": {"Type": "tencent-vpc"}}`, []string{"Backend.Type", "tencent-vpc", "no such backend", "use vxlan, host-gw"}},
		{"AS number out of range", `{"Network": "10.5.0.0/16", "Backend": {"Type": "bgp", "ASNumber": 4294967296}}`, []string{"Backend.ASNumber: 4294967296: must be 1..4294967295", "correct it"}},
		{"IPv6 only", `{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:5::/48", "Backend": {"Type": "vxlan"}}`, []string{"EnableIPv4: false", "IPv4 must be on"}},
		{"overlaps a host route", `{"Network": "198.51.0.0/16", "Backend": {"Type": "vxlan"}}`, []string{"network 198.51.0.0/16", "overlaps", "198.51.100.0/24", "choose another Network"}},
	} {
		t.Run(x.name, func(t *testing.T) {
			c, ctx := newCluster(t, Options{Hosts: 1, Config: x.config})
			n := c.Nodes[0]
			before := n.dump(t)
			must(t, n.Start())
			n.waitUnready(t, x.words...)
			n.unchanged(t, before)
			must(t, c.Configure(ctx, ConfigIPv4))
			must(t, n.WaitReady(ctx))
			must(t, n.waitProblem(ctx))
		})
	}
}

func TestBadConfigWhileRunning(t *testing.T) {
	c, ctx := startCluster(t, Options{Hosts: 2, Config: ConfigIPv4})
	pods := onePod(t, c)
	n := c.Nodes[0]
	before, err := n.dumpKernel()
	must(t, err)
	for _, x := range []struct {
		config string
		words  []string
	}{
		{`{"Network": `, []string{"config", "not JSON", "the last good one stays in force"}},
		{`{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "VNI": 0}}`, []string{"config", "Backend.VNI: 0: must be 1..16777215", "correct it"}},
		{`{"Network": "10.5.0.0/16", "Backend": {"Type": "tencent-vpc"}}`, []string{"config", "tencent-vpc", "not taken up", "the running one stays"}},
		{`{"Network": "10.5.0.0/16", "Backend": {"Type": "bgp", "ASNumber": 0}}`, []string{"config", "Backend.ASNumber: 0: must be 1..4294967295", "correct it"}},
		{`{"Network": "10.5.0.0/16", "Backend": {"Type": "bgp", "Peers": [{"Address": "203.0.113.1"}]}}`, []string{"config", "Backend.Peers[0].ASNumber", "must be 1..4294967295"}},
		{`{"Network": "10.5.0.0/16", "Backend": {"Type": "wireguard", "PSK": "x"}}`, []string{"config", "Backend.PSK", "wg genpsk"}},
		{`{"Network": "10.6.0.0/16", "Backend": {"Type": "vxlan", "Port": 4789}}`, []string{"config", "10.6.1.0", "does not fit", "not taken up"}},
		{"", []string{"config", "there is none", "etcdctl put", "stays in force"}},
	} {
		if x.config == "" {
			_, err = c.Etcd.Client().Delete(ctx, Prefix+"/config")
		} else {
			err = c.Configure(ctx, x.config)
		}
		must(t, err)
		for _, n := range c.Nodes {
			must(t, n.waitProblem(ctx, x.words...))
		}
		must(t, pods[0].Ping(pods[1].IPv4, 2, 56))
		after, err := n.dumpKernel()
		must(t, err)
		sameLines(t, x.config, before, after)
		if body, code, err := n.Get("/readyz"); err != nil || code != http.StatusOK {
			t.Errorf("with config %s: /readyz says %d %s, %v", x.config, code, body, err)
		}
	}
	must(t, c.Configure(ctx, ConfigIPv4))
	for _, n := range c.Nodes {
		must(t, n.waitProblem(ctx))
	}
	if _, err := n.Daemon.WaitLog(ctx, "problem solved"); err != nil {
		t.Error(err)
	}
}

func TestPoolFull(t *testing.T) {
	c, ctx := newCluster(t, Options{Hosts: 4, Config: `{"Network": "10.5.0.0/22", "SubnetLen": 24, "Backend": {"Type": "vxlan", "Port": 4789}}`})
	last := c.Nodes[3] // subnet 0 is never given out: there are three
	for _, n := range c.Nodes[:3] {
		must(t, n.Start())
		must(t, n.WaitReady(ctx))
	}
	before := last.dump(t)
	must(t, last.Start())
	last.waitUnready(t, "no free /24 subnet", "10.5.1.0", "10.5.3.0", "delete the leases")
	last.unchanged(t, before)
	status, err := c.Nodes[1].Status()
	must(t, err)
	must(t, c.Nodes[1].Daemon.Term())
	_, err = c.Etcd.Client().Delete(ctx, Prefix+"/subnets/"+status.Lease)
	must(t, err)
	must(t, last.WaitReady(ctx))
	if now, err := last.Status(); err != nil || now.Lease != status.Lease {
		t.Errorf("leased %s, want %s; %v", now.Lease, status.Lease, err)
	}
	// The other way out: a wider network.
	must(t, c.Nodes[1].Start())
	c.Nodes[1].waitUnready(t, "no free /24 subnet")
	must(t, c.Configure(ctx, `{"Network": "10.5.0.0/21", "SubnetLen": 24, "Backend": {"Type": "vxlan", "Port": 4789}}`))
	must(t, c.Nodes[1].WaitReady(ctx))
}

func TestBadPeer(t *testing.T) {
	c, ctx := startCluster(t, Options{Hosts: 2, Config: ConfigIPv4})
	pods := onePod(t, c)
	n := c.Nodes[0]
	before, err := n.dumpKernel()
	must(t, err)
	bad := map[string]struct {
		value string
		words []string
	}{
		"10.5.200.0-24": {`garbage`, []string{"lease 10.5.200.0-24", "not a lease", "correct the value"}},
		"10.5.201.0-24": {`{"PublicIP": "198.51.100.77", "BackendType": "vxlan", "BackendData": {"VNI": 1, "VtepMAC": "x"}}`, []string{"lease 10.5.201.0-24", "VtepMAC"}},
		"10.5.202.0-24": {`{"PublicIP": "198.51.100.78", "BackendType": "vxlan", "BackendData": {"VNI": 7, "VtepMAC": "0e:2a:00:00:00:02"}}`, []string{"lease 10.5.202.0-24", "VNI is 7, ours is 1"}},
		"10.5.203.0-24": {`{"PublicIP": "198.51.100.79", "BackendType": "wireguard"}`, []string{"lease 10.5.203.0-24", "wireguard", "ours is vxlan"}},
		"10.5.204.0-24": {`{"PublicIP": "203.0.113.79", "BackendType": "host-gw"}`, []string{"lease 10.5.204.0-24", "203.0.113.79 is not on the link of eth0"}},
		"10.5.205.0-24": {`{"PublicIP": "198.51.100.81", "BackendType": "bgp", "BackendData": {"ASNumber": 0, "Port": 179}}`, []string{"lease 10.5.205.0-24", "ASNumber 0"}},
		"10.5.0.0-8":    {`{"PublicIP": "198.51.100.80", "BackendType": "vxlan", "BackendData": {"VNI": 1, "VtepMAC": "0e:2a:00:00:00:03"}}`, []string{"10.5.0.0-8", "10.0.0.0/8"}},
		"nonsense":      {`{}`, []string{"nonsense", "not a subnet", "etcdctl del"}},
	}
	for key, x := range bad {
		_, err := c.Etcd.Client().Put(ctx, Prefix+"/subnets/"+key, x.value)
		must(t, err)
	}
	for _, x := range bad {
		must(t, n.waitProblem(ctx, x.words...))
	}
	must(t, pods[0].Ping(pods[1].IPv4, 2, 56))
	after, err := n.dumpKernel()
	must(t, err)
	sameLines(t, "with bad leases", before, after)
	for key := range bad {
		_, err := c.Etcd.Client().Delete(ctx, Prefix+"/subnets/"+key)
		must(t, err)
	}
	must(t, n.waitProblem(ctx))
}

func TestNoUsableInterface(t *testing.T) {
	c, ctx := newCluster(t, Options{Hosts: 1, Config: ConfigIPv4})
	n := c.Nodes[0]
	before := n.dump(t)
	for _, x := range []struct {
		args, words []string
	}{
		{[]string{"--iface=nope"}, []string{"no usable interface", "--iface=nope", "no such interface"}},
		{[]string{"--iface=203.0.113.9"}, []string{"no usable interface", "--iface=203.0.113.9"}},
		{[]string{"--iface=lo"}, []string{"lo (--iface=lo)", "no usable IPv4 address"}},
		{[]string{"--iface-regex=^wlan"}, []string{"--iface-regex=^wlan", "no such interface", "name one with --iface"}},
		{[]string{"--iface-skip=eth*"}, []string{"default route", "no such interface", "name one with --iface"}},
	} {
		must(t, n.Start(x.args...))
		n.waitUnready(t, x.words...)
		n.unchanged(t, before)
		must(t, n.Daemon.Term())
	}
	// It comes: the daemon goes on by itself.
	must(t, n.Start("--iface=up0"))
	n.waitUnready(t, "--iface=up0", "no such interface")
	_, err := n.Run("ip", "link", "add", "up0", "type", "veth", "peer", "name", "up1")
	must(t, err)
	n.waitUnready(t, "up0", "is down")
	_, err = n.Run("sh", "-c", "ip link set up0 up && ip link set up1 up && ip addr add 203.0.113.5/24 dev up0")
	must(t, err)
	must(t, n.WaitReady(ctx))
	if s, err := n.Status(); err != nil || s.PublicIP != netip.MustParseAddr("203.0.113.5") {
		t.Errorf("public IP %s, %v", s.PublicIP, err)
	}
}

func TestForeignVXLAN(t *testing.T) {
	for _, x := range []struct {
		name, link string
		words      []string
	}{
		{"other VNI", "type vxlan id 7 dstport 4789", []string{"link flannel.1", "not Twill's", "VNI 7", "ip link delete flannel.1"}},
		{"other port", "type vxlan id 1 dstport 8472", []string{"link flannel.1", "not Twill's", "port 8472", "Backend.Port"}},
		{"no VXLAN", "type bridge", []string{"link flannel.1", "ip link delete flannel.1"}},
	} {
		t.Run(x.name, func(t *testing.T) {
			c, ctx := newCluster(t, Options{Hosts: 1, Config: ConfigIPv4})
			n := c.Nodes[0]
			_, err := n.Run("sh", "-c", "ip link add flannel.1 "+x.link+" && ip addr add 203.0.113.1/32 dev flannel.1 && ip link set flannel.1 up && ip route add 203.0.113.64/26 dev flannel.1")
			must(t, err)
			before := n.dump(t)
			must(t, n.Start())
			n.waitUnready(t, x.words...)
			n.unchanged(t, before)
			_, err = n.Run("ip", "link", "delete", "flannel.1")
			must(t, err)
			must(t, n.WaitReady(ctx))
			must(t, n.waitProblem(ctx))
		})
	}
}

func TestDaemonRefuses(t *testing.T) {
	c, ctx := startCluster(t, Options{Hosts: 1, Config: ConfigIPv4})
	n := c.Nodes[0]
	first := n.Daemon
	before := n.dump(t)
	must(t, n.Start("--healthz-port=0"))
	n.exited(t, 1, "another twilld", fmt.Sprintf("pid %d", first.Pid()), "stop it first")
	if out, err := n.Run(twilld(t), "--cleanup"); err == nil || !containsAll(err.Error(), []string{"another twilld", fmt.Sprint(first.Pid())}) {
		t.Errorf("cleanup beside a twilld: %v\n%s", err, out)
	}
	n.unchanged(t, before)
	must(t, n.WaitReady(ctx))
	must(t, first.Term())
	before = n.dump(t)

	for _, x := range []struct {
		code  int
		args  []string
		words []string
	}{
		{1, []string{"--kube-subnet-mgr"}, []string{"Kubernetes API", "no pod of a cluster", "--kubeconfig-file or --kube-api-url"}},
		{2, []string{"--healthz-port=70000"}, []string{"--healthz-port: 70000: must be 0..65535"}},
		{2, []string{"--subnet-lease-renew-margin=0"}, []string{"--subnet-lease-renew-margin: 0: must be 1..1439 minutes"}},
		{2, []string{"--public-ip=2001:db8::1"}, []string{"--public-ip: 2001:db8::1: must be"}},
		{2, []string{"--public-ip=0.0.0.0"}, []string{"--public-ip: 0.0.0.0: must be"}},
		{2, []string{"--iface-regex=("}, []string{"--iface-regex: (: "}},
		{2, []string{"--log-level=loud"}, []string{"--log-level: loud: must be debug, info, warn or error"}},
		{2, []string{"--etcd-endpoint=http://203.0.113.1:1"}, []string{"not defined", "-etcd-endpoint", "twilld --help"}},
		{2, []string{"--ip-masq", "true"}, []string{`"true" is not a flag`}},
		{1, []string{"--etcd-endpoints=ftp://203.0.113.1:1"}, []string{"ftp", "unknown", "http://host:port"}},
		{1, []string{"--etcd-prefix=/"}, []string{"etcd prefix", "/coreos.com/network"}},
		{1, []string{fmt.Sprintf("--healthz-port=%d", healthPort), "--healthz-ip=203.0.113.77"}, []string{"--healthz-port", "203.0.113.77"}},
	} {
		must(t, n.StartWith(x.args...))
		n.exited(t, x.code, x.words...)
		if out, _ := n.Daemon.Output(); strings.Count(out, "\n") > 3 {
			t.Errorf("%q: says too much:\n%s", x.args, out)
		}
		n.unchanged(t, before)
	}
}

func listenTCP(addr string) (net.Listener, error) { return net.Listen("tcp", addr) }

func TestHealthPortTaken(t *testing.T) {
	c, ctx := newCluster(t, Options{Hosts: 1, Config: ConfigIPv4})
	n := c.Nodes[0]
	must(t, n.Do(func() error {
		l, err := listenTCP(fmt.Sprintf("127.0.0.1:%d", healthPort))
		t.Cleanup(func() { l.Close() })
		return err
	}))
	before := n.dump(t)
	must(t, n.Start())
	n.exited(t, 1, "--healthz-port", fmt.Sprint(healthPort), "address already in use", "is it in use?")
	n.unchanged(t, before)
	must(t, n.StartWith(append(c.StoreArgs(), "--healthz-port=0")...))
	must(t, n.WaitReady(ctx))
}

func TestSubnetFileUnwritable(t *testing.T) {
	c, ctx := newCluster(t, Options{Hosts: 1, Config: ConfigIPv4})
	n := c.Nodes[0]
	// Root may write everywhere but on a read-only mount.
	_, err := n.Run("sh", "-c", "mkdir -p /run/twill/ro && mount -t tmpfs -o ro none /run/twill/ro")
	must(t, err)
	before := n.dump(t)
	must(t, n.Start("--subnet-file=/run/twill/ro/subnet.env"))
	n.exited(t, 1, "/run/twill/ro", "read-only file system")
	n.unchanged(t, before)
	must(t, n.Start("--subnet-file=/run/twill/ro/subnet.env", "--socket=/run/flannel/twilld.sock"))
	n.waitUnready(t, "/run/twill/ro/subnet.env", "read-only file system")
	if body, _, _ := n.Get("/readyz"); strings.Contains(body, "kernel") {
		t.Errorf("/readyz blames the kernel: %s", body)
	}
	_, err = n.Run("mount", "-o", "remount,rw", "/run/twill/ro")
	must(t, err)
	must(t, n.WaitReady(ctx))
}

func jsonInto(b []byte, v any) error {
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("read %s: %w", b, err)
	}
	return nil
}

// cniError runs the plugin and returns its error.
func cniError(t *testing.T, p *Pod, command, netconf string) *types.Error {
	t.Helper()
	out, err := p.CNI(command, netconf)
	if err == nil {
		t.Fatalf("CNI %s succeeded: %s", command, out)
	}
	var e types.Error
	must(t, jsonInto(out, &e))
	return &e
}

func TestCNIRefuses(t *testing.T) {
	c, ctx := newCluster(t, Options{Hosts: 1, Config: `{"Network": "10.5.0.0/28", "SubnetLen": 30, "Backend": {"Type": "vxlan", "Port": 4789}}`})
	n := c.Nodes[0]
	want := func(p *Pod, command string, code uint, words ...string) {
		t.Helper()
		before := n.dump(t)
		must(t, Eventually(ctx, func() bool { // carriers come and go a moment later
			last := before
			before = n.dump(t)
			return before == last
		}))
		e := cniError(t, p, command, NetConf)
		if e.Code != code || !containsAll(e.Msg+" "+e.Details, words) {
			t.Errorf("CNI %s says %d %q %q, want %d %q", command, e.Code, e.Msg, e.Details, code, words)
		}
		n.unchanged(t, before)
	}
	pod := func(name string) *Pod {
		t.Helper()
		ns, err := n.NewPodNS(name)
		must(t, err)
		return &Pod{NS: ns, Node: n, ID: n.Name + "-" + name}
	}
	a, b := pod("a"), pod("b")
	want(a, "ADD", types.ErrTryAgainLater, "/run/flannel/twill.json", "missing", "netctl status")
	want(a, "STATUS", types.ErrPluginNotAvailable, "/run/flannel/twill.json", "netctl status")
	must(t, n.Start())
	must(t, n.WaitReady(ctx))

	gone := *a
	nowhere := *a.NS
	nowhere.Path = "/run/netns/nothing-is-here"
	gone.NS = &nowhere
	want(&gone, "ADD", types.ErrUnknownContainer, nowhere.Path, "does not exist", "sandbox")

	_, err := a.Run("ip", "link", "add", "eth0", "type", "bridge")
	must(t, err)
	want(a, "ADD", types.ErrInvalidEnvironmentVariables, "eth0 already", "use another name")
	_, err = a.Run("ip", "link", "delete", "eth0")
	must(t, err)
	_, err = a.CNI("ADD", NetConf) // a /30 holds a bridge and a pod
	must(t, err)
	want(b, "ADD", types.ErrTryAgainLater, "no free address", "10.5.0.", "remove pods")
	want(b, "STATUS", types.ErrPluginNotAvailable, "no free address", "10.5.0.")
	must(t, a.Delete())
	_, err = b.CNI("ADD", NetConf)
	must(t, err)
	must(t, b.Delete())

	must(t, n.Daemon.Term())
	_, err = n.Run("sed", "-i", `s/"version": 1/"version": 99/`, "/run/flannel/twill.json")
	must(t, err)
	want(a, "ADD", types.ErrDecodingFailure, "/run/flannel/twill.json", "version 99", "version 1", "one release")
	_, err = n.Run("sh", "-c", "echo garbage >/run/flannel/twill.json")
	must(t, err)
	want(a, "ADD", types.ErrDecodingFailure, "/run/flannel/twill.json", "invalid character")
	// The daemon puts it right again.
	must(t, n.Start())
	must(t, n.WaitReady(ctx))
	_, err = a.CNI("ADD", NetConf)
	must(t, err)
}

func TestForeignRoute(t *testing.T) {
	c, ctx := newCluster(t, Options{Hosts: 2, Config: ConfigIPv4})
	a, b := c.Nodes[0], c.Nodes[1]
	must(t, b.Start())
	must(t, b.WaitReady(ctx))
	s, err := b.Status()
	must(t, err)
	dst := s.Subnets[0].String()
	must(t, a.Start())
	must(t, a.WaitReady(ctx))
	must(t, a.WaitInSync(ctx))
	// Somebody takes the place of our route while we run.
	_, err = a.Run("sh", "-c", "ip route delete "+dst+"; ip route replace "+dst+" via 198.51.100.77 proto static")
	must(t, err)
	if err := a.waitProblem(ctx, dst, "198.51.100.77", "ip route delete"); err != nil {
		// The daemon may have put its own back between the two: then it was replaced.
		t.Error(err)
	}
	out, err := a.Run("ip", "route", "show", "exact", dst)
	must(t, err)
	if !strings.Contains(out, "via 198.51.100.77") || !strings.Contains(out, "proto static") {
		t.Errorf("the foreign route has become %s", out)
	}
	_, err = a.Run("ip", "route", "delete", dst, "proto", "static")
	must(t, err)
	must(t, a.waitProblem(ctx))
	must(t, a.WaitInSync(ctx))
	out, err = a.Run("ip", "route", "show", "exact", dst)
	must(t, err)
	if !strings.Contains(out, "proto 84") {
		t.Errorf("the route is %s", out)
	}
}
