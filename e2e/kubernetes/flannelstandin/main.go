// Command flannelstandin makes a node one of flannel's without flannel's programs. As
// flanneld it publishes and does what flannel documents of --kube-subnet-mgr with the
// backend vxlan: device, peers, rules, files, annotations. Called by a runtime (with
// CNI_COMMAND) it is flannel's CNI plugin, which has bridge and host-local do the work.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// netConf is what is understood of net-conf.json.
type netConf struct {
	Network, IPv6Network netip.Prefix
	EnableIPv6           bool
	Backend              struct {
		Type      string
		VNI, Port int
	}
}

func main() {
	if os.Getenv("CNI_COMMAND") != "" {
		os.Exit(plugin())
	}
	masq := flag.Bool("ip-masq", false, "")
	flag.Bool("kube-subnet-mgr", false, "")
	host := flag.String("host", "/host", "`directory` with the node's root, whose iptables is used")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *host, *masq); err != nil && ctx.Err() == nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, host string, masq bool) error {
	conf := netConf{}
	conf.Backend.VNI = 1
	text, err := os.ReadFile("/etc/kube-flannel/net-conf.json")
	if err == nil {
		err = json.Unmarshal(text, &conf)
	}
	if err != nil || conf.Backend.Type != "vxlan" {
		return fmt.Errorf("read net-conf.json: backend %q: %w", conf.Backend.Type, err)
	}
	config, err := rest.InClusterConfig()
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	node, err := ownNode(ctx, client)
	if err != nil {
		return err
	}
	f := &flannel{conf: conf, host: host, node: node.Name, peers: map[string][]peer{}}
	if err := f.setUp(node, masq); err != nil {
		return err
	}
	if err := f.publish(ctx, client); err != nil {
		return err
	}
	log.Printf("node %s has %v", node.Name, f.overlays)
	for ctx.Err() == nil {
		if err := f.follow(ctx, client); err != nil {
			log.Print(err)
		}
		time.Sleep(100 * time.Millisecond)
	}
	return nil
}

// ownNode asks for the own pod, which is on the own node.
func ownNode(ctx context.Context, client kubernetes.Interface) (*core.Node, error) {
	pod, err := client.CoreV1().Pods(os.Getenv("POD_NAMESPACE")).Get(ctx, os.Getenv("POD_NAME"), meta.GetOptions{})
	if err != nil {
		return nil, err
	}
	return client.CoreV1().Nodes().Get(ctx, pod.Spec.NodeName, meta.GetOptions{})
}

const prefix = "flannel.alpha.coreos.com/"

// publish writes annotations and condition.
func (f *flannel) publish(ctx context.Context, client kubernetes.Interface) error {
	annotations := map[string]string{prefix + "kube-subnet-manager": "true", prefix + "backend-type": "vxlan"}
	for _, o := range f.overlays {
		data, ip := "backend-data", "public-ip"
		if o.subnet.Addr().Is6() {
			data, ip = "backend-v6-data", "public-ipv6"
		}
		annotations[prefix+data] = fmt.Sprintf(`{"VNI":%d,"VtepMAC":"%s"}`, f.conf.Backend.VNI, o.mac)
		annotations[prefix+ip] = o.public.String()
	}
	now := meta.Now()
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"annotations": annotations},
		"status": map[string]any{"conditions": []core.NodeCondition{{
			Type: core.NodeNetworkUnavailable, Status: core.ConditionFalse, Reason: "FlannelIsUp", Message: "Flannel is running on this node",
			LastTransitionTime: now, LastHeartbeatTime: now,
		}}},
	})
	if err != nil {
		return err
	}
	_, err = client.CoreV1().Nodes().Patch(ctx, f.node, types.StrategicMergePatchType, patch, meta.PatchOptions{}, "status")
	return err
}

// follow keeps the peers up to date until the watch ends.
func (f *flannel) follow(ctx context.Context, client kubernetes.Interface) error {
	nodes, err := client.CoreV1().Nodes().List(ctx, meta.ListOptions{})
	if err != nil {
		return err
	}
	for _, n := range nodes.Items {
		if err := f.see(&n, false); err != nil {
			return err
		}
	}
	w, err := client.CoreV1().Nodes().Watch(ctx, meta.ListOptions{ResourceVersion: nodes.ResourceVersion})
	if err != nil {
		return err
	}
	defer w.Stop()
	for e := range w.ResultChan() {
		n, ok := e.Object.(*core.Node)
		if !ok {
			return fmt.Errorf("watch nodes: %v", e.Object)
		}
		if err := f.see(n, e.Type == "DELETED"); err != nil {
			return err
		}
	}
	return nil
}

// see does what flanneld does when a node says something new.
func (f *flannel) see(n *core.Node, deleted bool) error {
	if n.Name == f.node {
		return nil
	}
	var now []peer
	if !deleted && n.Annotations[prefix+"kube-subnet-manager"] == "true" && n.Annotations[prefix+"backend-type"] == "vxlan" {
		for _, o := range f.overlays {
			p, err := parsePeer(n, o)
			if err != nil {
				log.Printf("peer %s: %v", n.Name, err)
				continue
			}
			now = append(now, p)
		}
	}
	old := f.peers[n.Name]
	if slices.Equal(old, now) {
		return nil
	}
	f.peers[n.Name] = now
	for _, p := range old {
		if !slices.ContainsFunc(now, func(q peer) bool { return q.subnet == p.subnet }) {
			p.remove()
		}
	}
	for _, p := range now {
		if err := p.add(); err != nil {
			return fmt.Errorf("add peer %s: %w", n.Name, err)
		}
	}
	log.Printf("peer %s: %v", n.Name, now)
	return nil
}

func parsePeer(n *core.Node, o overlay) (peer, error) {
	p := peer{link: o.link}
	data, ip := "backend-data", "public-ip"
	if o.subnet.Addr().Is6() {
		data, ip = "backend-v6-data", "public-ipv6"
	}
	var vtep struct{ VtepMAC string }
	if err := json.Unmarshal([]byte(n.Annotations[prefix+data]), &vtep); err != nil {
		return p, err
	}
	p.mac = vtep.VtepMAC
	var err error
	if p.public, err = netip.ParseAddr(n.Annotations[prefix+ip]); err != nil {
		return p, err
	}
	p.subnet, err = subnetOf(n, o.subnet.Addr().Is6())
	return p, err
}

func subnetOf(n *core.Node, v6 bool) (netip.Prefix, error) {
	for _, cidr := range n.Spec.PodCIDRs {
		p, err := netip.ParsePrefix(cidr)
		if err != nil {
			return p, err
		}
		if p.Addr().Is6() == v6 {
			return p, nil
		}
	}
	return netip.Prefix{}, fmt.Errorf("node %s has no podCIDR of this family: %v", n.Name, n.Spec.PodCIDRs)
}
